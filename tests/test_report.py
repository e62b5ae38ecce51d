"""The page: honest verdicts, working links, equal bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages import report
from stages.artifacts import metrics
from stages.core.console import UserError
from stages.core.files import write_json, write_text
from tests.conftest import Workspace

MEASURED: dict[str, Any] = {
    "val.loss": 0.09,
    "val.loss_base": 0.13,
    "val.loss_change": -0.04,
    "val.loss_change_low": -0.045,
    "val.loss_change_high": -0.035,
    "val.train_loss": 0.08,
    "val.train_loss_base": 0.12,
    "val.overfit_gap": 0.002,
    "val.overfit_gap_low": -0.003,
    "val.overfit_gap_high": 0.007,
    "val.best_step": 4,
    "val.table": "0123456789abcdef",
    **{f"val.loss_{band}_noise{suffix}": 0.1 for band in ("low", "mid", "high") for suffix in ("", "_base")},
    "samples.chroma": 18.0,
    "samples.chroma_base": 120.0,
    "samples.dark_share": 0.6,
    "samples.dark_share_base": 0.02,
}
LINEAGE: dict[str, Any] = {
    "adapter": "aaaaaaaaaaaa",
    "base": {"scheduler": "bbbbbbbbbbbb", "unet": "cccccccccccc"},
    "dataset": {"heldout": 2, "train": 6},
    "latents": "dddddddddddd",
    "lora_config": {"r": 8, "lora_alpha": 8, "target_modules": ["down.0.attn1.to_q", "down.1.attn1.to_q"]},
    "model": {"family": "sd", "pretrained": "base", "variant": None, "dtype": "float32"},
    "num_steps": 4,
    "sheet": {"cell": 128},
    "table": {"num_pictures": {"heldout": 2, "train": 2}, "num_rows": 8, "prediction_type": "v_prediction"},
    "validate": {
        "prompts": ["red apple"],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "negative_prompt": "",
        "seed": 0,
        "scales": [1.0],
        "num_timesteps": 2,
    },
}
TRAIN = {
    "train.loss_final": 0.1,
    "train.num_steps": 4,
    "train.images_seen": 64,
    "train.num_trainable_parameters": 107520,
    "train.base_unchanged": True,
}


def write_reports(folder: Path) -> None:
    """What the other stages would have written below ``folder``."""
    metrics.save(folder / "metrics.json", MEASURED)
    write_json(folder / "validate" / "lineage.json", LINEAGE)
    write_text(folder / "validate" / "curve.csv", "step,heldout,train_probe\n0,0.13,0.12\n2,0.1,0.09\n4,0.09,0.08\n")
    metrics.save(folder / "train" / "metrics.json", TRAIN)
    rows = "".join(f"{step},{0.2 - step / 50},{step * 1e-4},0.5\n" for step in range(1, 5))
    write_text(folder / "train" / "loss.csv", "step,loss,learning_rate,grad_norm\n" + rows)
    metrics.save(
        folder / "dataset" / "metrics.json", {"num_pictures": 8, "num_train": 6, "num_heldout": 2, "chroma": 1.5}
    )
    metrics.save(
        folder / "export" / "metrics.json",
        {"export.diffusers.max_abs_error": 1.5e-7, "export.effect": 0.5, "export.megabytes": 0.43},
    )
    for name in ("samples.png", "progress.png", "dataset/contact.png"):
        Image.new("RGB", (8, 8)).save(folder / name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "loss fell by 0.0400 (−31 %), 95 % interval [−0.0450, −0.0350]: the adapter learned the style; no sign",
        ),
        ({"val.loss_change_high": 0.001}, "no difference that the held-out pictures can show"),
        (
            {"val.loss_change": 0.01, "val.loss_change_low": 0.005, "val.loss_change_high": 0.02},
            "rose by 0.0100 (+8 %), 95 % interval [+0.0050, +0.0200]: on pictures that it never saw, the adapter",
        ),
        (
            {"val.overfit_gap": 0.02, "val.overfit_gap_low": 0.01, "val.overfit_gap_high": 0.03, "val.best_step": 2},
            "overfits: training pictures gained 0.0200 more [+0.0100, +0.0300], and held-out loss was lowest at step 2",
        ),
        (
            {"val.overfit_gap": 0.02, "val.overfit_gap_low": 0.01, "val.overfit_gap_high": 0.03},
            "pictures gained 0.0200 more [+0.0100, +0.0300], but held-out loss was still at its lowest in the end",
        ),
        ({"val.loss_change_low": None, "val.loss_change_high": None}, "one held-out picture cannot tell more"),
        ({"val.overfit_gap_low": None, "val.overfit_gap_high": None}, "no sign of overfitting"),
    ],
)
def test_verdict_says_what_the_intervals_bear(changes: dict[str, Any], words: str) -> None:
    assert words in report.verdict(MEASURED | changes, num_steps=4)


def test_page_has_links_that_exist_and_no_path_of_this_machine(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    workspace.run("report")
    page = (workspace.path / "reports" / "report.md").read_text()
    links = re.findall(r"!\[[^]]*]\(([^)]+)\)", page)
    assert sorted(links) == ["dataset/contact.png", "loss.png", "progress.png", "samples.png"]
    assert all((workspace.path / "reports" / link).is_file() for link in links)
    assert str(workspace.path) not in page
    assert "/tmp" not in page and "nan" not in page and "None" not in page
    for words in (
        "107,520",
        "`to_q`",
        "`aaaaaaaaaaaa`",
        "1.5e-07",
        "| Adapter size | 0.43 MB |",
        "| Images seen | 64 |",
        "(v_prediction)",
        "| Chroma of the drawing, 0 to 255 | 120 | 18 | 1.5 |",
    ):
        assert words in page


def test_links_are_relative_when_reports_stand_elsewhere(workspace: Workspace) -> None:
    write_reports(workspace.path / "runs" / "a" / "reports")
    (workspace.path / "runs" / "a" / "reports" / "dataset").rename(workspace.path / "runs" / "the dataset")
    paths = {"reports": "", "train-reports": "/train", "export-reports": "/export"}
    arguments = [word for name, tail in paths.items() for word in (f"--{name}", f"runs/a/reports{tail}")]
    workspace.run("report", *arguments, "--dataset-reports", "runs/the dataset")
    page = (workspace.path / "runs/a/reports/report.md").read_text()
    assert "![Contact sheet](../../the%20dataset/contact.png)" in page


def test_bytes_are_equal_between_runs(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    workspace.run("report")
    first = workspace.tree("reports")
    workspace.run("report")
    assert workspace.tree("reports") == first
    assert len(first["loss.png"]) < 200_000


def test_page_without_pixel_measures_and_intervals(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    few = {name: value for name, value in MEASURED.items() if not name.startswith("samples.")}
    missing = {f"val.{name}_{bound}": None for name in ("loss_change", "overfit_gap") for bound in ("low", "high")}
    metrics.save(workspace.path / "reports" / "metrics.json", few | missing | {"val.loss_mid_noise": None})
    workspace.run("report")
    page = (workspace.path / "reports" / "report.md").read_text()
    assert "Chroma" not in page and "nan" not in page and "None" not in page


def test_missing_reports_name_their_stages(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    (workspace.path / "reports" / "progress.png").unlink()
    (workspace.path / "reports" / "train" / "loss.csv").unlink()
    with pytest.raises(UserError) as error:
        workspace.run("report")
    assert error.value.problems == (
        "reports/progress.png: no such file; run `python -m stages.validate` first",
        "reports/train/loss.csv: no such file; run `python -m stages.train` first",
    )


def test_smoothing_averages_the_last_values() -> None:
    assert report.smooth([1.0, 2.0, 3.0, 7.0], 2) == [1.0, 1.5, 2.5, 5.0]
