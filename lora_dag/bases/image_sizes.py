"""Image sizes that a base model cannot process: sides too long for its positions, or no multiples of its patches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_dag.core.console import Problem

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

NUM_EXAMPLES = 5
"""Sides listed in a message."""


def size_problems(
    model: ModelParams, family: Family, sizes: Iterable[tuple[int, int]], pretrained: str = ""
) -> list[Problem]:
    """Return problems of images with these widths and heights, in pixels, for the base model.

    Args:
        pretrained: ``model.pretrained`` of params.yaml, if ``model`` names a converted or downloaded folder instead.
    """
    pretrained = pretrained or model.pretrained
    try:
        multiple, limit = family.pixel_multiple(model), family.max_side(model)
    except (KeyError, TypeError) as error:
        text = f"{pretrained}: a config.json lacks a key that the family reads ({error}). Fetch the model again."
        return [Problem("base-incomplete", text)]
    sides = sorted({side for size in sizes for side in size})
    problems = []
    if limit is not None and sides[-1] > limit:
        problems.append(too_long(model, pretrained, sides, multiple, limit))
    bad = [side for side in sides if side % multiple]
    if bad and not (problems and len(sides) == 1):  # the text of too_long names the multiple too
        problems.append(not_multiple(model, pretrained, sides, bad, multiple))
    return problems


def too_long(model: ModelParams, pretrained: str, sides: list[int], multiple: int, limit: int) -> Problem:
    setting, limited = model.setting("dataset.resolution"), f"but {pretrained} supports sides of up to {limit} pixels"
    if len(sides) > 1:
        text = f"{setting}: its buckets have sides of up to {sides[-1]} pixels, {limited}. Lower it or"
        return Problem("resolution-too-large", f"{text} dataset.max_aspect_ratio.")
    text = f"{setting}: got {sides[0]}, {limited}. Write a multiple of {multiple} up to {limit}."
    return Problem("resolution-too-large", text)


def not_multiple(model: ModelParams, pretrained: str, sides: list[int], bad: list[int], multiple: int) -> Problem:
    needed = f"{pretrained} needs multiples of {multiple}"
    if len(sides) > 1:
        more = f" and {len(bad) - NUM_EXAMPLES:,} more" if len(bad) > NUM_EXAMPLES else ""
        examples = ", ".join(map(str, bad[:NUM_EXAMPLES])) + more
        return Problem(
            "resolution-not-multiple",
            f"{model.setting('dataset.bucket_step')}: it gives sides of {examples} pixels, but {needed}."
            f" Write {multiple}.",
        )
    below = bad[0] - bad[0] % multiple
    near = f"{below} or {below + multiple}" if below else str(multiple)
    text = f"{model.setting('dataset.resolution')}: got {bad[0]}, but {needed}. Write {near}."
    return Problem("resolution-not-multiple", text)
