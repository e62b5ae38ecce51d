"""The one strict reader of params.yaml for every stage, DVC and Snakemake alike.

It reads YAML 1.2 (``1e-4`` and ``1e-05`` are numbers, ``no`` is a string), no unknown keys, no NaN. The params class of
each stage is defined beside the stage. SECTIONS lists all, so that a typo in any section stops the first stage.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from ruamel.yaml import YAML, YAMLError

from lora_dag.core.console import Problem, UserError
from lora_dag.core.labels import type_name
from lora_dag.core.param_errors import explain, unknown_setting
from lora_dag.core.param_kinds import accepts_null, is_free_text
from lora_dag.core.setting_problem import setting_problem

# Modules are named, not imported: the code of a stage must not depend on the code of another stage.
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
"""Files of lora_dag/families that are one model family each. They are listed, not imported."""
if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[FAMILIES]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "fp8", "nf4"]


def normalize_path(path: str) -> str:
    """Return one spelling of ``data/raw``, ``data/raw/`` and ``./data/raw``.

    A URL is unchanged, for the message that rejects it. So is a path with ``..``, which may lead through a link.
    """
    return path if "://" in path or ".." in Path(path).parts else os.path.normpath(path)


def reject_tilde(path: str) -> str:
    """Reject ``~``: DVC reads the text itself as a dependency and does not expand it."""
    if path.startswith("~"):
        text = f"got '{path}', but DVC does not expand '~'. Write {os.path.expanduser(path)}."
        raise setting_problem("path-with-tilde", text)
    return path


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(reject_tilde), AfterValidator(normalize_path)]


def reject_unreadable_by_dvc(path: str) -> str:
    """Reject a base model that DVC would look for in another place: dvc.yaml names it relative to the clone."""
    if path.startswith("~"):
        raise setting_problem("path-with-tilde", f"got '{path}', but DVC does not expand '~'. {link_into_clone(path)}")
    if any(mark in path for mark in "?#"):
        text = f"got '{path}', but DVC cannot read a path with '?' or '#'. Rename the folder."
        raise setting_problem("base-path-character", text)
    if os.path.isabs(path) and "DVC_STAGE" in os.environ:
        text = f"got '{path}', but DVC finds a base model only below the clone. {link_into_clone(path)}"
        raise setting_problem("base-path-absolute", text)
    return path


def link_into_clone(path: str) -> str:
    """Return the sentence on how DVC can find a base model that is outside of the clone."""
    name = f"data/{Path(path).name}"
    return f"Run `ln -s {os.path.expanduser(path)} {name}` and set {name}."


BasePath = Annotated[str, Field(min_length=1), AfterValidator(reject_unreadable_by_dvc), AfterValidator(normalize_path)]
HomePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A file that no stage lists as a dependency. Its path may have ``~``."""


@dataclass(frozen=True)
class Origin:
    """The file and the overrides that settings come from."""

    path: Path = Path("params.yaml")
    overrides: Sequence[str] = ()
    """``section.key=value`` of ``--set``."""

    def place(self, key: str) -> str:
        """Return the place of a key or a section for a message: ``params.yaml lora.rank`` or ``--set lora.rank``."""
        given = [f"{override.partition('=')[0]}." for override in self.overrides]
        is_given = any(f"{key}.".startswith(name) or name.startswith(f"{key}.") for name in given)
        return f"{'--set' if is_given else self.path} {key}"


class Params(BaseModel):
    """A section of params.yaml: frozen, strict, no unknown keys. Every field is required: defaults live in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    ADDED: ClassVar[Mapping[str, Any]] = {}
    """Setting that earlier versions lack -> the value that acts as they did. Records leave out such values, so that
    the same results have the same bytes and keys."""

    @model_serializer(mode="wrap")
    def leave_out_added(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = object()
        return {name: value for name, value in serialize(self).items() if self.ADDED.get(name, absent) != value}

    @field_validator("*", mode="before")
    @classmethod
    def reject_half_characters(cls, value: Any) -> Any:
        """Reject YAML's "\\ud800", half a character, which cannot be written to a file."""
        try:
            json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            text = f"got {half}, which is half a surrogate pair. Write the character itself."
            raise setting_problem("half-character", text) from None
        return value

    def setting(self, key: str) -> str:
        """Return the place of a setting for a message: the file that was read and the dotted key.

        ``params.setting("rank")`` is ``params.yaml lora.rank``, ``runs/.params/a.yaml lora.rank`` in a sweep, or
        ``--set lora.rank``. A key that begins with another section, such as ``dataset.crop``, stays as it is.
        """
        names = {path.partition(":")[2]: name for name, path in SECTIONS.items()}
        section = "" if key.partition(".")[0] in SECTIONS else f"{names[type(self).__name__]}."
        return vars(self).get("_origin", Origin()).place(f"{section}{key}")


