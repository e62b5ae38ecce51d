"""The gate in clones without data: honest branches pass, and whatever was tampered with is named, with the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_dag.commands.gate import figures, limits, lock
from lora_dag.commands.gate.against import Comparison
from lora_dag.commands.gate.page import MAX_BYTES, Place, link, shortened
from lora_dag.core.console import UserError
from lora_dag.core.files import write_text
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.pipeline.code import dvc_md5
from stages.report.params import Gates
from tests.helpers import command
from tests.helpers.planted import Clone, git

OFF: dict[str, Any] = {**dict.fromkeys(Gates.model_fields), "when_not_comparable": "fail"}
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
    try:
        command.run("gate", *arguments)
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
    assert (
        "**Strength differs too**: alpha / rank is 0.5 against 1, so this compares strengths as well as ranks" in page
    )
    assert "**Not shared:** `` data/base.dvc, data/other.dvc, data/raw.dvc: nobody else can get this data:" in page
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
    assert (
        "dvc.lock and reports/ have the digests of one run (its code may be older" in page
        and "nothing was run again here" in page
    )
    assert "passes unless the whole of it is worse than the limit" in page
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
        lambda: edit("stages/train/loop.py", "from __future__", "#\nfrom __future__"),
        r"stages/train: changed since train ran, without a new dvc.lock; run `dvc repro`, or `lora-dag relock`",
    ),
    "no code": (
        lambda: Path("lora_dag/core/params.py").unlink(),
        r"lora_dag/core: changed since prepare, cache_latents, train, validate, export, report ran, without",
    ),
    "a new module": (
        lambda: Path("stages/train/new.py").write_text(""),
        r"stages/train: changed since train ran, without a new dvc.lock",
    ),
    "command": (
        lambda: edit("dvc.yaml", "python -m stages.train", "python -m stages.train --set train.seed=1"),
        r"dvc.yaml train: the command is 'python -m stages.train --set train.seed=1', and 'python -m stages.train' was",
    ),
    "pipeline": (
        lambda: edit("dvc.yaml", TRAINER, f"{TRAINER}      - lora_dag/commands/gate/lock.py\n"),
        r"dvc.yaml: lora_dag/commands/gate/lock.py is a dependency of train, and dvc.lock does not have it; "
        r"run `dvc repro`",
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
TRAINER = "      - stages/train\n"
FORGIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "no report": (
        lambda: Path("reports/metrics.json").unlink(),
        r"reports/metrics.json: missing, and stage validate wrote it",
    ),
    "unlisted": (
        lambda: (edit("dvc.yaml", TRAINER, ""), TAMPERED["code"][0]()),
        r"dvc.yaml: stages/train is not a dependency of train, .* run `dvc repro --force train`, then",
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


def test_a_raised_number_of_results_is_named(clone: Clone) -> None:
    clone("main")
    edit("stages/train/__init__.py", "RESULTS = 1", "RESULTS = 2")
    number, code = differences()
    assert number.startswith("stages/train/__init__.py: RESULTS is 2, and dvc.lock has 1: train has not run since; run")
    assert code.startswith("stages/train: changed since train ran")


NO_NUMBER = {"RESULTS = 'two'\n": "two", "": "none that DVC can read", "RESULTS = (\n": "no Python"}


@pytest.mark.parametrize("text", NO_NUMBER)
def test_a_stage_without_a_number_of_results_is_one_line(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    clone("main")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    Path("stages/train/__init__.py").write_text(text)
    assert lock.problems() == [
        "stages/train/__init__.py: expected one line RESULTS = NUMBER, such as RESULTS = 1; "
        f"got {NO_NUMBER[text]}; restore it"
    ]


def test_a_number_of_results_with_a_type(clone: Clone) -> None:
    clone("main")
    Path("stages/train/__init__.py").write_text("RESULTS: int = 2\n")
    assert differences()[0].startswith("stages/train/__init__.py: RESULTS is 2, and dvc.lock has 1: train has not run")


def test_what_editors_and_python_leave_beside_code_is_no_change(clone: Clone) -> None:
    clone("main")
    for name in ("__pycache__/trainer.cpython-311.pyc", ".trainer.py.swp", ".ipynb_checkpoints/trainer.py"):
        path = Path("stages/train", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert lock.problems() == []


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
    edit("params.yaml", "    limits:", "    limits:\n      samples.copied_share: 0.1")
    for name in ("params", "metrics", "code", "no report"):
        (TAMPERED | FORGIVEN)[name][0]()
    done = subprocess.run(
        [sys.executable, "-m", "lora_dag", "gate", "--out", "page.md"], capture_output=True, text=True
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for start in ("params.yaml lora.rank: 8", "reports/metrics.json: missing", "stages/train: changed"):
        assert any(line.startswith(f"error: {start}") for line in lines), lines
    assert "error: report.gates.limits: samples.copied_share was not measured; the limit is 0.1" in lines
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: not passed") and "- `` params.yaml lora.rank: 8, and dvc.lock has 2" in page
    assert len(lines) == 4


def test_gates_are_no_part_of_the_run_and_a_change_of_theirs_is_shown(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone("worse")
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_change: 0.5")
    assert run(monkeypatch, "--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: passed; changes report.gates\n")
    assert "- **report.gates**: `report.gates.max_heldout_change 0.0 → 0.5`" in page
    assert "The gate that ran is the branch's own." in page


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


# Figures whose digests are forged too


def forge(path: str, old: str, new: str) -> None:
    """Edit a report as one would who knows that dvc.lock has its digest."""
    before = dvc_md5(Path(path))
    edit(path, old, new)
    text = Path("dvc.lock").read_text(encoding="utf-8")
    assert before in text
    Path("dvc.lock").write_text(text.replace(before, dvc_md5(Path(path))), encoding="utf-8")


def set_metric(path: str, name: str, value: object) -> Callable[[], None]:
    def change() -> None:
        old = json.dumps(json.loads(Path(path).read_text(encoding="utf-8"))[name])
        forge(path, f'"{name}": {old}', f'"{name}": {json.dumps(value)}')

    return change


MEASURED, TRAINED = "reports/metrics.json", "reports/train/metrics.json"
HELDOUT, CURVE = "reports/validate/heldout.csv", "reports/validate/curve.csv"
NEAREST, PICTURES = "reports/validate/nearest.csv", "reports/dataset/pictures.csv"
LINEAGE, EXPORTED = "reports/validate/lineage.json", "reports/export/metrics.json"
FORGED: dict[str, tuple[Callable[[], Any], str]] = {
    "loss": (
        set_metric(MEASURED, "val.loss", 0.1),
        r"reports/metrics.json val.loss: 0.1, and .*heldout.csv gives 0.50",
    ),
    "interval": (
        set_metric(MEASURED, "val.overfit_gap_low", -0.9),
        r"reports/metrics.json val.overfit_gap_low: -0.9, and .*heldout.csv gives -0.00",
    ),
    "a third of the noise": (
        set_metric(MEASURED, "val.loss_high_noise", 0.2),
        r"reports/metrics.json val.loss_high_noise: 0.2, and .*heldout.csv gives 0.50",
    ),
    "null": (set_metric(MEASURED, "val.loss_change_high", None), r".*val.loss_change_high: None, and .* gives -0.49"),
    "best step": (set_metric(MEASURED, "val.best_step", 2), r".* val.best_step: 2, and .*curve.csv gives 4"),
    "curve": (
        lambda: forge(CURVE, "4,0.50", "4,0.40"),
        r"reports/validate/curve.csv: 0.40\d* where .*heldout.csv gives 0.50\d* \(val.loss\)",
    ),
    "copies": (
        set_metric(MEASURED, "samples.copied_share", 0.0),
        r"reports/metrics.json samples.copied_share: 0.0, and .*nearest.csv gives 0.25",
    ),
    "noise": (
        set_metric(MEASURED, "samples.far_share", 0.0),
        r"reports/metrics.json samples.far_share: 0.0, and .*nearest.csv gives 0.25",
    ),
    "copied": (
        lambda: (forge(NEAREST, "t0.png,1", "t0.png,0"), set_metric(MEASURED, "samples.copied_share", 0.0)()),
        r"reports/validate/nearest.csv: copied 0 at a distance of 0.2; reports/validate/lineage.json has 0.3",
    ),
    "a sample": (
        lambda: forge(NEAREST, "blue boat,1", "red apple,1"),
        r"reports/validate/nearest.csv: its 4 rows are not the 4 of validate.prompts and num_seeds",
    ),
    "a bad picture left out": (
        lambda: forge(PICTURES, "h3.png,heldout", "h3.png,left out"),
        r"reports/validate/heldout.csv h3.png: heldout, and reports/dataset/pictures.csv does not have it there",
    ),
    "a trained picture held out": (
        lambda: forge(PICTURES, "h3.png,heldout", "h3.png,train"),
        r"reports/validate/heldout.csv h3.png: heldout, and reports/dataset/pictures.csv does not have it there",
    ),
    "a held-out picture more": (
        set_metric("reports/dataset/metrics.json", "num_heldout", 9),
        r"reports/dataset/metrics.json num_heldout: 9, and reports/dataset/pictures.csv gives 8",
    ),
    "another timestep": (
        lambda: forge(HELDOUT, "h2.png,heldout,100", "h2.png,heldout,600"),
        r"reports/validate/heldout.csv h2.png: timesteps \[600, 900\], and validate.num_timesteps 2 asks one in each",
    ),
    "a row twice": (
        lambda: forge(HELDOUT, "h2.png-100,", "h2.png-900,"),
        r"reports/validate/heldout.csv: 2 rows are called 'h2.png-900', and each has a name of its own",
    ),
    "no names of rows": (
        lambda: forge(HELDOUT, "row,file_name", "line,file_name"),
        r"reports/validate/heldout.csv: 32 rows are called '', and each has a name of its own",
    ),
    "a number without end": (
        lambda: set_metric(MEASURED, "val.best_step", 10**400)(),
        r"reports/: what `steps` needs is not as its stage wrote it \(OverflowError",
    ),
    "no steps": (
        lambda: forge("reports/train/loss.csv", Path("reports/train/loss.csv").read_text().partition("\n")[2], ""),
        r"reports/: what `training` needs is not as its stage wrote it \(IndexError",
    ),
    "no timesteps": (
        lambda: forge(LINEAGE, '"num_train_timesteps": 1000', '"num_train_timesteps": 0'),
        r"reports/: what `heldout` needs is not as its stage wrote it \(ZeroDivisionError",
    ),
    "training": (
        set_metric(TRAINED, "train.loss_final", 0.1),
        r".* train.loss_final: 0.1, and .*loss.csv gives 0.52083",
    ),
    "images": (set_metric(TRAINED, "train.images_seen", 800), r".* train.images_seen: 800, and .*loss.csv gives 8"),
    "headline": (
        set_metric("reports/headline.json", "val.loss", 0.1),
        r"reports/headline.json val.loss: 0.1, and the stages' metrics.json gives 0.50",
    ),
    "adapter": (
        lambda: forge(LINEAGE, '"ada97e5', '"bda97e5'),
        r"reports/validate/lineage.json: another digest of the adapter \(bda97e500000\) than reports/export/lineage",
    ),
    "a base": (
        lambda: forge(LINEAGE, '"unet": "ba5e', '"unet": "ca5e'),
        r"reports/validate/lineage.json: another digest of the base's unet",
    ),
    "a format": (
        lambda: forge(EXPORTED, "export.diffusers.max_abs", "export.rank_8.max_abs"),
        r"reports/export/metrics.json: has no export.diffusers.max_abs_error, and export.formats lists diffusers",
    ),
    "no table": (
        lambda: forge(CURVE, "step,heldout", "step,held-out"),
        r"reports/: what `steps` needs is not as its stage wrote it \(KeyError: 'heldout'\)",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_figure_forged_with_its_digest_is_refused(clone: Clone, name: str) -> None:
    clone("main")
    change, expected = FORGED[name]
    assert figures.problems() == []
    change()
    assert differences() == []  # of digests: none
    found = figures.problems()
    assert any(re.match(expected, line) for line in found), found


def test_figures_forged_with_their_digests_close_the_gate(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC itself finds dvc.lock and reports/ up to date."""
    clone("worse")
    set_metric(MEASURED, "val.loss", 0.1)()
    closed, _, line = sorted(run(monkeypatch, "--against", "origin/main", "--out", "page.md"), reverse=True)
    assert closed.startswith("reports/metrics.json val.loss: 0.1, and reports/validate/heldout.csv gives 0.60")
    assert line.startswith("report.gates.max_heldout_change: held-out loss +19.90 %")  # judged by the rows themselves
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: not passed") and "- `reports/metrics.json val.loss: 0.1, and" in page


def test_a_table_invented_as_a_whole_passes_and_the_page_says_who_would_find_it(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone("rank-4")
    git("checkout", "--quiet", "origin/main", "--", "params.yaml")  # main's settings with rank-4's reports
    lock_text = Path("dvc.lock").read_text(encoding="utf-8").replace("rank: 4", "rank: 2")
    Path("dvc.lock").write_text(lock_text, encoding="utf-8")
    assert run(monkeypatch, "--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert "invented, together with its digest" in page and "`dvc repro --force --no-run-cache`" in page


def test_code_that_dvc_yaml_and_dvc_lock_both_leave_out_is_named(clone: Clone) -> None:
    """So that an edited trainer would have no digest anywhere."""
    clone("main")
    for path in ("dvc.yaml", "dvc.lock"):
        text = Path(path).read_text(encoding="utf-8")
        text = re.sub(r"( +)- path: stages/train\n(?:\1  .*\n)+", "", text.replace(TRAINER, ""))
        assert "stages/train\n" not in text
        Path(path).write_text(text, encoding="utf-8")
    edit("stages/train/loop.py", "from __future__", "#\nfrom __future__")
    assert differences() == []
    (line,) = lock.problems()
    assert line.startswith("dvc.yaml: stages/train is code of train, which does not list it; add it to its")


def test_a_report_that_no_stage_has_among_its_outputs_is_named(clone: Clone) -> None:
    """Neither dvc.yaml nor dvc.lock lists it, so that it may be edited."""
    clone("main")
    edit("dvc.yaml", "      - reports/train/metrics.json", "      - reports/train/figures.json")
    text = Path("dvc.lock").read_text(encoding="utf-8")
    Path("dvc.lock").write_text(text.replace("reports/train/metrics.json", "reports/train/figures.json"))
    (line,) = figures.problems()
    assert line.startswith("dvc.yaml: no stage has reports/train/metrics.json among its outputs")


def test_code_that_is_no_python_is_one_line(clone: Clone) -> None:
    clone("main")
    Path("stages/train/batches.py").write_text("def\n", encoding="utf-8")
    assert any(line.startswith("dvc.yaml train: its code cannot be read (SyntaxError") for line in lock.problems())


def test_text_of_a_report_is_no_markup_of_the_page(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("worse")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    mark = "![passed](https://example.org/passed.png)"
    edit(HELDOUT, ",100,1,", f",100,{mark},")
    run(monkeypatch, "--against", "origin/main", "--out", "page.md")
    page = Path("page.md").read_text(encoding="utf-8")
    assert mark in page and mark not in re.sub(r"`+[^`]*`+", "", page)


# Rules that a branch changes for itself


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
        "the numbers of results",
        "stages/report/__init__.py",
    ),
    "code beside a number of results": (
        lambda: edit("stages/report/__init__.py", "RESULTS = 1", "RESULTS = 1\nprint(1)"),
        "the gate's code, the numbers of results",
        "stages/report/__init__.py",
    ),
    "golden values": (
        lambda: write_text(Path("tests/golden/train.json"), "{}"),
        "the numbers of results",
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
def test_a_changed_rule_is_on_the_page_and_in_its_title(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    clone("rank-4")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    change, rule, detail = RULES[name]
    change()
    run(monkeypatch, "--against", "origin/main", "--out", "page.md")
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.splitlines()[0].endswith(f"; changes {rule}")
    assert all(f"- **{each}**: `{detail}`" in page for each in rule.split(", "))


def test_what_the_other_branch_has_changed_since_is_no_change_of_this_one(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone("main")
    edit("params.yaml", "max_heldout_change: 0.0", "max_heldout_change: 0.5")
    edit("requirements.lock", "torch==", "torch>=")
    git("commit", "--quiet", "--all", "--message", "Newer main")
    newer = git("rev-parse", "HEAD")
    git("checkout", "--quiet", "origin/rank-4")
    assert run(monkeypatch, "--against", newer, "--out", "page.md") == []
    assert Path("page.md").read_text(encoding="utf-8").startswith("# Experiment: passed\n")


# Other held-out pictures


SEED_OF_TRAIN = "seed: 0\n\nvalidate:"


def test_adapters_are_judged_on_the_pictures_that_both_hold_out(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("overlapping")
    assert run(monkeypatch, "--against", "origin/main", "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: passed\n")
    assert re.search(
        r"held-out loss −(19|20)\.\d\d % \[.*\] over 4 pictures that both hold out, of 8 and 8 \| passed", page
    )


@pytest.mark.parametrize(
    ("setting", "title", "closed"), [("fail", "not passed", True), ("neutral", "neutral, not comparable", False)]
)
def test_where_nothing_is_common_a_setting_decides(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, setting: str, title: str, closed: bool
) -> None:
    clone("disjoint")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    edit("params.yaml", "when_not_comparable: fail", f"when_not_comparable: {setting}")
    lines = run(monkeypatch, "--against", "origin/main", "--out", "page.md")
    assert bool(lines) == closed
    for line in lines:
        assert line.startswith("report.gates.max_heldout_change: not comparable: the held-out table differs (pictures)")
        assert line.endswith("; report.gates.when_not_comparable=neutral lets it pass")
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Experiment: {title}")
    assert ("| neutral |" in page) != closed


@pytest.mark.parametrize("broken", ["loss", "table"])
def test_neutral_is_for_other_pictures_and_not_for_broken_reports(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    clone("worse")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    edit("params.yaml", "when_not_comparable: fail", "when_not_comparable: neutral")
    edit(HELDOUT, ",0.6\n", ",nan\n") if broken == "loss" else edit(HELDOUT, "timestep", "time")
    lines = run(monkeypatch, "--against", "origin/main", "--out", "page.md")
    assert any(line.startswith("report.gates.max_heldout_change: not comparable") for line in lines), lines
    assert Path("page.md").read_text(encoding="utf-8").startswith("# Experiment: not passed")


def test_a_first_run_has_nothing_to_be_compared_with(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("main")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    edit("params.yaml", "when_not_comparable: fail", "when_not_comparable: neutral")
    start = git("rev-list", "--max-parents=0", "HEAD")
    assert run(monkeypatch, "--against", start, "--out", "page.md") == []
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Experiment: neutral, not comparable with {start}")


def test_invented_repeats_of_the_branch_do_not_widen_the_interval(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit before the last of the same setting and another seed, with losses all over the place."""
    clone("worse")
    reports = git("rev-parse", "HEAD")
    edit("params.yaml", SEED_OF_TRAIN, SEED_OF_TRAIN.replace("seed: 0", "seed: 1"))
    text = Path(HELDOUT).read_text(encoding="utf-8")
    Path(HELDOUT).write_text(re.sub(r",0\.6\d*\n", ",9.0\n", text), encoding="utf-8")
    git("commit", "--quiet", "--all", "--message", "Another seed")
    git("checkout", "--quiet", reports, "--", ".")
    git("commit", "--quiet", "--all", "--message", "This one")
    monkeypatch.setattr(lock, "ask_dvc", lambda: [])
    (closed,) = run(monkeypatch, "--against", "origin/main", "--out", "page.md")
    assert closed.startswith("report.gates.max_heldout_change: held-out loss +19.90 %")


# A commit, merged


def test_a_commit_is_judged_as_it_would_be_merged_and_none_of_its_code_runs(
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
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: reports/dataset.md: not what stage report wrote")
    assert not (tmp_path / "owned").exists()
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Experiment: not passed; changes the gate's code\n\nCommit `{head[:10]}` against")
    assert "The gate that ran is not the branch's own." in page
    assert git("worktree", "list").splitlines() == [f"{folder}  {git('rev-parse', '--short', 'HEAD')} [main]"]
    assert git("status", "--porcelain") == "?? page.md"


def test_a_commit_that_conflicts_has_a_page_that_says_so(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone("main")
    lines = run(monkeypatch, "--against", "origin/worse", "--commit", "origin/rank-4", "--out", "page.md")
    worse, better = (git("rev-parse", f"origin/{name}")[:10] for name in ("worse", "rank-4"))
    (line,) = lines
    assert line.startswith(f"{better} conflicts with {worse} in dvc.lock, ") and "reports/metrics.json" in line
    assert line.endswith(f"; merge {worse} into it and run again")
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: not passed") and "conflicts with" in page and "![" not in page


def test_a_newer_base_is_merged_before_a_commit_is_judged(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own lock is whole, and the merge's is not: main has other code of train by now."""
    clone("main")
    edit("stages/train/loop.py", "from __future__", "#\nfrom __future__")
    git("commit", "--quiet", "--all", "--message", "Newer main")
    assert run(monkeypatch, "--against", "origin/main", "--commit", "origin/rank-4", "--out", "page.md") == []
    (line,) = run(monkeypatch, "--against", "main", "--commit", "origin/rank-4", "--out", "page.md")
    assert line.startswith("stages/train: changed since train ran, without a new dvc.lock")


@pytest.mark.parametrize("name", ["", "workspace"])
def test_nothing_is_no_commit_to_judge(clone: Clone, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    clone("main")
    (line,) = run(monkeypatch, "--commit", name)
    assert line.startswith(f"--commit: got '{name}'; name a commit, branch or tag")


# Gates


def answer(metrics: dict[str, Any], change: Estimate | str | None = None, **gates: Any) -> list[str]:
    """Reasons of the gates that are closed."""
    comparison = None if change is None else Comparison("", change)
    found = limits.answers(Gates.model_validate(OFF | gates), metrics, comparison)
    return [str(each) for each in found if not each.passed]


@pytest.mark.parametrize(
    ("name", "metrics", "closed"),
    [
        ("val.overfit_gap", {"val.overfit_gap_low": 0.1}, False),
        ("val.overfit_gap", {"val.overfit_gap_low": 0.11}, "lower bound of val.overfit_gap is 0.11"),
        ("val.overfit_gap", {"val.overfit_gap_low": None}, "val.overfit_gap was not measured"),
        ("val.overfit_gap", {"val.overfit_gap_low": True}, "val.overfit_gap was not measured"),
        ("drift.loss_change", {"drift.loss_change_low": 0.2}, "lower bound of drift.loss_change is 0.2"),
        ("drift.loss_change", {}, "drift.loss_change was not measured"),
        ("samples.copied_share", {"samples.copied_share": 0.1}, False),
        ("samples.copied_share", {"samples.copied_share": 0.2}, "samples.copied_share is 0.2"),
        ("samples.copied_share", {}, "samples.copied_share was not measured"),
        ("export.*.max_abs_error", {"export.peft.max_abs_error": 0.1, "export.rank_4.max_abs_error": 9.0}, False),
        (
            "export.*.max_abs_error",
            {"export.peft.max_abs_error": 0.0, "export.comfyui.max_abs_error": 0.3},
            "export.comfyui.max_abs_error is 0.3",
        ),
        (
            "export.*.max_abs_error",
            {"export.peft.max_abs_error": 0.0, "export.comfyui.max_abs_error": None},
            "export.comfyui.max_abs_error was not measured",
        ),
        ("export.*.max_abs_error", {"export.peft.max_abs_error": None}, "export.peft.max_abs_error was not measured"),
        ("export.*.max_abs_error", {}, "export.*.max_abs_error was not measured"),
        (
            "export.*.max_abs_error",
            {"export.peft.max_abs_error": 0.0, "export.comfyui.max_abs_error": float("nan")},
            "export.comfyui.max_abs_error was not measured",
        ),
        ("samples.copied_share", {"samples.copied_share": 10**400}, "samples.copied_share was not measured"),
        (
            "export.peft.max_abs_error",
            {"export.comfyui.max_abs_error": 0.3},
            "export.peft.max_abs_error was not measured",
        ),
        ("val.loss", {"val.loss": 0.2, "val.loss_change_low": -1.0}, "val.loss is 0.2"),
        ("val.loss_change", {"val.loss": 0.2, "val.loss_change_low": -1.0}, False),
    ],
)
def test_a_limit_is_of_its_metric(name: str, metrics: dict[str, Any], closed: str | bool) -> None:
    expected = [f"report.gates.limits: {closed}; the limit is 0.1"] if closed else []
    assert answer(metrics, limits={name: 0.1}) == expected
    assert answer(metrics) == []


def test_where_higher_is_better_the_limit_is_the_least() -> None:
    """Of an interval the upper bound counts: noise alone closes nothing."""
    for score, closed in ((0.5, []), (0.4, ["report.gates.limits: samples.cosine is 0.4; the limit is at least 0.5"])):
        assert answer({"samples.cosine": score}, limits={"samples.cosine": 0.5}) == closed
    change = {"samples.cosine_change": -0.5, "samples.cosine_change_high": 0.0}
    assert answer(change, limits={"samples.cosine_change": 0.0}) == []
    (line,) = answer(change | {"samples.cosine_change_high": -0.1}, limits={"samples.cosine_change": 0.0})
    assert line == "report.gates.limits: upper bound of samples.cosine_change is -0.1; the limit is at least 0"


@pytest.mark.parametrize(
    ("name", "limit", "problem"),
    [
        ("samples.copied_shar", 0.1, "'samples.copied_shar' is no metric (near: samples.copied_share"),
        ("val.overfit_gap_low", 0.1, "'val.overfit_gap_low' is no metric"),
        ("val.best_step", 100, "'val.best_step' is neither better high nor low"),
        ("samples.copied_share", 5, "'samples.copied_share' is a share, and 5 is not; set 0 to 1"),
    ],
)
def test_a_limit_that_no_figure_can_meet_or_miss_is_refused(name: str, limit: float, problem: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(problem)):
        Gates.model_validate(OFF | {"limits": {name: limit}})


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
