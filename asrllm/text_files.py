"""Read text, YAML and JSON files that a user names. Every failure is a UserError with the path."""

import json
from pathlib import Path
from typing import Any

from asrllm.errors import UserError


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_text(path: str | Path, what: str) -> str:
    """Return the content of a UTF-8 text file.

    Args:
        path: the file.
        what: the role of the file, which begins the error message.

    Raises:
        UserError: the file does not exist or is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {str(path)!r} does not exist: check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {str(path)!r} is not UTF-8 text: {error}") from error


def read_yaml(path: str | Path, what: str) -> Any:
    """Return the content of a YAML file. Arguments and errors are those of `read_text`."""
    import yaml  # 40 ms, which verbs that read no YAML need not spend

    try:
        return yaml.safe_load(read_text(path, what))
    except RecursionError as error:
        raise UserError(f"{what} {str(path)!r} is nested too deeply. Write it with fewer levels.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{what} {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error


def read_json_object(path: str | Path, what: str) -> dict[str, Any]:
    """Return the object that a JSON file holds. Arguments and errors are those of `read_text`."""
    try:
        content = parse_json(read_text(path, what))
    except ValueError as error:
        raise UserError(f"{what} {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {str(path)!r} must be a JSON object")
    return content
