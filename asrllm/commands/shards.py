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

from asrllm.data.index import Index, open_index
from asrllm.data.storage import is_url
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.progress import ProgressBar

if TYPE_CHECKING:
    from asrllm.data.shards import ShardSummary

SHOWN_PROBLEMS = 20


def run(arguments: argparse.Namespace) -> None:
    actions = {"make": make_shards, "index": index, "verify": verify, "stats": stats}
    actions[arguments.action](arguments)


# Each action imports only its own dependencies, which saves a third of the start-up time.
def make_shards(arguments: argparse.Namespace) -> None:
    from asrllm.data.shards import write_shards
    from asrllm.data.sources import SOURCES

    name = next(name for name in SOURCES if getattr(arguments, name) is not None)
    source, where, options = SOURCES[name], getattr(arguments, name), _options(arguments, name)
    fields = {"corpus": arguments.corpus or Path(arguments.out).name}
    if arguments.lang:
        fields["lang"] = arguments.lang
    utterances = source.read(where, **options)
    if arguments.trust_audio:
        utterances = (replace(utterance, duration=None) for utterance in utterances)
    with ProgressBar("writing shards", source.count(where, **options)) as bar:

        def keep(count: int) -> None:
            bar.done_before += count  # else the time left would be reckoned by them
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
            keep=keep,
        )
    if summary.kept:
        print(f"kept {summary.kept} finished shards of the earlier run")
    _print_summary(arguments.out, summary)


def _options(arguments: argparse.Namespace, source: str) -> dict[str, Any]:
    """What the source takes beside its path; an option of another source is a mistake."""
    from asrllm.data.sources import SOURCES

    all_options = {option for about in SOURCES.values() for option in about.options}
    for option in sorted(all_options - set(SOURCES[source].options)):
        if getattr(arguments, option) is not None:
            takers = " or ".join(
                f"--{name}" for name, about in SOURCES.items() if option in about.options
            )
            raise UserError(
                f"--{option.replace('_', '-')} belongs to {takers}, but the source is --{source}. Leave it out."
            )
    given = {option: getattr(arguments, option) for option in SOURCES[source].options}
    return {option: value for option, value in given.items() if value is not None}


def index(arguments: argparse.Namespace) -> None:
    from asrllm.data.verify import index_tars

    with ProgressBar("indexing", len(arguments.tars)) as bar:
        summary = index_tars(
            arguments.tars, arguments.output, workers=arguments.workers, advance=bar.advance
        )
    _print_summary(str(Path(arguments.output or Path(arguments.tars[0]).parent)), summary)


def _print_summary(folder: str, summary: "ShardSummary") -> None:
    index = summary.index
    print(f"{folder}: {len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards")
    if summary.rejected:
        print(f"rejected: {_counts(summary.rejected)}; see {folder}/rejected.jsonl")
    if sum(summary.rejected.values()) > len(index):  # something is wrong with all of them
        for example in summary.examples:
            print(escape(example))


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def verify(arguments: argparse.Namespace) -> None:
    from asrllm.data.verify import verify_shards

    with _opened([arguments.folder]) as (index,), ProgressBar("verifying", len(index)) as bar:
        problems = verify_shards(index, workers=arguments.workers, advance=bar.advance)
    lines = [f"{problem}\n" for problem in problems]
    if arguments.output:
        try:
            Path(arguments.output).write_text(
                "".join(lines), encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise UserError(f"{arguments.output!r} cannot be written: {error}") from error
    if not problems:
        print(
            f"{arguments.folder}: {len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards: all is well"
        )
        return
    sys.stdout.writelines(lines[:SHOWN_PROBLEMS])
    if len(lines) > SHOWN_PROBLEMS:
        rest = (
            f"; all are in {arguments.output}"
            if arguments.output
            else ": give --output FILE to have them all"
        )
        print(f"... and {len(lines) - SHOWN_PROBLEMS} more{rest}")
    said = _counts(Counter(problem.reason for problem in problems))
    raise UserError(
        f"{arguments.folder!r} has {len(problems)} problems ({said}): restore the shards, or make or index them again"
    )


def stats(arguments: argparse.Namespace) -> None:
    from asrllm.data.stats import as_json, as_text, describe, draw

    with _opened(arguments.folders) as indexes:
        statistics = describe(" + ".join(arguments.folders), indexes)
    if arguments.output:
        draw(statistics, arguments.output)
    print(
        as_json(statistics)
        if arguments.json
        else as_text(statistics, shutil.get_terminal_size().columns)
    )


@contextmanager
def _opened(folders: Sequence[str]) -> Iterator[list[Index]]:
    """The indexes of directories or URLs; those of URLs are on this machine for as long as they are used."""
    if not any(is_url(folder) for folder in folders):
        yield [open_index(folder) for folder in folders]
        return
    from asrllm.data.cache import ShardCache
    from asrllm.data.verify import UNBOUNDED

    with tempfile.TemporaryDirectory(prefix="asrllm-") as folder_of_cache:
        cache = ShardCache(Path(folder_of_cache), max_bytes=UNBOUNDED)
        yield [open_index(folder, cache) for folder in folders]
