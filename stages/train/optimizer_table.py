"""The optimizers that ``train.optimizer`` knows by name; a new one is one row. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Settings of section ``train`` that the optimizer cannot follow."""

    reason: str
    """What follows its name in the refusal."""
    settings: tuple[str, ...]
    value: Any
    """What all of them must be."""


@dataclass(frozen=True)
class Row:
    """Where an optimizer comes from, and what is special to it."""

    path: str
    """Module and class, of torch.optim's kind."""
    package: str = ""
    """What pip calls it; empty for torch. The rules hold for every class of the package."""
    needs_gpu: bool = False
    gpu_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Defaults on CUDA."""
    rules: tuple[Rule, ...] = ()
    usual_rate: float | None = None
    """Of an optimizer that finds the rate itself, for which learning_rate is a factor."""

    @property
    def module(self) -> str:
        return self.path.partition(".")[0]


OPTIMIZERS = {
    "adamw": Row("torch.optim.AdamW", gpu_arguments={"fused": True}),
    "adamw_8bit": Row("bitsandbytes.optim.AdamW8bit", "bitsandbytes", needs_gpu=True),
    "adafactor": Row("torch.optim.Adafactor"),
    "lion": Row("lion_pytorch.Lion", "lion-pytorch"),
    "prodigy": Row(
        "prodigyopt.Prodigy",
        "prodigyopt",
        rules=(Rule("has one rate for all", ("lora_plus_ratio", "text_encoder_lr"), None),),
        usual_rate=1.0,
    ),
    "schedule_free": Row(
        "schedulefree.AdamWScheduleFree",
        "schedulefree",
        rules=(
            Rule("needs no schedule", ("lr_scheduler",), "constant"),
            Rule("averages by itself", ("ema_decay",), None),
        ),
    ),
}


def row_of(name: str) -> Row:
    """The row of a name of the table, or of a class such as ``schedulefree.SGDScheduleFree`` by its package."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module = name.partition(".")[0]
    other = Row(name, "" if module == "torch" else module)
    known = next((row for row in OPTIMIZERS.values() if row.package and row.module == module), other)
    return Row(name, known.package, rules=known.rules, usual_rate=known.usual_rate)
