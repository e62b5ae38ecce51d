"""Errors of pydantic as problems, one line each: file, dotted key, value, what is expected."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lora_dag.core.console import Problem
from lora_dag.core.labels import as_yaml
from lora_dag.core.param_kinds import innermost, is_union

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


LENGTH = re.compile(r"should have (at (?:least|most) (\d+) \w+)")


def explain(section: str, cls: type[BaseModel], error: ValidationError, place: Callable[[str], str]) -> list[Problem]:
    """Return one problem per validation error: place, value, what is expected.

    Args:
        place: function that returns the place of a dotted key, such as ``params.yaml lora.rank``.
    """
    problems: list[Problem] = []
    for _, alternatives in itertools.groupby(error.errors(), lambda detail: up_to_union(cls, detail["loc"])):
        details = decisive(list(alternatives))
        own_key = details[0].get("ctx", {}).get("key")
        key = ".".join([section, *key_names(cls, details[0]["loc"]), *([own_key] if own_key else [])])
        problems.append(explain_one(details, key, cls, place(key)))
    return problems


def explain_one(details: list[ErrorDetails], key: str, cls: type[BaseModel], place: str) -> Problem:
    """Return the problem of one setting.

    Args:
        details: pydantic's errors of it, one for each member of a union.
        place: where the setting is, with its key.
    """
    detail = details[0]
    inner = innermost(cls, detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_setting(place.removesuffix(key).rstrip(), key, inner.model_fields)
    if detail["type"] == "missing":
        return Problem("missing-setting", f"{place}: missing. {describe(inner, str(detail['loc'][-1]))}")
    if detail["type"] == "model_type":
        example = ", ".join(f"{name}: ..." for name, field in inner.model_fields.items() if field.is_required())
        return Problem("wrong-type", f"{place}: got {as_yaml(detail['input'])}, but {{{example}}} is expected.")
    if detail["type"] == "value_error":
        return Problem("wrong-value", f"{place}: {detail['msg'].removeprefix('Value error, ')}")
    if detail["type"] == "problem":
        return Problem(detail["ctx"]["code"], f"{place}: {detail['msg']}")
    got, hint = f"{place}: got {as_yaml(detail['input'])}", nearest(details) or unquoted(detail)
    if detail["type"] == "string_pattern_mismatch" and (example := example_of(inner, detail["loc"])):
        return Problem("wrong-value", f"{got}, but a text such as {example} is expected.")
    return Problem("wrong-value", f"{got}{expected(details)}{hint}")


def expected(details: list[ErrorDetails]) -> str:
    """Return ``, but a valid integer is expected.``, or pydantic's own sentence where it is of another form."""
    start = "Input should be "
    if length := LENGTH.search(details[0]["msg"]):
        return f", but {length[1]} {'is' if length[2] == '1' else 'are'} expected."
    if not details[0]["msg"].startswith(start):
        return f". {details[0]['msg']}."
    accepted = " or ".join(detail["msg"].removeprefix(start) for detail in details)
    return f", but {'a value ' if accepted.startswith(('greater', 'less')) else ''}{accepted} is expected."


def example_of(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return the example of a field with a pattern, in quotes; empty if it has none."""
    field = next((cls.model_fields[str(part)] for part in reversed(location) if str(part) in cls.model_fields), None)
    return repr(field.examples[0]) if field and field.examples else ""


def decisive(alternatives: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return the error of the union's member that has the value's type; all errors, if no member has it."""
    deepest = max(len(detail["loc"]) for detail in alternatives)
    specific = [detail for detail in alternatives if len(detail["loc"]) == deepest]
    same_type = [d for d in specific if not d["type"].endswith("_type") and d["type"] != "literal_error"]
    return same_type[:1] or specific


def nearest(details: list[ErrorDetails]) -> str:
    """Return `` Did you mean cosine?`` for a misspelled choice."""
    choices = [name for d in details if d["type"] == "literal_error" for name in re.findall("'(.*?)'", d["msg"])]
    near = difflib.get_close_matches(str(details[0]["input"]), choices, n=2)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def unquoted(detail: ErrorDetails) -> str:
    """Return a hint for a text without quotes, which YAML reads as something else."""
    signs = {type(None): "'#' begins a comment", dict: "': ' makes a mapping"}
    sign = signs.get(type(detail["input"])) if detail["type"] == "string_type" else None
    return f" {sign} in YAML: put the text in quotes." if sign else ""


def key_names(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return names and indices of a location, without the tags that pydantic adds for members of a union."""
    names: list[str] = []
    parts = iter(location)
    for part in parts:
        names.append(str(part))
        field = cls.model_fields.get(str(part))
        if field and is_union(field.annotation):
            next(parts, None)
        cls = innermost(cls, (part,))
    return names


def up_to_union(cls: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a location up to the first union, whose members have one error each; the whole location without one."""
    for depth, part in enumerate(location, start=1):
        field = cls.model_fields.get(str(part))
        if field and is_union(field.annotation):
            return location[:depth]
        cls = innermost(cls, (part,))
    return location


def describe(cls: type[BaseModel], field: str) -> str:
    """Return what a field accepts, by its annotation."""
    kind = cls.model_fields[field].annotation if field in cls.model_fields else None
    choices = f"one of {json.dumps(get_args(kind))}" if get_origin(kind) is Literal else ""  # of an alias such as Dtype
    annotation = choices or str(cls.__annotations__.get(field, "")).replace("Literal", "one of ")
    return f"Expected {annotation}." if annotation else "Add it."


def unknown_setting(place: str, key: str, known: Any, noun: str = "setting") -> Problem:
    """Return ``params.yaml lora.rnak: unknown setting. Did you mean lora.rank?``"""
    parent, dot, name = key.rpartition(".")
    near = [f"{parent}{dot}{similar}" for similar in difflib.get_close_matches(name, list(known), n=2)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known {noun}s: {', '.join(known)}."
    return Problem("unknown-setting", f"{place} {key}: unknown {noun}. {hint}")
