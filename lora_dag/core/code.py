"""Digests of the code itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_dag.core.files import sha256_file, sha256_json

ROOT = Path(__file__).resolve().parents[2]


def code_digest(stage: str) -> str:
    """Digest of all code that a stage may run: its folder, and lora_dag without the commands and their entry point."""
    commands = (ROOT / "lora_dag/commands", ROOT / "lora_dag/__main__.py")
    files = [path for name in (f"stages/{stage}", "lora_dag") for path in files_in(ROOT / name)]
    own = [path for path in files if not any(map(path.is_relative_to, commands))]
    return sha256_json({path.relative_to(ROOT).as_posix(): sha256_file(path) for path in own})


def files_in(path: Path) -> Iterator[Path]:
    """A file, or those below a folder, but what .dvcignore leaves out: hidden files and what Python compiles."""
    if path.is_file():
        yield path
    for file in sorted(path.rglob("*")):
        own = file.relative_to(path).parts
        if file.is_file() and "__pycache__" not in own and not any(part.startswith(".") for part in own):
            yield file
