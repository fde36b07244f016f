"""asrllm import-icefall: weights of icefall's ASR_LLM recipes -> a directory as a run leaves it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="pytorch_model.bin of icefall's egs/speech_llm/ASR_LLM, or a directory of shards")
    parser.add_argument("--audio-encoder", required=True, metavar="PATH", help="the Whisper of that training: a directory, or OpenAI's .pt")
    parser.add_argument("--llm", required=True, metavar="DIR", help="the LLM of that training: a directory, or a hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write; transcribe, evaluate and export take it")
    parser.add_argument("--lora-alpha", type=int, default=16, metavar="N", help="of its train.py; default: %(default)s")
    parser.add_argument("--prompt", default="请转写音频为文字", metavar="TEXT", help="of its training; default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    from asrllm.models.icefall import import_icefall

    options = {"encoder": arguments.audio_encoder, "llm": arguments.llm, "lora_alpha": arguments.lora_alpha, "prompt": arguments.prompt}
    import_icefall(Path(arguments.file), Path(arguments.output), **options)
    print(f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})")
