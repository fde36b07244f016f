"""The pages and tables of docs/ that are made from the code, in Markdown."""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from asrllm.commands.arguments.configured import HYDRA_TITLE, KEYS_TITLE
from asrllm.commands.arguments.verbs import VERBS
from asrllm.commands.dispatch import build_parser
from asrllm.conf.fields import as_yaml_value, default_values, field_docs, values_of
from asrllm.config_keys import NAMES_ELSEWHERE
from asrllm.data.corpora import CorpusEntry
from asrllm.data.sources import SOURCES
from asrllm.data.sources.files import SAMPLE_FIELDS
from asrllm.data.sources.folder import AUDIO_COLUMNS, TEXT_COLUMNS
from asrllm.evaluation.config import EvaluationRun
from asrllm.evaluation.metric_names import EVALUATION_METRICS
from asrllm.schema import keys_and_types
from asrllm.serving.metrics import ServerMetrics
from asrllm.training.callbacks.metric_names import METRICS
from asrllm.training.run_config import PlanRun, TrainRun

DOCS = Path(__file__).parents[2] / "docs"
MADE = "This page is made by `python -m asrllm.conf.write`."
TYPE_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    list[Any]: "list",
    type(None): "null",
}
# a table in a page that is otherwise written by hand
TABLE = re.compile(r"(?P<begin><!-- begin (?P<name>[a-z_]+) -->\n).*?(?P<end><!-- end -->)", re.S)
HYDRA_SECTION = "Hydra's options"
HYDRA_ANCHOR = "hydras-options"
MACHINE_DEFAULTS = {"workers": "their number"}  # defaults that depend on the machine


def pages() -> dict[Path, str]:
    """Return the content of every page of docs/ that the code determines, in whole or in part."""
    found = {
        DOCS / "configuration.md": configuration_page(),
        DOCS / "metrics.md": metrics_page(),
        DOCS / "cli.md": command_page(),
    }
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path not in found and TABLE.search(text):
            found[path] = TABLE.sub(_with_table, text)
    return found


def _with_table(match: re.Match[str]) -> str:
    table = GENERATED_TABLES[match["name"]]()
    return "\n".join([match["begin"].rstrip("\n"), "", *table, "", match["end"]])


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table. Vertical bars in its cells are escaped."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# --- configuration ---


def configuration_page() -> str:
    """Return the page of all keys with their types, defaults and meanings."""
    header = ("key", "type", "default", "meaning")
    lines = [
        "# Configuration",
        "",
        "The keys of `asrllm train`, `plan` and `evaluate`. Set them as `key=value`; see Hydra's",
        f"documentation for files, groups and sweeps. {MADE}",
    ]
    for title, cls in (("asrllm train", TrainRun), ("asrllm evaluate", EvaluationRun)):
        rows = list(key_rows(cls, default_values(cls)))
        lines += ["", f"## {title}", "", *table_lines(header, rows)]
    only_plan = default_values(PlanRun)
    for name in default_values(TrainRun):
        del only_plan[name]
    lines += ["", "## asrllm plan", "", "The keys of `asrllm train`, and:", ""]
    lines += table_lines(header, list(key_rows(PlanRun, only_plan)))
    return "\n".join(lines) + "\n"


def key_rows(cls: type, values: Mapping[str, Any], group: str = "") -> Iterator[Sequence[str]]:
    """Yield (key, type, default, meaning) of a component's keys.

    Args:
        cls: the component.
        values: values by key. Those of its groups are components.
        group: prefix of the keys.
    """
    meanings = field_docs(cls)
    hints = keys_and_types(cls)
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from key_rows(type(value), values_of(value), f"{group}{name}.")
            continue
        default = f"`{as_yaml_value(value)}`"
        yield f"`{group}{name}`", type_name(hints[name]), default, meanings.get(name, "")


def type_name(hint: Any) -> str:
    """Return a type as its users know it, for example `integer or null`."""
    if hint in TYPE_NAMES:
        return TYPE_NAMES[hint]
    origin = typing.get_origin(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(alternative) for alternative in typing.get_args(hint))
    if origin is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if origin is dict:
        return "mapping"
    raise TypeError(hint)


