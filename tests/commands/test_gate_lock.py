"""Changed files of a clone without data: each is named by its difference to dvc.lock."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_dag.commands.gate import lock
from lora_dag.core.console import Problem
from tests.helpers.planted import Clone, edit, git


def differences() -> list[Problem]:
    """Return the differences that are read from dvc.lock, without DVC's own check."""
    return lock.compare(lock.Pipeline.read())


DATA = "data/latents\n      hash: md5\n      md5: "
TRAINER = "      - stages/train\n"
TAMPERED: dict[str, tuple[Callable[[], Any], str, tuple[str, ...]]] = {
    "params": (
        lambda: edit("params.yaml", "rank: 2", "rank: 8"),
        "setting-changed",
        ("params.yaml lora.rank: got 8", "dvc.lock has 2 (train)", "`dvc repro`"),
    ),
    "metrics": (
        lambda: edit("reports/metrics.json", '"val.loss": 0', '"val.loss": 0.0'),
        "report-edited",
        ("reports/metrics.json: ", "stage validate", "`git checkout`"),
    ),
    "image": (
        lambda: Path("reports/samples.png").write_bytes(Path("reports/progress.png").read_bytes() + b"\0"),
        "report-edited",
        ("reports/samples.png: ", "stage validate"),
    ),
    "code": (
        lambda: edit("stages/train/loop.py", "from __future__", "#\nfrom __future__"),
        "dependency-changed",
        ("stages/train: ", "of train.", "`dvc repro`", "`lora-dag relock`"),
    ),
    "no code": (
        lambda: Path("lora_dag/core/params.py").unlink(),
        "dependency-changed",
        ("lora_dag/core: ", "of prepare, cache_latents, train, validate, export, report."),
    ),
    "a new module": (
        lambda: Path("stages/train/new.py").write_text(""),
        "dependency-changed",
        ("stages/train: ",),
    ),
    "command": (
        lambda: edit("dvc.yaml", "python -m stages.train", "python -m stages.train --set train.seed=1"),
        "command-changed",
        ("dvc.yaml train: ", "'python -m stages.train --set train.seed=1'", "'python -m stages.train'"),
    ),
    "pipeline": (
        lambda: edit("dvc.yaml", TRAINER, f"{TRAINER}      - lora_dag/commands/gate/lock.py\n"),
        "file-not-locked",
        ("dvc.yaml: lora_dag/commands/gate/lock.py", "a dependency of train", "`dvc repro`"),
    ),
    "data": (
        lambda: edit("data/raw.dvc", "md5: ", "md5: 0123456789abcdef0123456789abcdef.dir #"),
        "data-changed",
        ("data/raw.dvc: ", "01234567", "(prepare, cache_latents)"),
    ),
    "pin": (
        lambda: edit("dvc.lock", DATA, DATA.replace("md5: ", "md5: 0", 1)),
        "data-changed",
        ("dvc.lock: cache_latents wrote data/latents 0", "(train, validate)"),
    ),
}
FORGIVEN: dict[str, tuple[Callable[[], Any], str, tuple[str, ...]]] = {
    "no report": (
        lambda: Path("reports/metrics.json").unlink(),
        "report-missing",
        ("reports/metrics.json: ", "stage validate"),
    ),
    "unlisted": (
        lambda: (edit("dvc.yaml", TRAINER, ""), TAMPERED["code"][0]()),
        "file-not-listed",
        ("dvc.yaml: stages/train", "a dependency of train", "`dvc repro --force train`"),
    ),
    "frozen": (
        lambda: (
            edit("dvc.yaml", "  train:\n", "  train:\n    frozen: true\n"),
            edit("params.yaml", "rank: 2", "rank: 8"),
        ),
        "setting-changed",
        ("params.yaml lora.rank: got 8", "dvc.lock has 2 (train)"),
    ),
}


@pytest.mark.parametrize("name", [*TAMPERED, *FORGIVEN])
def test_lock_names_each_changed_file(clone: Clone, name: str) -> None:
    clone("main")
    change, code, values = (TAMPERED | FORGIVEN)[name]
    change()
    (problem,) = differences()
    assert problem.code == code and all(value in problem for value in values), problem


def test_lock_names_a_raised_results_number(clone: Clone) -> None:
    clone("main")
    edit("stages/train/__init__.py", "RESULTS = 1", "RESULTS = 2")
    number, code = differences()
    assert number.code == "results-changed" and code.code == "dependency-changed"
    assert number.startswith("stages/train/__init__.py: RESULTS is 2, but dvc.lock has 1") and "of train." in number


