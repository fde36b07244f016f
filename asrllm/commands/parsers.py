"""Arguments of all verbs. Importing this module loads neither torch nor numpy."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from asrllm.conf import help_text
from asrllm.defaults import (
    BASE_MODEL_KEYS,
    MAX_NEW_TOKENS,
    MAX_TOKENS_PER_SECOND,
    MAX_WORKERS,
    REPETITION_GUARD,
    TRANSCRIPT_FORMATS,
)
from asrllm.errors import UserError, nearest

MODEL_KEY = re.compile(r"(model\.[a-z_.]*)=(.*)", re.DOTALL)
DTYPE_CHOICES = ("bfloat16", "float16", "float32")
COMPARE = "compare"  # the only action of `asrllm evaluate` without key=value arguments
COMPARE_HELP = f"""
asrllm evaluate {COMPARE} A B: compare two results on the same utterances, with a paired bootstrap
interval and a permutation test. A and B are exp_dir/greedy_search directories, or files
generations-*.jsonl or recogs-*.txt (icefall's too).
"""


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def worker_count(text: str) -> int:
    """Parse a number of processes."""
    count = positive(text)
    if count > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_WORKERS} processes")
    return count


def not_empty(text: str) -> str:
    """Return a path or a name. An empty one would mean the working directory, or the default.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; a shell variable may be unset")
    return text


def add_shards(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the actions of `asrllm shards`, and the arguments of the action in `argv`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, add, help_line in (
        ("make", add_shards_make, "write shards, their index and rejected.jsonl"),
        (
            "index",
            add_shards_index,
            "write the index of existing tars: KEY.flac, wav, ... with KEY.json or KEY.txt",
        ),
        ("verify", add_shards_verify, "check every sample of a directory of shards"),
        ("stats", add_shards_stats, "show hours, lengths, corpora and languages from the index"),
    ):
        action = actions.add_parser(name, help=help_line, description=help_line)
        if name in argv[:1]:
            add(action)


def add_shards_make(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `asrllm shards make`."""
    from asrllm.data.sources import SOURCES  # numpy and libsndfile

    parser.epilog = (
        "Unusable utterances are listed in OUT/rejected.jsonl with the reason. An interrupted run "
        "keeps its finished shards in .OUT.partial; the same command resumes from there. The "
        "result has the same bytes as an uninterrupted run, for any number of workers."
    )
    parser.add_argument(
        "out", type=not_empty, metavar="OUT", help="directory to write; appears when complete"
    )
    group = parser.add_argument_group("source, one of")
    choice = group.add_mutually_exclusive_group(required=True)
    for name, source in SOURCES.items():
        choice.add_argument(f"--{name}", type=not_empty, metavar=source.metavar, help=source.help)
    add_source_options(parser)
    add_sample_options(parser)
    add_workers(parser)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only some sources of `asrllm shards make` have."""
    options = parser.add_argument_group("source options")
    options.add_argument(
        "--allow-pipes",
        action="store_true",
        default=None,
        help="run the shell commands in --kaldi's wav.scp (... |) or in --cuts' recordings",
    )
    options.add_argument(
        "--allow-urls",
        action="store_true",
        default=None,
        help="with --cuts: download recordings that are URLs",
    )
    options.add_argument(
        "--table",
        type=not_empty,
        metavar="FILE",
        help="with --folder: csv, tsv or jsonl; default: its metadata.csv, .tsv or .jsonl",
    )


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `asrllm shards make` that apply to every source."""
    samples = parser.add_argument_group("samples")
    samples.add_argument("--lang", help="language of samples without one in the source")
    samples.add_argument("--corpus", help="corpus name of every sample; default: the name of OUT")
    samples.add_argument(
        "--trust-audio",
        action="store_true",
        help="use the duration of the audio if the source states another; default: reject",
    )
    samples.add_argument(
        "--codec",
        choices=["flac", "keep"],
        default="flac",
        help="flac: 16-bit FLAC; keep: the original bytes of files with one utterance, FLAC for "
        "the rest; default: %(default)s",
    )
    samples.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="shuffle, with the manifest in memory; default: the order of the source",
    )
    samples.add_argument(
        "--utterances-per-shard",
        type=positive,
        default=1000,
        metavar="N",
        help="default: %(default)s",
    )


def add_shards_index(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `asrllm shards index`."""
    parser.epilog = "Unusable samples are listed in rejected.jsonl beside the index."
    parser.add_argument(
        "tars",
        type=not_empty,
        nargs="+",
        metavar="TAR",
        help="paths or URLs (s3://, gs://, https://, ...)",
    )
    parser.add_argument(
        "--output",
        type=not_empty,
        metavar="DIR",
        help="directory of the index; default: that of the tars",
    )
    add_workers(parser)


def add_shards_verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `asrllm shards verify`."""
    parser.add_argument(
        "folder", type=not_empty, metavar="DIR", help="directory or URL with an index"
    )
    parser.add_argument(
        "--output", type=not_empty, metavar="FILE", help="write all problems to it, one per line"
    )
    add_workers(parser)


def add_shards_stats(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `asrllm shards stats`."""
    parser.add_argument(
        "folders",
        type=not_empty,
        nargs="+",
        metavar="DIR",
        help="directories or URLs with an index, summed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output",
        type=not_empty,
        metavar="FILE",
        help="draw the histograms: .png, or .html with the tables",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of processes."""
    from asrllm.data.parallel import usable_cores

    parser.add_argument(
        "--workers",
        type=worker_count,
        default=usable_cores(),
        metavar="N",
        help="processes; default: all cores (%(default)s)",
    )


def add_overrides(parser: argparse.ArgumentParser, config: str) -> None:
    """Add the `key=value` arguments, and describe the keys of `asrllm/conf/CONFIG.yaml`."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a configuration key and its new value"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"keys, defaults and meanings:\n\n{help_text(config)}"
    add_hydra_options(parser)


def add_hydra_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Hydra that have an effect in asrllm."""
    options = parser.add_argument_group("Hydra's options, see https://hydra.cc")
    options.add_argument(
        "--config-dir", metavar="DIR", help="a directory with your own YAML files and groups"
    )
    options.add_argument(
        "--config-name",
        metavar="NAME",
        help="read NAME.yaml instead; for a run's config.yaml use --config-dir EXP "
        "--config-name config",
    )
    options.add_argument(
        "--cfg", choices=("job", "hydra", "all"), help="print the configuration and exit"
    )
    options.add_argument("--package", metavar="KEY", help="with --cfg: print this part only")
    options.add_argument("--resolve", action="store_true", help="with --cfg: resolve ${...}")
    options.add_argument(
        "-m", "--multirun", action="store_true", help="run a job for each of key=value1,value2,..."
    )


def split_base_models(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the paths of base models from the rest of a command line.

    They may appear anywhere, which argparse does not support together with a list of files.

    Returns:
        The other words, and the given paths by the part of the model.

    Raises:
        UserError: another key of the model is given.
    """
    parts = {key: part for part, key in BASE_MODEL_KEYS.items()}
    others: list[str] = []
    paths: dict[str, str] = {}
    for word in argv:
        match = MODEL_KEY.fullmatch(word)
        if match is None:
            others.append(word)
            continue
        key, path = match.groups()
        if key not in parts:
            raise UserError(f"unknown key {key!r} in {word!r}. {nearest(key, parts)}")
        if path != "null":
            paths[parts[key]] = path
    return others, paths


def add_base_models(parser: argparse.ArgumentParser) -> None:
    """Describe in the help what `split_base_models` takes from the command line."""
    words = " and ".join(f"{key}=PATH" for key in BASE_MODEL_KEYS.values())
    parser.add_argument_group(
        "base models that moved after training",
        f"{words}: where the base models are now; their weights must match those of training",
    )


def add_train(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm train`."""
    add_overrides(parser, "train")


def add_warm_start(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm warm-start`."""
    add_overrides(parser, "train")


def add_plan(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm plan`."""
    add_overrides(parser, "plan")


def add_evaluate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm evaluate`."""
    add_overrides(parser, "evaluate")
    parser.epilog = f"{COMPARE_HELP}\n{parser.epilog}"


def add_transcribe(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm transcribe`."""
    parser.add_argument(
        "model",
        type=not_empty,
        metavar="DIR_OR_EXP",
        help="an exported directory, a run's exp_dir, or a directory of Auden",
    )
    parser.add_argument(
        "audio",
        nargs="+",
        type=not_empty,
        metavar="AUDIO",
        help="audio files of any length (wav, flac, mp3, ogg, opus, ...; m4a, mp4, webm, ... with "
        "ffmpeg on PATH), or directories of them",
    )
    add_output(parser)
    add_prompt(parser)
    add_decoding(parser)
    add_base_models(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of `asrllm transcribe` about its output."""
    names = ", ".join(TRANSCRIPT_FORMATS)
    parser.add_argument(
        "--format",
        action="append",
        metavar="F[,F]",
        default=[],
        help=f"output formats: {names}; several formats need --output-dir; default: txt",
    )
    parser.add_argument(
        "--output-dir",
        type=lambda text: Path(not_empty(text)),
        metavar="DIR",
        help="write DIR/NAME.FORMAT for each file, replacing existing ones; default: standard "
        "output, with one line per file (PATH TAB TEXT, or JSON) if there are several",
    )


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the options of `asrllm transcribe` that make up the prompt."""
    parser.add_argument(
        "--prompt", metavar="TEXT", help="instruction; default: the first prompt of training"
    )
    parser.add_argument(
        "--language",
        metavar="LANG",
        help="language of the speech, for example en: selects the first prompt trained for it, and "
        "is stored in the JSON",
    )
    parser.add_argument(
        "--hotwords",
        metavar="W,W|@FILE",
        help="words that may occur, or a file with one per line; listed in the prompt",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the options of `asrllm transcribe` about segments, weights and decoding."""
    add_segments(parser)
    add_weights(parser)
    add_search(parser)


def add_segments(parser: argparse.ArgumentParser) -> None:
    """Add the options about the segments that are transcribed."""
    parser.add_argument(
        "--vad",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="transcribe speech only, in segments cut at pauses; --no-vad: all audio, cut at quiet "
        "places; default: --vad",
    )
    parser.add_argument(
        "--max-segment",
        type=float,
        metavar="SECONDS",
        help="longest segment; default: the longest utterances of training, at most 28 s",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="segments decoded together; default: %(default)s",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the options about the weights and their data type."""
    parser.add_argument(
        "--weights",
        type=not_empty,
        metavar="FILE",
        help="state dict of a run; default: pretrained.pt, else the newest averaged-*.pt",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="data type of the weights; default: bfloat16 on an accelerator, float32 on a CPU, "
        "where bfloat16 halves the memory and is often slower",
    )


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options about the search for the text of a segment."""
    parser.add_argument(
        "--num-beams",
        type=positive,
        default=1,
        metavar="N",
        help="beam size; default: %(default)s (greedy search)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="maximum number of tokens of a segment's text; default: %(default)s",
    )
    parser.add_argument(
        "--max-tokens-per-second",
        type=positive,
        default=MAX_TOKENS_PER_SECOND,
        metavar="N",
        help="maximum number of tokens per second of audio, plus ten; default: %(default)g",
    )
    parser.add_argument(
        "--repetition-guard",
        type=int,
        default=REPETITION_GUARD,
        metavar="N",
        help="if a text repeats a few tokens for more than N tokens, keep one copy of them; "
        "0: no guard; default: %(default)s",
    )


def add_serve(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm serve`."""
    parser.add_argument(
        "model",
        type=not_empty,
        metavar="DIR_OR_EXP",
        help="an exported directory, a run's exp_dir, or a directory of Auden",
    )
    parser.add_argument(
        "--host",
        type=not_empty,
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: all addresses; default: %(default)s",
    )
    parser.add_argument(
        "--port", type=port_number, default=8000, metavar="N", help="0: any; default: %(default)s"
    )
    parser.add_argument(
        "--model-name",
        type=not_empty,
        metavar="NAME",
        help="name of the model for clients; default: the directory's name",
    )
    parser.add_argument(
        "--api-key-file",
        type=not_empty,
        metavar="FILE",
        help="file with the key that clients must send; default: the environment variable "
        "ASRLLM_API_KEY, and no key without it",
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of web pages that may use the API, for example https://example.org; *: all; "
        "may be repeated",
    )
    parser.add_argument(
        "--root-path", default="", metavar="PATH", help="path of the server behind a proxy"
    )
    parser.add_argument(
        "--access-log",
        action="store_true",
        help="print a line of JSON for each request, without its content",
    )
    add_server_limits(parser)
    add_decoding(parser)
    add_base_models(parser)


def add_server_limits(parser: argparse.ArgumentParser) -> None:
    """Add the limits of `asrllm serve`."""
    parser.add_argument(
        "--max-megabytes",
        type=positive,
        default=100,
        metavar="N",
        help="maximum size of a request in MiB; default: %(default)s",
    )
    parser.add_argument(
        "--max-minutes",
        type=positive,
        default=120,
        metavar="N",
        help="maximum duration of a request's audio; default: %(default)s",
    )
    parser.add_argument(
        "--max-queued-minutes",
        type=positive,
        default=240,
        metavar="N",
        help="audio of all requests in progress, above which a request is refused with status "
        "429; default: %(default)s",
    )


def port_number(text: str) -> int:
    """Parse a TCP port, or 0."""
    if not text.isdigit() or int(text) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def add_average(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm average`."""
    parser.add_argument("exp_dir", type=not_empty, metavar="EXP", help="the run's exp_dir")
    add_averaged_checkpoints(parser)
    parser.add_argument(
        "--use-averaged-model",
        action="store_true",
        help="average over all steps since the checkpoint before these; requires a run with "
        "trainer.use_averaged_model=true",
    )
    parser.add_argument(
        "--lora",
        choices=("product", "factors"),
        help="how adapters are averaged. product (default): the products B A, exactly, with "
        "factors of a higher rank; factors: factor by factor",
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
        help="maximum size of each file in the directory; default: 5GB",
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
        "--keep-adapters",
        action="store_true",
        help="store the adapters beside the layers; default: merge them, so that transformers "
        "loads the directory without asrllm",
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
        default="5GB",
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
        "--max-shard-size", metavar="SIZE", help="maximum size of each file; default: 5GB"
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
        default=16,
        metavar="N",
        help="LoRA alpha of that training; default: %(default)s",
    )
    parser.add_argument(
        "--prompt",
        default="请转写音频为文字",
        metavar="TEXT",
        help="prompt of that training; default: %(default)s",
    )


class Verb(NamedTuple):
    """One verb of `asrllm`, implemented by `run` in `asrllm.commands.NAME`.

    Attributes:
        help: one line that describes the verb.
        add_arguments: adds the arguments of the verb to its parser, given the parser and the words
            that follow the verb.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser, Sequence[str]], None]


VERBS = {
    "shards": Verb("make, index, verify and describe WebDataset shards", add_shards),
    "plan": Verb("show steps, padding and memory by ZeRO stage before a run", add_plan),
    "warm-start": Verb("show how well the projector can be fitted to speech", add_warm_start),
    "train": Verb("train a model", add_train),
    "evaluate": Verb("average checkpoints, decode test sets, score them", add_evaluate),
    "transcribe": Verb("transcribe audio files", add_transcribe),
    "serve": Verb("transcribe over HTTP, in the form of OpenAI's audio API", add_serve),
    "consolidate": Verb("convert one ZeRO checkpoint to a plain state dict", add_consolidate),
    "average": Verb("average several checkpoints", add_average),
    "merge-lora": Verb(
        "write the LLM with merged adapters as a Hugging Face directory", add_merge_lora
    ),
    "import-icefall": Verb(
        "convert weights of icefall's ASR_LLM to a run's directory", add_import_icefall
    ),
    "export": Verb("write a run as a self-contained Hugging Face directory", add_export),
}
