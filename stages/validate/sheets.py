"""samples.png and progress.png: what base and adapter draw, prompt by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.core.labels import exact, numbers
from stages.validate.score_snapshots import step_label

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.latent_cache import LatentCache
    from stages.validate.params import ValidateParams
    from stages.validate.score_snapshots import ScoresAndSamples

MAX_COLUMNS, MAX_ROWS = 9, 12  # of the progress sheet


def draw(reports: Path, evidence: ScoresAndSamples, settings: ValidateParams, trained: set[str]) -> int:
    """samples.png and progress.png; returns the side of a cell of samples.png in pixels."""
    first = {step: drawn[0] for step, drawn in sorted(evidence.pictures.items())}
    samples = {"base": first[0]} | {scale_label(scale): drawn for scale, drawn in evidence.scaled.items()}
    progress = {step_label(step): first[step] for step in spread(list(first), MAX_COLUMNS)}
    marks = ["trained on: " if same_words(prompt) in trained else "" for prompt in settings.prompts]
    heads = [number + mark for number, mark in zip(numbers(len(marks)), marks, strict=True)]

    def save(name: str, columns: dict[str, list[Image.Image]], num_rows: int) -> int:
        from lora_dag.pages.sheets import MAX_BYTES, save_sheet, sheet

        rows = [list(row) for row in zip(*columns.values(), strict=True)][:num_rows]
        labels, begins = settings.prompts[:num_rows], heads[:num_rows]
        title = f"The first {len(rows)} of {len(heads)} prompts" if len(rows) < len(heads) else None
        return save_sheet(
            reports / f"{name}.png",
            lambda cell: sheet(rows, labels, list(columns), cell, title, row_heads=begins),
            cells(evidence),
            MAX_BYTES[name],
        )

    save("progress", progress, MAX_ROWS)
    return save("samples", samples, len(heads))


def spread(steps: list[int], most: int) -> list[int]:
    """The first, the last, and those evenly between that make at most ``most``."""
    if len(steps) <= most:
        return steps
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def trained_captions(cache: LatentCache) -> set[str]:
    """Every caption that training could ask for."""
    return {same_words(caption) for item in cache.items if item.split == "train" for caption in item.captions}


def same_words(text: str) -> str:
    """As two captions are compared: without case and spare spaces."""
    return " ".join(text.casefold().split())


def cells(evidence: ScoresAndSamples) -> list[int]:
    """Sides in pixels that a sheet's cells may have."""
    from lora_dag.pages.sheets import cell_sides

    side = max(evidence.pictures[0][0][0].size)
    return cell_sides(side, min(256, max(128, side)))


def scale_label(scale: float) -> str:
    return "adapter" if scale == 1 else f"adapter x {exact(scale)}"
