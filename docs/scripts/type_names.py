"""Types of pydantic's fields as users write their values."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from typing_extensions import TypeAliasType

NAMES: Mapping[object, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    types.NoneType: "null",
}


def type_name(annotation: object) -> str:
    """Such as `integer`, `text or null`, `list of number`, or the choices of a Literal."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(str(choice) for choice in arguments)
    inner = [type_name(argument) for argument in arguments]
    if origin is Annotated:
        return inner[0]
    if origin in {Union, types.UnionType}:
        return " or ".join(dict.fromkeys(inner))
    if origin is not None:
        return f"mapping of {inner[0]} to {inner[1]}" if issubclass(origin, Mapping) else f"list of {inner[0]}"
    if isinstance(annotation, TypeAliasType):  # JsonValue
        return "JSON"
    return NAMES.get(annotation, str(getattr(annotation, "__name__", annotation)))


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The pydantic models that occur in a type."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in models_in(argument)]
