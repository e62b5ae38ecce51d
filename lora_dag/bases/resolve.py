"""Finds the folder to load for ``model.pretrained``, and downloads or converts the base model if needed.

``model.pretrained`` names one of three:
    a folder in the diffusers layout (``diffusers_folder.py``);
    a YAML file that pins a model of the Hugging Face Hub to a commit (``hub.py``);
    a folder with a checkpoint in one .safetensors file (``single_file.py``, ``conversion.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.bases import component_files, conversion, diffusers_folder, hub, single_file
from lora_dag.core.console import Problem, UserError

if TYPE_CHECKING:
    from lora_dag.bases.hub import Pin
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

PINS = (".yaml", ".yml")
TEXTS = ("*.json", "*.txt", "*.model")
NUM_DIGITS = 12
"""Digits of a commit in messages."""


@dataclass(frozen=True)
class Base:
    """A frozen base model: the folder to load, and its name for people."""

    model: ModelParams
    """Section ``model``, with the folder to load as ``pretrained``."""
    pretrained: str
    """``model.pretrained`` of params.yaml."""
    name: str
    """owner/name for a pin, otherwise the name of the folder."""
    revision: str = ""
    """Commit of a pin, 40 hex digits; empty without a pin."""
    file: Path | None = None
    """Checkpoint in one file; None for other base models."""
    file_sha256: str = ""
    """Digest of ``file``."""
    components_in_file: tuple[str, ...] = ()
    """Components whose weights ``file`` has."""

    @property
    def label(self) -> str:
        """Name, with the commit of a pin."""
        return f"{self.name}@{self.revision[:NUM_DIGITS]}" if self.revision else self.name


def resolve(model: ModelParams, family: Family, make: bool = True) -> Base:
    """Return the checked base model, and download or convert it if that was not done yet.

    Args:
        make: download or convert; if False, a base model that needs it raises UserError.

    Raises:
        UserError: every problem of the base model.
    """
    path = Path(model.pretrained)
    if path.suffix in PINS:
        return resolve_pin(path, model, family, make)
    file = single_file.find_checkpoint(model, family)
    if file is None:
        diffusers_folder.require_base(model, family)
        return Base(model, model.pretrained, path.name)
    raise_if_any(single_file.checkpoint_problems(file, model, family))
    folder, digest = conversion.convert(file, model, family, make)
    inside = tuple(single_file.components_in_file(file, model, family))
    return Base(
        with_folder(model, folder),
        model.pretrained,
        path.name,
        file=file,
        file_sha256=digest,
        components_in_file=inside,
    )


@dataclass(frozen=True)
class BaseCheck:
    """Result of a check that downloads and converts nothing."""

    problems: list[Problem]
    configs: ModelParams | None = None
    """Section ``model`` with a folder that has the configs; None if there are problems or they are on the Hub."""
    to_do: str = ""
    """Text on what a run downloads or converts first; empty for nothing."""


def check(model: ModelParams, family: Family) -> BaseCheck:
    """Check a base model without downloading or converting anything."""
    path = Path(model.pretrained)
    try:
        if path.suffix not in PINS:
            return check_folder(model, family)
        pin = pin_with_files(path, model, family)
        if hub.is_fetched(pin):
            return BaseCheck([], resolve_pin(path, model, family, make=False).model)
    except UserError as error:
        return BaseCheck(list(error.problems))
    variant = f" (variant {model.variant})" if model.variant else ""
    files = f"{', '.join(family.COMPONENTS)}{variant} of {pin.hub} at {pin.revision[:NUM_DIGITS]}"
    return BaseCheck([], to_do=f"not downloaded yet: `python -m stages.cache_latents` downloads {files}")


def check_folder(model: ModelParams, family: Family) -> BaseCheck:
    file = single_file.find_checkpoint(model, family)
    if file is None:
        problems = diffusers_folder.folder_problems(model, family)
        return BaseCheck(problems, None if problems else model)
    problems = single_file.checkpoint_problems(file, model, family)
    if problems:
        return BaseCheck(problems)
    components, size = ", ".join(single_file.components_in_file(file, model, family)), file.stat().st_size / 1e6
    to_do = f"{components} of {file.name} are converted once: {size:,.0f} MB in the state directory"
    return BaseCheck([], model, to_do)


def raise_if_any(problems: list[Problem]) -> None:
    if problems:
        raise UserError(*problems)


def with_folder(model: ModelParams, folder: Path) -> ModelParams:
    """Return section ``model`` with another folder as ``pretrained``."""
    return model.model_copy(update={"pretrained": str(folder)})


# A pin


def resolve_pin(path: Path, model: ModelParams, family: Family, make: bool) -> Base:
    """Return the base model of a pin; only the files that the family loads are downloaded."""
    pin = pin_with_files(path, model, family)
    if not hub.is_fetched(pin):
        if not make:
            text = f"{path}: not downloaded yet. Run `python -m stages.cache_latents`."
            raise UserError(Problem("base-not-downloaded", text))
        check_repository(path, pin, model, family)
    folder = hub.fetch(path, verify=make, pin=pin)  # readers compute digests anyway, or must be fast
    raise_if_any(diffusers_folder.folder_problems(model, family, folder))
    return Base(with_folder(model, folder), model.pretrained, pin.hub, revision=pin.revision)


def pin_with_files(path: Path, model: ModelParams, family: Family) -> Pin:
    """Return the pin with the files that the family loads: configs, tokenizers, and the variant's safetensors."""
    suffix = f".{model.variant}" if model.variant else ""
    stems = sorted(component_files.WEIGHTS)
    weights = [f"{stem}{suffix}{end}" for stem in stems for end in (".safetensors", "-0*.safetensors")]
    files = [f"{component}/{name}" for component in family.COMPONENTS for name in (*TEXTS, *weights)]
    return replace(hub.read_pin(path), files=("model_index.json", *files))


def check_repository(path: Path, pin: Pin, model: ModelParams, family: Family) -> None:
    """Check pipeline and weight files of a repository before gigabytes are downloaded.

    Raises:
        UserError: a problem per component without weights, or the pipeline of another family.
    """
    names = hub.list_files(path, pin)
    if "model_index.json" not in names:
        examples = ", ".join(names[:5]) or "no files"
        text = (
            f"{path} hub: {pin.hub} has no model_index.json, but the diffusers layout is expected. It has {examples}."
        )
        raise UserError(Problem("no-model-index", text))
    index = hub.fetch(path, pin=replace(pin, files=("model_index.json",)))
    raise_if_any(diffusers_folder.index_problems(model, family, index))
    problems = [missing_weights(path, pin, name, names, model.variant) for name in family.COMPONENTS]
    raise_if_any([problem for problem in problems if problem])


def missing_weights(path: Path, pin: Pin, component: str, names: list[str], variant: str | None) -> Problem | None:
    """Return a problem if a repository with these files has no safetensors weights of the variant for a component."""
    files = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
    if "config.json" not in files or any(component_files.is_weight_file(name, variant) for name in files):
        return None  # schedulers and tokenizers have no weights
    others = ", ".join(name for name in files if not name.endswith((".json", ".txt"))) or "none at all"
    text = f"{path}: {pin.hub} has no {component} weights of model.variant '{variant or 'null'}' as safetensors."
    return Problem("variant-missing", f"{text} It has {others}.")
