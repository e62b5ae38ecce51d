"""Changes of a branch to the rules of its own gate: the page names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_dag.commands.gate import lock
from lora_dag.core.files import write_text
from tests.helpers.planted import Clone, edit, gate_problems, git

HELDOUT = "reports/validate/heldout.csv"


def test_page_shows_changed_limits_which_need_no_rerun(clone: Clone) -> None:
    clone("worse")
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_change: 0.5")
    assert gate_problems("--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: passed (this branch changes report.gates)\n")
    assert "- **report.gates**: `report.gates.max_heldout_change 0.0 → 0.5`" in page
    assert "has the code of this branch." in page


RULES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "gates": (
        lambda: edit("params.yaml", "max_abs_error: 1.0e-5", "max_abs_error: 1.0"),
        "report.gates",
        "report.gates.limits.export.*.max_abs_error 1e-05 → 1.0",
    ),
    "a gate without a comparison": (
        lambda: (edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_change:"), Path(HELDOUT).unlink()),
        "report.gates",
        "report.gates.max_heldout_change 0.0 → null",
    ),
    "packages": (lambda: edit("requirements.lock", "torch==", "torch>="), "the packages", "requirements.lock"),
    "gate": (
        lambda: edit("lora_dag/commands/gate/lock.py", "import re", "import re  #"),
        "the gate's code",
        "lora_dag/commands/gate/lock.py",
    ),
    "what the gate imports": (
        lambda: edit("lora_dag/evaluation/heldout_table.py", "import csv", "import csv  #"),
        "the gate's code",
        "lora_dag/evaluation/heldout_table.py",
    ),
    "lora-dag itself": (
        lambda: edit("lora_dag/__main__.py", "import runpy", "import runpy  #"),
        "the gate's code",
        "lora_dag/__main__.py",
    ),
    "a module of the gate removed": (
        lambda: Path("lora_dag/commands/compare/verdict.py").unlink(),
        "the gate's code",
        "lora_dag/commands/compare/verdict.py",
    ),
    "a package's first file": (
        lambda: Path("stages/__init__.py").write_text("import os\n"),
        "the gate's code",
        "stages/__init__.py",
    ),
    "a number of results": (
        lambda: edit("stages/report/__init__.py", "RESULTS = 1", "RESULTS = 2"),
        "the RESULTS numbers",
        "stages/report/__init__.py",
    ),
    "code beside a number of results": (
        lambda: edit("stages/report/__init__.py", "RESULTS = 1", "RESULTS = 1\nprint(1)"),
        "the gate's code, the RESULTS numbers",
        "stages/report/__init__.py",
    ),
    "golden values": (
        lambda: write_text(Path("tests/golden/train.json"), "{}"),
        "the RESULTS numbers",
        "tests/golden/train.json",
    ),
    "workflow": (
        lambda: edit(".github/workflows/experiment.yml", "contents: read", "contents: write"),
        "the workflows",
        ".github/workflows/experiment.yml",
    ),
    "a new workflow": (
        lambda: Path(".github/workflows/ours.yml").write_text("on: push\n"),
        "the workflows",
        ".github/workflows/ours.yml",
    ),
    "pipeline": (lambda: edit("dvc.yaml", "stages:", "stages: #"), "the pipeline", "dvc.yaml"),
}


@pytest.mark.parametrize("name", RULES)
def test_page_and_title_name_a_changed_rule(clone: Clone, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    clone("rank-4")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    change, rule, detail = RULES[name]
    change()
    gate_problems("--against", "origin/main", "--out", "page.md")
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.splitlines()[0].endswith(f" changes {rule})")
    assert all(f"- **{each}**: `{detail}`" in page for each in rule.split(", "))


def test_changes_of_the_target_branch_are_no_changes_of_this_one(clone: Clone) -> None:
    clone("main")
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_change: 0.5")
    edit("requirements.lock", "torch==", "torch>=")
    git("commit", "--quiet", "--all", "--message", "Newer main")
    newer = git("rev-parse", "HEAD")
    git("checkout", "--quiet", "origin/rank-4")
    assert gate_problems("--against", newer, "--out", "page.md") == []
    assert Path("page.md").read_text(encoding="utf-8").startswith("# Experiment: passed\n")
