"""Checks during a training: losses that are not finite, a changed base, layers without gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_dag.adapters import lora
from lora_dag.core.params import Dtype
from lora_dag.diffusion.objectives import VPrediction
from stages.train import loop
from stages.train.run import Run
from stages.train.self_checks import GradientMonitor, check_step_zero
from tests.helpers.errors import assert_line, codes_of, refused
from tests.helpers.trainings import LONG, history, weights
from tests.helpers.workspace import Workspace


def test_clipping_without_effect_is_an_error(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_",
        lambda self, p, norm: torch.nn.utils.get_total_norm([parameter.grad for parameter in p]),
    )
    with pytest.raises(RuntimeError, match=r"gradient norm is 0\.\d+ after clipping to 0.01"):
        encoded.run("train", "--set", "train.max_grad_norm=0.01")


@pytest.mark.parametrize(("dtype", "fix"), [("float32", "Fetch it again."), ("bfloat16", "Set model.dtype: float32.")])
def test_a_base_that_predicts_nan_gets_advice_for_its_dtype(dtype: Dtype, fix: str) -> None:
    adapter: Any = SimpleNamespace(disabled=contextlib.nullcontext)
    with refused("base-not-finite", "model.pretrained: ", dtype, fix) as raised:
        check_step_zero(adapter, lambda: torch.tensor([math.nan]), dtype=dtype)
    assert raised.value.problems[0].endswith(f"in {dtype}. {fix}")


@pytest.fixture
def broken_targets(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Return a function: ``broken_targets({2})`` makes the loss of the second step NaN."""

    def make(steps: set[int]) -> None:
        original, count = VPrediction.target, iter(range(1, 1000))

        def target(*args: Any) -> torch.Tensor:
            return original(*args) * (math.nan if next(count) in steps else 1)

        monkeypatch.setattr(VPrediction, "target", target)

    return make


def test_three_nan_losses_in_a_row_stop_the_training(
    encoded: Workspace, broken_targets: Callable[[set[int]], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken_targets({3, 4, 5})
    with refused("training-diverged", "3 steps in a row", "step 4", "train.learning_rate", "float32"):
        encoded.run("train", *LONG)
    assert not Path("data/adapter").exists() and not Path("reports/train").exists()
    log = "\n".join(caplog.messages)
    assert codes_of(log) == ["step-not-finite"] * 3
    for step in (2, 3, 4):
        assert_line(log, "step-not-finite", f"step {step} ", "loss nan", "norm nan")


def test_a_step_with_a_nan_loss_is_skipped(encoded: Workspace, broken_targets: Callable[[set[int]], None]) -> None:
    broken_targets({3, 4, 6})
    lines = encoded.run("train", *LONG)
    assert sum(line.startswith("warning: step") for line in lines) == 3
    assert [math.isnan(row["loss"]) for row in history()] == [False, False, True, True, False, True]
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_an_alpha_beyond_float32_is_refused(encoded: Workspace) -> None:
    with refused("alpha-too-large", "lora.alpha", "null"):
        encoded.run("train", "--set", "lora.alpha=1e300")
    assert not Path("data/adapter").exists()


def test_an_adapter_that_changes_step_zero_is_an_error(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = lora.keyed_init

    def nonzero(denoiser: torch.nn.Module, *args: Any) -> None:
        original(denoiser, *args)
        next(p for name, p in denoiser.named_parameters() if "lora_B" in name).data[0, 0] = 0.1

    monkeypatch.setattr(lora, "keyed_init", nonzero)
    with pytest.raises(RuntimeError, match="adapter changes the base's output by"):
        encoded.run("train")
    assert not Path("data/adapter").exists()


def test_a_changed_base_is_an_error(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.training_step

    def training_step(run: Run, step: int) -> None:
        original(run, step)
        next(p for p in run.base.denoiser.parameters() if not p.requires_grad).data.view(-1)[0] += 1e-3

    monkeypatch.setattr(loop, "training_step", training_step)
    with pytest.raises(RuntimeError, match="training changed the frozen base"):
        encoded.run("train")
    assert not Path("data/adapter").exists()


def test_a_part_of_a_layer_without_gradient_is_an_error(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = GradientMonitor.note_gradients

    def note_gradients(self: GradientMonitor) -> None:
        next(iter(self.trainable.values())).grad = None
        original(self)

    monkeypatch.setattr(GradientMonitor, "note_gradients", note_gradients)
    with pytest.raises(RuntimeError, match=r"no gradient ever reached \['down_blocks.0.*to_q.lora_A"):
        encoded.run("train")


def test_an_adapter_without_any_gradient_is_an_error() -> None:
    names = [f"{layer}.lora_{which}.default.weight" for layer in ("a.to_q", "b.to_q") for which in "AB"]
    monitor = GradientMonitor({name: torch.nn.Parameter(torch.zeros(1)) for name in names}, 1.0)
    for _ in range(4):
        monitor.note_gradients()
    with refused("no-gradient", "train.learning_rate"):
        monitor.check_end()


def test_weights_that_are_not_finite_are_not_written(encoded: Workspace) -> None:
    with refused("training-diverged", "train.weight_decay"):
        encoded.run("train", "--set", "train.learning_rate=1e6", "--set", "train.weight_decay=1e6")
    assert not Path("data/adapter").exists()
