"""Draw sheets of labeled images, and write PNG files.

The same input gives the same bytes: lora_dag/pages/lettering.py draws the text, Pillow the rest.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lora_dag.core.console import warn
from lora_dag.core.files import atomic
from lora_dag.core.labels import EMPTY, distinct, escape, exact_number
from lora_dag.pages.lettering import Lettering, missing

MAX_BYTES = {"samples": 92_000, "progress": 84_000, "nearest": 50_000, "contact": 54_000, "loss": 20_000}
"""Limit of each image that git tracks: 300 KB for an experiment."""
BACKGROUND = "#ffffff"
INK = "#24292f"
FAINT = "#d0d7de"
MAX_HEAD_LINES = 6  # lines of a title, or of a column label
CELLS = (32, 48, 64, 96, 128, 192)
"""Sides of cells for larger images; smaller images have cells of their own side, or a multiple of it."""
CUT, COVER = Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE
PALETTES = (
    *((256, CUT), (128, CUT), (256, COVER), (64, CUT), (128, COVER)),
    *((64, COVER), (32, CUT), (32, COVER), (16, CUT), (8, COVER)),
)
"""Number of colors, and method. A median cut keeps more of photographs, but loses whole hues of drawings."""
ENOUGH, MAX_ERROR = 64, 10
"""Fewest colors of a palette, and its largest root mean square error (of 255): otherwise smaller cells are better."""


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
    cell: int,
    title: str | None = None,
    captions: Sequence[Sequence[str | None]] | None = None,
    row_heads: Sequence[str] | None = None,
) -> Image.Image:
    """Draw a grid of images with labels left of the rows and above the columns.

    Labels that are too long end in an ellipsis. Different labels never look the same.

    Args:
        rows: images row by row; None and short rows leave cells empty.
        row_labels: one per row, or None; a label is at most as high as its row.
        column_labels: one per column, or None.
        cell: side of an image in pixels. Smaller images are scaled up, by whole pixels if possible (exact, and half
            the bytes); larger images are scaled down.
        captions: a text below each image, or None.
        row_heads: beginnings of the row labels that are never cut, such as numbers.
    """
    _warn_of_missing([title or "", *(row_labels or []), *(column_labels or []), *_texts(captions or [])])
    letters = _lettering(cell)
    below = _captions(captions or [], letters, cell)
    caption_height = _height(max((lines for row in below for lines in row), key=len, default=[]), letters)
    max_lines = (cell + caption_height) // letters.line_height
    left = _row_labels(row_labels or [], row_heads, letters, cell, max_lines)
    above = _fit(column_labels or [], letters, cell, MAX_HEAD_LINES)
    pitch = cell + caption_height + _spacing(cell)[0] * (2 if below else 1)
    layout = _layout(rows, title or "", left, above, cell, pitch)

    canvas = Image.new("RGB", layout.size, BACKGROUND)
    _text(canvas, layout.heading, layout.title_letters, layout.margin, layout.margin, 0)
    for column, lines in enumerate(above):
        x, y = layout.corner(0, column)
        _text(canvas, lines, letters, x + cell // 2, y - layout.gap - _height(lines, letters), 0.5)
    for index, lines in enumerate(left):
        _, y = layout.corner(index, 0)
        _text(canvas, lines, letters, layout.label_right, y + max(0, cell - _height(lines, letters)) // 2, 1)
    for index, row in enumerate(rows):
        for column, image in enumerate(row):
            x, y = layout.corner(index, column)
            if image is not None:
                canvas.paste(_square(image, cell), (x, y))
                ImageDraw.Draw(canvas).rectangle((x, y, x + cell - 1, y + cell - 1), outline=FAINT)
            if below:
                _text(canvas, below[index][column], letters, x + cell // 2, y + cell + 1, 0.5)
    return canvas


@dataclass(frozen=True)
class _Layout:
    """Positions on a sheet, in pixels."""

    cell: int
    gap: int
    margin: int
    heading: list[str]
    title_letters: Lettering
    label_right: int
    """Right end of the row labels."""
    first: tuple[int, int]
    """Upper left corner of the first cell."""
    pitch: int
    """Distance between the tops of two rows."""
    size: tuple[int, int]

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return the upper left corner of a cell."""
        x, y = self.first
        return x + column * (self.cell + self.gap), y + row * self.pitch


