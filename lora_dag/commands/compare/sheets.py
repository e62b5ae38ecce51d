"""The pictures of a comparison: sample sheets side by side, thumbnails of what changed, sliders from one to another."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.commands.compare.sides import SAMPLES, Side, how_to_report, shared_prompts
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_json
from lora_dag.core.labels import numbers

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL import Image

SAMPLING = ("num_inference_steps", "guidance_scale", "negative_prompt", "seed")  # of section validate
SHEET_BYTES = 300_000
Cells = Mapping[str, tuple["Image.Image", "Image.Image"]]
"""Prompt -> picture of the base, and of the adapter."""


def draw_pictures(sides: Sequence[Side], folder: Path) -> dict[str, Path]:
    """Write samples.png and, for each other dataset, dataset-NAME.png; the names of what there is, as a page asks."""
    paths = {"samples": draw_sheet(sides, folder / "samples.png")}
    for side in sides[1:]:
        file = folder / f"dataset-{file_name(side.name)}.png"
        paths[f"dataset {side.name}"] = draw_thumbnails(sides[0], side, file)
    return {name: path for name, path in paths.items() if path}


def file_name(name: str) -> str:
    """The name, and a digest where it has what a file's cannot: ``try/a`` is not ``try-a``."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return safe if safe == name else f"{safe}-{sha256_json(name)[:6]}"


def draw_thumbnails(a: Side, b: Side, path: Path) -> Path | None:
    """Of images that changed, where this machine has some."""
    from lora_dag.commands.compare import changed_images
    from lora_dag.pages.sheets import save_png

    image = changed_images.changes_sheet(a, b)
    if image is None:
        return None
    save_png(path, image, max_bytes=changed_images.MAX_BYTES)
    return path


def draw_sheet(sides: Sequence[Side], path: Path) -> Path | None:
    """A row for each prompt that all drew: the base, and each adapter; a base for each where they differ.

    An adapter at another strength than 1 is labelled with it.
    """
    from lora_dag.pages.sheets import save_png, sheet

    prompts = shared_prompts(sides)
    if not prompts:
        return None
    cells = [cut_cells(side) for side in sides]
    if all(drawn_from(side) == drawn_from(sides[0]) for side in sides):
        labels = ["base", *map(adapter_label, sides)]
        rows = [[cells[0][prompt][0], *(each[prompt][1] for each in cells)] for prompt in prompts]
    else:
        labels = [label for side in sides for label in (f"base of {side.name}", adapter_label(side))]
        rows = [[picture for each in cells for picture in each[prompt]] for prompt in prompts]
    image = sheet(rows, prompts, labels, cell=rows[0][0].width, row_heads=numbers(len(prompts)))
    save_png(path, image, max_bytes=SHEET_BYTES)
    return path


def cut_cells(side: Side) -> Cells:
    """Of its sample sheet, the adapter at the strength nearest to 1.

    Raises:
        UserError: the sheet is no PNG, or smaller than its pictures.
    """
    from PIL import Image

    from lora_dag.pages.sheets import cut, shown_scale

    scales, cell = side.lineage["validate"]["scales"], side.lineage["sheet"]["cell"]
    _, column = shown_scale(scales)
    try:
        with Image.open(io.BytesIO(side.samples), formats=["PNG"]) as picture:
            whole = picture.convert("RGB")
            small = whole.width < (1 + len(scales)) * cell or whole.height < len(side.prompts) * cell
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        small = True
    if small:
        raise UserError(f"{side.name}: {SAMPLES} is damaged; {how_to_report(side.commit)}")
    rows = cut(whole, len(side.prompts), 1 + len(scales), cell)
    return {prompt: (row[0], row[column]) for prompt, row in zip(side.prompts, rows, strict=True)}


def adapter_label(side: Side) -> str:
    from lora_dag.pages.sheets import at_scale, shown_scale

    scale, _ = shown_scale(side.lineage["validate"]["scales"])
    return at_scale(side.name, scale)


def drawn_from(side: Side) -> dict[str, Any]:
    """All that decides what the base draws for a prompt."""
    settings = {key: value for key, value in side.lineage["validate"].items() if key in SAMPLING}
    size = side.lineage["sheet"]["picture"]
    return settings | {"base": side.lineage["base"], "dtype": side.lineage["model"]["dtype"], "size": size}


def sliders(sides: Sequence[Side]) -> Markup:
    """For each shared prompt, a line to move between the first one's picture and the last one's."""
    from markupsafe import Markup

    from lora_dag.pages.html import choice, slider
    from lora_dag.pages.sheets import png

    a, b = sides[0], sides[-1]
    labels = adapter_label(a), adapter_label(b)
    cells_a, cells_b, prompts = cut_cells(a), cut_cells(b), shared_prompts(sides)
    panels = {
        number + prompt: slider(png(cells_a[prompt][1]), png(cells_b[prompt][1]), labels)
        for number, prompt in zip(numbers(len(prompts)), prompts, strict=True)
    }
    return choice("Prompt", panels) if panels else Markup()
