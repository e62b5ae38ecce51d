"""The gate in clones without data: which branches pass and which fail, and what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dag.commands.gate import lock
from lora_dag.commands.gate.page import MAX_BYTES, PageContext, link, shortened
from tests.helpers.errors import assert_line
from tests.helpers.planted import Clone, edit, gate_problems, git

ADDRESS = "https://github.com/o/r"
HELDOUT = "reports/validate/heldout.csv"


def test_gate_passes_a_better_branch(clone: Clone) -> None:
    clone("rank-4")
    arguments = ("--against", "origin/main", "--repository", ADDRESS, "--out", "page.md")
    assert gate_problems(*arguments) == []
    page = Path("page.md").read_text(encoding="utf-8")
    head, main = (git("rev-parse", name) for name in ("HEAD", "origin/main"))
    assert page.startswith(f"# Experiment: passed\n\nCommit `{head[:10]}` against `origin/main` (`{main[:10]}`).")
    assert "| max_heldout_change | 0 | held-out loss −19.90 %" in page
    assert "| lora.rank | 2 | 4 |" in page
    assert (
        "**Strength differs too**: alpha / rank is 0.5 against 1, so this compares strengths as well as ranks" in page
    )
    assert "**Data not shared:** `` data/base.dvc, data/other.dvc, data/raw.dvc: " in page
    assert f"| ![]({ADDRESS}/blob/{main}/reports/samples.png?raw=true) " in page
    assert f"| ![]({ADDRESS}/blob/{head}/reports/samples.png?raw=true) |" in page


def test_gate_fails_a_worse_branch(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("worse")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    (problem,) = gate_problems("--against", "origin/main", "--out", "page.md")
    assert problem.code == "gate-failed"
    assert problem.startswith("report.gates.max_heldout_change: held-out loss +19.90 %")
    assert "+19.90], but the limit is 0" in problem
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: failed") and "| **failed** |" in page
    sections = ["## Gates", "## Checked", "## Not checked"]
    assert [line for line in page.splitlines() if line in sections] == sections
    assert "![](reports/samples.png)" in page or "![Samples](reports/samples.png)" in page  # no address: by path


def test_gate_names_all_problems_at_once(clone: Clone) -> None:
    """In a process of its own: the page, one line per problem on stderr, exit code 2."""
    clone("main")
    edit("params.yaml", "    limits:", "    limits:\n      samples.copied_share: 0.1")
    edit("params.yaml", "rank: 2", "rank: 8")
    Path("reports/metrics.json").unlink()
    edit("stages/train/loop.py", "from __future__", "#\nfrom __future__")
    done = subprocess.run(
        [sys.executable, "-m", "lora_dag", "gate", "--out", "page.md"], capture_output=True, text=True
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert_line(done.stderr, "setting-changed", "params.yaml lora.rank: got 8")
    assert_line(done.stderr, "report-missing", "reports/metrics.json: ")
    assert_line(done.stderr, "dependency-changed", "stages/train: ")
    assert_line(done.stderr, "gate-failed", "report.gates.limits: samples.copied_share was not measured", "0.1")
    assert_line(done.stdout, "data-not-shared", "data/base.dvc, data/other.dvc, data/raw.dvc: ", "dvc remote add")
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: failed") and "- `` params.yaml lora.rank: got 8, but dvc.lock has 2" in page
    assert len(lines) == 4


def test_the_page_names_uncommitted_changes(clone: Clone) -> None:
    """A forgotten commit: the gate judges the folder, but a pull request contains commits."""
    clone("main")
    Path("notes.txt").touch()  # untracked: it is no part of the run
    assert gate_problems("--out", "page.md") == []
    assert "With uncommitted changes" not in Path("page.md").read_text(encoding="utf-8")
    edit("params.yaml", "rank: 2", "rank: 2  # a comment")
    assert gate_problems("--out", "page.md") == []
    assert "`. **With uncommitted changes:**" in Path("page.md").read_text(encoding="utf-8")
    assert gate_problems("--commit", "HEAD", "--out", "page.md") == []
    assert "With uncommitted changes" not in Path("page.md").read_text(encoding="utf-8")


def test_a_printed_page_is_all_of_stdout(clone: Clone) -> None:
    clone("main")
    done = subprocess.run([sys.executable, "-m", "lora_dag", "gate"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# Experiment: passed\n")
    assert not re.search("^(passed|neutral|warning)", done.stdout, re.MULTILINE)


def test_gate_fails_against_a_revision_without_reports(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("main")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    (problem,) = gate_problems("--against", git("rev-list", "--max-parents=0", "HEAD"), "--out", "page.md")
    assert problem.startswith("report.gates.max_heldout_change: not comparable with ") and "reports/" in problem
    assert "not comparable with" in Path("page.md").read_text(encoding="utf-8")


def test_page_names_bad_parameters(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("main")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_chance: -1")
    problems = gate_problems("--out", "page.md")
    found = [(problem.code, problem.partition(":")[0]) for problem in problems]
    assert ("unknown-setting", "params.yaml report.gates.max_heldout_chance") in found
    assert ("missing-setting", "params.yaml report.gates.max_heldout_change") in found
    assert "max_heldout_chance" in Path("page.md").read_text(encoding="utf-8")


def test_gate_rejects_an_unknown_revision_before_it_writes(clone: Clone) -> None:
    clone("main")
    (problem,) = gate_problems("--against", "origin/mian", "--out", "page.md")
    assert problem.code == "unknown-revision" and "'origin/mian'" in problem and "near: origin/main" in problem
    assert not Path("page.md").exists()


@pytest.mark.parametrize("name", ["", "workspace"])
def test_gate_rejects_an_empty_revision_and_the_workspace(clone: Clone, name: str) -> None:
    """An unset variable of CI is an empty name: it must not skip max_heldout_change."""
    clone("worse")
    (problem,) = gate_problems("--against", name, "--out", "page.md")
    assert problem.code == "revision-unusable" and problem.startswith(f"--against: got '{name}'")
    assert not Path("page.md").exists()


@pytest.mark.parametrize("out", ["reports/report.md", "./reports/metrics.json", "params.yaml", "data/export/page.md"])
def test_page_never_overwrites_a_file_of_the_run(clone: Clone, out: str) -> None:
    clone("main")
    (problem,) = gate_problems("--out", out)
    taken = "data/export" if "export" in out else str(Path(out))
    assert problem.code == "out-in-use" and f"--out: got {Path(out)}" in problem and taken in problem
    assert git("status", "--porcelain") == ""


def test_page_names_the_rerun_that_would_find_an_invented_table(clone: Clone) -> None:
    clone("rank-4")
    git("checkout", "--quiet", "origin/main", "--", "params.yaml")  # main's settings with rank-4's reports
    lock_text = Path("dvc.lock").read_text(encoding="utf-8").replace("rank: 4", "rank: 2")
    Path("dvc.lock").write_text(lock_text, encoding="utf-8")
    assert gate_problems("--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert "invented, together with its digest" in page and "`dvc repro --force --no-run-cache`" in page


def test_text_of_a_report_never_becomes_markup(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("worse")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    mark = "![passed](https://example.org/passed.png)"
    edit(HELDOUT, ",100,1,", f",100,{mark},")
    gate_problems("--against", "origin/main", "--out", "page.md")
    page = Path("page.md").read_text(encoding="utf-8")
    assert mark in page and mark not in re.sub(r"`+[^`]*`+", "", page)


def test_gate_compares_on_shared_heldout_images(clone: Clone) -> None:
    clone("overlapping")
    assert gate_problems("--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: passed\n")
    assert re.search(r"held-out loss −(19|20)\.\d\d % \[.*\] over 4 shared images, of 8 and 8 \| passed", page)


@pytest.mark.parametrize(
    ("setting", "title", "closed"), [("fail", "failed", True), ("neutral", "neutral, not comparable", False)]
)
def test_when_not_comparable_decides_without_shared_images(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, setting: str, title: str, closed: bool
) -> None:
    clone("disjoint")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    edit("params.yaml", "when_not_comparable: fail", f"when_not_comparable: {setting}")
    lines = gate_problems("--against", "origin/main", "--out", "page.md")
    assert bool(lines) == closed
    for line in lines:
        assert line.startswith("report.gates.max_heldout_change: not comparable: ") and "(images)" in line
        assert "report.gates.when_not_comparable=neutral" in line
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Experiment: {title}")
    assert ("| neutral |" in page) != closed


@pytest.mark.parametrize("broken", ["loss", "table"])
def test_broken_reports_are_never_neutral(clone: Clone, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    clone("worse")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    edit("params.yaml", "when_not_comparable: fail", "when_not_comparable: neutral")
    edit(HELDOUT, ",0.6\n", ",nan\n") if broken == "loss" else edit(HELDOUT, "timestep", "time")
    lines = gate_problems("--against", "origin/main", "--out", "page.md")
    assert any(line.startswith("report.gates.max_heldout_change: not comparable") for line in lines), lines
    assert Path("page.md").read_text(encoding="utf-8").startswith("# Experiment: failed")


def test_a_first_run_is_neutral(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("main")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    edit("params.yaml", "when_not_comparable: fail", "when_not_comparable: neutral")
    start = git("rev-list", "--max-parents=0", "HEAD")
    assert gate_problems("--against", start, "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Experiment: neutral, not comparable with {start}")


def test_repeats_on_the_branch_do_not_widen_the_interval(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit before the last of the same setting and another seed, with losses all over the place."""
    clone("worse")
    reports = git("rev-parse", "HEAD")
    settings = Path("params.yaml").read_text(encoding="utf-8")
    settings, count = re.subn(r"(\ntrain:\n.*?\n  seed: )0", r"\g<1>1", settings, flags=re.DOTALL)
    assert count == 1
    Path("params.yaml").write_text(settings, encoding="utf-8")
    text = Path(HELDOUT).read_text(encoding="utf-8")
    Path(HELDOUT).write_text(re.sub(r",0\.6\d*\n", ",9.0\n", text), encoding="utf-8")
    git("commit", "--quiet", "--all", "--message", "Another seed")
    git("checkout", "--quiet", reports, "--", ".")
    git("commit", "--quiet", "--all", "--message", "This one")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    (problem,) = gate_problems("--against", "origin/main", "--out", "page.md")
    assert problem.startswith("report.gates.max_heldout_change: held-out loss +19.90 %")


