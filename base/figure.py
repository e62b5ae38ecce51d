"""Draw docs/images/demo.png, the figure of README.md: the demo's samples in two rows, base model and LoRA.

In: reports/samples.png, where each prompt is a row. That sheet is too tall for the first screen of a page.
Out: docs/images/demo.png
Run: ``python -m base.figure`` after a run of the demo that is to be committed.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lora_dag.core.console import bare_parser, log, run
from lora_dag.pages import sheets

SAMPLES, FIGURE = Path("reports/samples.png"), Path("docs/images/demo.png")
CONCEPTS = ("red apple", "sailboat", "owl", "alarm clock", "umbrella", "hot beverage", "airplane", "grinning face")
MAX_BYTES = 64_000
COLUMNS = 3
"""Columns of the sample sheet: base, adapter at strength 0.5, adapter."""
SAMPLE_CELL, CELL = 128, 96
"""Sides of an image in pixels: on the sample sheet, in the figure."""


def main() -> None:
    bare_parser(__doc__).parse_args()
    with Image.open(SAMPLES) as sheet:
        sheets.save_png(FIGURE, figure(sheet.convert("RGB")), MAX_BYTES)
    log.info("%-11s %s", "wrote", FIGURE)


def figure(samples: Image.Image) -> Image.Image:
    """Return the first and the last column of the sample sheet as two rows."""
    rows = sheets.cut(samples, len(CONCEPTS), COLUMNS, SAMPLE_CELL)
    images = [[row[column] for row in rows] for column in (0, COLUMNS - 1)]
    return sheets.sheet(images, ["base model", "with the LoRA"], CONCEPTS, CELL)


if __name__ == "__main__":
    run(main)
