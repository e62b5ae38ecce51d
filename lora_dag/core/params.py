"""One strict reader of params.yaml for every stage, DVC and Snakemake alike.

YAML 1.2 (``1e-4`` and ``1e-05`` are numbers, ``no`` is a string), no unknown key, no NaN. Each stage's params class
stands beside the stage; SECTIONS names them all, so that a typo in any section stops the first stage, not the last.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML, YAMLError

from lora_dag.core.console import UserError
from lora_dag.core.param_errors import explain, unknown
from lora_dag.core.param_kinds import only_text, takes_null

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


def kind_of(key: str) -> Any:
    """Annotation of ``section.key``; Any where there is no such setting, which is refused later."""
    section, _, name = key.partition(".")
    field = params_class(section).model_fields.get(name) if section in SECTIONS else None
    return field.annotation if field else Any
