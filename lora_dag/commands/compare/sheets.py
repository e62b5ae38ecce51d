"""Draw the images of a comparison: joined sample sheets, thumbnails of changed images, sliders."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.commands.compare.revision_report import SAMPLES, RevisionReport, how_to_report, shared_prompts
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_json
from lora_dag.core.labels import numbered_heads

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL import Image

SAMPLING = ("num_inference_steps", "guidance_scale", "negative_prompt", "seed")  # of section validate
SHEET_BYTES = 300_000
Cells = Mapping[str, tuple["Image.Image", "Image.Image"]]
"""Prompt -> image of the base, and of the adapter."""


def draw_images(revisions: Sequence[RevisionReport], folder: Path) -> dict[str, Path]:
    """Write samples.png, and dataset-NAME.png for each changed dataset; return name -> file."""
    paths = {"samples": draw_sheet(revisions, folder / "samples.png")}
    for revision in revisions[1:]:
        file = folder / f"dataset-{file_name(revision.name)}.png"
        paths[f"dataset {revision.name}"] = draw_thumbnails(revisions[0], revision, file)
    return {name: path for name, path in paths.items() if path}


def file_name(name: str) -> str:
    """Return the name for a file, with a digest if characters were replaced: ``try/a`` is not ``try-a``."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return safe if safe == name else f"{safe}-{sha256_json(name)[:6]}"


def draw_thumbnails(a: RevisionReport, b: RevisionReport, path: Path) -> Path | None:
    """Write thumbnails of changed images; None if this machine has none of them."""
    from lora_dag.commands.compare import changed_images
    from lora_dag.pages.sheets import save_png

    image = changed_images.changes_sheet(a, b)
    if image is None:
        return None
    save_png(path, image, max_bytes=changed_images.MAX_BYTES)
    return path


def draw_sheet(revisions: Sequence[RevisionReport], path: Path) -> Path | None:
    """Write a sheet with a row per shared prompt: the base and each adapter; several bases if they differ.

    The label of an adapter has its strength if it is not 1.
    """
    from lora_dag.pages.sheets import save_png, sheet

    prompts = shared_prompts(revisions)
    if not prompts:
        return None
    cells = [cut_cells(revision) for revision in revisions]
    if all(base_inputs(revision) == base_inputs(revisions[0]) for revision in revisions):
        labels = ["base", *map(adapter_label, revisions)]
        rows = [[cells[0][prompt][0], *(each[prompt][1] for each in cells)] for prompt in prompts]
    else:
        labels = [label for revision in revisions for label in (f"base of {revision.name}", adapter_label(revision))]
        rows = [[image for each in cells for image in each[prompt]] for prompt in prompts]
    image = sheet(rows, prompts, labels, cell=rows[0][0].width, row_heads=numbered_heads(len(prompts)))
    save_png(path, image, max_bytes=SHEET_BYTES)
    return path


def cut_cells(revision: RevisionReport) -> Cells:
    """Cut a revision's sample sheet into images, with the adapter at the strength nearest to 1.

    Raises:
        UserError: the sheet is not a PNG file, or smaller than its images.
    """
    from PIL import Image

    from lora_dag.pages.sheets import cut, scale_nearest_one

    scales, cell = revision.lineage["validate"]["scales"], revision.lineage["sheet"]["cell"]
    _, column = scale_nearest_one(scales)
    try:
        with Image.open(io.BytesIO(revision.samples), formats=["PNG"]) as image:
            whole = image.convert("RGB")
            small = whole.width < (1 + len(scales)) * cell or whole.height < len(revision.prompts) * cell
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        small = True
    if small:
        text = f"{revision.name}: {SAMPLES} is damaged. {how_to_report(revision.commit)}"
        raise UserError(Problem("report-damaged", text))
    rows = cut(whole, len(revision.prompts), 1 + len(scales), cell)
    return {prompt: (row[0], row[column]) for prompt, row in zip(revision.prompts, rows, strict=True)}


def adapter_label(revision: RevisionReport) -> str:
    from lora_dag.pages.sheets import label_with_scale, scale_nearest_one

    scale, _ = scale_nearest_one(revision.lineage["validate"]["scales"])
    return label_with_scale(revision.name, scale)


def base_inputs(revision: RevisionReport) -> dict[str, Any]:
    """Return all that affects the base's image for a prompt."""
    settings = {key: value for key, value in revision.lineage["validate"].items() if key in SAMPLING}
    size = revision.lineage["sheet"]["image"]
    model = {key: revision.lineage["model"].get(key) for key in ("dtype", "quantization")}
    return settings | model | {"base": revision.lineage["base"], "size": size}


def sliders(revisions: Sequence[RevisionReport]) -> Markup:
    """Return a slider per shared prompt, between the images of the first and the last revision."""
    from markupsafe import Markup

    from lora_dag.pages.html import choice, slider
    from lora_dag.pages.sheets import png

    a, b = revisions[0], revisions[-1]
    labels = adapter_label(a), adapter_label(b)
    cells_a, cells_b, prompts = cut_cells(a), cut_cells(b), shared_prompts(revisions)
    panels = {
        number + prompt: slider(png(cells_a[prompt][1]), png(cells_b[prompt][1]), labels)
        for number, prompt in zip(numbered_heads(len(prompts)), prompts, strict=True)
    }
    return choice("Prompt", panels) if panels else Markup()
