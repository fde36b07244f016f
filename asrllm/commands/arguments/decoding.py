"""Arguments of `asrllm transcribe` and `asrllm serve`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from asrllm.commands.arguments.base_models import add_base_models
from asrllm.commands.arguments.values import not_empty, port_number, positive
from asrllm.config_keys import meaning
from asrllm.defaults import (
    MAX_NEW_TOKENS,
    MAX_TOKENS_PER_SECOND,
    REPETITION_GUARD,
    TRANSCRIPT_FORMATS,
    EngineName,
)


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


def add_serve(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm serve`."""
    parser.add_argument(
        "models",
        nargs="+",
        type=not_empty,
        metavar="[NAME=]DIR_OR_EXP",
        help="exported directories, runs' exp_dirs, or directories of Auden; clients choose one by "
        "NAME, by default the directory's name",
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
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key",
        type=not_empty,
        metavar="KEY",
        help="key that clients must send; other users of the machine can see it in the command",
    )
    keys.add_argument(
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
    parser.add_argument(
        "--log-texts", action="store_true", help="with --access-log: add the answer to each line"
    )
    add_server_limits(parser)
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
    parser.add_argument(
        "--engine",
        choices=get_args(EngineName),
        default="torch",
        help="what decodes: torch: this package; vllm: vLLM, for throughput, if it is installed; "
        "default: %(default)s",
    )
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
        help=f"{meaning('evaluate', 'max_tokens_per_second')}; default: %(default)g",
    )
    parser.add_argument(
        "--repetition-guard",
        type=int,
        default=REPETITION_GUARD,
        metavar="N",
        help="if a text repeats a few tokens for more than N tokens, keep one copy of them; "
        "0: no guard; default: %(default)s",
    )


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
        "--max-decoding-minutes",
        type=positive,
        default=60,
        metavar="N",
        help="time that a request may take, above which it ends with status 503; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--max-queued-minutes",
        type=positive,
        default=240,
        metavar="N",
        help="audio of all requests in progress, above which a request is rejected with status "
        "429; default: %(default)s",
    )
