"""The import rule: only down, never sideways.

commands -> stages -> formats -> {bases, adapters, images, sweeps} -> {pipeline ... pages} -> core.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.workspace import REPOSITORY

FLOORS = (
    {"core"},
    {"pipeline", "artifacts", "families", "diffusion", "evaluation", "pages"},
    {"bases", "adapters", "images", "sweeps"},
    {"formats"},
    {"prepare", "cache_latents", "train", "validate", "export", "report"},
    {"commands"},
)
FLOOR = {package: height for height, floor in enumerate(FLOORS) for package in floor}


def package(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] in ("stages", "lora_dag") else None


def names(path: Path) -> Iterator[str]:
    """What a file imports, at any depth of its code and under ``TYPE_CHECKING`` too: modules and what is in them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def imports(path: Path) -> Iterator[str]:
    """Packages of ours that a file imports."""
    yield from (found for name in names(path) if (found := package(name)))


def test_imports_go_down_only() -> None:
    wrong = set()
    for folder in ("lora_dag", "stages"):
        for path in (REPOSITORY / folder).glob("*/**/*.py"):
            own = path.relative_to(REPOSITORY).parts[1]
            name = path.relative_to(REPOSITORY).as_posix()
            wrong |= {f"{name} -> {other}" for other in imports(path) if other != own and FLOOR[other] >= FLOOR[own]}
    assert not wrong


def test_no_module_imports_another_that_imports_it() -> None:
    """``__main__`` and ``__init__`` too."""
    files = [path for folder in ("lora_dag", "stages") for path in (REPOSITORY / folder).rglob("*.py")]
    modules = {path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", "."): path for path in files}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {name: set(names(path)) & modules.keys() - {name} for name, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def layout() -> str:
    """Return the section of CONTRIBUTING.md that shows the layout."""
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split("\n## Layout and import rule\n")[1]
    return section.split("\n## ")[0]


def paths_in(tree: str) -> Iterator[str]:
    """The first column of an indented tree, each with its folder before it."""
    folder = ""
    for line in tree.splitlines():
        for name in line.strip().split("  ")[0].split(", "):
            yield folder + name if line.startswith(" ") else name
        folder = folder if line.startswith(" ") else line.split("  ")[0]


def test_contributing_names_every_package_and_nothing_that_is_gone() -> None:
    shown = list(paths_in(layout().split("```")[1].strip()))
    assert [name for name in shown if not (REPOSITORY / name).exists()] == []
    modules = [path for root in ("lora_dag", "stages") for path in REPOSITORY.glob(f"{root}/*/__init__.py")]
    packages = {f"{path.parent.relative_to(REPOSITORY)}/" for path in modules}
    assert {name for name in shown if re.fullmatch("(lora_dag|stages)/.+/", name)} == packages
    assert {"rules/", "profiles/", "docs/", "base/", "benchmarks/", "tests/dag/", "tests/golden/"} <= set(shown)


def test_the_import_rule_is_written_down() -> None:
    stages = {path.parent.name for path in REPOSITORY.glob("stages/*/__init__.py")}
    line = next(line for line in layout().splitlines() if line.startswith("`commands -> "))
    floors = [set(floor.split(", ")) for floor in line.strip("`.").split(" -> ")]
    assert floors[::-1] == [{"stages"} if floor == stages else floor for floor in FLOORS]
