"""Which programs read which of our files right: readers.json, README's table, and the kinds of adapters in it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import adapted, lora
from lora_dag.core import seeding
from stages.export import trained, writers
from tests.adapters.test_lora import params

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
    """README's table."""
    rows = [["`export.formats`", "family", "what it holds", *TABLE["columns"].values()]]
    for row in TABLE["rows"]:
        families = ", ".join(f"`{name}`" for name in row["families"])
        cells = [row["readers"].get(reader, "") for reader in TABLE["columns"]]
        rows.append([f"`{row['file']}`", families, row["holds"], *cells])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


# Adapters, and what a reader makes of their files

Parts = dict[str, trained.Trained]
Tensors = dict[str, torch.Tensor]


def train(family: Family, modules: dict[str, Any], kind: str) -> Parts:
    """An adapter of the kind as if trained for long, by component.

    Args:
        modules: the denoiser, then text encoders that may be adapted; they stay as they are.
    """
    settings = params(**KINDS[kind])
    denoiser, text = modules[family.DENOISER], {n: m for n, m in modules.items() if n in family.TEXT_ENCODERS}
    configs = {family.DENOISER: lora.make_config(settings, denoiser)}
    configs |= adapted.text_configs(settings, family, text) if settings.train_text_encoder else {}
    parts = {}
    for name, config in configs.items():
        carrier = copy.deepcopy(modules[name])
        for key, parameter in lora.inject(carrier, config).items():
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=seeding.generator(0, key))
        parts[name] = trained.read(config, carrier)
    return parts


def write(family: Family, parts: Parts, file: str, folder: Path) -> Path:
    if file == "diffusers":
        writers.write_diffusers(family, parts, {}, folder)
        return folder / writers.DIFFUSERS_FILE
    writers.write_comfyui(family, parts, {}, folder / "ours.safetensors")
    return folder / "ours.safetensors"


def states(modules: dict[str, Any], parts: Parts) -> dict[str, Tensors]:
    """Component -> its tensors with the adapter in them."""
    found = {}
    for name, module in modules.items():
        found[name] = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
        if name in parts:
            writers.merge(parts[name], found[name])
    return found


def plain(parts: Parts) -> Parts:
    """Without DoRA's magnitudes."""
    return {name: dataclasses.replace(part, row_factors={}) for name, part in parts.items()}


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
