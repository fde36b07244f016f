"""Arguments of the verbs that convert checkpoints and weights."""

import argparse
from collections.abc import Sequence
from typing import get_args

from asrllm.commands.arguments.base_models import add_base_models
from asrllm.commands.arguments.values import not_empty, positive
from asrllm.config_keys import meaning
from asrllm.defaults import ICEFALL_LORA_ALPHA, ICEFALL_PROMPT, MAX_SHARD_SIZE, LoraMean

EXPORT_FORMS = ("asrllm", "voxtral")
DTYPE_CHOICES = ("bfloat16", "float16", "float32")


def add_average(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm average`."""
    parser.add_argument("exp_dir", type=not_empty, metavar="EXP", help="the run's exp_dir")
    add_averaged_checkpoints(parser)
    parser.add_argument(
        "--use-averaged-model",
        action="store_true",
        help=meaning("evaluate", "checkpoint.model.use_averaged_model"),
    )
    parser.add_argument(
        "--lora",
        choices=get_args(LoraMean),
        help=f"{meaning('evaluate', 'checkpoint.model.lora')}; default: product",
    )
    parser.add_argument(
        "--output", type=not_empty, metavar="FILE", help="default: EXP/averaged-iter-N-avg-K.pt"
    )
    add_base_models(parser)


def add_averaged_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the checkpoints to average."""
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument(
        "--iter",
        type=positive,
        default=0,
        metavar="N",
        help="average the last K checkpoints up to this step",
    )
    end.add_argument(
        "--epoch",
        type=positive,
        default=0,
        metavar="N",
        help="average the checkpoints of the last K epochs up to this one",
    )
    parser.add_argument(
        "--avg", type=positive, required=True, metavar="K", help="number of checkpoints"
    )


def add_consolidate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm consolidate`."""
    parser.add_argument("exp_dir", type=not_empty, metavar="EXP", help="the run's exp_dir")
    parser.add_argument(
        "--tag",
        type=not_empty,
        help="checkpoint-N or epoch-N; default: the newest complete checkpoint",
    )
    parser.add_argument(
        "--output",
        type=not_empty,
        metavar="FILE",
        help="a .pt, .bin or .safetensors file, or a directory for safetensors files; default: "
        "EXP/TAG.pt",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help=f"maximum size of each file in the directory; default: {MAX_SHARD_SIZE}",
    )


def add_export(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm export`."""
    parser.add_argument(
        "source",
        type=not_empty,
        metavar="EXP_OR_FILE",
        help="a run's exp_dir, a weights file in it, an exported directory, or one of Auden",
    )
    add_output_and_weights(parser)
    parser.add_argument(
        "--as",
        dest="form",
        choices=EXPORT_FORMS,
        default="asrllm",
        help="asrllm: with the code that transformers needs; voxtral: as transformers' own "
        "VoxtralForConditionalGeneration, for a model of that shape; default: %(default)s",
    )
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--keep-adapters",
        action="store_true",
        help="store the adapters beside the layers; default: merge them, so that transformers "
        "loads the directory without asrllm",
    )
    adapters.add_argument(
        "--separate-adapter",
        action="store_true",
        help="write the LLM as it was before training, and its adapter to DIR/adapter in PEFT's "
        "format, which vLLM applies per request",
    )
    parser.add_argument(
        "--parts",
        action="store_true",
        help="also write audio_encoder/, projector/ and llm/ as separate directories, merged",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="bfloat16",
        help="data type of the weights; default: %(default)s",
    )
    parser.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="maximum size of each file; default: %(default)s",
    )
    add_upload(parser)
    add_base_models(parser)


def add_output_and_weights(parser: argparse.ArgumentParser) -> None:
    """Add the directory to write, and the weights file of the run to read."""
    parser.add_argument(
        "--output", required=True, type=not_empty, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--weights",
        type=not_empty,
        metavar="FILE",
        help="state dict of a run; default: EXP/pretrained.pt, else the newest averaged-*.pt",
    )


def add_upload(parser: argparse.ArgumentParser) -> None:
    """Add the options about the Hugging Face hub."""
    parser.add_argument(
        "--push-to-hub",
        type=not_empty,
        metavar="REPO",
        help="upload to this repository of the Hugging Face hub",
    )
    parser.add_argument(
        "--private", action="store_true", help="make that repository private if it is new"
    )


def add_merge_lora(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm merge-lora`."""
    parser.add_argument(
        "source",
        type=not_empty,
        metavar="EXP_OR_FILE",
        help="a run's exp_dir, a weights file in it, or an exported directory",
    )
    add_output_and_weights(parser)
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="write only the adapters, in PEFT's format, instead of merging them",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        help="data type of the weights; default: that of the base model, or of the run for weights "
        "that it trained",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help=f"maximum size of each file; default: {MAX_SHARD_SIZE}",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the logits before and after, which reads the weights three more times",
    )
    add_base_models(parser)


def add_import_icefall(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm import-icefall`."""
    parser.add_argument(
        "file",
        type=not_empty,
        metavar="FILE",
        help="pytorch_model.bin of icefall's egs/speech_llm/ASR_LLM, or a directory of shards",
    )
    parser.add_argument(
        "--audio-encoder",
        required=True,
        type=not_empty,
        metavar="PATH",
        help="the Whisper model of that training: a directory, or OpenAI's .pt",
    )
    parser.add_argument(
        "--llm",
        required=True,
        type=not_empty,
        metavar="DIR",
        help="the LLM of that training: a directory, or a hub id",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=not_empty,
        metavar="DIR",
        help="directory to write; transcribe, evaluate and export read it",
    )
    parser.add_argument(
        "--lora-alpha",
        type=int,
        default=ICEFALL_LORA_ALPHA,
        metavar="N",
        help="LoRA alpha of that training; default: %(default)s",
    )
    parser.add_argument(
        "--prompt",
        default=ICEFALL_PROMPT,
        metavar="TEXT",
        help="prompt of that training; default: %(default)s",
    )
