"""Forged reports whose digests in dvc.lock are forged too: their own tables show it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_dag.commands.gate import lock, recomputed_metrics
from lora_dag.pipeline.code import dvc_md5
from tests.helpers.planted import Clone, edit, gate_problems


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 200_000])
def test_gate_reports_metrics_that_are_no_numbers(clone: Clone, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    clone("main")
    monkeypatch.setattr(lock, "stale_stages", lambda: [])
    Path("reports/metrics.json").write_text(text)
    edited, damaged = gate_problems("--out", "page.md")
    assert edited.code == "report-edited"
    assert all(problem.startswith("reports/metrics.json: ") for problem in (edited, damaged))
    assert Path("page.md").read_text(encoding="utf-8").startswith("# Experiment: failed")


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
NEAREST, IMAGES = "reports/validate/nearest.csv", "reports/dataset/images.csv"
LINEAGE, EXPORTED = "reports/validate/lineage.json", "reports/export/metrics.json"
FORGED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "loss": (
        set_metric(MEASURED, "val.loss", 0.1),
        "metric-edited",
        r"reports/metrics.json val.loss: got 0.1, but .*heldout.csv gives 0.50",
    ),
    "interval": (
        set_metric(MEASURED, "val.overfit_gap_low", -0.9),
        "metric-edited",
        r"reports/metrics.json val.overfit_gap_low: got -0.9, but .*heldout.csv gives -0.00",
    ),
    "a third of the noise": (
        set_metric(MEASURED, "val.loss_high_noise", 0.2),
        "metric-edited",
        r"reports/metrics.json val.loss_high_noise: got 0.2, but .*heldout.csv gives 0.50",
    ),
    "null": (
        set_metric(MEASURED, "val.loss_change_high", None),
        "metric-edited",
        r".*val.loss_change_high: got null, but .* gives -0.49",
    ),
    "best step": (
        set_metric(MEASURED, "val.best_step", 2),
        "metric-edited",
        r".* val.best_step: got 2, but .*curve.csv gives 4",
    ),
    "curve": (
        lambda: forge(CURVE, "4,0.50", "4,0.40"),
        "metric-edited",
        r"reports/validate/curve.csv val.loss: got 0.40\d*, but .*heldout.csv gives 0.50",
    ),
    "copies": (
        set_metric(MEASURED, "samples.copied_share", 0.0),
        "metric-edited",
        r"reports/metrics.json samples.copied_share: got 0.0, but .*nearest.csv gives 0.25",
    ),
    "noise": (
        set_metric(MEASURED, "samples.far_share", 0.0),
        "metric-edited",
        r"reports/metrics.json samples.far_share: got 0.0, but .*nearest.csv gives 0.25",
    ),
    "copied": (
        lambda: (forge(NEAREST, "t0.png,1", "t0.png,0"), set_metric(MEASURED, "samples.copied_share", 0.0)()),
        "copied-flag-edited",
        r"reports/validate/nearest.csv: got copied 0 at distance 0.2, .*lineage.json .* 0.3",
    ),
    "a sample": (
        lambda: forge(NEAREST, "blue boat,1", "red apple,1"),
        "samples-edited",
        r"reports/validate/nearest.csv: its 4 rows .* 4 of validate.prompts and num_seeds",
    ),
    "a bad image left out": (
        lambda: forge(IMAGES, "h3.png,heldout", "h3.png,left out"),
        "split-edited",
        r"reports/validate/heldout.csv h3.png: got heldout, .*dataset/images.csv",
    ),
    "a trained image held out": (
        lambda: forge(IMAGES, "h3.png,heldout", "h3.png,train"),
        "split-edited",
        r"reports/validate/heldout.csv h3.png: got heldout, .*dataset/images.csv",
    ),
    "a held-out image more": (
        set_metric("reports/dataset/metrics.json", "num_heldout", 9),
        "metric-edited",
        r"reports/dataset/metrics.json num_heldout: got 9, but .*images.csv gives 8",
    ),
    "another timestep": (
        lambda: forge(HELDOUT, "h2.png,heldout,100", "h2.png,heldout,600"),
        "timesteps-edited",
        r"reports/validate/heldout.csv h2.png: got timesteps \[600, 900\], .* 2 ",
    ),
    "a row twice": (
        lambda: forge(HELDOUT, "h2.png-100,", "h2.png-900,"),
        "row-duplicated",
        r"reports/validate/heldout.csv: 2 rows .*'h2.png-900'",
    ),
    "no names of rows": (
        lambda: forge(HELDOUT, "row,file_name", "line,file_name"),
        "row-duplicated",
        r"reports/validate/heldout.csv: 32 rows .*''",
    ),
    "a number without end": (
        lambda: set_metric(MEASURED, "val.best_step", 10**400)(),
        "report-unreadable",
        r"reports/: check_curve .*\(OverflowError",
    ),
    "no steps": (
        lambda: forge("reports/train/loss.csv", Path("reports/train/loss.csv").read_text().partition("\n")[2], ""),
        "report-unreadable",
        r"reports/: check_training .*\(IndexError",
    ),
    "no timesteps": (
        lambda: forge(LINEAGE, '"num_train_timesteps": 1000', '"num_train_timesteps": 0'),
        "report-unreadable",
        r"reports/: check_heldout .*\(ZeroDivisionError",
    ),
    "training": (
        set_metric(TRAINED, "train.loss_final", 0.1),
        "metric-edited",
        r".* train.loss_final: got 0.1, but .*loss.csv gives 0.52083",
    ),
    "images": (
        set_metric(TRAINED, "train.images_seen", 800),
        "metric-edited",
        r".* train.images_seen: got 800, but .*loss.csv gives 8",
    ),
    "headline": (
        set_metric("reports/headline.json", "val.loss", 0.1),
        "metric-edited",
        r"reports/headline.json val.loss: got 0.1, but metrics.json .* gives 0.50",
    ),
    "adapter": (
        lambda: forge(LINEAGE, '"ada97e5', '"bda97e5'),
        "digests-differ",
        r"reports/validate/lineage.json: .*the adapter \(bda97e500000\) .*reports/export/lineage",
    ),
    "a base": (
        lambda: forge(LINEAGE, '"unet": "ba5e', '"unet": "ca5e'),
        "digests-differ",
        r"reports/validate/lineage.json: .*the base's unet",
    ),
    "a format": (
        lambda: forge(EXPORTED, "export.diffusers.max_abs", "export.rank_8.max_abs"),
        "export-unmeasured",
        r"reports/export/metrics.json: export.diffusers.max_abs_error .*lists diffusers",
    ),
    "no table": (
        lambda: forge(CURVE, "step,heldout", "step,held-out"),
        "report-unreadable",
        r"reports/: check_curve .*\(KeyError: 'heldout'\)",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_recomputed_metrics_find_each_forgery(clone: Clone, name: str) -> None:
    clone("main")
    change, code, expected = FORGED[name]
    assert recomputed_metrics.problems() == []
    change()
    assert lock.compare(lock.Pipeline.read()) == []  # the forged digests agree
    found = recomputed_metrics.problems()
    assert any(problem.code == code and re.match(expected, problem) for problem in found), found


def test_gate_fails_for_forged_metrics_and_digests(clone: Clone) -> None:
    """DVC itself finds dvc.lock and reports/ up to date."""
    clone("worse")
    set_metric(MEASURED, "val.loss", 0.1)()
    failed, _, gate = sorted(gate_problems("--against", "origin/main", "--out", "page.md"), reverse=True)
    assert (failed.code, gate.code) == ("metric-edited", "gate-failed")
    assert failed.startswith("reports/metrics.json val.loss: got 0.1") and "heldout.csv gives 0.60" in failed
    assert gate.startswith("report.gates.max_heldout_change: held-out loss +19.90 %")  # from the rows, not the metric
    page = Path("page.md").read_text(encoding="utf-8")
    assert page.startswith("# Experiment: failed") and "- `` reports/metrics.json val.loss: got 0.1" in page


def test_gate_names_a_report_that_is_no_output_of_a_stage(clone: Clone) -> None:
    """Neither dvc.yaml nor dvc.lock lists the file, so it could be edited."""
    clone("main")
    edit("dvc.yaml", "      - reports/train/metrics.json", "      - reports/train/figures.json")
    text = Path("dvc.lock").read_text(encoding="utf-8")
    Path("dvc.lock").write_text(text.replace("reports/train/metrics.json", "reports/train/figures.json"))
    (problem,) = recomputed_metrics.problems()
    assert problem.code == "report-untracked" and problem.startswith("dvc.yaml: reports/train/metrics.json ")