def test_gate_reads_a_merged_commit_and_runs_none_of_its_code(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Modules of the branch that Python or DVC would import if the folder were theirs, hooks, links out of it."""
    folder = clone("rank-4")
    mark = f"from pathlib import Path; Path({str(tmp_path / 'owned')!r}).touch()\n"
    for path in (
        "dvc/__init__.py",
        "ruamel/__init__.py",
        "numpy.py",
        "lora_dag/commands/gate/lock.py",
        "sitecustomize.py",
    ):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(mark, encoding="utf-8")
    Path("reports/dataset.md").unlink()
    Path("reports/dataset.md").symlink_to("/etc/hostname")
    Path(".gitattributes").write_text("* filter=own\n")
    git("add", "--all", "--force")
    git("commit", "--quiet", "--message", "Better")
    head = git("rev-parse", "HEAD")
    git("checkout", "--quiet", "main")
    command = ["-m", "lora_dag", "gate", "--against", "origin/main", "--commit", head, "--out", "page.md"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert_line(done.stderr, "report-edited", "error: reports/dataset.md: ", "stage report")
    assert not (tmp_path / "owned").exists()
    page = Path("page.md").read_text(encoding="utf-8")
    title = "# Experiment: failed (this branch changes the gate's code)"
    assert page.startswith(f"{title}\n\nCommit `{head[:10]}` against")
    assert "has the code of the target branch." in page
    assert git("worktree", "list").splitlines() == [f"{folder}  {git('rev-parse', '--short', 'HEAD')} [main]"]
    assert git("status", "--porcelain") == "?? page.md"


def test_page_names_the_files_of_a_merge_conflict(clone: Clone) -> None:
    clone("main")
    lines = gate_problems("--against", "origin/worse", "--commit", "origin/rank-4", "--out", "page.md")
    worse, better = (git("rev-parse", f"origin/{name}")[:10] for name in ("worse", "rank-4"))
    (problem,) = lines
    assert problem.code == "merge-conflict" and all(each in problem for each in (better, worse))
    assert "dvc.lock, " in problem and "reports/metrics.json" in problem
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: failed") and "conflicts with" in page and "![" not in page


def test_gate_merges_a_newer_target_branch_first(clone: Clone) -> None:
    """The commit alone is up to date, but the merge is not: main has newer code of train."""
    clone("main")
    edit("stages/train/loop.py", "from __future__", "#\nfrom __future__")
    git("commit", "--quiet", "--all", "--message", "Newer main")
    assert gate_problems("--against", "origin/main", "--commit", "origin/rank-4", "--out", "page.md") == []
    (line,) = gate_problems("--against", "main", "--commit", "origin/rank-4", "--out", "page.md")
    assert line.code == "dependency-changed" and line.startswith("stages/train: ")


@pytest.mark.parametrize("name", ["", "workspace"])
def test_gate_rejects_an_empty_commit_and_the_workspace(clone: Clone, name: str) -> None:
    clone("main")
    (problem,) = gate_problems("--commit", name)
    assert problem.code == "revision-unusable" and problem.startswith(f"--commit: got '{name}'")


def test_images_are_linked_by_a_commit_with_the_same_bytes(clone: Clone) -> None:
    clone("rank-4")
    head, main = git("rev-parse", "HEAD"), git("rev-parse", "origin/main")
    path = "reports/samples.png"
    assert link(PageContext(ADDRESS, head, "main", main), path) == f"{ADDRESS}/blob/{head}/{path}?raw=true"
    git("checkout", "--quiet", "origin/main", "--", path)
    assert link(PageContext(ADDRESS, head, "main", main), path) == f"{ADDRESS}/blob/{main}/{path}?raw=true"
    Path(path).write_bytes(b"replaced")
    assert link(PageContext(ADDRESS, head, "main", main), path) == path


def test_a_long_page_fits_into_a_comment() -> None:
    page = shortened("# First\n\n" + "- ö ü\n" * 20_000, "## Samples\n\n![](a.png)")
    assert len(page.encode()) <= MAX_BYTES
    assert page.startswith("# First") and page.endswith("the whole page)\n\n## Samples\n\n![](a.png)\n")
