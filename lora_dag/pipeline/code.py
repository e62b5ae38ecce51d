"""A stage's import closure inside the repository, read from the source: what dvc.yaml must list as code.

Run: ``python -m lora_dag.pipeline.code [STAGE ...]`` prints the lines to paste into dvc.yaml.
"""

from __future__ import annotations

import ast
from pathlib import Path

from lora_dag.core.files import sha256_file, sha256_json

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "lora_dag/families/${model.family}.py"


def closure(stage: str, root: Path = ROOT) -> list[str]:
    """Files that ``python -m stages.<stage>`` (a module or a package) can import, relative to the repository.

    The family's file is named by its template: families are loaded by name, by ``load_family`` in families/protocol.py.
    Imports under ``if TYPE_CHECKING`` never run.

    Args:
        root: of another checkout of the repository, which is read and not imported.
    """
    main = root / "stages" / stage / "__main__.py"
    found = reachable([main if main.exists() else root / "lora_dag/commands" / stage / "command.py"], root)
    if root / "lora_dag/formats/__init__.py" in found:  # formats are loaded by name
        found |= reachable(sorted((root / "lora_dag/formats").glob("**/*.py")), root)
    dynamic = []
    if root / "lora_dag/families/protocol.py" in found:
        families = {
            path
            for path in (root / "lora_dag/families").glob("*.py")
            if path.name not in ("__init__.py", "protocol.py", "common.py", "long_texts.py", "unet.py")
        }
        found |= reachable(sorted(families), root) - families
        dynamic = [FAMILY]
    return sorted([*(path.relative_to(root).as_posix() for path in found), *dynamic])


def code_digest(stage: str, family: str) -> str:
    """Digest of the stage's code with one family's file: equal exactly when DVC sees no change of code."""
    return sha256_json({path: sha256_file(ROOT / path.replace("${model.family}", family)) for path in closure(stage)})


def reachable(todo: list[Path], root: Path) -> set[Path]:
    """The files and all that they import; empty ``__init__.py`` are left out."""
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imports(path, root)
    return {path for path in found if path.stat().st_size}


def imports(path: Path, root: Path) -> list[Path]:
    """Modules of this repository that a file imports, at any depth of its code."""
    found = []
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [module_path(alias.name, root) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(module_path(node.module, root))
            found += [module_path(f"{node.module}.{alias.name}", root) for alias in node.names]
    return [p for p in found if p is not None]


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        nodes += [child, *runtime_nodes(child)]
    return nodes


def module_path(name: str, root: Path) -> Path | None:
    if name.split(".")[0] not in ("stages", "lora_dag"):
        return None
    path = root.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        print(f"{name}:", *closure(name), sep="\n      - ")
