"""What ``model.pretrained`` names -> the folder that is loaded.

It may name a folder in the diffusers layout; a YAML file that pins a model of the Hugging Face Hub to a commit
(``hub.py``); or a folder with a checkpoint in one .safetensors file at its top (``single_file.py``, ``conversion.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.bases import conversion, hub, layout, single_file
from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from lora_dag.bases.hub import Pin
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

PINS = (".yaml", ".yml")
TEXTS = ("*.json", "*.txt", "*.model")
NUM_DIGITS = 12
"""Of a commit, where a person reads it."""


@dataclass(frozen=True)
class Base:
    """A frozen base as it is loaded, and as a person knows it."""

    model: ModelParams
    """Section ``model`` with the folder that is loaded as ``pretrained``."""
    pretrained: str
    """As params.yaml names it."""
    name: str
    """owner/name for a pin, else the folder's own name."""
    revision: str = ""
    """Commit of a pin, 40 hex digits."""
    file: Path | None = None
    """The checkpoint, where it is one file."""
    file_sha256: str = ""
    inside: tuple[str, ...] = ()
    """Components whose weights were in the file."""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.revision[:NUM_DIGITS]}" if self.revision else self.name


def resolve(model: ModelParams, family: Family, make: bool = True) -> Base:
    """The base, checked; downloaded or converted where that was not done yet.

    Args:
        make: else what would have to be downloaded or converted is refused.

    Raises:
        UserError: naming everything that is wrong with it.
    """
    path = Path(model.pretrained)
    if path.suffix in PINS:
        return pinned(path, model, family, make)
    file = single_file.find(path, family)
    if file is None:
        layout.require_base(model, family)
        return Base(model, model.pretrained, path.name)
    require(single_file.problems(file, model, family))
    folder, digest = conversion.convert(file, model, family, make)
    inside = tuple(single_file.components_in_file(file, model, family))
    return Base(loaded_from(model, folder), model.pretrained, path.name, file=file, file_sha256=digest, inside=inside)


@dataclass(frozen=True)
class BaseCheck:
    """What the preflight can know, which downloads and converts nothing."""

    problems: list[str]
    configs: ModelParams | None = None
    """Section ``model`` with a folder that has the configs; None where there are problems, or they are on the Hub."""
    to_do: str = ""
    """A line on what is downloaded or converted before the base is first loaded."""


def check(model: ModelParams, family: Family) -> BaseCheck:
    path = Path(model.pretrained)
    try:
        if path.suffix not in PINS:
            return check_folder(path, model, family)
        pin = pin_with_files(path, model, family)
        if hub.is_fetched(pin):
            return BaseCheck([], pinned(path, model, family, make=False).model)
    except UserError as error:
        return BaseCheck(list(error.problems))
    parts = ", ".join(family.COMPONENTS)
    what = (
        f"{parts}{f' (variant {model.variant})' if model.variant else ''} of {pin.hub} at {pin.revision[:NUM_DIGITS]}"
    )
    return BaseCheck([], to_do=f"not fetched yet: `python -m stages.cache_latents` downloads {what}")


def check_folder(path: Path, model: ModelParams, family: Family) -> BaseCheck:
    file = single_file.find(path, family)
    if file is None:
        found = layout.problems(model, family)
        return BaseCheck(found, None if found else model)
    found = single_file.problems(file, model, family)
    if found:
        return BaseCheck(found)
    inside, size = ", ".join(single_file.components_in_file(file, model, family)), file.stat().st_size / 1e6
    return BaseCheck([], model, f"{inside} of {file.name}, converted once: {size:,.0f} MB below the state directory")


def require(problems: list[str]) -> None:
    if problems:
        raise UserError(*problems)


def loaded_from(model: ModelParams, folder: Path) -> ModelParams:
    return model.model_copy(update={"pretrained": str(folder)})


# A pin


def pinned(path: Path, model: ModelParams, family: Family, make: bool) -> Base:
    """The snapshot of a pinned commit, of which only what the family loads is fetched."""
    pin = pin_with_files(path, model, family)
    if not hub.is_fetched(pin):
        if not make:
            raise UserError(f"{path}: not fetched yet; run `python -m stages.cache_latents`")
        check_repository(path, pin, model, family)
    folder = hub.fetch(path, verify=make, pin=pin)  # else whoever asks takes digests anyway, or must be fast
    require(layout.problems(model, family, folder))
    return Base(loaded_from(model, folder), model.pretrained, pin.hub, revision=pin.revision)


def pin_with_files(path: Path, model: ModelParams, family: Family) -> Pin:
    """The pin with the files that the family loads: configs, tokenizers, and the variant's safetensors."""
    suffix = f".{model.variant}" if model.variant else ""
    stems = sorted(layout.WEIGHTS)
    weights = [f"{stem}{suffix}{end}" for stem in stems for end in (".safetensors", "-0*.safetensors")]
    files = [f"{component}/{name}" for component in family.COMPONENTS for name in (*TEXTS, *weights)]
    return replace(hub.read_pin(path), files=("model_index.json", *files))


def check_repository(path: Path, pin: Pin, model: ModelParams, family: Family) -> None:
    """Before gigabytes are fetched: is it a pipeline of the family, and are the weights there?

    Raises:
        UserError: one line for each component without them.
    """
    names = hub.list_files(path, pin)
    if "model_index.json" not in names:
        there = ", ".join(names[:5]) or "no files"
        raise UserError(f"{path} hub: {pin.hub} has no model_index.json, so not the diffusers layout; it has {there}")
    index = hub.fetch(path, pin=replace(pin, files=("model_index.json",)))
    require(layout.index_problems(model, family, index))
    require([line for name in family.COMPONENTS if (line := without_weights(path, pin, name, names, model.variant))])


def without_weights(path: Path, pin: Pin, component: str, names: list[str], variant: str | None) -> str:
    """A line, if a repository with these files has no safetensors weights of the variant for a component."""
    there = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
    if "config.json" not in there or any(layout.is_weight_file(name, variant) for name in there):
        return ""  # schedulers and tokenizers have no weights
    others = ", ".join(name for name in there if not name.endswith((".json", ".txt"))) or "none at all"
    return (
        f"{path}: {pin.hub} has no {component} weights of model.variant '{variant or 'null'}' as safetensors; it has"
        f" {others}"
    )