# --- metrics ---


def metrics_page() -> str:
    """Return the page of everything that training, evaluation and the server measure."""
    header = ("Name", "Unit", "Meaning")
    lines = [
        "# Metrics",
        "",
        f"What training, evaluation and the server measure. {MADE}",
        "",
        "## Training",
        "",
        "A line of `metrics.jsonl` is one record: `step`, the optimizer steps done, and these",
        "values over all ranks. Trackers put `train/` before a name without a slash.",
        "`{corpus}` and `{set}` are names from the data configurations, and `{reason}` is the name",
        "of a filter. [Training](training.md#metrics) says when records are written.",
        "",
        *metric_table(header, METRICS),
        "",
        "## Evaluation",
        "",
        "W&B puts the name of the test set before each name: `test/wer`. `results.json` has the",
        "same numbers: an interval is the list `wer_ci95`, and a name with slashes is nested.",
        "`baseline` is the Whisper from which the audio encoder comes, if it is decoded.",
        "",
        *metric_table(header, EVALUATION_METRICS),
        "",
        "## Server",
        "",
        "`GET /metrics` of `asrllm serve`, in the format of Prometheus, which appends `_total` to",
        "counters and `_bucket`, `_sum` and `_count` to histograms.",
        "",
        *server_table(),
    ]
    return "\n".join(lines) + "\n"


