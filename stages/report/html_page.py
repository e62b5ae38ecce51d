"""reports/report.html: report.md in one file to look at, with what is no function of the inputs.

Time and memory of this machine, and what differs from the last commit, change between equal runs: neither DVC nor git
tracks this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from lora_dag.core.console import plural
from lora_dag.core.files import read_json, sha256_file, understood
from lora_dag.core.labels import numbers
from lora_dag.pages import html
from lora_dag.pages.markdown import image, table
from lora_dag.pages.sheets import at_scale, cut, png, shown_scale
from stages.report import last_commit, page
from stages.report.inputs import Inputs


def write_page(title: str, inputs: Inputs, reports: Path, train: Path, export: Path) -> str:
    """HTML of the page in ``reports``.

    Args:
        train: folder of train's reports.
        export: folder of export's.
    """
    figures = {"train": train / "metrics.json", "validate": reports / "metrics.json"}
    measured = measured_here(
        {"train": train / "run.json", "validate": reports / "validate" / "run.json"},
        {stage: sha256_file(path) for stage, path in figures.items()},
    )
    markdown = page.write_page(title, inputs, reports, last_commit.changed(inputs, reports, export), measured)
    sheet, losses = inputs.pictures["samples"], inputs.pictures["loss"]
    extras = {
        image("Samples", sheet, reports): html.beside(
            html.picture(sheet.read_bytes(), "Samples"), html.choice("Prompt", dict(sliders(inputs)))
        ),
        image("Losses", losses, reports): html.picture(losses.read_bytes(), "Losses", plot=True),
    }
    return html.page(title, markdown, reports, extras)


def sliders(inputs: Inputs) -> Iterator[tuple[str, Markup]]:
    """Number with prompt, and slider between the base's picture and the adapter's, at the scale nearest to 1."""
    asked, cell = inputs.lineage["validate"], inputs.lineage["sheet"]["cell"]
    prompts, scales = asked["prompts"], asked["scales"]
    scale, column = shown_scale(scales)
    labels = ("base", at_scale("adapter", scale))
    with Image.open(inputs.pictures["samples"]) as sheet:
        rows = cut(sheet.convert("RGB"), len(prompts), 1 + len(scales), cell)
    for number, prompt, row in zip(numbers(len(prompts)), prompts, rows, strict=True):
        yield number + prompt, html.slider(png(row[0]), png(row[column]), labels)


# Times and memory of this machine


def measured_here(files: Mapping[str, Path], figures: Mapping[str, str]) -> str:
    """A table of each stage's run.json, where it is of the run that these figures are of: DVC restores none.

    Args:
        figures: sha256 of the stage's metrics.json.

    Raises:
        UserError: one is damaged.
    """
    runs: dict[str, tuple[str, ...]] = {}
    for stage, path in files.items():
        if path.exists():
            with understood(path, f"stages.{stage}"):
                run = read_json(path)
                if run["of"] == figures[stage]:
                    runs[stage] = cells_of(run)
    if not runs:
        return ""
    rows = [(label, *cells) for label, *cells in zip(LABELS, *runs.values(), strict=True) if any(cells)]
    return table(("Measured on this machine", *runs), rows)


LABELS = ("Images per second", "Wall time", "Peak memory", "Peak memory of the GPU", "Device", "Went on from step")


def cells_of(run: Mapping[str, Any]) -> tuple[str, ...]:
    """A cell for each of LABELS, empty where nothing was measured."""
    where = run["environment"]
    return (
        number_text(run.get("images_per_second"), "g"),
        duration(run["seconds"]),
        number_text(run.get("peak_memory_gb"), ".3g", " GB"),
        number_text(run.get("peak_gpu_memory_gb"), ".3g", " GB"),
        f"{where['device']}, {plural(where['num_threads'], 'thread')}",
        number_text(run.get("resumed_from_step") or None, ","),
    )


def number_text(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


def duration(seconds: float) -> str:
    """``2 min 07 s``"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
