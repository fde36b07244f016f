"""asrllm shards make | index | verify | stats: WebDataset shards and their index."""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asrllm.data.cache import ShardCache
from asrllm.data.index import Index, open_index
from asrllm.data.parallel import usable_cores
from asrllm.data.shards import ShardSummary, write_shards
from asrllm.data.sources import SOURCES
from asrllm.data.stats import as_json, as_text, describe, draw
from asrllm.data.verify import UNBOUNDED, index_tars, verify_shards
from asrllm.errors import UserError
from asrllm.progress import ProgressBar

SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, add, what in (
        ("make", _add_make, "write shards, their index and rejected.jsonl"),
        ("index", _add_index, "write the index of tars that others made: KEY.flac, wav, ... with KEY.json or KEY.txt"),
        ("verify", _add_verify, "check every sample of a directory of shards"),
        ("stats", _add_stats, "hours, lengths, corpora and languages, from the index alone"),
    ):
        add(actions.add_parser(name, help=what, description=what))


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What is unfit becomes a row of OUT/rejected.jsonl with its reason. An interrupted run leaves its finished shards in .OUT.partial; "
        "the same command goes on from there, and the result has the same bytes as without the interruption, for any number of workers."
    )
    parser.add_argument("out", metavar="OUT", help="directory to write; it appears when everything is in it")
    group = parser.add_argument_group("source, one of")
    choice = group.add_mutually_exclusive_group(required=True)
    for name, source in SOURCES.items():
        choice.add_argument(f"--{name}", metavar=source.metavar, help=source.help)
    options = parser.add_argument_group("options of a source")
    options.add_argument("--allow-pipes", action="store_true", default=None, help="with --kaldi: run the commands (... |) of wav.scp")
    options.add_argument("--table", metavar="FILE", help="with --folder: csv or tsv; default: metadata.csv or metadata.tsv in it")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--lang", help="language written into every sample, where the source names none")
    samples.add_argument("--corpus", help="corpus name written into every sample; default: the name of OUT")
    samples.add_argument(
        "--codec",
        choices=["flac", "keep"],
        default="flac",
        help="flac: 16 bits; keep: the bytes of files that are one utterance, FLAC for the rest; default: %(default)s",
    )
    samples.add_argument("--seed", type=int, metavar="N", help="shuffle; needs memory for the whole manifest; default: the source's order")
    samples.add_argument("--utterances-per-shard", type=positive, default=1000, metavar="N", help="default: %(default)s")
    _add_workers(parser)
    parser.set_defaults(act=make_shards)


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Samples that cannot be used are left out and become rows of rejected.jsonl beside the index."
    parser.add_argument("tars", nargs="+", metavar="TAR", help="paths or URLs (s3://, gs://, https://, ...)")
    parser.add_argument("--output", metavar="DIR", help="directory of the index; default: the one where the tars lie")
    _add_workers(parser)
    parser.set_defaults(act=index)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="directory or URL with an index")
    parser.add_argument("--output", metavar="FILE", help="write all problems there, one a line")
    _add_workers(parser)
    parser.set_defaults(act=verify)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="directories or URLs with an index, counted together")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="draw the histograms: .png, or .html with the tables")
    parser.set_defaults(act=stats)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, default=usable_cores(), metavar="N", help="processes; default: all cores (%(default)s)")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    arguments.act(arguments)


def make_shards(arguments: argparse.Namespace) -> None:
    name = next(name for name in SOURCES if getattr(arguments, name) is not None)
    source, where, options = SOURCES[name], getattr(arguments, name), _options(arguments, name)
    fields = {"corpus": arguments.corpus or Path(arguments.out).name}
    if arguments.lang:
        fields["lang"] = arguments.lang
    with ProgressBar("writing shards", source.count(where, **options)) as bar:

        def keep(count: int) -> None:
            bar.begun_at += count  # else the time left would be reckoned by them
            bar.advance(count)

        summary = write_shards(
            arguments.out,
            source.read(where, **options),
            utterances_per_shard=arguments.utterances_per_shard,
            workers=arguments.workers,
            fields=fields,
            codec=arguments.codec,
            seed=arguments.seed,
            advance=bar.advance,
            keep=keep,
        )
    if summary.kept:
        print(f"kept {summary.kept} finished shards of the earlier run")
    _print_summary(arguments.out, summary)


def _options(arguments: argparse.Namespace, source: str) -> dict[str, Any]:
    """What the source takes beside its path; an option of another source is a mistake."""
    for other, about in SOURCES.items():
        for option in about.options:
            if getattr(arguments, option) is not None and option not in SOURCES[source].options:
                raise UserError(f"--{option.replace('_', '-')} belongs to --{other}, the source here is --{source}: leave it out")
    given = {option: getattr(arguments, option) for option in SOURCES[source].options}
    return {option: value for option, value in given.items() if value is not None}


def index(arguments: argparse.Namespace) -> None:
    with ProgressBar("indexing", len(arguments.tars)) as bar:
        summary = index_tars(arguments.tars, arguments.output, workers=arguments.workers, advance=bar.advance)
    _print_summary(str(Path(arguments.output or Path(arguments.tars[0]).parent)), summary)


def _print_summary(folder: str, summary: ShardSummary) -> None:
    index = summary.index
    print(f"{folder}: {len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards")
    if summary.rejected:
        print(f"rejected: {_counts(summary.rejected)}; see {folder}/rejected.jsonl")


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def verify(arguments: argparse.Namespace) -> None:
    with _opened([arguments.folder]) as (index,), ProgressBar("verifying", len(index)) as bar:
        problems = verify_shards(index, workers=arguments.workers, advance=bar.advance)
    lines = [f"{problem}\n" for problem in problems]
    if arguments.output:
        try:
            Path(arguments.output).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{arguments.output!r} cannot be written: {error}") from error
    if not problems:
        print(f"{arguments.folder}: {len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards: all is well")
        return
    sys.stdout.writelines(lines[:SHOWN_PROBLEMS])
    if len(lines) > SHOWN_PROBLEMS:
        rest = f"; all are in {arguments.output}" if arguments.output else ": give --output FILE to have them all"
        print(f"... and {len(lines) - SHOWN_PROBLEMS} more{rest}")
    said = _counts(Counter(problem.reason for problem in problems))
    raise UserError(f"{arguments.folder!r} has {len(problems)} problems ({said}): restore the shards, or make or index them again")


def stats(arguments: argparse.Namespace) -> None:
    with _opened(arguments.folders) as indexes:
        statistics = describe(" + ".join(arguments.folders), indexes)
    if arguments.output:
        draw(statistics, arguments.output)
    print(as_json(statistics) if arguments.json else as_text(statistics, shutil.get_terminal_size().columns))


@contextmanager
def _opened(folders: Sequence[str]) -> Iterator[list[Index]]:
    """The indexes of directories or URLs; those of URLs are on this machine for as long as they are used."""
    with tempfile.TemporaryDirectory(prefix="asrllm-") as cache:
        yield [open_index(folder, ShardCache(Path(cache), max_bytes=UNBOUNDED)) for folder in folders]
