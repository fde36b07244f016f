"""Components of the configuration: dataclasses that pydantic validates.

A component declares each key once: its type, default value and bounds in a field, and its meaning
in the docstring below the field. `asrllm.conf.write` makes the YAML files from these declarations.
"""

import dataclasses
import json
import re
import threading
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import ConfigDict, Field, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from asrllm.config_keys import unknown_key
from asrllm.defaults import MAX_WORKERS
from asrllm.errors import UserError, nearest

T = TypeVar("T")
# keys that are paths; of the other paths, `~` is expanded
PATH_KEYS = (
    "exp_dir",
    "init_from",
    "train_data_config",
    "valid_data_config",
    "test_data_config",
    "deepspeed_config",
    "shards",
    "manifest",
)
# Values are not converted, except an integer to a float: 1.5 steps or the text "no" are mistakes.
SETTINGS = ConfigDict(strict=True, allow_inf_nan=False, validate_by_name=True)
Ratio = Annotated[float, Field(ge=0, le=1)]
RatioBelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
TimeLimit = Annotated[float, Field(ge=0, lt=threading.TIMEOUT_MAX)]  # seconds
WorkerCount = Annotated[int, Field(ge=0, le=MAX_WORKERS)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# how to respect a bound, by pydantic's type of the error
BOUND_FIXES = {
    "greater_than": "Use a value above {gt}.",
    "greater_than_equal": "Use a value of at least {ge}.",
    "less_than": "Use a value below {lt}.",
    "less_than_equal": "Use a value of at most {le}.",
    "finite_number": "Use a finite number.",
    "too_short": "Give at least {min_length} items.",
    "too_long": "Give at most {max_length} items.",
    "string_pattern_mismatch": "It must match {pattern}.",
}
# what a value must be, by the beginning of pydantic's type of the error, for example "int_parsing"
EXPECTED_TYPES = {
    "int": "an integer",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a group of keys",
    "dataclass": "a group of keys",
    "none": "null",
    "literal": "one of its choices",
}
# names of JSON types, by the beginning of pydantic's type of the error, or by Python's type
JSON_TYPES = EXPECTED_TYPES | {
    "dict": "an object",
    "model": "an object",
    "path": "a string",
    "str": "a string",
}


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def component(cls: type[T]) -> type[T]:
    """Make a class a component: a frozen dataclass with keyword arguments, validated by pydantic.

    Checks of several keys together belong in `__post_init__`, and raise UserError.
    """
    decorate = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=SETTINGS)
    return decorate(cls)  # type: ignore[return-value]


def build(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    where: str = "",
    group: str = "",
    known: Collection[str] = (),
) -> T:
    """Build a component from nested mappings.

    Args:
        cls: the component.
        values: values of its keys. Missing ones have their defaults.
        where: the place of the values, which messages put before a key: "FILE, entry 3: ".
        group: prefix of the keys: "trainer.".
        known: all keys of the configuration; by default those of the component.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type or is out of bounds.
    """
    hints = keys_and_types(cls)
    known = known or all_keys(cls, group)
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(f"{group}{key}", known, where)
        inner = nested_component(hints[key])
        if inner is not None and isinstance(value, Mapping):
            value = build(inner, value, where=where, group=f"{group}{key}.", known=known)
        if key in PATH_KEYS:
            _check_expanded(value, f"{where}{group}{key}")
        given[key] = value
    try:
        return cls(**given)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
    raise _as_user_error(hints, given, problems, where, group)


def _check_expanded(value: object, key: str) -> None:
    """Raise UserError for a path with ~ or $NAME, which would be a directory of that name."""
    if isinstance(value, str) and (found := re.match(r"(~|\$\w+|\$\{\w+\})(?=/)|~$", value)):
        raise UserError(
            f"{key}={value!r} begins with {found.group()!r}, which only a shell expands, and only "
            "at the beginning of a word. Write the whole path."
        )


def keys_and_types(cls: type) -> dict[str, Any]:
    """Return the type hint of every key of a component. A key is its field's alias, if any."""
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    hints = typing.get_type_hints(cls)
    return {str(field.validation_alias or name): hints[name] for name, field in fields.items()}