@pytest.mark.parametrize("text", ["RESULTS = 'two'\n", "", "RESULTS = (\n"])
def test_lock_reports_an_invalid_results_number(clone: Clone, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    clone("main")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    Path("stages/train/__init__.py").write_text(text)
    (problem,) = lock.problems()
    assert "stages/train/__init__.py" in problem and "RESULTS = 1" in problem


def test_lock_reads_a_results_number_with_a_type(clone: Clone) -> None:
    clone("main")
    Path("stages/train/__init__.py").write_text("RESULTS: int = 2\n")
    assert differences()[0].startswith("stages/train/__init__.py: RESULTS is 2, but dvc.lock has 1")


def test_lock_ignores_files_of_editors_and_python(clone: Clone) -> None:
    clone("main")
    for name in ("__pycache__/trainer.cpython-311.pyc", ".trainer.py.swp", ".ipynb_checkpoints/trainer.py"):
        path = Path("stages/train", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert lock.problems() == []


def test_lock_ignores_a_dropped_unchanged_dependency(clone: Clone) -> None:
    """DVC reruns nothing for it and keeps dvc.lock."""
    clone("main")
    edit("dvc.yaml", TRAINER, "")
    assert differences() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TAMPERED, *FORGIVEN])
def test_dvc_finds_all_changes_but_the_forgiven_ones(clone: Clone, name: str) -> None:
    clone("main")
    (TAMPERED | FORGIVEN)[name][0]()
    assert (lock.stale_stages() == []) == (name in FORGIVEN)


def conflict() -> None:
    edit("dvc.lock", "schema:", "<<<<<<< HEAD\nschema:")


@pytest.mark.parametrize(
    ("damage", "code", "values"),
    [
        (lambda: Path("dvc.lock").unlink(), "lock-missing", ("dvc.lock: ", "`dvc repro`")),
        (conflict, "lock-conflict", ("dvc.lock: ", "`git checkout --ours dvc.lock`", "`lora-dag relock`")),
        (lambda: edit("params.yaml", "rank: 2", "rank: [2"), "dvc-failed", ("params.yaml",)),
        (lambda: edit("dvc.yaml", "stages:", "stages: 1\nother:"), "dvc-failed", ("dvc.yaml",)),
    ],
)
def test_lock_reports_files_that_dvc_cannot_read(
    clone: Clone, damage: Callable[[], Any], code: str, values: tuple[str, ...]
) -> None:
    clone("main")
    damage()
    (problem,) = lock.problems()
    assert problem.code == code and all(value in problem for value in values), problem


def test_lock_explains_an_unfinished_merge(clone: Clone) -> None:
    """git keeps dvc.lock of one branch, without conflict markers."""
    clone("worse")
    git("branch", "--quiet", "better", "origin/rank-4")
    subprocess.run(["git", "merge", "--quiet", "better"], check=False, capture_output=True)
    git("checkout", "--ours", "--", ".")
    merge, *others = lock.problems()
    assert merge.code == "lock-unmerged" and "worse" in merge and "`git checkout --theirs dvc.lock`" in merge
    assert others[0].code == "setting-changed" and "params.yaml lora.rank: got 4" in others[0]


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("dvc.lock", "stages:\n", "stages:\nother:\n"),
        ("dvc.lock", "path: reports/metrics.json", "path: null"),
        ("dvc.lock", "cmd: python -m stages.train", "cmds: x"),
        ("data/raw.dvc", "outs:\n", "outs: [x]\nother:\n"),
    ],
)
def test_lock_reports_content_that_dvc_would_not_write(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, path: str, old: str, new: str
) -> None:
    clone("main")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])  # which refuses most of them by itself
    edit(path, old, new)
    (problem,) = lock.problems()
    assert problem.code == "dvc-file-invalid" and path in problem or ".dvc file" in problem


def test_lock_names_code_that_neither_dvc_yaml_nor_dvc_lock_lists(clone: Clone) -> None:
    """Otherwise an edited trainer would have no digest anywhere."""
    clone("main")
    for path in ("dvc.yaml", "dvc.lock"):
        text = Path(path).read_text(encoding="utf-8")
        text = re.sub(r"( +)- path: stages/train\n(?:\1  .*\n)+", "", text.replace(TRAINER, ""))
        assert "stages/train\n" not in text
        Path(path).write_text(text, encoding="utf-8")
    edit("stages/train/loop.py", "from __future__", "#\nfrom __future__")
    assert differences() == []
    (problem,) = lock.problems()
    assert problem.code == "code-not-listed" and problem.startswith("dvc.yaml: stage train imports stages/train,")


def test_lock_names_code_with_a_syntax_error(clone: Clone) -> None:
    clone("main")
    Path("stages/train/batches.py").write_text("def\n", encoding="utf-8")
    found = [problem for problem in lock.problems() if problem.code == "code-unreadable"]
    assert found and found[0].startswith("dvc.yaml train: ") and "SyntaxError" in found[0]