def _lettering(cell: int) -> Lettering:
    return Lettering(max(11, min(cell // 8, 14)))


def _layout(
    rows: Sequence[Sequence[Image.Image | None]],
    title: str,
    left: Sequence[Sequence[str]],
    above: Sequence[Sequence[str]],
    cell: int,
    pitch: int,
) -> _Layout:
    letters = _lettering(cell)
    title_letters = Lettering(round(letters.size * 1.25))
    gap, margin = _spacing(cell)
    label_width = max((letters.width(line) for lines in left for line in lines), default=0)
    label_right = margin + label_width
    x = label_right + (3 * gap + 2 if label_width else 0)
    width = x + max(map(len, rows)) * (cell + gap) - gap + margin
    heading = title_letters.wrap(title, width - 2 * margin, MAX_HEAD_LINES)
    y = margin + _height(heading, title_letters) + max((_height(lines, letters) for lines in above), default=0)
    y += (2 * gap if heading else 0) + (gap if above else 0)
    height = y + len(rows) * pitch - gap + margin
    return _Layout(cell, gap, margin, heading, title_letters, label_right, (x, y), pitch, (width, height))


def cut(sheet: Image.Image, num_rows: int, num_columns: int, cell: int) -> list[list[Image.Image]]:
    """Cut a sheet without captions into its images, row by row."""
    gap, margin = _spacing(cell)
    x = sheet.width - margin - num_columns * (cell + gap) + gap
    y = sheet.height - margin - num_rows * (cell + gap) + gap
    lefts = [x + column * (cell + gap) for column in range(num_columns)]
    tops = [y + row * (cell + gap) for row in range(num_rows)]
    return [[sheet.crop((left, top, left + cell, top + cell)) for left in lefts] for top in tops]


def _spacing(cell: int) -> tuple[int, int]:
    """Return the pixels between cells, and around all of them."""
    return max(2, cell // 32), max(8, cell // 8)


def _square(image: Image.Image, cell: int) -> Image.Image:
    """Return the image scaled to a square cell, centered on the background."""
    image = image.convert("RGB")
    scale = cell / max(image.size)
    if scale != 1:
        filter = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
        image = image.resize([max(1, round(side * scale)) for side in image.size], filter)
    square = Image.new("RGB", (cell, cell), BACKGROUND)
    square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return square


# Labels


def _row_labels(
    labels: Sequence[str], heads: Sequence[str] | None, letters: Lettering, cell: int, max_lines: int
) -> list[list[str]]:
    """Return lines of each label for the narrowest of three column widths that holds all, else for the widest."""
    widths = [max(share * cell // 2, 7 * letters.size) for share in (2, 3, 4)]
    texts = [head + label for head, label in zip(heads or [""] * len(labels), labels, strict=True)]
    max_lines = max(1, max_lines)

    def holds_all(width: int) -> bool:
        return all(len(letters.wrap(label, width, max_lines + 1)) <= max_lines for label in texts)

    return _fit(labels, letters, next(filter(holds_all, widths), widths[-1]), max_lines, heads)


def _captions(captions: Sequence[Sequence[str | None]], letters: Lettering, cell: int) -> list[list[list[str]]]:
    """Return the lines below each image; different captions of a sheet look different."""
    texts = list(dict.fromkeys(_texts(captions)))
    lines = dict(zip(texts, _fit(texts, letters, cell, 2 if cell >= 128 else 3, empty=EMPTY), strict=True))
    return [[[] if text is None else lines[text] for text in row] for row in captions]


def _texts(captions: Sequence[Sequence[str | None]]) -> list[str]:
    return [text for row in captions for text in row if text is not None]


def _fit(
    labels: Sequence[str],
    letters: Lettering,
    width: int,
    max_lines: int,
    heads: Sequence[str] | None = None,
    empty: str = "",
) -> list[list[str]]:
    """Return the lines of each label; ``empty`` for a blank one."""

    def show(text: str) -> list[str]:
        return letters.wrap(text if text.strip() else empty, width, max_lines)

    def seen(lines: list[str]) -> tuple[bytes, ...]:
        return tuple(letters.draw(line).tobytes() for line in lines)

    return distinct(labels, show, seen, heads)


def _height(lines: Sequence[str], letters: Lettering) -> int:
    return len(lines) * letters.line_height


def _text(canvas: Image.Image, lines: list[str], letters: Lettering, x: int, y: int, align: float) -> None:
    """Draw lines that begin at ``x`` (align 0), are centered on it (0.5), or end there (1)."""
    for index, line in enumerate(lines):
        left = x - round(align * letters.width(line))
        canvas.paste(INK, (left, y + index * letters.line_height), letters.draw(line))


_warned: set[str] = set()


def _warn_of_missing(texts: Sequence[str]) -> None:
    """Warn once per process of characters that the typeface does not have."""
    characters = missing("".join(texts))
    if characters and not _warned:
        listed = " ".join(characters[:8]) + (" …" if len(characters) > 8 else "")
        text = f"images: the typeface DejaVu Sans does not have {listed}."
        warn("glyphs-missing", f"{text} Images show codes like {escape(characters[0])}; pages have the whole text.")
    _warned.update(characters)


# Files


def cell_sides(image_side: int, most: int) -> list[int]:
    """Return good sides of cells for images of a side, up to ``most``: smaller sides, the same, whole multiples."""
    return [
        *(side for side in CELLS if side < min(image_side, most)),
        *([most] if image_side > most else range(image_side, most + 1, image_side)),
    ]


def save_sheet(path: Path, draw: Callable[[int], Image.Image], sides: Sequence[int], max_bytes: int) -> int:
    """Write a sheet with the largest cells that fit into ``max_bytes``; return their side in pixels.

    Args:
        draw: function from the side of a cell to the sheet.
        sides: possible sides, the smallest first.
    """
    fitting, best = sides[0], b""
    for side in sides:
        sheet = draw(side)
        reduced = _reduce(sheet, max_bytes)
        blob = _encode(reduced)
        if best and (len(blob) > max_bytes or _poor(sheet, reduced)):
            break
        fitting, best = side, blob
    _write(path, best)
    return fitting


def save_png(path: Path, image: Image.Image, max_bytes: int | None = None) -> None:
    """Write a PNG file as a whole, with fixed encoder settings and without metadata.

    Above ``max_bytes`` the image is reduced to a palette of fewer and fewer colors, down to eight.
    """
    _write(path, _encode(image if max_bytes is None else _reduce(image, max_bytes)))


def _write(path: Path, blob: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(blob)


def _reduce(image: Image.Image, max_bytes: int) -> Image.Image:
    """Return the image itself, or with the first palette that makes it small enough, else with the last."""
    if len(_encode(image)) <= max_bytes:
        return image
    colorful = image.convert("RGB")
    coarse = colorful.point([round(round(value / 255 * 63) * 255 / 63) for value in range(256)] * 3)  # 20 times faster
    for colors, method in PALETTES:
        source = coarse if method == COVER else colorful
        reduced = source.quantize(colors, method=method, dither=Image.Dither.NONE)
        if len(_encode(reduced)) <= max_bytes:
            break
    return reduced


def _poor(image: Image.Image, reduced: Image.Image) -> bool:
    """Return whether the loss of colors is clearly visible."""
    difference = np.asarray(image.convert("RGB"), np.int32) - np.asarray(reduced.convert("RGB"), np.int32)
    few = reduced.mode == "P" and len(reduced.getcolors() or ()) < ENOUGH - 1  # a median cut may leave one out
    return few and int((difference**2).sum(dtype=np.int64)) > MAX_ERROR**2 * difference.size


def _encode(image: Image.Image) -> bytes:
    clean = image.copy()
    clean.info = {}
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def scale_nearest_one(scales: Sequence[float]) -> tuple[float, int]:
    """Return the adapter's strength nearest to 1 on a sample sheet, and its column there."""
    scale = min(scales, key=lambda scale: abs(scale - 1))
    return scale, 1 + scales.index(scale)


def label_with_scale(name: str, scale: float) -> str:
    return name if scale == 1 else f"{name} x {exact_number(scale)}"


def png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file for an HTML page, without slow compression."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
