"""Read text, YAML and JSON files that a user names. Every failure is a UserError with the path."""

import codecs
import contextlib
import errno
import functools
import json
import mmap
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from asrllm.errors import UserError
from asrllm.escape import escape

if TYPE_CHECKING:
    import yaml

JsonObject = dict[str, Any]  # its values are JSON values
TORCH_REASON = "WeightsUnpickler error: "
Buffer = bytes | mmap.mmap
LFS_POINTER = (
    b"version https://git-lfs"  # begins the file that git-LFS puts in place of a large one
)
# A YAML file whose aliases expand to more values, and to ten times those in the file, is rejected:
# 300 bytes can be gigabytes for whatever copies or prints them
MAX_EXPANDED = 10_000
# errors that the file does not cause; `explain` in asrllm/commands/dispatch.py names the fix
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO)


@contextlib.contextmanager
def reading(
    path: str | Path,
    what: str,
    fix: str = "Copy it again, or download it again.",
) -> Iterator[None]:
    """Turn any exception of a library that reads a user's file into a UserError with the path.

    Libraries raise almost any exception for a corrupted file: transformers KeyError and TypeError,
    tokenizers a bare Exception. So put as little as possible into the block.

    Args:
        path: the file or directory that is read in the block.
        what: the role of the file, which begins the error message.
        fix: what the user can do about it.

    Raises:
        UserError: the block raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        raise UserError(
            f"{what} {str(path)!r} cannot be read: {first_words(error)}. {fix}"
        ) from error


def first_words(error: BaseException, limit: int = 200) -> str:
    """Return the beginning of an exception's message on one line, without a full stop.

    Libraries quote other people's files in their messages, so unsafe characters are escaped.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if TORCH_REASON in text:  # torch.load puts it between pieces of advice to trust the file
        text = re.split("Please use|Check the documentation", text.rpartition(TORCH_REASON)[2])[0]
    text = escape(" ".join(text.split()))
    if isinstance(error, KeyError) and len(error.args) == 1:
        key = str(error.args[0])
        is_sentence = " " in key  # transformers raises KeyError with one
        text = escape(" ".join(key.split())) if is_sentence else f"{text} is missing"
    text = text or type(error).__name__
    if len(text) > limit:  # between two words
        return f"{text[:limit].rpartition(' ')[0] or text[:limit]} [...]"
    return text.rstrip(". ")


def open_regular(path: str | Path, what: str = "the file") -> BinaryIO:
    """Open a file for reading, unless reading it could wait forever or give other content.

    Args:
        path: the file.
        what: the role of the file, which begins the error message.

    Raises:
        UserError: the path is a directory, pipe or device, or the file is a git-LFS pointer.
        OSError: the file cannot be read.
    """
    if os.path.exists(path):
        check_file(path, what)
    with open(path, "rb") as file:
        problem = pointer_problem(file.read(len(LFS_POINTER)), path)
    if problem:
        raise UserError(f"{str(path)!r} {problem}")
    return open(path, "rb")


def pointer_problem(content: Buffer, path: str | Path | None) -> str:
    """Return what is wrong with a file that is a git-LFS pointer, or "" for any other file.

    Args:
        content: the file, or its beginning.
        path: its path, or None for content that was not read from a file.
    """
    if content[: len(LFS_POINTER)] != LFS_POINTER:
        return ""
    where = "where it is from"
    if path is not None:
        where = f"in {str(Path(path).absolute().parent)!r}"
    return (
        "is a git-LFS pointer, not the file itself. "
        f"Run 'git lfs pull' {where}, or download the file."
    )


def check_no_pointer(path: str | Path) -> None:
    """Check that a file is a regular file and not a git-LFS pointer, as `open_regular` does."""
    open_regular(path).close()


