"""The gate in clones without data: honest branches pass, and whatever was tampered with is named, with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.core.console import UserError
from stages.core.evaluation import Estimate
from stages.gate import __main__ as gate
from stages.gate import limits, lock
from stages.gate.page import MAX_BYTES, Place, link, shortened
from stages.report.params import Gates
from tests.planted import Clone, git

OFF: dict[str, Any] = dict.fromkeys(Gates.model_fields)
ADDRESS = "https://github.com/o/r"


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text(encoding="utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")


def differences() -> list[str]:
    """What is read from dvc.lock here, DVC aside."""
    return lock.compare(lock.Pipeline.read())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """Reasons not to pass."""
    monkeypatch.setattr(sys, "argv", ["gate", *arguments])
    try:
        gate.main()
    except UserError as error:
        return list(error.problems)
    return []


def test_an_honest_branch_passes(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("rank-4")
    arguments = ("--against", "origin/main", "--repository", ADDRESS, "--out", "page.md")
    assert run(monkeypatch, *arguments) == []
    page = Path("page.md").read_text(encoding="utf-8")
    head, main = (git("rev-parse", name) for name in ("HEAD", "origin/main"))
    assert page.startswith(f"# Experiment: passed\n\nCommit `{head[:10]}` against `origin/main` (`{main[:10]}`).")
    assert "| max_heldout_change | 0 | held-out loss −19.90 %" in page
    assert "| lora.rank | 2 | 4 |" in page
    assert "**Not shared:** `data/base.dvc, data/other.dvc, data/raw.dvc: nobody else can get this data: no DVC" in page
    assert f"| ![]({ADDRESS}/blob/{main}/reports/samples.png?raw=true) " in page
    assert f"| ![]({ADDRESS}/blob/{head}/reports/samples.png?raw=true) |" in page


def test_a_worse_branch_is_closed_by_its_gate(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("worse")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    (closed,) = run(monkeypatch, "--against", "origin/main", "--out", "page.md")
    assert closed.startswith("report.gates.max_heldout_change: held-out loss +19.90 %")
    assert closed.endswith("+19.90]; the limit is 0")
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: not passed") and "**not passed**" in page
    assert "are of one run" in page
    assert "passes unless the whole of it lies above the limit" in page
    assert "![](reports/samples.png)" in page or "![Samples](reports/samples.png)" in page  # no address: by path


TAMPERED: dict[str, tuple[Callable[[], Any], str]] = {
    "params": (
        lambda: edit("params.yaml", "rank: 2", "rank: 8"),
        r"params.yaml lora.rank: 8, and dvc.lock has 2 \(train\): changed without a new dvc.lock",
    ),
    "metrics": (
        lambda: edit("reports/metrics.json", '"val.loss": 0', '"val.loss": 0.0'),
        r"reports/metrics.json: not what stage validate wrote \(md5 \w{8}, dvc.lock has \w{8}\): edited",
    ),
    "picture": (
        lambda: Path("reports/samples.png").write_bytes(Path("reports/progress.png").read_bytes() + b"\0"),
        r"reports/samples.png: not what stage validate wrote",
    ),
    "code": (
        lambda: edit("stages/train/trainer.py", "from __future__", "#\nfrom __future__"),
        r"stages/train/trainer.py: changed since train ran, without a new dvc.lock",
    ),
    "command": (
        lambda: edit("dvc.yaml", "python -m stages.train", "python -m stages.train --set train.seed=1"),
        r"dvc.yaml train: the command is 'python -m stages.train --set train.seed=1', and 'python -m stages.train' was",
    ),
    "pipeline": (
        lambda: edit("dvc.yaml", TRAINER, f"{TRAINER}      - stages/gate/lock.py\n"),
        r"dvc.yaml: stages/gate/lock.py is a dependency of train, and dvc.lock does not have it; run `dvc repro`",
    ),
    "data": (
        lambda: edit("data/raw.dvc", "md5: ", "md5: 0123456789abcdef0123456789abcdef.dir #"),
        r"data/raw.dvc: names data 01234567, and dvc.lock has \w{8} \(prepare, cache_latents\)",
    ),
    "pin": (
        lambda: edit("dvc.lock", DATA, DATA.replace("md5: ", "md5: 0", 1)),
        r"dvc.lock: data/latents is 0\w{7} as cache_latents wrote it, and \w{8} \(train, validate\): run",
    ),
}
DATA = "data/latents\n      hash: md5\n      md5: "
TRAINER = "      - stages/train/trainer.py\n"
FORGIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "no report": (
        lambda: Path("reports/metrics.json").unlink(),
        r"reports/metrics.json: missing, and stage validate wrote it",
    ),
    "no code": (
        lambda: Path("stages/core/params.py").unlink(),
        r"stages/core/params.py: missing, and a dependency of prepare, cache_latents, train, validate, export, report;",
    ),
    "unlisted": (
        lambda: (edit("dvc.yaml", TRAINER, ""), TAMPERED["code"][0]()),
        r"dvc.yaml: stages/train/trainer.py is not a dependency of train, .* run `dvc repro --force train`, then",
    ),
    "frozen": (
        lambda: (
            edit("dvc.yaml", "  train:\n", "  train:\n    frozen: true\n"),
            edit("params.yaml", "rank: 2", "rank: 8"),
        ),
        r"params.yaml lora.rank: 8, and dvc.lock has 2 \(train\)",
    ),
}


@pytest.mark.parametrize("name", [*TAMPERED, *FORGIVEN])
def test_what_was_tampered_with_is_named(clone: Clone, name: str) -> None:
    clone("main")
    change, expected = (TAMPERED | FORGIVEN)[name]
    change()
    (line,) = differences()
    assert re.match(expected, line), line


def test_a_dependency_less_is_no_matter(clone: Clone) -> None:
    """DVC runs nothing for it, and writes no other dvc.lock."""
    clone("main")
    edit("dvc.yaml", TRAINER, "")
    assert differences() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TAMPERED, *FORGIVEN])
def test_dvc_agrees_or_forgives(clone: Clone, name: str) -> None:
    clone("main")
    (TAMPERED | FORGIVEN)[name][0]()
    assert (lock.ask_dvc() == []) == (name in FORGIVEN)


def test_all_that_is_wrong_is_said_at_once(clone: Clone) -> None:
    """As a person starts it: the page, a line per reason on stderr, exit code 2."""
    clone("main")
    edit("params.yaml", "    max_copied_share:", "    max_copied_share: 0.1")
    for name in ("params", "metrics", "code", "no report"):
        (TAMPERED | FORGIVEN)[name][0]()
    done = subprocess.run([sys.executable, "-m", "stages.gate", "--out", "page.md"], capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for start in ("params.yaml lora.rank: 8", "reports/metrics.json: missing", "stages/train/trainer.py: changed"):
        assert any(line.startswith(f"error: {start}") for line in lines), lines
    assert "error: report.gates.max_copied_share: samples.copied_share was not measured; the limit is 0.1" in lines
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: not passed") and "- `params.yaml lora.rank: 8, and dvc.lock has 2" in page
    assert len(lines) == 4


def test_gates_are_no_part_of_the_run_and_a_change_of_theirs_is_shown(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone("worse")
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_change: 0.5")
    assert run(monkeypatch, "--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert "**This branch changes gates:** `report.gates.max_heldout_change 0.0 → 0.5` (`origin/main` has" in page


def test_a_revision_without_reports_closes_the_gate_that_asks_for_it(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone("main")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    (closed,) = run(monkeypatch, "--against", git("rev-list", "--max-parents=0", "HEAD"), "--out", "page.md")
    assert closed.startswith("report.gates.max_heldout_change: not comparable with ") and "reports/" in closed
    assert "No comparison: not comparable with" in Path("page.md").read_text(encoding="utf-8")


def conflict() -> None:
    edit("dvc.lock", "schema:", "<<<<<<< HEAD\nschema:")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda: Path("dvc.lock").unlink(), r"dvc.lock: missing; run `dvc repro`"),
        (conflict, r"dvc: .*dvc.lock.*; see `dvc repro --dry --allow-missing`"),
        (lambda: edit("params.yaml", "rank: 2", "rank: [2"), r"dvc: .*params.yaml.*; see"),
        (lambda: edit("dvc.yaml", "stages:", "stages: 1\nother:"), r"dvc: .*dvc.yaml.*; see"),
    ],
)
def test_files_that_dvc_cannot_read_are_one_line(clone: Clone, damage: Callable[[], Any], expected: str) -> None:
    clone("main")
    damage()
    (line,) = lock.problems()
    assert re.match(expected, line), line


def test_bad_parameters_are_on_the_page_too(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("main")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_chance: -1")
    problems = run(monkeypatch, "--out", "page.md")
    for start in ("chance: unknown key (near: max_heldout_change", "change: missing; expected float | None"):
        assert any(line.startswith(f"params.yaml report.gates.max_heldout_{start}") for line in problems), problems
    assert "max_heldout_chance" in Path("page.md").read_text(encoding="utf-8")


def test_an_unknown_revision_is_refused_before_anything_is_written(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone("main")
    (line,) = run(monkeypatch, "--against", "origin/mian", "--out", "page.md")
    assert line.startswith("origin/mian: no commit, branch, tag or DVC experiment of that name (near: origin/main")
    assert not Path("page.md").exists()


@pytest.mark.parametrize("name", ["", "workspace"])
def test_nothing_and_itself_are_no_revision_to_pass_against(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An empty one, as an unset variable of CI gives it, left max_heldout_change out."""
    clone("worse")
    (line,) = run(monkeypatch, "--against", name, "--out", "page.md")
    assert line.startswith(f"--against: got '{name}'; name a commit, branch, tag or DVC experiment")
    assert not Path("page.md").exists()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("dvc.lock", "stages:\n", "stages:\nother:\n"),
        ("dvc.lock", "path: reports/metrics.json", "path: null"),
        ("dvc.lock", "cmd: python -m stages.train", "cmds: x"),
        ("data/raw.dvc", "outs:\n", "outs: [x]\nother:\n"),
    ],
)
def test_what_dvc_would_not_write_is_one_line(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, path: str, old: str, new: str
) -> None:
    clone("main")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])  # which refuses most of them by itself
    edit(path, old, new)
    (line,) = lock.problems()
    assert line.startswith("dvc.yaml, dvc.lock or a .dvc file: not as DVC writes it (") and "\n" not in line


