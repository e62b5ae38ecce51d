"""What a branch changes of the rules that it is judged by.

Gates, the gate's code, the numbers of results, workflows, packages, pipeline.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_dag.commands.compare.revisions import read_file
from lora_dag.commands.compare.sides import DAMAGED, PARAMS, parse_params
from lora_dag.pipeline.code import ROOT, imported
from lora_dag.pipeline.dvc_files import ABSENT, show
from lora_dag.pipeline.git import git

GATES = "report.gates"
GATE = ROOT / "lora_dag/commands/gate"
FILES: dict[str, Callable[[str], bool]] = {
    "the numbers of results": lambda path: path.startswith("tests/golden/") or is_stage_s_first(path),
    "the workflows": lambda path: path.startswith(".github/"),
    "the packages": lambda path: path in ("requirements.lock", "pyproject.toml"),
    "the pipeline": lambda path: path in ("dvc.yaml", ".dvc/config", ".dvcignore"),
}


@dataclass(frozen=True)
class Change:
    rule: str
    """Such as ``report.gates`` or ``the gate's code``."""
    details: tuple[str, ...]
    """Files, or settings with the value before and the value here."""


def changes(revision: str) -> list[Change]:
    """Of the current folder since it left the revision's history; read from files, so that no report can hide one."""
    start = (git("merge-base", "HEAD", revision) or revision.encode()).decode().strip()
    paths = changed_paths(start)
    own = gate_code()
    kinds = {"the gate's code": lambda path: (path in own or is_gate(path)) and not is_number(path), **FILES}
    found = {GATES: changed_gates(start)}
    found |= {rule: [path for path in paths if matches(path)] for rule, matches in kinds.items()}
    return [Change(rule, tuple(details)) for rule, details in found.items() if details]


def changed_paths(commit: str) -> list[str]:
    """Files that the folder has otherwise than the commit, new and missing ones too.

    Relative to the folder; those outside of it, such as the repository's workflows, to the repository.
    """
    prefix = (git("rev-parse", "--show-prefix") or b"").decode().strip()
    changed = git("diff", "--name-only", "--no-renames", "--no-ext-diff", "-z", commit) or b""
    new = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z") or b""
    names = sorted({name for name in (changed + new).decode(errors="replace").split("\0") if name})
    return [name.removeprefix(prefix) for name in names]


def gate_code() -> set[str]:
    """All that the gate imports, as it runs here and as the folder has it."""
    here = imported(sorted(GATE.glob("*.py")))
    try:
        return here | imported(sorted((Path.cwd() / GATE.relative_to(ROOT)).glob("*.py")), Path.cwd())
    except (OSError, SyntaxError, ValueError, RecursionError):  # of the folder's: it would not start either
        return here


def is_gate(path: str) -> bool:
    """Also what is removed, or what Python imports on the way."""
    return path.startswith(("lora_dag/__main__.py", "lora_dag/commands/gate/", "lora_dag/commands/compare/")) or (
        path.startswith(("lora_dag/", "stages/")) and path.endswith("__init__.py")
    )


def is_stage_s_first(path: str) -> bool:
    """Such as stages/train/__init__.py, which has the number ``RESULTS``: `lora-dag relock` relies on it."""
    return re.fullmatch(r"stages/\w+/__init__\.py", path) is not None


def is_number(path: str) -> bool:
    """Whether such a file has a number and nothing else that runs."""
    try:
        nodes = ast.parse(Path(path).read_bytes()).body if is_stage_s_first(path) else []
    except (OSError, SyntaxError, ValueError):
        return False
    return bool(nodes) and all(
        isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr) and isinstance(node.value, ast.Constant)
        for node in nodes
    )


def changed_gates(commit: str) -> list[str]:
    """``report.gates.max_heldout_change 0.0 → 0.5``"""
    before, now = gates(read_file(commit, PARAMS)), gates(read_file(None, PARAMS))
    pairs = {key: (before.get(key, ABSENT), now.get(key, ABSENT)) for key in sorted(before | now)}
    return [f"{key} {show(old)} → {show(new)}" for key, (old, new) in pairs.items() if old != new]


def gates(blob: bytes | None) -> dict[str, object]:
    """Empty where no params.yaml can be read; the gate says so elsewhere."""
    try:
        return {key: value for key, value in parse_params(blob or b"{}").items() if key.startswith(GATES)}
    except DAMAGED:
        return {}
