"""Questions about annotations of params classes: is it text, does it accept null, which class is inside."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def members(kind: Any) -> list[Any]:
    """Return the types of a union, or the one type, without Annotated."""
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [each for member in get_args(kind) for each in members(member)]
    return [kind]


def inside(kind: Any, key: str | None = None) -> Any:
    """Return the type of a list's items; with ``key``, the type of a mapping's values or of a class's field."""
    for member in members(kind):
        if key is None and get_origin(member) is list:
            return get_args(member)[0]
        if key is not None and get_origin(member) is dict:
            return get_args(member)[1]
        if key is not None and isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(key)
            return field.annotation if field else Any
    return Any


def is_text(kind: Any) -> bool:
    """Return whether each scalar but null is text: free text or a choice of names."""
    scalars = [m for m in members(kind) if get_origin(m) not in (list, dict) and m is not type(None)]
    choices = [name for m in scalars if get_origin(m) is Literal for name in get_args(m)]
    return (
        bool(scalars)
        and all(m is str or get_origin(m) is Literal for m in scalars)
        and all(isinstance(name, str) for name in choices)
    )


def is_free_text(kind: Any) -> bool:
    """Return whether a value is free text or null."""
    return set(members(kind)) <= {str, type(None)}


def accepts_null(kind: Any) -> bool:
    return type(None) in members(kind)


def is_union(annotation: Any) -> bool:
    """Return whether there are several types beside null."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    return len([member for member in members if member is not type(None)]) > 1


def innermost(cls: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the class that has the field of a location such as ``("subsets", 0, "path")``."""
    for part in location:
        field = cls.model_fields.get(str(part))
        cls = next(models(field.annotation), cls) if field else cls
    return cls


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the params classes inside an annotation such as ``list[Subset] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)
