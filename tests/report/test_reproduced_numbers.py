"""After equal settings, data and code on another kind of processor: one line says how near the numbers are."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lora_dag.artifacts import metrics
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.files import write_text
from stages.report.reproduced_numbers import relative
from tests.helpers.reports import LINEAGE, MADE, MEASURED, TRAIN, write_reports
from tests.helpers.workspace import Workspace

TABLE = "row,file_name,split,timestep,base,adapter\nab,a.png,heldout,19,0.5,{}\n"
CODE = Path("stages/train/loop.py")


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def committed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """reports/ of a repository with a dvc.lock and a folder of code, all committed."""
    reports = workspace.path / "reports"
    write_reports(reports)
    write_text(reports / "validate/heldout.csv", TABLE.format(0.25))
    CODE.parent.mkdir(parents=True)
    CODE.write_text("pass\n")
    tree = json.dumps([{"md5": hashlib.md5(b"pass\n").hexdigest(), "relpath": CODE.name}])  # as DVC keeps a folder
    dep = {"path": CODE.parent.as_posix(), "md5": hashlib.md5(tree.encode()).hexdigest() + ".dir"}
    train = {"cmd": "python -m stages.train", "deps": [dep]}
    Path("dvc.lock").write_text(json.dumps({"stages": {"train": train}}))  # JSON is YAML
    monkeypatch.setattr("stages.report.__main__.plot_losses", lambda _, path: Image.new("RGB", (8, 8)).save(path))
    git("init", "--quiet")
    git("add", "reports", CODE.parts[0], "dvc.lock")
    git("commit", "--quiet", "-m", "Reports")
    return reports


@pytest.fixture
def said(workspace: Workspace, committed: Path) -> Callable[[], str]:
    """The line of a run of the stage, with COMMIT for the name of the commit."""

    def run() -> str:
        lines = workspace.run("report")
        found = [line for line in lines if line.startswith(("same", "differs"))]
        assert len(found) <= 1 and not any("up to 1e-05" in path.read_text() for path in committed.glob("*.md"))
        return "".join(found).replace(git("rev-parse", "--short", "HEAD"), "COMMIT")

    return run


def change(reports: Path, **changes: float) -> None:
    metrics.save(reports / "metrics.json", MEASURED | {f"val.{name}": value for name, value in changes.items()})


def test_equal_bytes_give_no_line(said: Callable[[], str]) -> None:
    assert said() == ""


def test_last_bits(committed: Path, said: Callable[[], str]) -> None:
    change(committed, loss=MEASURED["val.loss"] * (1 + 4e-6))
    assert said() == "same        all metrics of commit COMMIT up to 1e-05 (at most 4.4e-06, val.loss)"
    change(committed)
    write_text(committed / "validate/heldout.csv", TABLE.format(0.250002))
    most = "8.0e-06, validate/heldout.csv ab adapter"
    assert said() == f"same        all metrics of commit COMMIT up to 1e-05 (at most {most})"
    write_text(committed / "validate/heldout.csv", TABLE.format(0.25))
    Image.new("RGB", (8, 8), "red").save(committed / "samples.png")
    metrics.save(committed / "train/metrics.json", TRAIN | {"train.adapter_digest": "other"})
    assert said() == "same        all metrics of commit COMMIT up to 1e-05"


def test_the_last_of_six_digits_is_within_the_tolerance() -> None:
    """1.00001 is 1e-5 more than 1; 1.00002 is not."""
    from stages.report.reproduced_numbers import compared

    assert compared({"a": 1.0}, {"a": 1.00001}, "c").startswith("same")
    assert compared({"a": 1.0}, {"a": 1.00002}, "c").startswith("differs")
    assert dict(relative({"a": 0.0, "b": -2.0, "c": 1.0, "e": 0.0}, {"a": 0.0, "b": 2.0, "d": 1.0})) == {
        "a": 0.0,
        "b": 2.0,
        "c": float("inf"),
        "d": float("inf"),
        "e": float("inf"),
    }


def test_more_than_last_bits(committed: Path, said: Callable[[], str]) -> None:
    change(committed, loss=MEASURED["val.loss"] * 1.001, loss_base=MEASURED["val.loss_base"] * (1 + 2e-5))
    assert said().startswith("differs     from commit COMMIT: at most val.loss by 1.0e-03. ")
    write_text(committed / "validate/heldout.csv", TABLE.format(0.5))  # a row says less than a metric
    change(committed, loss=MEASURED["val.loss"] * 1.001, loss_base=MEASURED["val.loss_base"] * 1.01)
    assert ": val.loss by 1.0e-03, at most val.loss_base by 9.9e-03. " in said()


def test_rows_of_the_table_alone(committed: Path, said: Callable[[], str]) -> None:
    change(committed)
    write_text(committed / "validate/heldout.csv", TABLE.format(0.5))
    assert ": val.loss by 0.0e+00, at most validate/heldout.csv ab adapter by 5.0e-01. " in said()


def test_rounding_errors_of_exports_are_no_difference(committed: Path, said: Callable[[], str]) -> None:
    exported = {"export.diffusers.max_abs_error": 3e-7, "export.effect": 0.5, "export.megabytes": 0.43}
    metrics.save(committed / "export/metrics.json", exported)
    assert said() == "same        all metrics of commit COMMIT up to 1e-05"


@pytest.mark.parametrize("what", ["setting", "images", "held-out", "code", "uncommitted", "no lock", "title"])
def test_nothing_is_said_of_another_experiment(committed: Path, said: Callable[[], str], what: str) -> None:
    change(committed, loss=MEASURED["val.loss"] * 1.000004)
    if what == "setting":
        save_lineage(committed / "export/lineage.json", MADE | {"lora": MADE["lora"] | {"rank": 77}})
    elif what == "images":
        save_lineage(committed / "export/lineage.json", MADE | {"images": "3" * 64})
    elif what == "held-out":
        other = LINEAGE["dataset"] | {"content": "other"}
        save_lineage(committed / "validate/lineage.json", LINEAGE | {"dataset": other})
    elif what == "code":
        CODE.write_text("other\n")
    elif what == "uncommitted":
        git("rm", "--quiet", "--cached", "reports/metrics.json")
        git("commit", "--quiet", "-m", "No metrics")
    elif what == "no lock":
        git("rm", "--quiet", "--cached", "dvc.lock")
        git("commit", "--quiet", "-m", "No lock")
    else:  # of report itself: its own pages differ, and no number
        change(committed)
        write_text(committed / "report.md", "another title\n")
    assert said() == ""


def test_other_packages_are_one_reason_more(committed: Path, said: Callable[[], str]) -> None:
    save_lineage(committed / "export/lineage.json", MADE | {"packages": {"torch": "3.0"}})
    change(committed, loss=MEASURED["val.loss"] * 1.000004)
    assert said().startswith("same        all metrics")


def test_nothing_is_said_without_git(workspace: Workspace, committed: Path) -> None:
    change(committed, loss=1.0)
    (workspace.path / ".git").rename(workspace.path / "no-git")
    assert not any(line.startswith(("same", "differs")) for line in workspace.run("report"))
