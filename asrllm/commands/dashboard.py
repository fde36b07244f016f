"""asrllm dashboard: build a W&B workspace with a panel for every logged value."""

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from asrllm.errors import UserError
from asrllm.evaluation.metric_names import EVALUATED_SAMPLES, EVALUATION_METRICS
from asrllm.text_files import first_words
from asrllm.training.callbacks.metric_names import METRICS, SAMPLES, full_name
from asrllm.training.wandb_login import check_login

DATA = (
    "utterances",
    "audio_seconds",
    "text_tokens",
    "padding",
    "bad",
    "dropped/{reason}",
    "data_wait",
    "data_wait_max",
    "slowest_rank",
)
SPEED = (
    "tokens_per_second",
    "audio_hours_per_hour",
    "seconds_per_step",
    "tflops",
    "mfu",
    "memory_gb",
)
TABLES = {"Validation": SAMPLES, "Evaluation": EVALUATED_SAMPLES}  # by section
COMPARED_SETTINGS = ("trainer.lr", "trainer.num_steps", "data.sampler.max_tokens")
COMPARED_METRICS = ("loss", "acc", "audio_hours_per_hour")
INSTALL = "Run: pip install 'asrllm[dashboard]'"


class Plot(NamedTuple):
    """Values of one unit over the steps.

    Attributes:
        title: title of the panel.
        unit: unit of its values.
        names: their names in W&B.
        pattern: regular expression of their names, if these have a variable part. Go, JavaScript
            and Python understand it.
    """

    title: str
    unit: str
    names: list[str]
    pattern: str | None = None


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm dashboard`."""
    try:
        workspace = build_workspace(arguments.project, arguments.entity or "")
    except ImportError as error:
        raise UserError(
            f"the dashboard needs a package that is not installed ({error.name}). {INSTALL}"
        ) from error
    if arguments.dry_run:
        print(json.dumps(workspace._spec, indent=1))
        return
    check_login("asrllm dashboard", "Run 'wandb login', set WANDB_API_KEY, or use --dry-run.")
    print(save(workspace))


def save(workspace: Any) -> str:
    """Save a workspace as a new view of its project, and return the view's address.

    Raises:
        UserError: W&B did not accept it.
    """
    import wandb

    try:
        if not workspace.entity:
            workspace.entity = wandb.Api().default_entity
        workspace.save()
    except Exception as error:  # that of a GraphQL answer is not one of wandb.errors
        raise UserError(
            f"W&B did not save the workspace of {workspace.project!r}: {first_words(error)}. "
            "Check the project, --entity and the login."
        ) from error
    return str(workspace.url)


def build_workspace(project: str, entity: str) -> Any:
    """Return the workspace. This needs neither a network nor a login.

    Args:
        project: W&B project.
        entity: its user or team; empty: that of the login.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for name, plots in metric_sections().items():
        panels = [line_plot(plot) for plot in plots]
        if name in TABLES:
            panels.append(reports.WeavePanelSummaryTable(table_name=TABLES[name]))
        sections.append(workspaces.Section(name=name, panels=panels, is_open=True))
    comparison = workspaces.Section(name="Comparison of runs", panels=comparison_panels())
    return workspaces.Workspace(
        project=project,
        entity=entity,
        name="asrllm",
        sections=[*sections, comparison],
        auto_generate_panels=False,
    )


def line_plot(plot: Plot) -> Any:
    """Return the panel of a plot."""
    import wandb_workspaces.reports.v2 as reports

    return reports.LinePlot(
        title=plot.title,
        x="Step",
        title_x="optimizer steps",
        title_y=plot.unit,
        y=[*plot.names],
        metric_regex=plot.pattern,
    )


def comparison_panels() -> list[Any]:
    """Return the panels that compare the settings and the last values of runs."""
    import wandb_workspaces.reports.v2 as reports

    columns = []
    for key in COMPARED_SETTINGS:
        columns.append(reports.ParallelCoordinatesPlotColumn(metric=reports.Config(key)))
    for name in COMPARED_METRICS:
        metric = reports.SummaryMetric(full_name(name))
        title = f"{name} ({METRICS[name][0]})"
        columns.append(reports.ParallelCoordinatesPlotColumn(metric=metric, display_name=title))
    return [
        reports.RunComparer(diff_only="split"),
        reports.ParallelCoordinatesPlot(title="settings and results", columns=columns),
    ]


def metric_sections() -> dict[str, list[Plot]]:
    """Return the plots of all metrics by section."""
    sections: dict[str, list[Plot]] = {"Training": [], "Data": [], "Speed": [], "Validation": []}
    for name, (unit, _) in METRICS.items():
        sections[section_of(name)].append(training_plot(name, unit))
    sections["Evaluation"] = list(evaluation_plots())
    return sections


def section_of(name: str) -> str:
    """Return the section of a metric of training."""
    if name.startswith("valid/"):
        return "Validation"
    if name in DATA:
        return "Data"
    return "Speed" if name in SPEED else "Training"


def training_plot(name: str, unit: str) -> Plot:
    """Return the plot of a name in METRICS, in which {corpus} and others may be any text."""
    pieces = re.split(r"{\w+}", full_name(name))
    if len(pieces) == 1:
        return Plot(name, unit, pieces)
    return Plot(name, unit, [], f"^{'.+'.join(map(re.escape, pieces))}$")


def evaluation_plots() -> Iterator[Plot]:
    """Yield the plots of the evaluation, whose names begin with that of the test set."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (unit, _) in EVALUATION_METRICS.items():
        groups.setdefault((evaluation_title(name, unit), unit), []).append(name)
    for (title, unit), names in groups.items():
        any_set = "[^/]+"
        if METRICS.keys() & names:  # which have "train/" in place of the test set
            any_set = f"({other_than('train')})"
        yield Plot(title, unit, [], f"^{any_set}/({'|'.join(names)})$")


def evaluation_title(name: str, unit: str) -> str:
    """Return the title of a metric's plot. An interval is in the plot of its value."""
    if name.startswith("hallucinations/") and unit == "utterances":
        return "hallucinations"
    return re.sub(r"_(low|high)$", "", name)


def other_than(word: str) -> str:
    """Return a pattern for every name without a slash except `word`.

    A lookahead would be shorter, but Go does not have any.
    """
    alternatives = [f"{word}[^/]+"]
    for end, letter in enumerate(word):
        beginning = word[:end]
        alternatives.append(f"{beginning}[^{letter}/][^/]*")
        if beginning:
            alternatives.append(beginning)
    return "|".join(alternatives)
