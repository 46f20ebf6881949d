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
    if isinstance(annotation, TypeAliasType):
        return "JSON" if annotation.__name__ == "JsonValue" else type_name(annotation.__value__)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin in {Union, types.UnionType}:
        return " or ".join(dict.fromkeys(type_name(argument) for argument in arguments))
    if origin in {tuple, list, frozenset, set}:
        return f"list of {type_name(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return NAMES.get(annotation, str(getattr(annotation, "__name__", annotation)))


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The pydantic models that occur in a type."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in models_in(argument)]
