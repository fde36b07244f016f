"""Arguments of `asrllm shards`."""

import argparse
from collections.abc import Sequence

from asrllm.commands.arguments.values import not_empty, positive, worker_count


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
