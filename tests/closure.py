"""A stage's import closure inside the repository, read from the source: what dvc.yaml must list as code."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILY = "stages/families/${model.family}.py"


def closure(stage: str) -> list[str]:
    """Files that ``python -m stages.<stage>`` can import, relative to the repository; the family file by its template.

    Imports under ``if TYPE_CHECKING`` never run. Families are loaded by name, by ``load_family`` in families/base.py.
    """
    todo, found = [ROOT / "stages" / f"{stage}.py"], set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imports(path)
    files = {path.relative_to(ROOT).as_posix() for path in found if path.stat().st_size}
    if "stages/families/base.py" in files:
        files.add(FAMILY)
        for family in (ROOT / "stages/families").glob("*.py"):  # what a family imports, the stage runs
            files |= {p.relative_to(ROOT).as_posix() for p in imports(family)}
    return sorted(files)


def imports(path: Path) -> list[Path]:
    """Modules of this repository that a file imports, at any depth of its code."""
    found = []
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [module_path(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(module_path(node.module))
            found += [module_path(f"{node.module}.{alias.name}") for alias in node.names]
    return [p for p in found if p is not None]


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        nodes += [child, *runtime_nodes(child)]
    return nodes


def module_path(name: str) -> Path | None:
    if name.split(".")[0] != "stages":
        return None
    path = ROOT.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        print(f"{name}:", *closure(name), sep="\n      - ")