def all_keys(cls: type, group: str = "") -> list[str]:
    """Return the keys of a component and of the components in it, as dotted paths."""
    keys: list[str] = []
    for key, hint in keys_and_types(cls).items():
        keys.append(group + key)
        inner = nested_component(hint)
        if inner is not None:
            keys += all_keys(inner, f"{group}{key}.")
    return keys


def nested_component(hint: Any) -> type | None:
    """Return the component that a type hint is, or has as an alternative; else None."""
    for alternative in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(alternative) and isinstance(alternative, type):
            return alternative
    return None


def _as_user_error(
    hints: Mapping[str, Any],
    given: Mapping[str, Any],
    problems: Sequence[ErrorDetails],
    where: str,
    group: str,
) -> UserError:
    """Return an error about the first of pydantic's problems.

    Args:
        hints: types of the component's keys.
        given: values of the component's keys.
        problems: what pydantic found. A value that may have several types has one for each.
        where: see `build`.
        group: see `build`.
    """
    first = problems[0]
    kind = first["type"]
    value = first["input"]
    key = str(first["loc"][0])
    name = f"{where}{group}{key}" + _path_within(given.get(key), first["loc"][1:])
    if kind == "missing":
        return _missing_error(first, where, group, name)
    choices = [str(choice) for choice in _choices(hints[key])]
    if kind == "literal_error" and len(problems) == 1:
        hint = nearest("" if value is None else str(value), choices)
        return UserError(f"{name}={shown(value)} is not a valid choice. {hint}")
    if kind == "string_too_short":
        return UserError(f"{name} is empty. Set it, or remove it.")
    fix = bound_fix(first)
    if fix is not None:
        if type(None) in typing.get_args(hints[key]):
            fix = f"{fix.removesuffix('.')}, or null."
        return UserError(f"{name}={shown(value)} is out of range. {fix}")
    expected: list[str] = []
    for problem in problems:
        if problem["loc"][0] == key:
            prefix = problem["type"].partition("_")[0]
            kinds = EXPECTED_TYPES | {"literal": " or ".join(choices)}
            expected.append(kinds.get(prefix, "another type"))
    alternatives = " or ".join(dict.fromkeys(expected))
    message = f"{name}={shown(value)} has the wrong type. Expected: {alternatives}."
    inner = nested_component(hints[key])
    if inner is not None:
        message += f" Its keys are: {', '.join(keys_and_types(inner))}."
    return UserError(message)


def bound_fix(problem: ErrorDetails) -> str | None:
    """Return how to respect the bound that a value violates, or None for another problem."""
    fix = BOUND_FIXES.get(problem["type"])
    if fix is None:
        return None
    limits = problem.get("ctx", {})
    return fix.format(**{name: _plain(limit) for name, limit in limits.items()})


def _path_within(value: Any, parts: Sequence[int | str]) -> str:
    """Return the path to an entry of a value, like "[0].key".

    Args:
        value: the value.
        parts: positions, keys, and pydantic's names of the types that a value may have, which are
            left out.
    """
    path = ""
    for part in parts:
        if isinstance(part, int) and isinstance(value, Sequence) and part < len(value):
            path += f"[{part}]"
            value = value[part]
        elif isinstance(value, Mapping) and part in value:
            path += f".{part}"
            value = value[part]
    return path


def _missing_error(problem: ErrorDetails, where: str, group: str, name: str) -> UserError:
    """Return an error about a missing key, or about an item that a tuple lacks."""
    key, *parts = problem["loc"]
    if not parts:
        return UserError(f"{where}missing key {group + str(key)!r}. Add it.")
    last = parts[-1]
    if isinstance(last, int):
        return UserError(
            f"{name}={shown(problem['input'])} has too few items. Give at least {last + 1} items."
        )
    return UserError(f"{name} has no key {last!r}. Add it.")


def shown(value: object) -> str:
    """Return a value as a user writes it in YAML: true and null, not True and None."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value)


def _plain(limit: object) -> object:
    """Return a limit as a user would write it: 0 instead of 0.0."""
    if isinstance(limit, float) and limit.is_integer():
        return int(limit)
    return limit


def _choices(hint: Any) -> list[object]:
    """Return the values of the Literal that a type hint is, or has as an alternative."""
    for alternative in (hint, *typing.get_args(hint)):
        if typing.get_origin(alternative) is Literal:
            return list(typing.get_args(alternative))
    return []