class ModelParams(Params):
    """Section ``model``: the frozen base model."""

    family: FamilyName
    """Model family: name of a file in lora_dag/families."""
    pretrained: BasePath
    """Folder in the diffusers layout, folder with one .safetensors checkpoint, or YAML file that pins a model of
    the Hub (``lora_dag/bases``)."""
    variant: str | None = Field(min_length=1)
    """Variant of the weight files, such as fp16 for ``*.fp16.safetensors``."""
    dtype: Dtype
    """Data type of the frozen weights and of autocast. Adapters are always float32."""
    quantization: Quantization | None
    """Form in which the denoiser's frozen weights are kept in memory (``families/quantized.py``); null: as they are."""

    ADDED = {"quantization": None}

    @property
    def quantization_record(self) -> dict[str, str]:
        """Entry of records on which results depend; empty for null, as in records of versions without the setting."""
        return {"quantization": self.quantization} if self.quantization else {}


class RuntimeParams(Params):
    """Section ``runtime``: device, threads and processes. It is no dependency of a stage and changes no result."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    """Device of all stages. auto: a GPU if there is one."""
    num_threads: int | None = Field(ge=1, le=1024)
    """CPU threads. null: all cores. The last bits of results depend on the number of threads."""
    num_processes: int = Field(ge=1, le=1024)
    """Training processes on all machines, one per GPU. The result is bit-identical for every number."""
    num_machines: int = Field(ge=1, le=1024)
    """Machines that have equal numbers of the processes."""
    log_every_n_steps: int = Field(ge=1)
    """Training steps between log lines, where there is no terminal."""
    tracker: Literal["none", "tensorboard", "wandb", "dvclive"]
    """Tracker that accelerate writes to, in logs/."""

    @model_validator(mode="after")
    def is_even(self) -> RuntimeParams:
        if self.num_processes % self.num_machines:
            text = f"got {self.num_processes}, which is not a multiple of num_machines ({self.num_machines})"
            raise setting_problem("uneven-processes", f"{text}. Write a multiple of it.", "num_processes")
        return self


T = TypeVar("T", bound=Params)
NULLS = ("", "null", "Null", "NULL", "~")
"""Spellings of null in YAML."""


class Config:
    """A validated params file. ``config.section(TrainParams)`` returns one section as its class.

    Attributes:
        source: file that was read.
        tree: its content with overrides applied, before validation.
    """

    def __init__(self, sections: dict[str, Params], source: Path, tree: Mapping[str, Any] | None = None) -> None:
        self.sections = sections
        self.source = source
        self.tree = tree or {}

    def section(self, cls: type[T]) -> T:
        return next(section for section in self.sections.values() if isinstance(section, cls))

    def replaced(self, section: Params) -> Config:
        """Return a copy in which the section of the same class is replaced."""
        other = {name: section if type(own) is type(section) else own for name, own in self.sections.items()}
        return Config(other, self.source, self.tree)


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check the whole file, with ``section.key=value`` overrides applied.

    Raises:
        UserError: all problems, one line each.
    """
    return check(read_with_overrides(path, overrides), Origin(path, overrides))