def check_no_bom(path: str | Path) -> None:
    """Check that a file which another library reads does not begin with a byte-order mark.

    transformers rejects it in JSON, and would make it a part of every prompt in a chat template.

    Raises:
        UserError: the file begins with the mark of UTF-8.
    """
    with open_regular(path) as file:
        begin = file.read(len(codecs.BOM_UTF8))
    if begin == codecs.BOM_UTF8:
        raise UserError(
            f"{str(path)!r} begins with a UTF-8 byte-order mark. Remove it: "
            f"sed -i '1s/^\\xEF\\xBB\\xBF//' {shlex.quote(str(path))}"
        )


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON file, as the `object_pairs_hook` of json or hjson.

    Raises:
        ValueError: a key is repeated, so that one of its values would be lost.
    """
    keys = [key for key, _ in pairs]
    content = dict(pairs)
    if len(content) < len(keys):
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{repeated!r} occurs twice in one object")
    return content


def json_problem(error: Exception, path: str | Path) -> str:
    """Return where and why a file is not JSON: `FILE:LINE:COLUMN is not valid JSON: PROBLEM`.

    Args:
        error: error of json or hjson, or of `parse_json`.
        path: the file.
    """
    line = getattr(error, "lineno", None)
    if line is None:
        return f"{str(path)!r} is not valid JSON: {first_words(error)}"
    column = getattr(error, "colno", 1)
    problem = escape(str(getattr(error, "msg", "")))
    return f"{path}:{line}:{column} is not valid JSON: {problem}"


def check_file(path: str | Path, what: str) -> None:
    """Check that a path is a regular file, which can be read more than once.

    Args:
        path: the file.
        what: the role of the file, which begins the error message.

    Raises:
        UserError: the path does not exist, or is a directory, pipe or device.
    """
    path = Path(path)
    if path.is_file():
        return
    if path.is_dir():
        raise UserError(f"{what} {str(path)!r} is a directory. Use a file.")
    if path.exists():
        raise UserError(
            f"{what} {str(path)!r} is a pipe or device. Write its content to a file and use that."
        )
    raise UserError(f"{what} {str(path)!r} {missing_problem(path)}")


def check_link(path: str | Path) -> None:
    """Raise UserError if a path is a symbolic link that leads nowhere."""
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{str(path)!r} {missing_problem(path)}")


def missing_problem(path: str | Path) -> str:
    """Return why a path cannot be opened that does not exist, and what to do."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a loop of symbolic links. Correct the link."
        if os.path.islink(path):
            return f"is a symbolic link to {os.readlink(path)!r}, which does not exist. Correct it."
    return "does not exist. Check the path."


def read_text(path: str | Path, what: str) -> str:
    """Return the content of a UTF-8 text file.

    Args:
        path: the file.
        what: the role of the file, which begins the error message.

    Raises:
        UserError: the file does not exist, cannot be read, is not UTF-8, or is a git-LFS pointer.
    """
    check_file(path, what)
    try:
        with reading(path, what, "Change its permissions, or copy it again."):
            check_no_pointer(path)
            content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {str(path)!r} is not UTF-8 text: {error}. Convert it to UTF-8, or copy it "
            "again."
        ) from error


def read_yaml(path: str | Path, what: str) -> Any:
    """Return the content of a YAML file. Arguments and errors are those of `read_text`."""
    import yaml  # takes 40 ms, which most verbs do not need

    try:
        content = yaml.load(read_text(path, what), Loader=_unique_keys_loader())
    except RecursionError as error:
        raise UserError(
            f"{what} {str(path)!r} is nested too deeply. Write it with fewer levels."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{what} {yaml_problem(error, path)}. Correct it.") from error
    if _expands(content):
        raise UserError(
            f"{what} {str(path)!r} has aliases (*name) that expand to more than {MAX_EXPANDED} "
            "values. Write it without them."
        )
    return content


def _expands(content: object) -> bool:
    """Return whether most values of a YAML file are repetitions by aliases."""
    seen: set[int] = set()
    own = 0  # number of values that the file contains
    expanded = 0
    remaining = [content]
    while remaining:
        value = remaining.pop()
        if not isinstance(value, (dict, list)):
            continue
        expanded += len(value)
        if id(value) not in seen:
            seen.add(id(value))
            own += len(value)
        if expanded > MAX_EXPANDED and expanded > 10 * own:
            return True
        remaining += value.values() if isinstance(value, dict) else value
    return False


@functools.cache
def _unique_keys_loader() -> type["yaml.SafeLoader"]:
    """Return PyYAML's safe loader that rejects repeated keys, as the YAML standard does."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[object] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                    problem = f"the key {key.value!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
            return super().construct_mapping(node, deep)

    return Loader


def yaml_problem(error: "yaml.YAMLError", path: str | Path = "") -> str:
    """Return where and why a file is not YAML: `FILE:LINE:COLUMN is not valid YAML: PROBLEM`.

    Args:
        error: error of PyYAML.
        path: the file; by default the one that the error names.
    """
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that YAML does not allow
        name = str(path or getattr(error, "name", "the file"))
        return f"{name!r} is not valid YAML: {first_words(error)}"
    place = f"{path or mark.name}:{mark.line + 1}:{mark.column + 1}"
    problem = escape(str(getattr(error, "problem", "")))
    return f"{place} is not valid YAML: {problem}"


def read_json_object(path: str | Path, what: str) -> JsonObject:
    """Return the object in a JSON file. Arguments and errors are those of `read_text`."""
    try:
        content = parse_json(read_text(path, what))
    except ValueError as error:
        raise UserError(f"{what} {json_problem(error, path)}. Copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {str(path)!r} is not a JSON object. Copy it again.")
    return content
