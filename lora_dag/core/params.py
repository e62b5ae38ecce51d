"""One strict reader of params.yaml for every stage, DVC and Snakemake alike.

YAML 1.2 (``1e-4`` and ``1e-05`` are numbers, ``no`` is a string), no unknown key, no NaN. Each stage's params class
stands beside the stage; SECTIONS names them all, so that a typo in any section stops the first stage, not the last.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML, YAMLError

from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Modules are named, not imported: a stage's code must not depend on another stage's.
SECTIONS = {
    "model": "lora_dag.core.params:ModelParams",
    "dataset": "stages.prepare.params:DatasetParams",
    "cache": "stages.cache_latents.params:CacheParams",
    "lora": "lora_dag.adapters.params:LoraParams",
    "train": "stages.train.params:TrainParams",
    "validate": "stages.validate.params:ValidateParams",
    "export": "stages.export.params:ExportParams",
    "report": "stages.report.params:ReportParams",
    "runtime": "lora_dag.core.params:RuntimeParams",
    "sweep": "lora_dag.sweeps.grid:SweepParams",
}

FAMILIES = tuple(
    sorted(
        path.stem
        for path in (Path(__file__).parents[1] / "families").glob("*.py")
        if "\nPIPELINE = " in path.read_text(encoding="utf-8")
    )
)
"""Files of lora_dag/families that are one model family each. They are listed, not imported: nothing above is."""
if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[FAMILIES]
Dtype = Literal["float32", "bfloat16", "float16"]


def one_spelling(path: str) -> str:
    """Of ``data/raw``, ``data/raw/`` and ``./data/raw``.

    An address stays, for the message that refuses it, and so does what ``..`` may reach through a link.
    """
    return path if "://" in path or ".." in Path(path).parts else os.path.normpath(path)


def no_tilde(path: str) -> str:
    """DVC reads the text itself as a dependency, and knows no ``~``."""
    if path.startswith("~"):
        raise ValueError(f"got '{path}', which DVC takes for a folder named '~'; write {os.path.expanduser(path)}")
    return path


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(no_tilde), AfterValidator(one_spelling)]
HomePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A file that no stage lists as a dependency, so that its path may hold ``~``."""


class Params(BaseModel):
    """A section of params.yaml: frozen, strict, no unknown keys. Every field is required: defaults live in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def is_text(cls, value: Any) -> Any:
        """YAML's "\\ud800" is half a character, which no file can hold."""
        try:
            json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"holds {half}, half a surrogate pair; write the character itself") from None
        return value


class ModelParams(Params):
    """Section ``model``: the frozen base."""

    family: FamilyName
    """File in lora_dag/families/ that knows the model."""
    pretrained: LocalPath
    """Folder in the diffusers layout, or what ``lora_dag/bases`` makes one of."""
    variant: str | None = Field(min_length=1)
    """Weight file variant, such as fp16 for ``*.fp16.safetensors``."""
    dtype: Dtype
    """Dtype of the frozen weights and of autocast; adapters are always float32."""


class RuntimeParams(Params):
    """Section ``runtime``: where and how a run is carried out. No stage lists it; it changes no result."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    """auto takes a GPU when there is one."""
    num_threads: int | None = Field(ge=1, le=1024)
    """CPU threads, null for all cores. Results differ in the last bits between thread counts."""
    num_processes: int = Field(ge=1, le=1024)
    """Processes that share a training's micro-batches, one per GPU, on all machines; the bytes stay the same."""
    num_machines: int = Field(ge=1, le=1024)
    """Machines that the processes are spread over evenly."""
    log_every_n_steps: int = Field(ge=1)
    """Steps of train between log lines where there is no terminal."""
    tracker: Literal["none", "tensorboard", "wandb", "dvclive"]
    """Tracker that accelerate writes to, under logs/."""

    @model_validator(mode="after")
    def is_even(self) -> RuntimeParams:
        if self.num_processes % self.num_machines:
            raise ValueError(f"num_machines {self.num_machines} does not divide num_processes {self.num_processes}")
        return self


T = TypeVar("T", bound=Params)


class Config:
    """A validated params file. ``config.section(TrainParams)`` returns one section as its class."""

    def __init__(self, sections: dict[str, Params], source: Path) -> None:
        self.sections = sections
        self.source = source

    def section(self, cls: type[T]) -> T:
        return next(section for section in self.sections.values() if isinstance(section, cls))

    def replaced(self, section: Params) -> Config:
        """With another section of this one's class."""
        other = {name: section if type(own) is type(section) else own for name, own in self.sections.items()}
        return Config(other, self.source)


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check the whole file, with ``section.key=value`` overrides applied.

    Raises:
        UserError: every problem found, one line each.
    """
    return check(overridden(path, overrides), path)


def overridden(path: Path, overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """The file's tree with ``section.key=value`` overrides applied, unchecked."""
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return tree