def metric_table(header: Sequence[str], metrics: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the table of metrics with their units and meanings."""
    rows = [(f"`{name}`", unit, meaning) for name, (unit, meaning) in metrics.items()]
    return table_lines(header, rows)


def server_table() -> list[str]:
    """Return the table of the server's metrics."""
    rows = []
    for metric in ServerMetrics().registry.collect():
        rows.append((f"`{metric.name}`", metric.type, metric.documentation.rstrip(".")))
    return table_lines(("Name", "Type", "Meaning"), rows)


# --- commands ---


def command_page() -> str:
    """Return the page of all verbs with their arguments."""
    lines = [
        "# Commands",
        "",
        "The arguments of every verb, as `asrllm VERB --help` shows them. Each verb is also a",
        "script in `launch/`, with underscores for dashes; `launch/make_shards.py` is",
        "`asrllm shards make`, and `launch/zero_to_fp32.py` is `asrllm consolidate`.",
        f"{MADE}",
        "",
        "The exit status is 0 for success and 2 for the user's mistake.",
        "[Training](training.md#when-a-run-is-interrupted) lists the others.",
    ]
    for verb, about in VERBS.items():
        lines += ["", f"## asrllm {verb}", "", sentence(about.help)]
        parser = verb_parser(verb)
        actions = subparsers_of(parser)
        if not actions:
            lines += argument_lines(parser)
        for name in actions:
            inner = subparsers_of(verb_parser(verb, name))[name]
            lines += ["", f"### asrllm {verb} {name}", "", sentence(str(inner.description))]
            lines += argument_lines(inner)
    lines += ["", f"## {HYDRA_SECTION}", "", *hydra_table(verb_parser("train"))]
    return "\n".join(lines) + "\n"


def verb_parser(verb: str, *words: str) -> argparse.ArgumentParser:
    """Return the parser of a verb that knows the arguments of an action in `words`."""
    return subparsers_of(build_parser([verb, *words]))[verb]


def sentence(text: str) -> str:
    """Return a line of help as a sentence."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the verbs, or of the actions of a verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def argument_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield what the page says about the arguments of a parser."""
    parser.set_defaults(**MACHINE_DEFAULTS)
    hydra = hydra_group(parser)
    actions = []
    for action in parser._actions:
        if action.dest != "help" and not (hydra and action in hydra._group_actions):
            actions.append(action)
    yield from ("", "```", usage(parser, actions), "```")
    prose, title, _ = str(parser.epilog or "").partition(KEYS_TITLE)
    if prose.strip():
        yield from ("", " ".join(prose.split()))
    if title:
        yield from ("", f"[The keys](configuration.md), and [Hydra's options](#{HYDRA_ANCHOR}).")
    yield from ("", *argument_table(actions))
    for group in parser._action_groups:
        if group.description:
            yield from ("", sentence(f"{group.title}: {group.description}"))


def hydra_group(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup | None:
    """Return the group of Hydra's options, or None if the parser has none."""
    groups = [group for group in parser._action_groups if group.title == HYDRA_TITLE]
    return groups[0] if groups else None


def hydra_table(parser: argparse.ArgumentParser) -> list[str]:
    """Return the table of Hydra's options."""
    group = hydra_group(parser)
    return argument_table(group._group_actions) if group else []


def argument_table(actions: Sequence[argparse.Action]) -> list[str]:
    """Return the table of arguments."""
    shown = [action for action in actions if action.help is not argparse.SUPPRESS]
    rows = [(argument_name(action), argument_help(action)) for action in shown]
    return table_lines(("Argument", "Meaning"), rows)


def usage(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> str:
    """Return a command line with the arguments that are required."""
    words = [parser.prog, *filter(None, map(usage_word, actions))]
    for group in parser._mutually_exclusive_groups:
        if group.required:
            choices = [f"{a.option_strings[0]} {a.metavar}" for a in group._group_actions]
            words.append(f"({' | '.join(choices)})")
    return " ".join([*words, "[options]"])


def usage_word(action: argparse.Action) -> str:
    """Return a positional argument or required option as the usage shows it, else ""."""
    metavar = str(action.metavar or action.dest.upper())
    if action.option_strings:
        return f"{action.option_strings[0]} {metavar}" if action.required else ""
    return {"+": f"{metavar}...", "*": f"[{metavar}...]"}.get(str(action.nargs), metavar)


def argument_name(action: argparse.Action) -> str:
    """Return an argument with the placeholder or the choices of its value, as code."""
    metavar = str(action.metavar or action.dest.upper())
    if action.choices:
        metavar = "|".join(map(str, action.choices))
    names = action.option_strings or [metavar]
    takes_value = action.option_strings and action.nargs != 0
    return ", ".join(f"`{name} {metavar}`" if takes_value else f"`{name}`" for name in names)


def argument_help(action: argparse.Action) -> str:
    """Return the help of an argument with its default."""
    return str(action.help or "") % (vars(action) | {"prog": "asrllm"})


# --- tables in pages that are written by hand ---


def corpus_table() -> list[str]:
    """Return the keys of an entry of a data configuration."""
    rows = list(key_rows(CorpusEntry, default_values(CorpusEntry)))
    return table_lines(("Key", "Type", "Default", "Meaning"), rows)


def source_table() -> list[str]:
    """Return the sources of `asrllm shards make`."""
    rows = [(f"`--{name} {source.metavar}`", source.help) for name, source in SOURCES.items()]
    return table_lines(("Option", "What it reads"), rows)


def sample_field_table() -> list[str]:
    """Return the fields of a sample, and their names in manifests and tables."""
    rows = [(f"`{field}`", code_list(names)) for field, names in SAMPLE_FIELDS.items()]
    return table_lines(("Field", "Its names in manifests and tables"), rows)


def column_table() -> list[str]:
    """Return the columns of a folder's table."""
    rows = [
        ("audio file", code_list(AUDIO_COLUMNS)),
        ("text", code_list(TEXT_COLUMNS)),
        ("length in seconds", code_list(["duration"])),
    ]
    return table_lines(("Column", "Its names"), rows)


def code_list(names: Sequence[str]) -> str:
    """Return names as code with commas between them."""
    return ", ".join(f"`{name}`" for name in names)


def names_elsewhere_table() -> list[str]:
    """Return the table of our keys with their names in other frameworks."""
    rows = []
    for key, names in sorted(NAMES_ELSEWHERE.items()):
        rows.append((f"`{key}`", ", ".join(f"`{name}`" for name in names)))
    return table_lines(("Our key", "Names elsewhere"), rows)


GENERATED_TABLES = {
    "corpus_keys": corpus_table,
    "sources": source_table,
    "sample_fields": sample_field_table,
    "table_columns": column_table,
    "names_elsewhere": names_elsewhere_table,
}
