"""pydantic's errors in the project's words, one line each: file, dotted key, value, what is accepted."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lora_dag.core.param_kinds import innermost, is_union

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain(path: Path, section: str, cls: type[BaseModel], error: ValidationError) -> list[str]:
    """A validation error in the project's words: file, dotted key, value, what is accepted."""
    lines = []
    for _, alternatives in itertools.groupby(error.errors(), lambda detail: union(cls, detail["loc"])):
        details = decisive(list(alternatives))
        detail = details[0]
        key = ".".join([section, *place(cls, detail["loc"])])
        inner = innermost(cls, detail["loc"])
        if detail["type"] == "extra_forbidden":
            lines.append(unknown(str(path), key, inner.model_fields))
        elif detail["type"] == "missing":
            lines.append(f"{path} {key}: missing; {describe(inner, str(detail['loc'][-1]))}")
        elif detail["type"] == "model_type":
            example = ", ".join(f"{name}: ..." for name, field in inner.model_fields.items() if field.is_required())
            lines.append(f"{path} {key}: got {detail['input']!r}; expected {{{example}}}")
        elif detail["type"] == "value_error":
            lines.append(f"{path} {key}: {detail['msg'].removeprefix('Value error, ')}")
        else:
            accepted = [detail["msg"], *(other["msg"].removeprefix("Input should be ") for other in details[1:])]
            text = " or ".join(accepted)
            hint = nearest(details) or unquoted(detail)
            lines.append(f"{path} {key}: got {detail['input']!r}; {text[0].lower() + text[1:]}{hint}")
    return lines


def decisive(alternatives: list[ErrorDetails]) -> list[ErrorDetails]:
    """Of what the members of a union say: that of the one whose type the value has, else all of it."""
    deepest = max(len(detail["loc"]) for detail in alternatives)
    meant = [detail for detail in alternatives if len(detail["loc"]) == deepest]
    of_its_type = [d for d in meant if not d["type"].endswith("_type") and d["type"] != "literal_error"]
    return of_its_type[:1] or meant


def nearest(details: list[ErrorDetails]) -> str:
    """`` (near: cosine)`` for a choice that was misspelled."""
    choices = [name for d in details if d["type"] == "literal_error" for name in re.findall("'(.*?)'", d["msg"])]
    near = difflib.get_close_matches(str(details[0]["input"]), choices, n=2)
    return f" (near: {', '.join(near)})" if near else ""


def unquoted(detail: ErrorDetails) -> str:
    """What YAML made of a text without quotes."""
    signs = {type(None): "'#' begins a comment", dict: "': ' makes a mapping"}
    sign = signs.get(type(detail["input"])) if detail["type"] == "string_type" else None
    return f"; {sign} in YAML, so put the text in quotes" if sign else ""


def place(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names and indices of a location, without the tags by which pydantic tells the members of a union apart."""
    found: list[str] = []
    parts = iter(location)
    for part in parts:
        found.append(str(part))
        field = cls.model_fields.get(str(part))
        if field and is_union(field.annotation):
            next(parts, None)
        cls = innermost(cls, (part,))
    return found


def union(cls: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A location up to the first union, whose members each have their say; the whole location where there is none."""
    for depth, part in enumerate(location, start=1):
        field = cls.model_fields.get(str(part))
        if field and is_union(field.annotation):
            return location[:depth]
        cls = innermost(cls, (part,))
    return location


def describe(cls: type[BaseModel], field: str) -> str:
    kind = cls.model_fields[field].annotation if field in cls.model_fields else None
    choices = f"one of {json.dumps(get_args(kind))}" if get_origin(kind) is Literal else ""  # of an alias such as Dtype
    annotation = choices or str(cls.__annotations__.get(field, "")).replace("Literal", "one of ")
    return f"expected {annotation}" if annotation else "add it"


def unknown(where: str, key: str, known: Any) -> str:
    """``params.yaml lora.rnak: unknown key (near: rank)``"""
    near = difflib.get_close_matches(key.rpartition(".")[2], list(known), n=2)
    hint = f"near: {', '.join(near)}" if near else f"known: {', '.join(known)}"
    return f"{where} {key}: unknown key ({hint})"
