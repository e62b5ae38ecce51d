"""Optimizers as section ``train`` names them, against the libraries called by hand; refusals by their lines."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import torch

from lora_dag.core.console import UserError
from stages.train import optimizers
from stages.train.optimizer_table import OPTIMIZERS, Row, Rule, row_of
from tests.helpers.checkout import REPOSITORY
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
def test_each_is_the_library_s_own(name: str) -> None:
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
    ("changes", "message"),
    [
        (["optimizer=adamw_8bit"], "train.optimizer: adamw_8bit needs a GPU; use adamw"),
        (["optimizer=nothing.Here"], "train.optimizer: nothing.Here is not installed; pip install nothing"),
        (["optimizer=torch.nn.Linear"], "torch.nn.Linear is no optimizer; use adamw, adamw_8bit, adafactor, lion"),
        (["optimizer=torch.optim.AdamX"], "torch.optim.AdamX is no optimizer; use adamw"),
        (["optimizer_args={beta: 1}"], "train.optimizer_args: AdamW takes no beta here; it takes amsgrad, betas,"),
        (["optimizer_args={lr: 1}"], "train.optimizer_args: AdamW takes no lr here"),
        (["optimizer_args={betas: [2, 2]}"], "train.optimizer: adamw: Invalid beta parameter"),
        (["optimizer=torch.optim.Rprop"], "train.weight_decay: Rprop has none; set it to 0"),
        (["optimizer=torch.optim.LBFGS", "weight_decay=0"], "train.optimizer: torch.optim.LBFGS: "),
        (["optimizer=torch.optim.SparseAdam", "weight_decay=0"], "SparseAdam does not support dense gradients"),
        (["optimizer_args={foreach: true, fused: true}"], "`fused` and `foreach` cannot be `True` together"),
        (["optimizer_args={differentiable: true}"], "train.optimizer: adamw: "),
        (["lr_scheduler=polynomial", "learning_rate=1e-8"], "train.optimizer: adamw: lr_end (1e-07) must be smaller"),
        (["optimizer=schedulefree.AdamWScheduleFree"], "needs no schedule; set train.lr_scheduler to constant"),
        (
            ["optimizer=schedule_free", "lr_scheduler=constant", "ema_decay=0.9"],
            "averages by itself; set train.ema_",
        ),
        (["optimizer=schedule_free"], "schedule_free needs no schedule; set train.lr_scheduler to constant"),
        (["optimizer=prodigy", "lora_plus_ratio=4"], "prodigy has one rate for all; set train.lora_plus_ratio and"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        optimizers.try_out(train_params(*changes), CPU)
    assert message in str(caught.value)


def test_a_rate_that_prodigy_does_not_expect_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    optimizers.try_out(train_params("optimizer=prodigy", "learning_rate=1e-4"), CPU)
    assert "prodigy finds the rate itself, and learning_rate is a factor of it; 1.0 is usual" in caplog.text


def test_a_row_is_all_that_a_name_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("torch.optim.NAdam", rules=(Rule("has no use for warmup", ("lr_warmup_steps",), 0),))
    monkeypatch.setitem(OPTIMIZERS, "nadam", row)
    with pytest.raises(UserError, match="train.optimizer: nadam has no use for warmup; set train.lr_warmup_steps to 0"):
        optimizers.try_out(train_params("optimizer=nadam", "lr_warmup_steps=5"), CPU)
    asked = train_params("optimizer=nadam", "lr_warmup_steps=0")
    optimizers.try_out(asked, CPU)
    assert type(optimizers.make_optimizer(asked, trainable(), {}, CPU)) is torch.optim.NAdam
    with pytest.raises(UserError, match="got 'nadan'; use nadam, or a class"):
        train_params("optimizer=nadan")


def test_the_rules_of_a_package_hold_for_its_other_classes() -> None:
    assert row_of("schedulefree.SGDScheduleFree").rules == OPTIMIZERS["schedule_free"].rules
    assert row_of("lion_pytorch.Other").package == "lion-pytorch" and row_of("torch.optim.RAdam").package == ""
    assert row_of("torch_optimizer.Yogi").package == "torch_optimizer"


def test_every_row_is_written_where_people_look() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = {re.split(">|=", line)[0] for line in project["gpu"] + project["optimizers"]}
    assert extras == {row.package for row in OPTIMIZERS.values() if row.package}
    (comment,) = re.findall("^  optimizer: (.*)$", (REPOSITORY / "params.yaml").read_text(), re.M)
    assert [name for name in OPTIMIZERS if not re.search(rf"\b{name}\b", comment)] == []
    (line,) = (line for line in (REPOSITORY / "README.md").read_text().splitlines() if "`train.optimizer`: " in line)
    assert [name for name in OPTIMIZERS if f"`{name}`" not in line] == []
