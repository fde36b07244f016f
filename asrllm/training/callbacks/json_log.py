"""Logs of JSON lines to which a resumed run appends."""

import json
import logging
from pathlib import Path
from typing import TextIO

from asrllm.atomic import write_whole
from asrllm.text_files import parse_json

logger = logging.getLogger(__name__)


def reopen_log(path: Path, step: int) -> TextIO:
    """Open a log of JSON lines for appending.

    Records after `step`, from which the run resumes, and corrupted lines are removed.

    Args:
        path: path of the log.
        step: optimizer steps done.
    """
    lines_to_keep = []
    if step and path.is_file():
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            logged = _step_of(line)
            if logged is not None and logged <= step:
                lines_to_keep.append(line.decode())
            if logged is None and number < len(lines):  # the last line may be incomplete
                logger.warning("%s:%d is corrupted and is dropped", path, number)
    write_whole(path, "".join(line + "\n" for line in lines_to_keep))
    return open(path, "a", encoding="utf-8")


def last_steps(path: Path) -> dict[str, int]:
    """Return the last step that a log of JSON lines has, or had before a resume, of each name.

    `reopen_log` removes lines, therefore the steps are kept in a file beside the log. If it is
    corrupted, a warning is logged, and the steps are those of the log.
    """
    kept = path.with_suffix(".steps.json")
    steps = _kept_steps(kept) if kept.is_file() else {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for line in lines:
        step = _step_of(line)
        if step is not None:
            for name in parse_json(line):
                steps[name] = max(step, steps.get(name, step))
    if steps:
        write_whole(kept, json.dumps(steps))
    return steps


def _kept_steps(path: Path) -> dict[str, int]:
    try:
        steps = parse_json(path.read_bytes())
        if all(isinstance(step, int) for step in steps.values()):
            return dict(steps)
    except (ValueError, AttributeError):
        pass
    logger.warning(
        "%s is corrupted and is made again. Trackers may get records of repeated steps twice.", path
    )
    return {}


def _step_of(line: bytes) -> int | None:
    """Return the step of a log record, or None if the line is not a record."""
    try:
        record = parse_json(line)
        step = record["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None
