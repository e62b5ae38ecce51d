"""How the original checkpoint of a denoiser, which ComfyUI and kohya's scripts load, names and stacks its layers.

The facts are each family's ORIGINAL_LAYERS; `pytest -m peers` compares them with a ComfyUI at hand.
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
class Part:
    """A layer of the denoiser, as rows of a layer of its original checkpoint."""

    name: str
    swapped: bool
    """Whether the halves of its rows are in the other order there."""


def parts(denoiser: Any) -> dict[str, list[Part]]:
    """Layer of the original checkpoint -> the denoiser's layers whose rows are stacked there, in order."""
    family = family_of(denoiser)
    names = dict.fromkeys(name for name, _ in denoiser.named_modules())
    last = max((int(name.split(".")[1]) for name in names if re.match(r"transformer_blocks\.\d+$", name)), default=0)
    each = sum(re.fullmatch(r"up_blocks\.0\.resnets\.\d+", name) is not None for name in names)
    found: dict[str, list[Part]] = {}
    taken: set[str] = set()
    for there, here in (family.ORIGINAL_LAYERS if family else {}).items():
        swapped = here.startswith(SWAPPED)
        for numbers, stacked in matching(here.removeprefix(SWAPPED).replace("{last}", str(last)), names):
            if not taken.intersection(stacked):
                taken.update(stacked)
                place = 2 if f"up_blocks.{numbers.get('i')}.attentions.0" in names else 1
                layer = there.format(last=last, place=place, **counted(each, **numbers))
                found[layer] = [Part(name, swapped) for name in stacked]
    return found


def matching(pattern: str, names: dict[str, None]) -> Iterator[tuple[dict[str, int], list[str]]]:
    """Each choice of the pattern's numbers for which the denoiser has all of its layers; and those layers."""
    start, *endings = pattern.split()
    first = re.escape(start + (endings[0] if endings else ""))
    regex = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", first))
    for name in names:
        if match := regex.fullmatch(name):
            numbers = {letter: int(number) for letter, number in match.groupdict().items()}
            stacked = [(start + ending).format(**numbers) for ending in endings or [""]]
            if names.keys() >= set(stacked):
                yield numbers, stacked


def counted(each: int, i: int = 0, j: int = 0, k: int = 0) -> dict[str, int]:
    """These numbers, and those that a UNet's blocks have there, where inputs and outputs are counted through.

    Args:
        each: number of resnets of an output block; an input block has a downsampler in place of the last.
    """
    numbers = {"i": i, "j": j, "k": k, "input": 1 + each * i + j, "output": each * i + j, "middle": 2 * j}
    return numbers | {"down": each * (i + 1), "up": each * (i + 1) - 1}


def swapped_layers(denoiser: Any) -> set[str]:
    """Names of the denoiser's layers whose rows are in the other order in the original checkpoint."""
    return {part.name for layer in parts(denoiser).values() for part in layer if part.swapped}


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows, then the first; twice gives them back."""
    import torch

    return torch.cat([*reversed(rows.chunk(2))])
