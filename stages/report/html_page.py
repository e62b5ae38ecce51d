"""Write reports/report.html: report.md as one file, with time, memory and differences from the last commit.

These change between equal runs, so neither DVC nor git tracks this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from lora_dag.core.console import plural
from lora_dag.core.files import artifact_errors, read_json, sha256_file
from lora_dag.core.labels import numbered_heads
from lora_dag.pages import html
from lora_dag.pages.markdown import image, table
from lora_dag.pages.sheets import cut, label_with_scale, png, scale_nearest_one
from stages.report import last_commit, page
from stages.report.inputs import Inputs


def write_page(title: str, inputs: Inputs, reports: Path, train: Path, export: Path) -> str:
    """Return the HTML of the page in ``reports``.

    Args:
        train: folder of train's reports.
        export: folder of export's reports.
    """
    figures = {"train": train / "metrics.json", "validate": reports / "metrics.json"}
    measured = measured_here(
        {"train": train / "run.json", "validate": reports / "validate" / "run.json"},
        {stage: sha256_file(path) for stage, path in figures.items()},
    )
    markdown = page.write_page(title, inputs, reports, last_commit.changes_line(inputs, reports, export), measured)
    sheet, losses = inputs.images["samples"], inputs.images["loss"]
    extras = {
        image("Samples", sheet, reports): html.beside(
            html.embedded_image(sheet.read_bytes(), "Samples"), html.choice("Prompt", dict(sliders(inputs)))
        ),
        image("Losses", losses, reports): html.embedded_image(losses.read_bytes(), "Losses", plot=True),
    }
    return html.page(title, markdown, reports, extras)


def sliders(inputs: Inputs) -> Iterator[tuple[str, Markup]]:
    """Yield each numbered prompt with a slider between base and adapter, at the scale nearest to 1."""
    settings, cell = inputs.lineage["validate"], inputs.lineage["sheet"]["cell"]
    prompts, scales = settings["prompts"], settings["scales"]
    scale, column = scale_nearest_one(scales)
    labels = ("base", label_with_scale("adapter", scale))
    with Image.open(inputs.images["samples"]) as sheet:
        rows = cut(sheet.convert("RGB"), len(prompts), 1 + len(scales), cell)
    for number, prompt, row in zip(numbered_heads(len(prompts)), prompts, rows, strict=True):
        yield number + prompt, html.slider(png(row[0]), png(row[column]), labels)


# Times and memory of this machine


def measured_here(files: Mapping[str, Path], figures: Mapping[str, str]) -> str:
    """Return a table of each stage's run.json, if it belongs to the current metrics: DVC does not restore it.

    Args:
        files: stage -> its run.json.
        figures: stage -> SHA-256 of its metrics.json.

    Raises:
        UserError: a run.json is damaged.
    """
    runs: dict[str, tuple[str, ...]] = {}
    for stage, path in files.items():
        if path.exists():
            with artifact_errors(path, f"stages.{stage}"):
                run = read_json(path)
                if run["of"] == figures[stage]:
                    runs[stage] = cells_of(run)
    if not runs:
        return ""
    rows = [(label, *cells) for label, *cells in zip(LABELS, *runs.values(), strict=True) if any(cells)]
    return table(("Measured on this machine", *runs), rows)


LABELS = ("Images per second", "Wall time", "Peak memory", "Peak memory of the GPU", "Device", "Resumed from step")


def cells_of(run: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a cell per label of LABELS, empty if not measured."""
    environment = run["environment"]
    return (
        number_text(run.get("images_per_second"), "g"),
        duration(run["seconds"]),
        number_text(run.get("peak_memory_gb"), ".3g", " GB"),
        number_text(run.get("peak_gpu_memory_gb"), ".3g", " GB"),
        f"{environment['device']}, {plural(environment['num_threads'], 'thread')}",
        number_text(run.get("resumed_from_step") or None, ","),
    )


def number_text(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


def duration(seconds: float) -> str:
    """Return a duration like ``2 min 07 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
