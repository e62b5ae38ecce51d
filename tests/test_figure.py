"""README's figure is made from the committed samples of the demo."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

from PIL import Image, ImageChops

from base import figure
from lora_dag.pages import sheets
from tests.helpers.workspace import REPOSITORY


def committed(path: Path) -> Image.Image:
    """Return an image as the last commit has it: a run of other settings replaces reports/samples.png."""
    blob = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    return Image.open(io.BytesIO(blob))


def test_readme_shows_the_committed_samples(tmp_path: Path) -> None:
    sheets.save_png(tmp_path / "demo.png", figure.figure(committed(figure.SAMPLES).convert("RGB")), figure.MAX_BYTES)
    expected = Image.open(tmp_path / "demo.png").convert("RGB")
    assert ImageChops.difference(committed(figure.FIGURE).convert("RGB"), expected).getbbox() is None
    assert str(figure.FIGURE) in (REPOSITORY / "README.md").read_text(encoding="utf-8")
