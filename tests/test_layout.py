"""The import rule: only down, never sideways.

commands -> stages -> formats -> {bases, adapters, pictures, sweeps} -> {pipeline ... pages} -> core.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

FLOORS = (
    {"core"},
    {"pipeline", "artifacts", "families", "diffusion", "evaluation", "pages"},
    {"bases", "adapters", "pictures", "sweeps"},
    {"formats"},
    {"prepare", "cache_latents", "train", "validate", "export", "report"},
    {"commands"},
)
FLOOR = {package: height for height, floor in enumerate(FLOORS) for package in floor}
EXCEPTIONS: set[str] = set()


def package(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] in ("stages", "lora_dag") else None


def imports(path: Path) -> Iterator[str]:
    """Packages of ours that a file imports, at any depth of its code and under ``TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name}" for name in names]
        yield from (found for name in names if (found := package(name)))


def test_imports_go_down_only() -> None:
    wrong = set()
    for folder in ("lora_dag", "stages"):
        for path in (REPOSITORY / folder).glob("*/**/*.py"):
            own = path.relative_to(REPOSITORY).parts[1]
            name = path.relative_to(REPOSITORY).as_posix()
            wrong |= {f"{name} -> {other}" for other in imports(path) if other != own and FLOOR[other] >= FLOOR[own]}
    assert wrong == EXCEPTIONS