def read_with_overrides(path: Path, overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Return the content of the file with ``section.key=value`` overrides applied, unchecked."""
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return tree


def check(tree: dict[str, Any], origin: Origin) -> Config:
    """Return every section as its class.

    Args:
        origin: file and overrides that the tree was read from, for messages.

    Raises:
        UserError: all problems, one line each.
    """
    path = origin.path
    problems = [unknown_setting(str(path), str(key), SECTIONS, "section") for key in tree if key not in SECTIONS]
    missing = [name for name in SECTIONS if name not in tree]
    problems += [Problem("missing-section", f"{path}: section '{name}' is missing. Add it.") for name in missing]
    sections = {}
    for name in SECTIONS:
        if name in tree:
            try:
                sections[name] = check_section(origin, name, tree[name])
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return Config(sections, path, tree)


def check_section(origin: Origin, name: str, values: Any) -> Params:
    """Return one section as its class.

    Raises:
        UserError: the problems of the section, one line each.
    """
    try:
        params = params_class(name).model_validate(values)
    except ValidationError as error:
        raise UserError(*explain(name, params_class(name), error, origin.place)) from None
    vars(params)["_origin"] = origin  # no field, so that sections of two files with the same values are equal
    return params


def params_class(section: str) -> type[Params]:
    module, cls = SECTIONS[section].split(":")
    started = sys.modules["__main__"]  # `python -m stages.NAME` runs as __main__; imported again, its class is another
    if getattr(getattr(started, "__spec__", None), "name", None) == module:
        return getattr(started, cls)
    return getattr(importlib.import_module(module), cls)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of sections in a YAML 1.2 file.

    Raises:
        UserError: the file is missing, invalid or no mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if conflict := conflict_line(text):
            raise UserError(markers_problem(f"{path}:{conflict}"))
        tree = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        text = f"{path}: no such file. Run the command in the root of the repository, or pass --params."
        raise UserError(Problem("params-missing", text)) from None
    except IsADirectoryError:
        text = f"{path}: a folder, but a YAML file is expected. Name the file in it."
        raise UserError(Problem("params-missing", text)) from None
    except UnicodeDecodeError:
        raise UserError(Problem("not-utf8", f"{path}: not UTF-8 text. Save it as UTF-8.")) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        cause = getattr(error, "problem", None) or "no reason given"
        raise UserError(Problem("invalid-yaml", f"{place}: invalid YAML ({cause}). Correct it.")) from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-99-99, or thousands of brackets
        raise UserError(Problem("invalid-yaml", f"{path}: invalid YAML ({error}). Put text in quotes.")) from None
    if not isinstance(tree, dict):
        text = f"{path}: got {type_name(tree)}, but a mapping of sections is expected."
        raise UserError(Problem("no-mapping", text))
    return tree


def conflict_line(text: str) -> int | None:
    """Return the number of the first line with a marker of a merge conflict; None without one."""
    return next((number for number, line in enumerate(text.split("\n"), 1) if line.startswith("<<<<<<< ")), None)


def markers_problem(place: str) -> Problem:
    """Return the problem of a file in which git left the markers of a merge conflict."""
    remedy = "Keep one version between <<<<<<< and >>>>>>>, delete the marked lines, and run `git add`."
    return Problem("merge-conflict-left", f"{place}: git left a merge conflict here. {remedy}")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in place; the value is read as YAML 1.2, as DVC does with ``-S``."""
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        text = f"--set {override}: SECTION.KEY=VALUE is expected, such as lora.rank=16."
        raise UserError(Problem("wrong-override", text))
    if not isinstance(tree.get(section), dict):
        raise UserError(unknown_setting(f"--set {override}:", section, SECTIONS, "section"))
    target = tree[section]
    while isinstance(inner := target.get(name.partition(".")[0]), dict) and "." in name:  # report.gates.limits
        target, name = inner, name.partition(".")[2]
    target[name] = read_value(key, value)


def read_value(key: str, value: str) -> Any:
    """Return the value of an override.

    Raises:
        UserError: YAML reads only a part of the text, or another type where the setting is text. The message has a
            form that works.
    """
    kind = annotation_of(key)
    is_text = is_free_text(kind)
    remedy = f'Write "{key}={quoted(value.strip())}".' if is_text else "Put each text in quotes of its own."

    def problem(cause: str) -> UserError:
        return UserError(Problem("ambiguous-override", f"--set {key}={value}: {cause}. {remedy}"))

    try:
        node, read = YAML(typ="safe", pure=True).compose(value), YAML(typ="safe", pure=True).load(value)
    except (YAMLError, ValueError, RecursionError) as error:
        detail = getattr(error, "problem", None)
        cause = "'#' begins a comment in YAML" if "#" in value else "invalid YAML"
        raise problem(f"{cause} ({detail})" if detail else cause) from None
    if value[node.end_mark.index if node else 0 :].strip():
        raise problem("'#' begins a comment in YAML")
    if read is None and value.strip() not in NULLS:
        raise problem("YAML reads null")
    if is_text and not isinstance(read, str) and not (read is None and accepts_null(kind)):
        raise problem(f"YAML reads {json.dumps(read, default=str)}, which is no text")
    if read == "" and value.strip(" '\""):
        raise problem("YAML reads an empty text")
    return read


def quoted(text: str) -> str:
    """Return the text quoted for YAML and for DVC's -S, inside of double quotes of a shell."""
    as_yaml = "'" + text.replace("'", "''") + "'"
    if "'" in text and '"' not in text and "\\" not in text:
        as_yaml = f'"{text}"'
    return re.sub(r'([\\"$`])', r"\\\1", as_yaml)


def annotation_of(key: str) -> Any:
    """Return the annotation of ``section.key``; Any for an unknown setting, which is rejected later."""
    section, _, name = key.partition(".")
    field = params_class(section).model_fields.get(name) if section in SECTIONS else None
    return field.annotation if field else Any
