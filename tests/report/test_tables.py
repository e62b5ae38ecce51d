"""Tables of the report: rows of METRICS, figures without a row, and counts of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lora_dag.evaluation import metrics
from lora_dag.evaluation.metrics import METRICS, Metric
from stages.report import headline, tables

TABLE = {"prediction_type": "epsilon", "num_rows": 2, "num_images": {"heldout": 1, "train": 1}}


def inputs(measured: dict[str, Any], **lineage: Any) -> Any:
    return SimpleNamespace(
        measured=measured, lineage={"table": TABLE} | lineage, dataset={"chroma": 3.0}, train={}, export={}
    )


def test_a_row_of_the_table_is_all_that_a_new_metric_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Metric(
        "Sharpness", "samples", "Mean gradient.", unit="0 to 255", better="higher", has_base=True, headline=("",)
    )
    monkeypatch.setitem(METRICS, "samples.sharpness", new)
    for ending in new.endings:
        monkeypatch.setitem(metrics.NAMES, f"samples.sharpness{ending}", "samples.sharpness")
    page = tables.results(inputs({"samples.sharpness": 2.5, "samples.sharpness_base": 2.0}))
    assert "| Sharpness, 0 to 255 | 2 | 2.5 |  |" in page and "Other metrics" not in page
    assert headline.numbers(inputs({"samples.sharpness": 2.5})) == {"samples.sharpness": 2.5}


def test_a_figure_without_a_row_is_shown_by_its_own_name() -> None:
    page = tables.results(inputs({"val.loss": 0.5, "val.loss_base": 1.0, "val.odd": 2.0, "val.odd_base": 1.0}))
    assert "| Other metrics | base | adapter |" in page and page.endswith("| `val.odd` | 1 | 2 |")
    assert "| Held-out loss | 1.0000 | 0.5000 | −0.5000 |" in page


def test_a_row_without_a_figure_is_left_out() -> None:
    page = tables.results(inputs({"val.loss": 0.5, "val.loss_base": 1.0, "samples.chroma": None}))
    assert page.count("\n") == 2 and "Chroma" not in page


def test_the_dataset_s_own_figure_stands_beside_that_of_the_samples() -> None:
    measured = {"samples.chroma": 4.0, "samples.chroma_base": 100.0, "samples.nearest_distance": 0.5}
    page = tables.results(inputs(measured, neighbors={"threshold": None, "heldout_median": 0.75}))
    assert "| Chroma of the samples, 0 to 255 | 100 | 4 | 3 |" in page
    assert "| Distance to the nearest training image |  | 0.5 | 0.75 |" in page


def test_counts_of_one_are_singular() -> None:
    note = tables.notes(inputs({"val.overfit_gap": 0.0}))
    assert "over a fixed table of 2 rows: 1 held-out and 1 training image, 1 timestep each." in note
    neighbors = {"num_heldout": 1, "num_training_views": 1, "space": "latents", "far_threshold": None}
    _, note = tables.copies_notes(neighbors, 0.5)
    assert "one of 1 training view counts as a copy. 1 held-out image is too few" in note
