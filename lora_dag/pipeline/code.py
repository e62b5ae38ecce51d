"""The code of each stage: what dvc.yaml must list of it, its digest, and the number of the results that it gives.

Run: ``python -m lora_dag.pipeline.code [STAGE ...]`` prints the lines to paste into dvc.yaml.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Iterator
from modulefinder import ModuleFinder
from pathlib import Path

from lora_dag.core import params
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_file, sha256_json
from lora_dag.pipeline import dvc_files

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lora_dag/", "stages/")
COMMANDS = "lora_dag/commands/"
FAMILIES = "lora_dag/families"
FAMILY = f"{FAMILIES}/${{model.family}}.py"


def is_code(dependency: str) -> bool:
    """Whether a dependency of dvc.yaml or dvc.lock is code."""
    return dependency.startswith(FOLDERS)


def dependencies(stage: str, root: Path = ROOT) -> list[str]:
    """What dvc.yaml lists as a stage's code: the packages that its imports reach, and of families single files.

    The family's own file is named by its template, so that an edit of another family runs nothing again.

    Args:
        root: of another checkout of the repository, which is read and not imported.
    """
    found = imported([root / "stages" / stage / "__main__.py"], root)
    if "lora_dag/formats/__init__.py" in found:  # it loads a format by its name
        found |= imported(sorted((root / "lora_dag/formats").glob("**/*.py")), root)
    if f"{FAMILIES}/protocol.py" in found:  # it loads a family by its name
        files = families(root)
        found |= imported(files, root) - {path.relative_to(root).as_posix() for path in files} | {FAMILY}
    return packages(found, root)


def packages(files: Iterable[str], root: Path) -> list[str]:
    """Of files that are code; those without any, such as an empty ``__init__.py``, count for nothing."""
    own = filter(is_code, files)  # a numpy.py beside the packages is none of them
    return sorted({package(path) for path in own if path == FAMILY or has_code(root / path)})


def families(root: Path = ROOT) -> list[Path]:
    """One file each; none imports another."""
    return [root / FAMILIES / f"{name}.py" for name in params.FAMILIES]


def imported(files: Iterable[Path], root: Path = ROOT) -> set[str]:
    """The files and all of the repository that they import, at any depth; nothing is run.

    Raises:
        SyntaxError: a file is no Python.
    """
    finder, found = ModuleFinder(path=[str(root)]), set()
    for file in files:
        finder.run_script(str(file))
        found.add(file)
    for name in finder.badmodules:  # what it has not found, such as torch, or has not been able to read
        if (path := root.joinpath(*name.split(".")).with_suffix(".py")).is_file():
            ast.parse(path.read_bytes(), str(path))
    places = [getattr(module, "__file__", None) for module in finder.modules.values()]
    found |= {Path(place) for place in places if place}
    return {path.relative_to(root).as_posix() for path in found}


def package(path: str) -> str:
    """``stages/train`` of ``stages/train/loop.py``; a family's file, or one beside the packages, is itself."""
    parts, depth = path.split("/"), 3 if path.startswith(COMMANDS) else 2  # each command is a package of its own
    return path if len(parts) <= depth or path.startswith(FAMILIES) else "/".join(parts[:depth])


def has_code(path: Path) -> bool:
    """More than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_bytes()).body)


def digest(paths: Iterable[str], family: str = "", root: Path = Path()) -> str:
    """Digest of the code among a stage's dependencies: equal exactly where DVC finds no change of code."""
    code = [path.replace("${model.family}", family) for path in paths if is_code(path)]
    files = (file for path in code for file in files_in(root / path))
    return sha256_json({file.relative_to(root).as_posix(): sha256_file(file) for file in files})


def stage_digest(stage: str, family: str) -> str:
    """The same of the code that runs here, by the dvc.yaml beside it; the data may be in another folder."""
    return digest(dvc_files.read_pipeline(root=ROOT)[stage].deps, family, ROOT)


def command_digest(command: str, root: Path = ROOT) -> str:
    """The same of a command that Snakemake runs, over the packages that its imports reach; it loads no family."""
    return digest(packages(imported([root / COMMANDS / command / "command.py"], root), root), root=root)


def files_in(path: Path) -> Iterator[Path]:
    """A file, or those below a folder, but what .dvcignore leaves out: hidden files and what Python compiles."""
    if path.is_file():
        yield path
    for file in sorted(path.rglob("*")):
        own = file.relative_to(path).parts
        if file.is_file() and "__pycache__" not in own and not any(part.startswith(".") for part in own):
            yield file


def dvc_md5(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> str:
    """As dvc.lock has it of a file, or of a folder of code.

    Args:
        read: the content of a file, such as one with other line ends than the file's own.
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
    """``RESULTS`` of a stage, read as DVC reads it and not imported: raised by whoever changes what equal inputs give.

    Raises:
        UserError: the file has no such number.
    """
    from dvc.utils.serialize import ParseError, load_py

    file = Path("stages", stage, "__init__.py")
    try:
        number = load_py(str(root / file)).get("RESULTS", "none that DVC can read")
        stored = [node for node in ast.walk(ast.parse((root / file).read_bytes())) if is_stored(node)]
        if len(stored) > 1:  # DVC reads the first of them
            number = f"{len(stored)} such lines"
        if type(number) is int:
            return number
    except (OSError, ParseError) as error:
        number = "no such file" if isinstance(error, OSError) else "no Python"
    raise UserError(f"{file}: expected one line RESULTS = NUMBER, such as RESULTS = 1; got {number}; restore it")


def is_stored(node: ast.AST) -> bool:
    """Whether the node gives ``RESULTS`` a value."""
    return isinstance(node, ast.Name) and node.id == "RESULTS" and isinstance(node.ctx, ast.Store)


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        print(f"{name}:", *dependencies(name), sep="\n      - ")
