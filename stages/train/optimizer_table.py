"""Table of the optimizers with a short name in ``train.optimizer``; a new one is one row. torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Settings of section ``train`` that an optimizer does not support."""

    reason: str
    """Reason in the error message, after the optimizer's name."""
    settings: tuple[str, ...]
    value: Any
    """Required value of the settings."""


@dataclass(frozen=True)
class OptimizerRow:
    """Origin and special rules of an optimizer."""

    path: str
    """Dotted path of a subclass of torch.optim.Optimizer."""
    package: str = ""
    """Name for pip; empty for torch. The rules apply to every class of the package."""
    needs_gpu: bool = False
    gpu_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Default arguments on CUDA."""
    rules: tuple[Rule, ...] = ()
    usual_rate: float | None = None
    """Usual learning_rate of an optimizer that adapts the rate itself; learning_rate is a factor then."""

    @property
    def module(self) -> str:
        return self.path.partition(".")[0]


OPTIMIZERS = {
    "adamw": OptimizerRow("torch.optim.AdamW", gpu_arguments={"fused": True}),
    "adamw_8bit": OptimizerRow("bitsandbytes.optim.AdamW8bit", "bitsandbytes", needs_gpu=True),
    "adafactor": OptimizerRow("torch.optim.Adafactor"),
    "lion": OptimizerRow("lion_pytorch.Lion", "lion-pytorch"),
    "prodigy": OptimizerRow(
        "prodigyopt.Prodigy",
        "prodigyopt",
        rules=(Rule("has one rate for all", ("lora_plus_ratio", "text_encoder_lr"), None),),
        usual_rate=1.0,
    ),
    "schedule_free": OptimizerRow(
        "schedulefree.AdamWScheduleFree",
        "schedulefree",
        rules=(
            Rule("needs no schedule", ("lr_scheduler",), "constant"),
            Rule("averages by itself", ("ema_decay",), None),
        ),
    ),
}


def find_row(name: str) -> OptimizerRow:
    """Return the row of a short name, or of a class such as ``schedulefree.SGDScheduleFree`` by its package."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module = name.partition(".")[0]
    default = OptimizerRow(name, "" if module == "torch" else module)
    relative = next((row for row in OPTIMIZERS.values() if row.package and row.module == module), default)
    return OptimizerRow(name, relative.package, rules=relative.rules, usual_rate=relative.usual_rate)
