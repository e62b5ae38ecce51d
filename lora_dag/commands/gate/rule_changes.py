"""Find changes of a branch to the rules of its own gate.

The rules are limits, the code of the gate, the numbers RESULTS, workflows, packages and the pipeline.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_dag.commands.compare.revision_report import DAMAGED, PARAMS, parse_params
from lora_dag.commands.compare.revisions import read_file
from lora_dag.pipeline.code import ROOT, imported
from lora_dag.pipeline.dvc_files import ABSENT, show
from lora_dag.pipeline.git import git

GATES = "report.gates"
GATE = ROOT / "lora_dag/commands/gate"
FILES: dict[str, Callable[[str], bool]] = {
    "the RESULTS numbers": lambda path: path.startswith("tests/golden/") or is_stage_init(path),
    "the workflows": lambda path: path.startswith(".github/"),
    "the packages": lambda path: path in ("requirements.lock", "pyproject.toml"),
    "the pipeline": lambda path: path in ("dvc.yaml", ".dvc/config", ".dvcignore"),
}


@dataclass(frozen=True)
class RuleChange:
    rule: str
    """Name of the rule, such as ``report.gates`` or ``the gate's code``."""
    details: tuple[str, ...]
    """Changed files, or settings with the old and the new value."""


def find_changes(revision: str) -> list[RuleChange]:
    """Return rule changes of the current folder since its history left the revision's, read from the files."""
    start = (git("merge-base", "HEAD", revision) or revision.encode()).decode().strip()
    paths = changed_paths(start)
    own = gate_code()
    kinds = {"the gate's code": lambda path: (path in own or is_gate(path)) and not has_only_constants(path), **FILES}
    found = {GATES: changed_gates(start)}
    found |= {rule: [path for path in paths if matches(path)] for rule, matches in kinds.items()}
    return [RuleChange(rule, tuple(details)) for rule, details in found.items() if details]


def changed_paths(commit: str) -> list[str]:
    """Return files that differ between the folder and the commit, also new and missing files.

    Paths are relative to the folder; files outside of it, such as workflows, are relative to the repository.
    """
    prefix = (git("rev-parse", "--show-prefix") or b"").decode().strip()
    changed = git("diff", "--name-only", "--no-renames", "--no-ext-diff", "-z", commit) or b""
    new = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z") or b""
    names = sorted({name for name in (changed + new).decode(errors="replace").split("\0") if name})
    return [name.removeprefix(prefix) for name in names]


def gate_code() -> set[str]:
    """Return all files that the gate imports, in this installation and in the folder."""
    here = imported(sorted(GATE.glob("*.py")))
    try:
        return here | imported(sorted((Path.cwd() / GATE.relative_to(ROOT)).glob("*.py")), Path.cwd())
    except (OSError, SyntaxError, ValueError, RecursionError):  # of the folder: its gate would not start either
        return here


def is_gate(path: str) -> bool:
    """Return whether a path is code of the gate, also if it was removed, or if Python imports it on the way."""
    return path.startswith(("lora_dag/__main__.py", "lora_dag/commands/gate/", "lora_dag/commands/compare/")) or (
        path.startswith(("lora_dag/", "stages/")) and path.endswith("__init__.py")
    )


def is_stage_init(path: str) -> bool:
    """Return whether a path is like stages/train/__init__.py, whose RESULTS number `lora-dag relock` reads."""
    return re.fullmatch(r"stages/\w+/__init__\.py", path) is not None


def has_only_constants(path: str) -> bool:
    """Return whether the __init__.py of a stage assigns constants and runs nothing else."""
    try:
        nodes = ast.parse(Path(path).read_bytes()).body if is_stage_init(path) else []
    except (OSError, SyntaxError, ValueError):
        return False
    return bool(nodes) and all(
        isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr) and isinstance(node.value, ast.Constant)
        for node in nodes
    )


def changed_gates(commit: str) -> list[str]:
    """Return lines like ``report.gates.max_heldout_change 0.0 → 0.5``."""
    before, now = gates_in(read_file(commit, PARAMS)), gates_in(read_file(None, PARAMS))
    pairs = {key: (before.get(key, ABSENT), now.get(key, ABSENT)) for key in sorted(before | now)}
    return [f"{key} {show(old)} → {show(new)}" for key, (old, new) in pairs.items() if old != new]


def gates_in(blob: bytes | None) -> dict[str, object]:
    """Return the gates of a params.yaml; empty if it cannot be read, which the gate reports elsewhere."""
    try:
        return {key: value for key, value in parse_params(blob or b"{}").items() if key.startswith(GATES)}
    except DAMAGED:
        return {}
