"""Files of the base model's components: which ones are loaded, and their digests. Nothing is imported or built.

Digests of files are kept (``core/kept_digests.py``), so that a file is read once, by the first stage that loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.core.console import Problem, UserError
from lora_dag.core.kept_digests import sha256_files
from lora_dag.families.common import declared_null

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams

WEIGHTS = {"model", "diffusion_pytorch_model"}
"""Stems of weight files in a component's folder."""


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files that ``from_pretrained(variant=...)`` reads, shards included."""
    return [path for path in sorted(folder.glob("*.safetensors")) if is_weight_file(path.name, variant)]


def is_weight_file(name: str, variant: str | None) -> bool:
    suffix = f".{variant}" if variant else ""
    return name.endswith(".safetensors") and any(
        name == f"{stem}{suffix}.safetensors" or name.startswith(f"{stem}{suffix}-0") for stem in WEIGHTS
    )


def loaded_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the config, tokenizer and weight files of a component: all files that can change its results."""
    texts = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model", ".jinja"})
    return texts + weight_files(folder, variant)


def digests(model: ModelParams, components: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of each component, over the names and bytes of its files.

    A component that the base model declares null has ``absent`` instead.
    """
    names = sorted(components)
    null = declared_null(model, names)
    folders = {name: Path(model.pretrained) / name for name in names if name not in null}
    return dict.fromkeys(names, "absent") | folder_digests(folders, model.variant)


def digest(folder: Path, variant: str | None) -> str:
    """Return the sha256 over the names and bytes of a component's files."""
    return folder_digests({"": folder}, variant)[""]


def folder_digests(folders: dict[str, Path], variant: str | None) -> dict[str, str]:
    """Return the digest of each folder. All files are read with one progress bar."""
    files = {name: loaded_files(folder, variant) for name, folder in folders.items()}
    by_file = sha256_files(path for paths in files.values() for path in paths)
    lines = {name: [f"{path.name} {by_file[path]}\n" for path in paths] for name, paths in files.items()}
    return {name: hashlib.sha256("".join(lines[name]).encode()).hexdigest() for name in lines}


def require_same_base(recorded: dict[str, str], actual: dict[str, str], artifact: Path) -> None:
    """Raise UserError if an artifact was made with another base model than ``model.pretrained`` names now."""
    differ = [name for name, value in actual.items() if name in recorded and recorded[name] != value]
    if differ:
        raise UserError(
            Problem(
                "base-changed",
                f"{artifact}: made with another {', '.join(differ)} than model.pretrained has now. Run `dvc repro`.",
            )
        )