def check(tree: dict[str, Any], path: Path) -> Config:
    """Every section as its class; ``path`` is named in the messages.

    Raises:
        UserError: every problem found, one line each.
    """
    problems = [unknown(str(path), str(key), SECTIONS) for key in tree if key not in SECTIONS]
    problems += [f"{path}: section '{name}' is missing" for name in SECTIONS if name not in tree]
    sections = {}
    for name in SECTIONS:
        if name in tree:
            try:
                sections[name] = check_section(path, name, tree[name])
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return Config(sections, path)


def check_section(path: Path, name: str, values: Any) -> Params:
    """One section as its class.

    Raises:
        UserError: its problems, one line each.
    """
    try:
        return params_class(name).model_validate(values)
    except ValidationError as error:
        raise UserError(*explain(path, name, params_class(name), error)) from None


def params_class(section: str) -> type[Params]:
    module, cls = SECTIONS[section].split(":")
    started = sys.modules["__main__"]  # `python -m stages.NAME` runs as __main__; imported again, its class is another
    if getattr(getattr(started, "__spec__", None), "name", None) == module:
        return getattr(started, cls)
    return getattr(importlib.import_module(module), cls)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping of sections.

    Raises:
        UserError: no such file, no YAML, a key twice, or no mapping.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this from the repository's root or pass --params") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {getattr(error, 'problem', None) or 'no valid YAML'}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-99-99; brackets without end
        raise UserError(f"{path}: no valid YAML ({error}); put text in quotes") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in place; the value is read as YAML 1.2, as DVC does with ``-S``."""
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"--set {override}: expected SECTION.KEY=VALUE, such as lora.rank=16")
    if not isinstance(tree.get(section), dict):
        raise UserError(unknown("--set " + override, section, SECTIONS))
    tree[section][name] = read_value(key, value)


def read_value(key: str, value: str) -> Any:
    """The value of an override.

    Raises:
        UserError: YAML reads less than all of it, or another type where the setting is text; the form that works.
    """
    cure = f'write "{key}={quoted(value.strip())}"' if only_text(kind_of(key)) else "put each text in quotes of its own"
    try:
        node, read = YAML(typ="safe", pure=True).compose(value), YAML(typ="safe", pure=True).load(value)
    except (YAMLError, ValueError, RecursionError) as error:
        why = "'#' begins a comment in YAML" if "#" in value else "the value is no valid YAML"
        said = getattr(error, "problem", None)
        raise UserError(f"--set {key}={value}: {why}{f' ({said})' if said else ''}; {cure}") from None
    if value[node.end_mark.index if node else 0 :].strip():
        raise UserError(f"--set {key}={value}: '#' begins a comment in YAML; {cure}")
    if only_text(kind_of(key)) and not isinstance(read, str) and not (read is None and takes_null(kind_of(key))):
        raise UserError(f"--set {key}={value}: YAML reads {json.dumps(read, default=str)}, which is no text; {cure}")
    if read == "" and value.strip(" '\""):
        raise UserError(f"--set {key}={value}: YAML reads an empty text; {cure}")
    return read


def quoted(text: str) -> str:
    """As YAML and DVC's -S both read it, between double quotes of a shell."""
    as_yaml = "'" + text.replace("'", "''") + "'"
    if "'" in text and '"' not in text and "\\" not in text:
        as_yaml = f'"{text}"'
    return re.sub(r'([\\"$`])', r"\\\1", as_yaml)


def explain(path: Path, section: str, cls: type[Params], error: ValidationError) -> list[str]:
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


def kind_of(key: str) -> Any:
    """Annotation of ``section.key``; Any where there is no such setting, which is refused later."""
    section, _, name = key.partition(".")
    field = params_class(section).model_fields.get(name) if section in SECTIONS else None
    return field.annotation if field else Any


def members(kind: Any) -> list[Any]:
    """The types of a union, or the one type; without what Annotated adds."""
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [each for member in get_args(kind) for each in members(member)]
    return [kind]


def inside(kind: Any, key: str | None = None) -> Any:
    """Type of a list's items; with ``key``, of a mapping's values or of a params class's field."""
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
    """Whether every scalar of it but null is text: a free one, or a choice of names."""
    scalars = [m for m in members(kind) if get_origin(m) not in (list, dict) and m is not type(None)]
    choices = [name for m in scalars if get_origin(m) is Literal for name in get_args(m)]
    return (
        bool(scalars)
        and all(m is str or get_origin(m) is Literal for m in scalars)
        and all(isinstance(name, str) for name in choices)
    )


def only_text(kind: Any) -> bool:
    """Free text, or null."""
    return set(members(kind)) <= {str, type(None)}


def takes_null(kind: Any) -> bool:
    return type(None) in members(kind)


def is_union(annotation: Any) -> bool:
    """Of several types; one type or null is none."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    return len([member for member in members if member is not type(None)]) > 1


def innermost(cls: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The class that a location such as ``("subsets", 0, "path")`` leads into."""
    for part in location:
        field = cls.model_fields.get(str(part))
        cls = next(models(field.annotation), cls) if field else cls
    return cls


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The params classes inside an annotation such as ``list[Subset] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


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
