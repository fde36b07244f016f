"""Write the YAML files of this directory from the components, and the pages made from the code.

Run `python -m asrllm.conf.write` after changing a key, an argument or a metric. A test compares
the files with the result.
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asrllm.collator.config import DataConfig
from asrllm.conf.fields import as_yaml_value, default_values, field_docs, values_of
from asrllm.conf.pages import pages
from asrllm.evaluation.config import EvaluationRun, TestData
from asrllm.models.model_args import ModelConfig
from asrllm.training.run_config import PlanRun, TrainerConfig, TrainRun

COMMENT_COLUMN = 26
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


if __name__ == "__main__":
    for name, text in yaml_files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
