"""Pin of ``lora.init_from``: the sha256 of the file's content, so that a run never starts from an edited file.

Only paths and bytes are read; no tensor is loaded.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

from lora_dag.core.console import PATHS, Problem
from lora_dag.core.files import sha256_file

SETTING = "params.yaml lora.init_from"


def problems(path: str, pinned: str | None, setting: str = SETTING) -> list[Problem]:
    """Return the problem of a file that is missing, no safetensors file, or not the pinned one.

    Args:
        pinned: sha256 in the settings; None if there is none yet.
        setting: the setting's name for the message, with the file it was read from.
    """
    if "\0" in path:
        text = f"{setting}: {path!r} contains a NUL character, which is not allowed in a path. Correct the path."
        return [Problem("invalid-path", text)]
    file, place = Path(path), f"{setting}: '{path}'"
    outputs = (PATHS["adapter"], PATHS["export"], "runs")
    output = next((folder for folder in outputs if is_inside(file, Path(folder))), None)
    if output:
        command = f"mkdir -p data/start && cp {file.parent}/*.* data/start/ && dvc add data/start"
        text = f"{place} is in {output}, which a run deletes or overwrites. Copy it first: {command}"
        return [Problem("file-in-output-folder", text)]
    if file.is_dir():
        names = ", ".join(sorted(p.relative_to(file).as_posix() for p in file.rglob("*.safetensors"))[:4])
        text = f"{place} is a folder. Name a .safetensors file in it ({names or 'it contains none'})."
        return [Problem("path-is-folder", text)]
    if not file.is_file():
        text = f"{place}: no such file. Fetch it with dvc pull or git, or correct the path."
        return [Problem("file-missing", text)]
    if file.suffix != ".safetensors":
        text = f"{place} is no .safetensors file. Convert it: other formats can run code when they are loaded."
        return [Problem("no-safetensors", text)]
    found = digest(file)
    if pinned == found:
        return []
    argument = override("lora.init_from", path, found)
    if pinned is None:
        text = f"{place} has no pinned sha256. To start from this file: {argument}"
        return [Problem("pin-missing", text)]
    text = f"{place} has the sha256 {found}, but {pinned} is pinned. To start from this file: {argument}"
    return [Problem("pin-differs", text)]


def is_inside(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def digest(file: Path) -> str:
    """Return the sha256 of a file; with a config beside it that sets alpha, of the lines of ``sha256sum`` for both."""
    config = config_beside(file)
    if config is None:
        return sha256_file(file)
    return hashlib.sha256("".join(f"{sha256_file(p)}  {p.name}\n" for p in (config, file)).encode()).hexdigest()


def config_beside(file: Path) -> Path | None:
    """Return the path of PEFT's adapter_config.json or our adapter.json if it exists and belongs to a file."""
    folder = file.parent.parent if file.parent.name == "snapshots" else file.parent
    config = folder / "adapter_config.json" if file.name == "adapter_model.safetensors" else folder / "adapter.json"
    is_ours = file.name == "adapter.safetensors" or file.parent.name == "snapshots"
    return config if config.is_file() and (is_ours or config.name == "adapter_config.json") else None


def override(setting: str, path: str, digest: str) -> str:
    """Return the argument of ``dvc exp run`` that pins a digest, in quotes if the path needs them."""
    mark = '"' if "'" in path else "'"
    name = path if re.fullmatch(r"[\w./-]+", path, re.ASCII) else f"{mark}{path}{mark}"
    text = f"{setting}={{path: {name}, sha256: {digest}}}"
    return f'-S "{text}"' if not set('"$`\\') & set(text) else f"-S {shlex.quote(text)}"
