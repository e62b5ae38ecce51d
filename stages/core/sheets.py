"""Sheets of labelled pictures, and PNG files.

Everything here is Pillow; the same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.core.files import atomic

BACKGROUND = "#ffffff"
INK = "#24292f"
FAINT = "#d0d7de"
LINE_SPACING = 1.3
MAX_LABEL_LINES = 3


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
    cell: int,
    title: str | None = None,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A grid of pictures with labels left of the rows and above the columns.

    Args:
        rows: pictures row by row; None, or a row that ends early, leaves a cell empty.
        row_labels: one per row, or None for no labels; long ones are wrapped, then cut with an ellipsis.
        column_labels: one per column, or None.
        cell: side of a picture in pixels; smaller pictures are scaled up, larger ones down.
        captions: a text below each picture, or None.
    """
    font = _font(max(11, min(cell // 7, 16)))
    title_font = _font(round(font.size * 1.4))
    gap, margin = _spacing(cell)
    left = [_wrap(label, font, max(cell, round(font.size * 7))) for label in row_labels or []]
    above = [_wrap(label, font, cell) for label in column_labels or []]
    below = [[_wrap(text, font, cell, 2) for text in row] for row in captions or []]

    label_width = max((_width(line, font) for lines in left for line in lines), default=0)
    label_right = margin + label_width
    x = label_right + (3 * gap + 2 if label_width else 0)
    width = x + max(map(len, rows)) * (cell + gap) - gap + margin
    heading = _wrap(title or "", title_font, width - 2 * margin)
    y = margin + _height(heading, title_font) + max((_height(lines, font) for lines in above), default=0)
    y += (2 * gap if heading else 0) + (gap if above else 0)
    caption_height = max((_height(lines, font) for row in below for lines in row), default=0)
    pitch = max([cell + caption_height, *(_height(lines, font) for lines in left)]) + gap + (gap if below else 0)
    canvas = Image.new("RGB", (width, y + len(rows) * pitch - gap + margin), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    _text(draw, heading, title_font, margin, margin)
    for column, lines in enumerate(above):
        _text(draw, lines, font, x + column * (cell + gap) + cell // 2, y - gap - _height(lines, font), "ma")
    for index, row in enumerate(rows):
        top = y + index * pitch
        if left:
            _text(draw, left[index], font, label_right, top + max(0, cell - _height(left[index], font)) // 2, "ra")
        for column, image in enumerate(row):
            corner = (x + column * (cell + gap), top)
            if image is not None:
                canvas.paste(_fit(image, cell), corner)
                draw.rectangle((*corner, corner[0] + cell - 1, top + cell - 1), outline=FAINT)
            if below:
                _text(draw, below[index][column], font, corner[0] + cell // 2, top + cell + 1, "ma")
    return canvas


def cut(sheet: Image.Image, num_rows: int, num_columns: int, cell: int) -> list[list[Image.Image]]:
    """The pictures of a sheet again, row by row, if no label is higher than a cell (64 pixels always suffice)."""
    gap, margin = _spacing(cell)
    x = sheet.width - margin - num_columns * (cell + gap) + gap
    y = sheet.height - margin - num_rows * (cell + gap) + gap
    lefts = [x + column * (cell + gap) for column in range(num_columns)]
    tops = [y + row * (cell + gap) for row in range(num_rows)]
    return [[sheet.crop((left, top, left + cell, top + cell)) for left in lefts] for top in tops]


def _spacing(cell: int) -> tuple[int, int]:
    """Pixels between cells, and around them all."""
    return max(2, cell // 32), max(8, cell // 8)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface inside Pillow itself: no machine's fonts change a sheet."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType; install the wheel from PyPI")
    return font


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """Scaled to fit a square cell, centred on the background."""
    image = image.convert("RGB")
    scale = cell / max(image.size)
    if scale != 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), BACKGROUND)
    square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return square


def _wrap(label: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = MAX_LABEL_LINES) -> list[str]:
    """Lines no wider than ``width`` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in label.split():
        if lines and _width(f"{lines[-1]} {word}", font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [_ellipsize(line, font, width) for line in lines[:max_lines]]
    if len(lines) > max_lines and not kept[-1].endswith("..."):
        kept[-1] = _ellipsize(kept[-1] + "...", font, width)
    return kept


def _ellipsize(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    kept = line
    while len(kept) > 1 and _width(line if kept == line else kept + "...", font) > width:
        kept = kept[:-1]
    return line if kept == line else kept.rstrip(" ,.") + "..."


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(text)))


def _line(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * LINE_SPACING)


def _height(lines: list[str], font: ImageFont.FreeTypeFont) -> int:
    return len(lines) * _line(font)


def _text(
    draw: ImageDraw.ImageDraw, lines: list[str], font: ImageFont.FreeTypeFont, x: int, y: int, anchor: str = "la"
) -> None:
    for index, line in enumerate(lines):
        draw.text((x, y + index * _line(font)), line, fill=INK, font=font, anchor=anchor)


def save_png(path: Path, image: Image.Image, max_bytes: int | None = None) -> None:
    """Write a PNG whole, with fixed encoder settings and nothing but pixels in it.

    Above ``max_bytes`` the picture is reduced to fewer levels per channel, then to a palette of ever fewer colours.
    """
    blob = _encode(image)
    for colours in (64**3, 32**3, 256, 128, 64, 32, 16, 8):
        if max_bytes is None or len(blob) <= max_bytes:
            break
        blob = _encode(_reduce(image.convert("RGB"), colours))
    with atomic(path) as temporary:
        temporary.write_bytes(blob)


def _reduce(image: Image.Image, colours: int) -> Image.Image:
    """Levels that keep black and white, or a palette; Pillow's median cut would give small areas another hue."""
    if colours > 256:
        steps = round(colours ** (1 / 3)) - 1
        return image.point([round(round(value / 255 * steps) * 255 / steps) for value in range(256)] * 3)
    return image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def _encode(image: Image.Image) -> bytes:
    clean = image.copy()
    clean.info = {}
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
