"""The code of each stage: its dependencies in dvc.yaml, its digest, and its RESULTS number.

Run: ``python -m lora_dag.pipeline.code [STAGE ...]`` prints the lines to paste into dvc.yaml.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Iterator
from modulefinder import ModuleFinder
from pathlib import Path

from lora_dag.core import params
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_file, sha256_json
from lora_dag.pipeline import dvc_files

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lora_dag/", "stages/")
COMMANDS = "lora_dag/commands/"
FAMILIES = "lora_dag/families"
FAMILY = f"{FAMILIES}/${{model.family}}.py"


def is_code(dependency: str) -> bool:
    """Return whether a dependency of dvc.yaml or dvc.lock is code."""
    return dependency.startswith(FOLDERS)


def dependencies(stage: str, root: Path = ROOT) -> list[str]:
    """Return a stage's code for dvc.yaml: the packages that it imports, and single files of lora_dag/families.

    The file of the family is a template, so that an edit of another family reruns nothing.

    Args:
        root: root of another checkout, which is read and not imported.
    """
    found = imported([root / "stages" / stage / "__main__.py"], root)
    if "lora_dag/formats/__init__.py" in found:  # it loads a format by its name
        found |= imported(sorted((root / "lora_dag/formats").glob("**/*.py")), root)
    if f"{FAMILIES}/protocol.py" in found:  # it loads a family by its name
        files = families(root)
        found |= imported(files, root) - {path.relative_to(root).as_posix() for path in files} | {FAMILY}
    return packages(found, root)


def packages(files: Iterable[str], root: Path) -> list[str]:
    """Return the packages of files with code; an empty ``__init__.py`` has none."""
    own = filter(is_code, files)  # excludes a numpy.py beside the packages
    return sorted({package(path) for path in own if path == FAMILY or has_code(root / path)})


def families(root: Path = ROOT) -> list[Path]:
    """Return the file of each family; no family imports another."""
    return [root / FAMILIES / f"{name}.py" for name in params.FAMILIES]


def imported(files: Iterable[Path], root: Path = ROOT) -> set[str]:
    """Return the files and all files of the repository that they import, at any depth, without running them.

    Raises:
        SyntaxError: a file is not valid Python.
    """
    finder, found = ModuleFinder(path=[str(root)]), set()
    for file in files:
        finder.run_script(str(file))
        found.add(file)
    for name in finder.badmodules:  # modules that were not found, such as torch, or not readable
        if (path := root.joinpath(*name.split(".")).with_suffix(".py")).is_file():
            ast.parse(path.read_bytes(), str(path))
    paths = [getattr(module, "__file__", None) for module in finder.modules.values()]
    found |= {Path(path) for path in paths if path}
    return {path.relative_to(root).as_posix() for path in found}


def package(path: str) -> str:
    """Return ``stages/train`` for ``stages/train/loop.py``; the path itself for a family or a file beside packages."""
    parts, depth = path.split("/"), 3 if path.startswith(COMMANDS) else 2  # each command is a package
    return path if len(parts) <= depth or path.startswith(FAMILIES) else "/".join(parts[:depth])


def has_code(path: Path) -> bool:
    """Return whether a file has more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_bytes()).body)


def digest(paths: Iterable[str], family: str = "", root: Path = Path()) -> str:
    """Return the digest of the code among a stage's dependencies: equal exactly if DVC finds no change of code."""
    code = [path.replace("${model.family}", family) for path in paths if is_code(path)]
    files = (file for path in code for file in files_in(root / path))
    return sha256_json({file.relative_to(root).as_posix(): sha256_file(file) for file in files})


def stage_digest(stage: str, family: str) -> str:
    """Return the digest of a stage's running code, by the dvc.yaml beside it; data may be in another folder."""
    return digest(dvc_files.read_pipeline(root=ROOT)[stage].deps, family, ROOT)


def command_digest(command: str, root: Path = ROOT) -> str:
    """Return the digest of a command that Snakemake runs, over the packages that it imports; it loads no family."""
    return digest(packages(imported([root / COMMANDS / command / "command.py"], root), root), root=root)


def files_in(path: Path) -> Iterator[Path]:
    """Yield the file, or the files in a folder that .dvcignore does not exclude: no hidden and no compiled files."""
    if path.is_file():
        yield path
    for file in sorted(path.rglob("*")):
        own = file.relative_to(path).parts
        if file.is_file() and "__pycache__" not in own and not any(part.startswith(".") for part in own):
            yield file


def dvc_md5(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> str:
    """Return the md5 that dvc.lock has for a file or a folder of code.

    Args:
        read: returns the content of a file, for example with other line ends.
    """
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if path.is_file():
        return hashlib.md5(read(path), usedforsecurity=False).hexdigest()
    tree = Tree()
    for file in files_in(path):
        tree.add(file.relative_to(path).parts, None, HashInfo("md5", dvc_md5(file, read)))
    tree.digest()
    return str(tree.hash_info.value)


def results_of(stage: str, root: Path = Path()) -> int:
    """Return ``RESULTS`` of a stage, read as DVC reads it. It is raised when equal inputs give another result.

    Raises:
        UserError: the file has no such number.
    """
    from dvc.utils.serialize import ParseError, load_py

    file = Path("stages", stage, "__init__.py")
    try:
        number = load_py(str(root / file)).get("RESULTS", "no such line")
        stored = [node for node in ast.walk(ast.parse((root / file).read_bytes())) if is_stored(node)]
        if len(stored) > 1:  # DVC reads the first of them
            number = f"{len(stored)} such lines"
        if type(number) is int:
            return number
    except (OSError, ParseError) as error:
        number = "no such file" if isinstance(error, OSError) else "invalid Python"
    text = f"{file}: got {number}, but one line such as RESULTS = 1 is expected. Restore the line."
    raise UserError(Problem("results-missing", text))


def is_stored(node: ast.AST) -> bool:
    """Return whether the node assigns ``RESULTS``."""
    return isinstance(node, ast.Name) and node.id == "RESULTS" and isinstance(node.ctx, ast.Store)


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        print(f"{name}:", *dependencies(name), sep="\n      - ")
