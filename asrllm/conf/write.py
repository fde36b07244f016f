"""Write the YAML files of this directory, and docs/configuration.md, from the components.

Run `python -m asrllm.conf.write` after changing a key. A test compares the files with the result.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from asrllm.collator.config import DataConfig
from asrllm.evaluation.config import EvaluationRun, TestData
from asrllm.models.model_args import ModelConfig
from asrllm.schema import keys_and_types
from asrllm.training.run_config import PlanRun, TrainerConfig, TrainRun

COMMENT_COLUMN = 26
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
TYPE_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
WIDTH = 100
# components by the file of their group
GROUPS: dict[str, type] = {
    "model/default": ModelConfig,
    "data/default": DataConfig,
    "trainer/default": TrainerConfig,
    "data/test": TestData,
}
# component and groups of each verb's file
CONFIGURED_VERBS: dict[str, tuple[type, tuple[str, ...]]] = {
    "train": (TrainRun, ("model/default", "data/default", "trainer/default")),
    "plan": (PlanRun, ("model/default", "data/default", "trainer/default")),
    "evaluate": (EvaluationRun, ("data/test",)),
}


def yaml_files() -> dict[str, str]:
    """Return the content of every file by its name."""
    files: dict[str, str] = {}
    for name, cls in GROUPS.items():
        lines = list(component_lines(cls, default_values(cls)))
        files[f"{name}.yaml"] = "\n".join(lines) + "\n"
    for verb, (cls, groups) in CONFIGURED_VERBS.items():
        head = [f"# asrllm {verb} key=value ...", "defaults:"]
        values = default_values(cls)
        for group in groups:
            head.append(f"  - {group.replace('/', ': ')}")
            del values[group.partition("/")[0]]
        lines = [*head, "  - _self_", "", *component_lines(cls, values)]
        files[f"{verb}.yaml"] = "\n".join(lines) + "\n"
    return files


def default_values(cls: type) -> dict[str, Any]:
    """Return the default value of every key of a component."""
    fields: dict[str, Any] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return {name: field.get_default() for name, field in fields.items()}


def values_of(group: Any) -> dict[str, Any]:
    """Return the values of a component in the order of its declaration."""
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def component_lines(cls: type, values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield the lines of a component: its keys with their values and meanings.

    Args:
        cls: the component.
        values: values by key. Those of its groups are components.
        indent: spaces before every line.
    """
    meanings = field_docs(cls)
    for name, value in values.items():
        meaning = meanings.get(name, "")
        if dataclasses.is_dataclass(value):
            yield from commented(f"{indent}{name}:", meaning)
            yield from component_lines(type(value), values_of(value), indent + "  ")
        else:
            yield from commented(f"{indent}{name}: {as_yaml_value(value)}", meaning)


def commented(text: str, meaning: str) -> list[str]:
    """Return a line with its comment, which continues on further lines."""
    if not meaning:
        return [text]
    return textwrap.wrap(
        meaning,
        WIDTH,
        initial_indent=text.ljust(COMMENT_COLUMN - 2) + "  # ",
        subsequent_indent=" " * COMMENT_COLUMN + "# ",
        break_on_hyphens=False,
    )


def as_yaml_value(value: object) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, float) and 0 < value < 0.001:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa)}e{int(exponent)}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and of the classes it inherits from.

    The description of a field whose meaning contains a constant precedes its docstring.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    described: dict[str, Any] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return docs | {
        name: field.description for name, field in described.items() if field.description
    }


def reference_page() -> str:
    """Return the page of all keys with their types, defaults and meanings, in Markdown."""
    lines = [
        "# Configuration",
        "",
        "The keys of `asrllm train`, `plan` and `evaluate`. Set them as `key=value`; see Hydra's",
        "documentation for files, groups and sweeps. This page is made by",
        "`python -m asrllm.conf.write`.",
    ]
    for title, cls in (("asrllm train", TrainRun), ("asrllm evaluate", EvaluationRun)):
        lines += ["", f"## {title}", "", "| key | type | default | meaning |"]
        lines += ["| --- | --- | --- | --- |", *reference_rows(cls, default_values(cls))]
    only_plan = default_values(PlanRun)
    for name in default_values(TrainRun):
        del only_plan[name]
    lines += ["", "## asrllm plan", "", "The keys of `asrllm train`, and:", ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += reference_rows(PlanRun, only_plan)
    return "\n".join(lines) + "\n"


def reference_rows(cls: type, values: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Yield the rows of a component's keys.

    Args:
        cls: the component.
        values: values by key. Those of its groups are components.
        group: prefix of the keys.
    """
    meanings = field_docs(cls)
    hints = keys_and_types(cls)
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from reference_rows(type(value), values_of(value), f"{group}{name}.")
            continue
        cells = (type_name(hints[name]), as_yaml_value(value), meanings.get(name, ""))
        kind, default, meaning = (cell.replace("|", "\\|") for cell in cells)
        yield f"| `{group}{name}` | {kind} | `{default}` | {meaning} |"


def type_name(hint: Any) -> str:
    """Return a type as its users know it, for example `integer or null`."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(alternative) for alternative in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return TYPE_NAMES[hint]


if __name__ == "__main__":
    for name, text in yaml_files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
    PAGE.write_text(reference_page(), encoding="utf-8")
