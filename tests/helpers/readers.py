"""Which programs read which exports right: readers.json, its table in docs/export.md, and the kinds of adapters."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import adapter_set, adapter_tensors, bias, lora
from lora_dag.core import seeding
from tests.helpers.adapters import params

if TYPE_CHECKING:
    from lora_dag.families.protocol import Family

TABLE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ALL: dict[str, Any] = {"rank": 4, "alpha": 6.0, "target_modules": "all-linear+conv"}
LYCORIS: dict[str, Any] = ALL | {"init_lora_weights": "kaiming"}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA, attention": {"rank": 4, "alpha": 1.5, "target_modules": "attention"},
    "LoRA, all layers": ALL,
    "LoRA, patterns": {"rank": 4, "alpha": 1.5, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 5.0}},
    "rsLoRA": {"rank": 4, "alpha": 3.0, "target_modules": "attention+ff", "use_rslora": True},
    "DoRA, attention": {"rank": 4, "alpha": 6.0, "target_modules": "attention", "use_dora": True},
    "DoRA, all layers": ALL | {"use_dora": True},
    "LoKr": LYCORIS | {"algo": "lokr"},
    "LoKr, two products": LYCORIS | {"algo": "lokr", "rank": 2, "decompose_factor": 16, "decompose_both": True},
    "LoKr, Tucker": LYCORIS | {"algo": "lokr", "rank": 2, "use_effective_conv2d": True},
    "LoHa": LYCORIS | {"algo": "loha", "rank": 2},
    "LoHa, Tucker": LYCORIS | {"algo": "loha", "rank": 2, "use_effective_conv2d": True},
    "biases": {"rank": 4, "alpha": 6.0, "target_modules": "attention", "bias": "all"},
    "text encoders": {"rank": 4, "alpha": 6.0, "target_modules": "attention", "train_text_encoder": True},
}
"""Name in the table -> section lora."""
EXACT = 2e-6  # of weights of about 1, in float32


def verdict(family: str, kind: str, file: str, reader: str) -> str | None:
    """What the table says; None where there is no such file, or it was not run."""
    for row in TABLE["rows"]:
        if row["file"] == file and family in row["families"] and kind in row["kinds"]:
            return row["readers"].get(reader)
    return None


def markdown() -> str:
    """Return the table of docs/export.md."""
    rows = [["`export.formats`", "family", "what it holds", *TABLE["columns"].values()]]
    for row in TABLE["rows"]:
        families = ", ".join(f"`{name}`" for name in row["families"])
        cells = [row["readers"].get(reader, "") for reader in TABLE["columns"]]
        rows.append([f"`{row['file']}`", families, row["holds"], *cells])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


# Adapters, and what a reader makes of their files

Tensors = dict[str, torch.Tensor]
States = dict[str, Tensors]
"""Component -> its tensors under the names of the base."""


@dataclass(frozen=True)
class Trained:
    """An adapter, and what the base's weights are with it."""

    parts: dict[str, adapter_tensors.AdapterTensors]
    merged: States
    without_dora: States
    """The same without DoRA's magnitudes."""


def train(family: Family, modules: dict[str, Any], kind: str) -> Trained:
    """An adapter of the kind as if trained for long.

    Args:
        modules: the denoiser, then text encoders that may be adapted; they stay as they are.
    """
    settings = params(**KINDS[kind])
    denoiser, text = modules[family.DENOISER], {n: m for n, m in modules.items() if n in family.TEXT_ENCODERS}
    configs = {family.DENOISER: lora.make_config(settings, denoiser)}
    configs |= adapter_set.text_configs(settings, family, text) if settings.train_text_encoder else {}
    trained = Trained({}, states(modules), states(modules))
    for name, config in configs.items():
        carrier = copy.deepcopy(modules[name])
        for key, parameter in lora.inject(carrier, config).items():
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=seeding.generator(0, key))
        trained.parts[name] = adapter_tensors.read(config, carrier)
        for target in lora.target_names(carrier):
            change = carrier.get_submodule(target).get_delta_weight(lora.NAME).detach()
            trained.without_dora[name][f"{target}.weight"] += change
        for module, delta in bias.deltas(carrier).items():
            trained.without_dora[name][f"{module}.bias"] += delta.detach()
        lora.merge(carrier)
        trained.merged[name] = states({name: carrier})[name]
    return trained


def states(modules: dict[str, Any]) -> States:
    """Copies of the modules' tensors."""
    return {name: {k: t.detach().clone() for k, t in module.state_dict().items()} for name, module in modules.items()}


def judged(found: Tensors, wanted: Tensors, without_dora: Tensors, said: bool) -> str:
    """What a reader made of a file.

    Args:
        said: whether it complained of keys that it did not take.
    """
    if far(found, wanted) <= EXACT and not said:
        return "exact"
    if far(found, without_dora) <= EXACT < far(wanted, without_dora):
        return "plain"
    return "part" if said else "wrong"


def far(one: Tensors, other: Tensors) -> float:
    """Largest difference of a weight or bias."""
    return max(float((one[name] - other[name]).abs().max()) for name in other)
