"""The pin of ``lora.init_from``: a file by the digest of its content, so that no edited one is ever trained from.

Names and bytes only; nothing is loaded.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

from lora_dag.core.console import PATHS
from lora_dag.core.files import sha256_file

SETTING = "params.yaml lora.init_from"


def problems(path: str, pinned: str | None) -> list[str]:
    """A line if the file is not there, no safetensors, or not the pinned one; then with the digest to pin."""
    if "\0" in path:
        return [f"{SETTING}: {path!r} has a NUL character, which no path has"]
    file, where = Path(path), f"{SETTING}: '{path}'"
    written = next((own for own in (PATHS["adapter"], PATHS["export"], "runs") if inside(file, Path(own))), None)
    if written:
        copy = f"mkdir -p data/start && cp {file.parent}/*.* data/start/ && dvc add data/start"
        return [f"{where} lies in {written}, which a run deletes or writes anew; copy it: {copy}"]
    if file.is_dir():
        found = ", ".join(sorted(p.relative_to(file).as_posix() for p in file.rglob("*.safetensors"))[:4])
        return [f"{where} is a folder; name a file in it ({found or 'there is no .safetensors'})"]
    if not file.is_file():
        return [f"{where}: no such file; it has to be tracked by DVC (dvc add, dvc pull) or git"]
    if file.suffix != ".safetensors":
        return [f"{where} is no .safetensors file; convert it: other formats can run code when they are loaded"]
    found = digest(file)
    if pinned == found:
        return []
    says = f"params.yaml pins {pinned}" if pinned else "params.yaml pins no sha256"
    return [f"{where} has the digest {found}, {says}; to start from it: {override('lora.init_from', path, found)}"]


def inside(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def digest(file: Path) -> str:
    """sha256 of the file; with a config beside it that says its alpha, of what ``sha256sum`` prints for both."""
    config = config_beside(file)
    if config is None:
        return sha256_file(file)
    return hashlib.sha256("".join(f"{sha256_file(p)}  {p.name}\n" for p in (config, file)).encode()).hexdigest()


def config_beside(file: Path) -> Path | None:
    """PEFT's adapter_config.json, or our adapter.json, where the file's name asks for one and it is there."""
    folder = file.parent.parent if file.parent.name == "snapshots" else file.parent
    config = folder / "adapter_config.json" if file.name == "adapter_model.safetensors" else folder / "adapter.json"
    ours = file.name == "adapter.safetensors" or file.parent.name == "snapshots"
    return config if config.is_file() and (ours or config.name == "adapter_config.json") else None


def override(setting: str, path: str, found: str) -> str:
    """The argument of ``dvc exp run`` and ``--set`` that pins a digest, in quotes where the path needs them."""
    mark = '"' if "'" in path else "'"
    name = path if re.fullmatch(r"[\w./-]+", path, re.ASCII) else f"{mark}{path}{mark}"
    text = f"{setting}={{path: {name}, sha256: {found}}}"
    return f'-S "{text}"' if not set('"$`\\') & set(text) else f"-S {shlex.quote(text)}"
