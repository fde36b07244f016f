"""The keys of the components of the configuration with their defaults and meanings."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

import yaml

from asrllm.schema import keys_and_types, nested_component


def default_values(cls: type) -> dict[str, Any]:
    """Return the default value of every key of a component."""
    fields: dict[str, Any] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return {name: field.get_default() for name, field in fields.items()}


def values_of(group: Any) -> dict[str, Any]:
    """Return the values of a component in the order of its declaration."""
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and of the classes it inherits from.

    The description of a field whose meaning contains a constant precedes its docstring. A component
    in a field without either is described by the first line of its own docstring.
    """
    docs: dict[str, str] = {}
    for name, hint in keys_and_types(cls).items():
        inner = nested_component(hint)
        if inner is not None and inner.__doc__:
            docs[name] = inner.__doc__.partition("\n")[0].removesuffix(".")
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


def as_yaml_value(value: object) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, float) and 0 < value < 0.001:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa)}e{int(exponent)}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()
