"""Limits of ``report.gates`` against metrics, without a repository."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_dag.commands.gate import limits
from lora_dag.commands.gate.comparison import Comparison
from lora_dag.evaluation.bootstrap import Estimate
from stages.report.params import Gates

OFF: dict[str, Any] = {**dict.fromkeys(Gates.model_fields), "when_not_comparable": "fail"}


def failures(metrics: dict[str, Any], change: Estimate | str | None = None, **gates: Any) -> list[str]:
    """Return the problems of the gates that fail."""
    comparison = None if change is None else Comparison("", change)
    found = limits.check_limits(Gates.model_validate(OFF | gates), metrics, comparison)
    return [each.problem for each in found if not each.passed]


@pytest.mark.parametrize(
    ("name", "metrics", "failed"),
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
def test_limit_of_a_metric(name: str, metrics: dict[str, Any], failed: str | bool) -> None:
    expected = [f"report.gates.limits: {failed}, but the limit is 0.1."] if failed else []
    assert failures(metrics, limits={name: 0.1}) == expected
    assert failures(metrics) == []


def test_limit_is_a_minimum_if_higher_is_better() -> None:
    """The upper bound of an interval counts: noise alone fails no gate."""
    text = "report.gates.limits: samples.cosine is 0.4, but the limit is at least 0.5."
    for score, failed in ((0.5, []), (0.4, [text])):
        assert failures({"samples.cosine": score}, limits={"samples.cosine": 0.5}) == failed
    change = {"samples.cosine_change": -0.5, "samples.cosine_change_high": 0.0}
    assert failures(change, limits={"samples.cosine_change": 0.0}) == []
    (line,) = failures(change | {"samples.cosine_change_high": -0.1}, limits={"samples.cosine_change": 0.0})
    assert "upper bound of samples.cosine_change is -0.1" in line and "at least 0" in line


@pytest.mark.parametrize(
    ("name", "limit", "code", "values"),
    [
        ("samples.copied_shar", 0.1, "unknown-metric", ("'samples.copied_shar'", "samples.copied_share")),
        ("val.overfit_gap_low", 0.1, "unknown-metric", ("'val.overfit_gap_low'",)),
        ("val.best_step", 100, "limit-without-direction", ("'val.best_step'",)),
        ("samples.copied_share", 5, "share-out-of-range", ("'samples.copied_share'", "5")),
    ],
)
def test_gates_reject_a_limit_without_effect(name: str, limit: float, code: str, values: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        Gates.model_validate(OFF | {"limits": {name: limit}})
    (problem,) = error.value.errors()
    assert problem["ctx"]["code"] == code and all(value in problem["msg"] for value in values)


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
def test_heldout_gate_passes_noise_and_fails_without_a_comparison(change: Estimate | str | None, passed: bool) -> None:
    assert (failures({}, change, max_heldout_change=0.0) == []) == passed
