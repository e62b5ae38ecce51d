"""Optimizers of section ``train`` against direct calls of the libraries, and settings that are refused."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import torch

from stages.train import optimizers
from stages.train.optimizer_table import OPTIMIZERS, OptimizerRow, Rule, find_row
from tests.helpers.checkout import REPOSITORY
from tests.helpers.errors import assert_line, refused
from tests.helpers.settings import train_params

CPU = torch.device("cpu")
NAMES = ("layer.lora_A.default.weight", "layer.lora_B.default.weight", "layer.lora_magnitude_vector.default.weight")


def trainable() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for name in NAMES}


def trained(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int = 4
) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def by_hand(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import lion_pytorch
    import prodigyopt
    import schedulefree

    first, magnitude = parameters[:2], {"params": parameters[2:], "weight_decay": 0.0}
    groups: Any = [{"params": first}, magnitude]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.2)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=0.01, weight_decay=0.2)
    if name == "lion":
        return lion_pytorch.Lion(groups, lr=0.01, weight_decay=0.2)
    if name == "prodigy":
        return prodigyopt.Prodigy(groups, lr=0.01, weight_decay=0.2)
    if name == "torch.optim.NAdam":
        return torch.optim.NAdam(groups, lr=0.01, weight_decay=0.2)
    optimizer = schedulefree.AdamWScheduleFree(groups, lr=0.01, weight_decay=0.2)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "prodigy", "schedule_free", "torch.optim.NAdam"])
def test_each_optimizer_equals_the_librarys(name: str) -> None:
    asked = train_params(f"optimizer={name}", "learning_rate=0.01", "weight_decay=0.2", "lr_scheduler=constant")
    ours, theirs = trainable(), list(trainable().values())
    found = trained(optimizers.make_optimizer(asked, ours, {}, CPU), list(ours.values()))
    expected = trained(by_hand(name, theirs), theirs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], next(iter(trainable().values())))


def test_arguments_reach_the_class() -> None:
    asked = train_params("optimizer_args={betas: [0.5, 0.6], eps: 0.1}")
    optimizer = optimizers.make_optimizer(asked, trainable(), {}, CPU)
    assert list(optimizer.param_groups[0]["betas"]) == [0.5, 0.6] and optimizer.param_groups[0]["eps"] == 0.1


def test_rates_of_lora_plus_and_of_the_batch() -> None:
    asked = train_params("learning_rate=1e-3", "lora_plus_ratio=16.0", "scale_lr=true", "batch_size=8")
    optimizer = optimizers.make_optimizer(asked, trainable(), {}, CPU)
    assert [group["lr"] for group in optimizer.param_groups] == [8e-3, 8e-3 * 16, 8e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]


def test_schedules_count_optimizer_steps() -> None:
    for name, change, expected in (
        ("polynomial", "lr_power=2.0", [0.0, 0.5, 1.0, 0.5625, 0.25, 0.0625]),
        ("cosine_with_restarts", "lr_num_cycles=2", [0.0, 0.5, 1.0, 0.5, 1.0, 0.5]),
    ):
        asked = train_params("num_steps=6", "lr_warmup_steps=2", f"lr_scheduler={name}", change, "learning_rate=1.0")
        optimizer = optimizers.make_optimizer(asked, trainable(), {}, CPU)
        schedule = optimizers.make_lr_scheduler(asked, optimizer)
        rates = []
        for _ in range(6):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        (["optimizer=adamw_8bit"], "needs-gpu", ["train.optimizer: adamw_8bit", "adamw."]),
        (["optimizer=nothing.Here"], "package-missing", ["train.optimizer: nothing.Here", "pip install nothing"]),
        (["optimizer=torch.nn.Linear"], "unknown-optimizer", ["torch.nn.Linear", "adamw, adamw_8bit, adafactor, lion"]),
        (["optimizer=torch.optim.AdamX"], "unknown-optimizer", ["torch.optim.AdamX", "adamw"]),
        (
            ["optimizer_args={beta: 1}"],
            "unknown-optimizer-argument",
            ["train.optimizer_args: got beta", "amsgrad, "],
        ),
        (["optimizer_args={lr: 1}"], "unknown-optimizer-argument", ["train.optimizer_args: got lr", "AdamW"]),
        (["optimizer_args={betas: [2, 2]}"], "optimizer-fails", ["train.optimizer: adamw", "Invalid beta parameter"]),
        (["optimizer=torch.optim.Rprop"], "unsupported-by-optimizer", ["train.weight_decay: ", "Rprop", " 0"]),
        (["optimizer=torch.optim.LBFGS", "weight_decay=0"], "optimizer-fails", ["torch.optim.LBFGS"]),
        (["optimizer=torch.optim.SparseAdam", "weight_decay=0"], "optimizer-fails", ["support dense gradients"]),
        (["optimizer_args={foreach: true, fused: true}"], "optimizer-fails", ["`fused` and `foreach` cannot be"]),
        (["optimizer_args={differentiable: true}"], "optimizer-fails", ["train.optimizer: adamw"]),
        (["lr_scheduler=polynomial", "learning_rate=1e-8"], "optimizer-fails", ["adamw", "lr_end (1e-07)"]),
        (
            ["optimizer=schedulefree.AdamWScheduleFree"],
            "unsupported-by-optimizer",
            ["AdamWScheduleFree", "train.lr_scheduler to constant"],
        ),
        (
            ["optimizer=schedule_free", "lr_scheduler=constant", "ema_decay=0.9"],
            "unsupported-by-optimizer",
            ["schedule_free", "train.ema_decay to null"],
        ),
        (["optimizer=schedule_free"], "unsupported-by-optimizer", ["schedule_free", "train.lr_scheduler to constant"]),
        (
            ["optimizer=prodigy", "lora_plus_ratio=4"],
            "unsupported-by-optimizer",
            ["prodigy", "train.lora_plus_ratio and train.text_encoder_lr to null"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_unsupported_settings_are_refused(changes: list[str], code: str, values: list[str]) -> None:
    with refused(code, *values):
        optimizers.try_out(train_params(*changes), CPU)


def test_an_unusual_rate_of_prodigy_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    optimizers.try_out(train_params("optimizer=prodigy", "learning_rate=1e-4"), CPU)
    assert_line("\n".join(caplog.messages), "rate-unusual", "train.learning_rate: got 0.0001", "1.0")


def test_a_row_adds_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    row = OptimizerRow("torch.optim.NAdam", rules=(Rule("has no use for warmup", ("lr_warmup_steps",), 0),))
    monkeypatch.setitem(OPTIMIZERS, "nadam", row)
    with refused(
        "unsupported-by-optimizer", "train.optimizer: nadam has no use for warmup", "train.lr_warmup_steps to 0"
    ):
        optimizers.try_out(train_params("optimizer=nadam", "lr_warmup_steps=5"), CPU)
    asked = train_params("optimizer=nadam", "lr_warmup_steps=0")
    optimizers.try_out(asked, CPU)
    assert type(optimizers.make_optimizer(asked, trainable(), {}, CPU)) is torch.optim.NAdam
    with refused("unknown-optimizer", "train.optimizer: got 'nadan'", "nadam"):
        train_params("optimizer=nadan")


def test_rules_of_a_package_apply_to_its_other_classes() -> None:
    assert find_row("schedulefree.SGDScheduleFree").rules == OPTIMIZERS["schedule_free"].rules
    assert find_row("lion_pytorch.Other").package == "lion-pytorch" and find_row("torch.optim.RAdam").package == ""
    assert find_row("torch_optimizer.Yogi").package == "torch_optimizer"


def test_every_row_is_documented() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = {re.split(">|=", line)[0] for line in project["gpu"] + project["optimizers"]}
    assert extras == {row.package for row in OPTIMIZERS.values() if row.package}
    (comment,) = re.findall("^  optimizer: (.*)$", (REPOSITORY / "params.yaml").read_text(), re.M)
    assert [name for name in OPTIMIZERS if not re.search(rf"\b{name}\b", comment)] == []
    page = (REPOSITORY / "docs/training.md").read_text()
    (line,) = (line for line in page.splitlines() if "`train.optimizer`: " in line)
    assert [name for name in OPTIMIZERS if f"`{name}`" not in line] == []
