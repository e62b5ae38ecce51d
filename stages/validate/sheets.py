"""samples.png and progress.png: samples of base and adapter, one row per prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.core.labels import exact_number, numbered_heads
from stages.validate.score_snapshots import step_label

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.latent_cache import LatentCache
    from stages.validate.params import ValidateParams
    from stages.validate.score_snapshots import ScoresAndSamples

MAX_COLUMNS, MAX_ROWS = 9, 12  # of the progress sheet


def write_sheets(reports: Path, scored: ScoresAndSamples, settings: ValidateParams, trained: set[str]) -> int:
    """Write samples.png and progress.png; return the side of a cell of samples.png in pixels."""
    first = {step: by_seed[0] for step, by_seed in sorted(scored.images.items())}
    samples = {"base": first[0]} | {scale_label(scale): images for scale, images in scored.scaled.items()}
    progress = {step_label(step): first[step] for step in evenly_spaced(list(first), MAX_COLUMNS)}
    marks = ["trained on: " if normalized(prompt) in trained else "" for prompt in settings.prompts]
    heads = [number + mark for number, mark in zip(numbered_heads(len(marks)), marks, strict=True)]

    def save(name: str, columns: dict[str, list[Image.Image]], num_rows: int) -> int:
        from lora_dag.pages.sheets import MAX_BYTES, save_sheet, sheet

        rows = [list(row) for row in zip(*columns.values(), strict=True)][:num_rows]
        labels, begins = settings.prompts[:num_rows], heads[:num_rows]
        title = f"The first {len(rows)} of {len(heads)} prompts" if len(rows) < len(heads) else None
        return save_sheet(
            reports / f"{name}.png",
            lambda cell: sheet(rows, labels, list(columns), cell, title, row_heads=begins),
            cell_sizes(scored),
            MAX_BYTES[name],
        )

    save("progress", progress, MAX_ROWS)
    return save("samples", samples, len(heads))


def evenly_spaced(steps: list[int], most: int) -> list[int]:
    """Return at most ``most`` steps: the first, the last, and evenly spaced ones between them."""
    if len(steps) <= most:
        return steps
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def trained_captions(cache: LatentCache) -> set[str]:
    """Return all captions of training images, normalized."""
    return {normalized(caption) for item in cache.items if item.split == "train" for caption in item.captions}


def normalized(text: str) -> str:
    """Return the text in lower case without repeated spaces, to compare captions."""
    return " ".join(text.casefold().split())


def cell_sizes(scored: ScoresAndSamples) -> list[int]:
    """Return the sides in pixels that a sheet's cells may have."""
    from lora_dag.pages.sheets import cell_sides

    side = max(scored.images[0][0][0].size)
    return cell_sides(side, min(256, max(128, side)))


def scale_label(scale: float) -> str:
    """Return the heading of a column of the sample sheet."""
    return "adapter" if scale == 1 else f"adapter x {exact_number(scale)}"
