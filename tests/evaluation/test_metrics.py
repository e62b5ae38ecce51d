"""METRICS: every number has a row, every row is in the docs, and unknown names are shown as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_dag.evaluation import metrics
from lora_dag.evaluation.metrics import DATA, METRICS, PAGE, arrow, find, key_of, undocumented_names
from tests.helpers.workspace import REPOSITORY

FILES = ("metrics.json", "train/metrics.json", "export/metrics.json")


def read(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "reports" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*FILES, "headline.json"])
def test_every_number_of_the_demo_reports_is_documented(name: str) -> None:
    values = read(name)
    assert undocumented_names(values) == []
    numbers = {key for key, value in values.items() if not isinstance(value, bool | str)}
    assert not numbers & DATA.keys() and all(key_of(key) for key in numbers)


def test_metrics_without_a_value_belong_to_options_that_the_demo_does_not_use() -> None:
    measured = {key_of(name) for file in FILES for name in read(file)} | {"num_heldout"}
    features = {"samples.clip_score", "samples.cosine", "samples.cmmd", "samples.feature_kid"}
    quantized = {"val.quantization_price", "val.loss_unquantized", "export.quantization_error"}
    quantized |= {"export.*.max_abs_error_quantized"}
    assert METRICS.keys() - measured == features | quantized | {key for key in METRICS if "rank_*" in key}


@pytest.mark.parametrize("name", ["metrics.json", "train/metrics.json"])
def test_endings_match_the_written_names(name: str) -> None:
    values = read(name)
    for key in filter(None, map(key_of, values)):
        assert [leaf for leaf in values if key_of(leaf) == key] == sorted(key + end for end in METRICS[key].endings)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("val.loss_change_low", "val.loss"),
        ("val.loss_low_noise_base", "val.loss_low_noise"),
        ("export.peft.max_abs_error", "export.*.max_abs_error"),
        ("export.rank_4.max_abs_error", "export.rank_*.max_abs_error"),
        ("val.loss_median", None),
        ("val.best_step_base", None),
    ],
)
def test_name_finds_its_metric(name: str, key: str | None) -> None:
    assert key_of(name) == key
    assert find(name) == (METRICS[key] if key else None)


def test_arrows_point_in_the_better_direction() -> None:
    names = ("val.loss_change", "samples.clip_score", "val.best_step", "val.unknown")
    assert [arrow(name) for name in names] == ["↓", "↑", "", ""]


def test_endings_of_changes_and_intervals() -> None:
    assert METRICS["val.loss"].endings == ("", "_base", "_change", "_change_low", "_change_high")
    assert METRICS["val.overfit_gap"].endings == ("", "_low", "_high")
    assert METRICS["val.train_loss"].endings == ("", "_base")


def test_docs_page_is_current() -> None:
    written = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    assert written == metrics.page(), "run `python -m lora_dag.evaluation.metrics --write`"
    assert all(f"`{name}`" in written for name in (*METRICS, *DATA))