@pytest.mark.parametrize("out", ["reports/report.md", "./reports/metrics.json", "params.yaml", "data/export/page.md"])
def test_the_page_takes_the_place_of_no_file_of_the_run(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    clone("main")
    (line,) = run(monkeypatch, "--out", out)
    taken = "data/export" if "export" in out else str(Path(out))
    assert line == f"--out: {Path(out)} is, or lies in, {taken} of the run; name another file, such as gate.md"
    assert git("status", "--porcelain") == ""


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 200_000])
def test_figures_of_another_kind_are_one_line(clone: Clone, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    clone("main")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    Path("reports/metrics.json").write_text(text)
    edited, damaged = run(monkeypatch, "--out", "page.md")
    assert edited.startswith("reports/metrics.json: not what stage validate wrote")
    assert re.fullmatch(r"reports/metrics\.json: damaged, no .*run `dvc repro`", damaged)
    assert Path("page.md").read_text(encoding="utf-8").startswith("# Experiment: not passed")


# Gates


def answer(metrics: dict[str, Any], change: Estimate | str | None = None, **gates: float) -> list[str]:
    """Reasons of the gates that are closed."""
    found = limits.answers(Gates.model_validate(OFF | gates), metrics, change)
    return [str(each) for each in found if not each.passed]


@pytest.mark.parametrize(
    ("gate", "metrics", "closed"),
    [
        ("max_overfit_gap", {"val.overfit_gap_low": 0.1}, False),
        ("max_overfit_gap", {"val.overfit_gap_low": 0.11}, "lower bound of val.overfit_gap is 0.11"),
        ("max_overfit_gap", {"val.overfit_gap_low": None}, "val.overfit_gap was not measured"),
        ("max_overfit_gap", {"val.overfit_gap_low": True}, "val.overfit_gap was not measured"),
        ("max_drift_change", {"drift.loss_change_low": 0.2}, "lower bound of drift.loss_change is 0.2"),
        ("max_drift_change", {}, "drift.loss_change was not measured"),
        ("max_copied_share", {"samples.copied_share": 0.1}, False),
        ("max_copied_share", {"samples.copied_share": 0.2}, "samples.copied_share is 0.2"),
        ("max_copied_share", {}, "samples.copied_share was not measured"),
        ("max_export_error", {"export.peft.max_abs_error": 0.1, "export.rank_4.max_abs_error": 9.0}, False),
        (
            "max_export_error",
            {"export.peft.max_abs_error": 0.0, "export.comfyui.max_abs_error": 0.3},
            "export.comfyui.max_abs_error is 0.3",
        ),
        (
            "max_export_error",
            {"export.peft.max_abs_error": 0.0, "export.comfyui.max_abs_error": None},
            "export.comfyui.max_abs_error was not measured",
        ),
        ("max_export_error", {"export.peft.max_abs_error": None}, "export.peft.max_abs_error was not measured"),
        ("max_export_error", {}, "export.*.max_abs_error was not measured"),
        (
            "max_export_error",
            {"export.peft.max_abs_error": 0.0, "export.comfyui.max_abs_error": float("nan")},
            "export.comfyui.max_abs_error was not measured",
        ),
        ("max_copied_share", {"samples.copied_share": 10**400}, "samples.copied_share was not measured"),
    ],
)
def test_each_gate_asks_its_figure(gate: str, metrics: dict[str, Any], closed: str | bool) -> None:
    expected = [f"report.gates.{gate}: {closed}; the limit is 0.1"] if closed else []
    assert answer(metrics, **{gate: 0.1}) == expected
    assert answer(metrics) == []


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (Estimate(-0.1, -0.2, -0.05), True),
        (Estimate(0.1, -0.01, 0.2), True),
        (Estimate(0.1, 0.02, 0.2), False),
        (Estimate(0.1, float("nan"), float("nan")), False),
        ("not comparable with main: the held-out table differs", False),
        (None, True),
    ],
)
def test_the_heldout_gate_opens_for_noise_and_closes_for_what_it_cannot_tell(
    change: Estimate | str | None, passed: bool
) -> None:
    assert (answer({}, change, max_heldout_change=0.0) == []) == passed


# The page


def test_pictures_are_linked_by_a_commit_that_has_their_bytes(clone: Clone) -> None:
    clone("rank-4")
    head, main = git("rev-parse", "HEAD"), git("rev-parse", "origin/main")
    path = "reports/samples.png"
    assert link(Place(ADDRESS, head, "main", main), path) == f"{ADDRESS}/blob/{head}/{path}?raw=true"
    git("checkout", "--quiet", "origin/main", "--", path)
    assert link(Place(ADDRESS, head, "main", main), path) == f"{ADDRESS}/blob/{main}/{path}?raw=true"
    Path(path).write_bytes(b"replaced")
    assert link(Place(ADDRESS, head, "main", main), path) == path


def test_a_long_page_fits_into_a_comment() -> None:
    page = shortened("# First\n\n" + "- ö ü\n" * 20_000, "## Samples\n\n![](a.png)")
    assert len(page.encode()) <= MAX_BYTES
    assert page.startswith("# First") and page.endswith("shows all of it)\n\n## Samples\n\n![](a.png)\n")
