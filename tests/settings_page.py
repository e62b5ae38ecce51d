"""docs/settings.md: one table per section of params.yaml.

Type and limits come from the params classes. Default and section text come from params.yaml. The meaning is the
docstring of the field, or the comment in params.yaml if the field has no docstring: no sentence is written twice.

Run: ``python -m tests.settings_page --write``
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lora_dag.core import params
from lora_dag.core.param_kinds import models
from lora_dag.core.params import SECTIONS, Params, params_class, read_yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/settings.md"
HEAD = """\
# Settings

Every setting of `params.yaml`, by section. `dvc exp run -S section.key=value` changes one for an experiment,
`lora-dag check --set section.key=value` checks a value without a run. An unknown key or a value of another type stops
the first stage with one line per problem. Do not edit this page: `python -m tests.settings_page --write` makes it from
the params classes and the comments of `params.yaml`.
"""
NUMBERS = {int: "integer", float: "number"}
MAX_DEFAULT = 60
"""Characters of a default; a longer one is described by its length."""


def page() -> str:
    """Return the content of docs/settings.md."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    tree = read_yaml(ROOT / "params.yaml")
    parts = [HEAD]
    for section in SECTIONS:
        cls = params_class(section)
        where = f" In code: `{cls.__name__}` in `{source_of(cls)}`."
        parts.append(f"## {section}\n\n{section_text(text, section)}{where}\n")
        table = rows(cls, tree[section], comments(text, section))
        parts.append(
            "\n".join(["| setting | default | type and limits | meaning |", "| --- | --- | --- | --- |", *table])
        )
        parts[-1] += "\n"
    return "\n".join(parts)


def rows(cls: type[Params], values: dict[str, Any] | None, notes: dict[str, str], prefix: str = "") -> Iterator[str]:
    """Yield a row per field; the fields of a params class inside a field follow it."""
    for name, field in cls.model_fields.items():
        key = prefix + name
        inner = next(models(field.annotation), None)
        assert inner is None or issubclass(inner, Params)
        default = values[name] if values is not None else field.default
        meaning = docstrings(cls).get(name) or sentence(notes.get(key) or notes.get(name) or "")
        assert meaning, f"{cls.__name__}.{name} has neither a docstring nor a comment in params.yaml"
        nullable = values is not None and default is None
        expands = inner is not None and isinstance(default, dict) and field.annotation is inner
        cells = [f"`{key}`", "below" if expands else as_default(default), kind(field, nullable), meaning]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        if inner:
            in_list = any(get_origin(each) is list for each in (field.annotation, *get_args(field.annotation)))
            in_dict = any(get_origin(each) is dict for each in (field.annotation, *get_args(field.annotation)))
            below = f"{key}[]." if in_list else f"{key}.*." if in_dict else f"{key}."
            yield from rows(inner, default if expands else None, notes, below)


def as_default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_DEFAULT:
        return f"{len(value)} {'prompts' if isinstance(value, list) else 'dataset'}, see params.yaml"
    if isinstance(value, str) and value and re.fullmatch(r"[\w./]+", value):
        text = value
    return f"`{text}`"


def kind(field: FieldInfo, nullable: bool = False) -> str:
    """Return a field's type and limits in words, such as ``integer, 1 to 1024, or null``."""
    text = annotation_of(field.annotation, field.metadata)
    return f"{text}, or `null`" if nullable and "`null`" not in text else text


def annotation_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        flat = [each for item in extra for each in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return annotation_of(inner, [*flat, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [each for each in get_args(annotation) if each is not type(None)]
        texts = [annotation_of(each, metadata if len(members) == 1 else ()) for each in members]
        texts += ["`null`"] if type(None) in get_args(annotation) else []
        return ", or ".join(texts)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list{length(metadata)}: {annotation_of(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"mapping of name to {annotation_of(get_args(annotation)[1])}"
    if annotation is bool:
        return "`true`, `false`"
    if annotation in NUMBERS:
        return NUMBERS[annotation] + limits(metadata)
    if annotation is str:
        return (
            "path" if any(each.func in PATH_RULES for each in metadata if isinstance(each, AfterValidator)) else "text"
        )
    if annotation is Any:
        return "any value"
    assert issubclass(annotation, Params), annotation
    return "mapping"


PATH_RULES = {
    each.func
    for kind in (params.LocalPath, params.HomePath)
    for each in get_args(kind)[1:]
    if isinstance(each, AfterValidator)
}


def limits(metadata: Sequence[Any]) -> str:
    """Return the limits of a number: ``, 1 to 8``, ``, above 0``, ``, 0 to below 1``."""
    low = next((digits(each.ge) for each in metadata if isinstance(each, annotated_types.Ge)), None)
    above = next((digits(each.gt) for each in metadata if isinstance(each, annotated_types.Gt)), None)
    high = next((digits(each.le) for each in metadata if isinstance(each, annotated_types.Le)), None)
    below = next((digits(each.lt) for each in metadata if isinstance(each, annotated_types.Lt)), None)
    start = low if low is not None else f"above {above}" if above is not None else None
    end = high if high is not None else f"below {below}" if below is not None else None
    if start and end:
        return f", {start} to {end}"
    if low is not None:
        return f", {low} or more"
    return f", {start or end}" if start or end else ""


def digits(value: Any) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,}"


def length(metadata: Sequence[Any]) -> str:
    low = next((each.min_length for each in metadata if isinstance(each, annotated_types.MinLen)), 0)
    high = next((each.max_length for each in metadata if isinstance(each, annotated_types.MaxLen)), None)
    if low == high:
        return f" of exactly {low}"
    return f" of {low} or more" if low else ""


@cache
def docstrings(cls: type[Params]) -> dict[str, str]:
    """Return the docstrings of a class's fields in one line each, with single backticks."""
    (node,) = (
        node
        for node in ast.parse((ROOT / source_of(cls)).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    found = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            text = after.value.value if isinstance(after.value, ast.Constant) else ""
            if isinstance(text, str) and text:
                found[field.target.id] = " ".join(text.replace("``", "`").split())
    return found


def source_of(cls: type[Params]) -> str:
    return Path(inspect.getfile(cls)).resolve().relative_to(ROOT).as_posix()


def section_text(text: str, section: str) -> str:
    """Return the comment lines above a section of params.yaml as one paragraph."""
    match = re.search(rf"((?:^# .*\n)+){section}:", text, re.MULTILINE)
    assert match, f"params.yaml: section {section} has no comment above it"
    return " ".join(line.removeprefix("# ") for line in match[1].splitlines())


def comments(text: str, section: str) -> dict[str, str]:
    """Return the comments of a section's keys: ``key`` and, for a key inside another one, ``outer.key``."""
    match = re.search(rf"^{section}:.*\n((?:[ ].*\n)+)", text, re.MULTILINE)
    assert match, section
    found, outer = {}, ""
    for line in match[1].splitlines():
        part = re.match(r"( +)([a-z_0-9]+):(.*?)\s+# (.*)$", line)
        if part:
            indent, key, _, comment = part.groups()
            outer = outer if len(indent) > 2 else key
            found[key if len(indent) == 2 else f"{outer}.{key}"] = comment
    return found


def sentence(comment: str) -> str:
    """Return a comment as a sentence: with a capital, unless it starts with a name, and a period."""
    if comment.split(" ")[0].isalpha():
        comment = comment[0].upper() + comment[1:]
    return comment and comment.removesuffix(".") + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/settings.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
