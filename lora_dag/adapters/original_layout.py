"""Names and stacking of a denoiser's layers in its original checkpoint, which ComfyUI and kohya's scripts load.

Each family defines them in ORIGINAL_LAYERS. `pytest -m peers` compares them with an installed ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.families.common import SWAPPED
from lora_dag.families.protocol import family_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StackedLayer:
    """Layer of the denoiser whose rows are part of a layer of the original checkpoint."""

    name: str
    swapped: bool
    """Whether the original checkpoint has the two halves of its rows in the opposite order."""


def original_layers(denoiser: Any) -> dict[str, list[StackedLayer]]:
    """Map each layer of the original checkpoint to the denoiser's layers whose rows it stacks, in order."""
    family = family_of(denoiser)
    names = dict.fromkeys(name for name, _ in denoiser.named_modules())
    last = max((int(name.split(".")[1]) for name in names if re.match(r"transformer_blocks\.\d+$", name)), default=0)
    num_resnets = sum(re.fullmatch(r"up_blocks\.0\.resnets\.\d+", name) is not None for name in names)
    layers: dict[str, list[StackedLayer]] = {}
    assigned: set[str] = set()
    for original, pattern in (family.ORIGINAL_LAYERS if family else {}).items():
        swapped = pattern.startswith(SWAPPED)
        for numbers, stacked in matching_layers(pattern.removeprefix(SWAPPED).replace("{last}", str(last)), names):
            if not assigned.intersection(stacked):
                assigned.update(stacked)
                place = 2 if f"up_blocks.{numbers.get('i')}.attentions.0" in names else 1
                layer = original.format(last=last, place=place, **block_numbers(num_resnets, **numbers))
                layers[layer] = [StackedLayer(name, swapped) for name in stacked]
    return layers


def matching_layers(pattern: str, names: dict[str, None]) -> Iterator[tuple[dict[str, int], list[str]]]:
    """Yield each choice of the pattern's numbers for which the denoiser has all of its layers, with these layers."""
    start, *endings = pattern.split()
    first = re.escape(start + (endings[0] if endings else ""))
    regex = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", first))
    for name in names:
        if match := regex.fullmatch(name):
            numbers = {letter: int(number) for letter, number in match.groupdict().items()}
            stacked = [(start + ending).format(**numbers) for ending in endings or [""]]
            if names.keys() >= set(stacked):
                yield numbers, stacked


def block_numbers(num_resnets: int, i: int = 0, j: int = 0, k: int = 0) -> dict[str, int]:
    """Return i, j and k, and the numbers of a UNet's blocks in the original checkpoint, which counts them in one list.

    Args:
        num_resnets: resnets of an output block; an input block has a downsampler instead of the last one.
    """
    numbers = {"i": i, "j": j, "k": k, "input": 1 + num_resnets * i + j}
    numbers |= {"output": num_resnets * i + j, "middle": 2 * j}
    return numbers | {"down": num_resnets * (i + 1), "up": num_resnets * (i + 1) - 1}


def swapped_layers(denoiser: Any) -> set[str]:
    """Return the denoiser's layers whose halves of rows have the opposite order in the original checkpoint."""
    return {layer.name for stack in original_layers(denoiser).values() for layer in stack if layer.swapped}


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """Return the second half of the rows, then the first half. Applied twice, it changes nothing."""
    import torch

    return torch.cat([*reversed(rows.chunk(2))])
