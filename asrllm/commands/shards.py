"""asrllm shards make | index | verify | stats: WebDataset shards and their index."""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asrllm.atomic import check_text_output, write_whole
from asrllm.data.index import Index, open_index
from asrllm.data.storage import is_url
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.progress import ProgressBar

if TYPE_CHECKING:
    from asrllm.data.shard_summary import ShardSummary

SHOWN_PROBLEMS = 20


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm shards ACTION`."""
    actions = {"make": make_shards, "index": index, "verify": verify, "stats": stats}
    actions[arguments.action](arguments)


# Each action imports only its own dependencies, which saves a third of the start-up time.
def make_shards(arguments: argparse.Namespace) -> None:
    """Write shards from the source that the command line names."""
    from asrllm.data.shards import write_shards
    from asrllm.data.sources import SOURCES

    name = next(name for name in SOURCES if getattr(arguments, name) is not None)
    source = SOURCES[name]
    path = getattr(arguments, name)
    options = _source_options(arguments, name)
    fields = {"corpus": arguments.corpus or Path(arguments.out).name}
    if arguments.lang:
        fields["lang"] = arguments.lang
    utterances = source.read(path, **options)
    if arguments.trust_audio:
        utterances = (replace(utterance, duration=None) for utterance in utterances)
    with ProgressBar("writing shards", source.count(path, **options)) as bar:

        def skip_finished(count: int) -> None:
            # shards of the interrupted run took no time, and must not shorten the remaining time
            bar.done_before += count
            bar.advance(count)

        summary = write_shards(
            arguments.out,
            utterances,
            utterances_per_shard=arguments.utterances_per_shard,
            workers=arguments.workers,
            fields=fields,
            codec=arguments.codec,
            seed=arguments.seed,
            advance=bar.advance,
            advance_reused=skip_finished,
        )
    if summary.reused:
        print(f"shards reused from the interrupted run: {summary.reused}")
    _print_summary(arguments.out, summary)


def _source_options(arguments: argparse.Namespace, source: str) -> dict[str, Any]:
    """Return the given options of a source, by name.

    Raises:
        UserError: an option of another source is given.
    """
    from asrllm.data.sources import SOURCES

    own = SOURCES[source].options
    all_options = {option for about in SOURCES.values() for option in about.options}
    for option in sorted(all_options - set(own)):
        if getattr(arguments, option) is not None:
            owners = [name for name, about in SOURCES.items() if option in about.options]
            raise UserError(
                f"--{option.replace('_', '-')} belongs to --{' or --'.join(owners)}, "
                f"but the source is --{source}. Leave it out."
            )
    given = {option: getattr(arguments, option) for option in own}
    return {option: value for option, value in given.items() if value is not None}


def index(arguments: argparse.Namespace) -> None:
    """Write the index of existing tars."""
    from asrllm.data.verify import index_tars

    with ProgressBar("indexing", len(arguments.tars)) as bar:
        summary = index_tars(
            arguments.tars, arguments.output, workers=arguments.workers, advance=bar.advance
        )
    folder = Path(arguments.output or Path(arguments.tars[0]).parent)
    _print_summary(str(folder), summary)


def _print_summary(folder: str, summary: "ShardSummary") -> None:
    print(describe_index(folder, summary.index))
    if summary.rejected:
        counts = _counts(summary.rejected)
        print(f"rejected: {counts}. See {escape(folder)}/rejected.jsonl.")
    if sum(summary.rejected.values()) > len(summary.index):
        # most utterances are rejected, probably all for the same reason
        for example in summary.examples:
            print(escape(example))


def describe_index(folder: str, index: Index) -> str:
    """Return one line with the size of a directory of shards."""
    size = f"{len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards"
    return f"{escape(folder)}: {size}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def verify(arguments: argparse.Namespace) -> None:
    """Check every sample of a directory of shards.

    Raises:
        UserError: a sample has a problem, or --output cannot be written.
    """
    from asrllm.data.verify import verify_shards

    if arguments.output:
        check_text_output(Path(arguments.output))  # before hours of work
    with _opened([arguments.folder]) as (index,), ProgressBar("verifying", len(index)) as bar:
        problems = verify_shards(index, workers=arguments.workers, advance=bar.advance)
    lines = [f"{problem}\n" for problem in problems]
    if arguments.output:
        content = "".join(lines).encode("utf-8", "backslashreplace")
        write_whole(Path(arguments.output), content)
    if not problems:
        print(f"{describe_index(arguments.folder, index)}, no problems")
        return
    _print_problems(lines, arguments.output)
    counts = _counts(Counter(problem.reason for problem in problems))
    raise UserError(
        f"{arguments.folder!r} has {len(problems)} problems ({counts}). "
        "Copy the shards again, or make them again."
    )


def _print_problems(lines: Sequence[str], output: str | None) -> None:
    """Print the first problems, and where to find the others."""
    sys.stdout.writelines(lines[:SHOWN_PROBLEMS])
    hidden = len(lines) - SHOWN_PROBLEMS
    if hidden > 0 and output:
        print(f"... and {hidden} more. All are in {escape(output)}.")
    elif hidden > 0:
        print(f"... and {hidden} more. Use --output FILE to list them all.")


def stats(arguments: argparse.Namespace) -> None:
    """Print the statistics of one or more directories of shards, and draw them with --output."""
    from asrllm.data.stats import (
        check_drawing,
        collect_statistics,
        draw,
        statistics_json,
        statistics_text,
    )

    output = Path(arguments.output) if arguments.output else None
    if output:
        check_drawing(output)
    with _opened(arguments.folders) as indexes:
        statistics = collect_statistics(" + ".join(arguments.folders), indexes)
    if output:
        draw(statistics, output)
    if arguments.json:
        print(statistics_json(statistics))
    else:
        print(statistics_text(statistics, shutil.get_terminal_size().columns))


@contextmanager
def _opened(folders: Sequence[str]) -> Iterator[list[Index]]:
    """Open the indexes of directories or URLs. Indexes of URLs are cached within the block."""
    if not any(is_url(folder) for folder in folders):
        yield [open_index(folder) for folder in folders]
        return
    from asrllm.data.cache import ShardCache
    from asrllm.data.verify import UNBOUNDED

    with tempfile.TemporaryDirectory(prefix="asrllm-") as cache_folder:
        cache = ShardCache(Path(cache_folder), max_bytes=UNBOUNDED)
        yield [open_index(folder, cache) for folder in folders]
