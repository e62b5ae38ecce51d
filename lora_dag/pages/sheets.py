"""Sheets of labelled pictures, and PNG files.

The same input gives the same bytes: lora_dag/pages/lettering.py draws the text, Pillow the rest.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lora_dag.core.console import log
from lora_dag.core.files import atomic
from lora_dag.core.labels import EMPTY, distinct, escape, exact
from lora_dag.pages.lettering import Lettering, missing

MAX_BYTES = {"samples": 92_000, "progress": 84_000, "nearest": 50_000, "contact": 54_000, "loss": 20_000}
"""Of each picture that git keeps: 300 KB for an experiment."""
BACKGROUND = "#ffffff"
INK = "#24292f"
FAINT = "#d0d7de"
MAX_HEAD_LINES = 6  # of a title, or of what stands above a column
CELLS = (32, 48, 64, 96, 128, 192)
"""Sides that larger pictures are shown with; smaller ones with their own, or a multiple."""
CUT, COVER = Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE
PALETTES = (
    *((256, CUT), (128, CUT), (256, COVER), (64, CUT), (128, COVER)),
    *((64, COVER), (32, CUT), (32, COVER), (16, CUT), (8, COVER)),
)
"""Number of colours, and how they are chosen: a median cut loses less of photographs, but whole hues of drawings."""
ENOUGH, MAX_ERROR = 64, 10
"""Colours of a palette, and root mean square of what it changes, of 255: below and above, smaller cells show more."""


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
    cell: int,
    title: str | None = None,
    captions: Sequence[Sequence[str | None]] | None = None,
    row_heads: Sequence[str] | None = None,
) -> Image.Image:
    """A grid of pictures with labels left of the rows and above the columns.

    What does not fit ends in an ellipsis, and labels that differ never look alike.

    Args:
        rows: pictures row by row; None, or a row that ends early, leaves a cell empty.
        row_labels: one per row, or None for no labels; they are as high as a row at most.
        column_labels: one per column, or None.
        cell: side of a picture in pixels; smaller pictures are scaled up (by whole pixels where that fits: it shows
            what was drawn and takes half the bytes), larger ones down.
        captions: a text below each picture, or None.
        row_heads: what row labels begin with and is never cut, such as numbers.
    """
    letters = Lettering(max(11, min(cell // 8, 14)))
    title_letters = Lettering(round(letters.size * 1.25))
    gap, margin = _spacing(cell)
    below = _captions(captions or [], letters, cell)
    caption_height = _height(max((lines for row in below for lines in row), key=len, default=[]), letters)
    left = _row_labels(row_labels or [], row_heads, letters, cell, (cell + caption_height) // letters.line_height)
    above = _fit(column_labels or [], letters, cell, MAX_HEAD_LINES)
    _warn_of_missing([title or "", *(row_labels or []), *(column_labels or []), *_texts(captions or [])])

    label_width = max((letters.width(line) for lines in left for line in lines), default=0)
    label_right = margin + label_width
    x = label_right + (3 * gap + 2 if label_width else 0)
    width = x + max(map(len, rows)) * (cell + gap) - gap + margin
    heading = title_letters.wrap(title or "", width - 2 * margin, MAX_HEAD_LINES)
    y = margin + _height(heading, title_letters) + max((_height(lines, letters) for lines in above), default=0)
    y += (2 * gap if heading else 0) + (gap if above else 0)
    pitch = cell + caption_height + gap + (gap if below else 0)
    canvas = Image.new("RGB", (width, y + len(rows) * pitch - gap + margin), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    _text(canvas, heading, title_letters, margin, margin, 0)
    for column, lines in enumerate(above):
        _text(canvas, lines, letters, x + column * (cell + gap) + cell // 2, y - gap - _height(lines, letters), 0.5)
    for index, row in enumerate(rows):
        top = y + index * pitch
        if left:
            _text(canvas, left[index], letters, label_right, top + max(0, cell - _height(left[index], letters)) // 2, 1)
        for column, image in enumerate(row):
            corner = (x + column * (cell + gap), top)
            if image is not None:
                canvas.paste(_square(image, cell), corner)
                draw.rectangle((*corner, corner[0] + cell - 1, top + cell - 1), outline=FAINT)
            if below:
                _text(canvas, below[index][column], letters, corner[0] + cell // 2, top + cell + 1, 0.5)
    return canvas


def cut(sheet: Image.Image, num_rows: int, num_columns: int, cell: int) -> list[list[Image.Image]]:
    """The pictures of a sheet without captions again, row by row."""
    gap, margin = _spacing(cell)
    x = sheet.width - margin - num_columns * (cell + gap) + gap
    y = sheet.height - margin - num_rows * (cell + gap) + gap
    lefts = [x + column * (cell + gap) for column in range(num_columns)]
    tops = [y + row * (cell + gap) for row in range(num_rows)]
    return [[sheet.crop((left, top, left + cell, top + cell)) for left in lefts] for top in tops]


def _spacing(cell: int) -> tuple[int, int]:
    """Pixels between cells, and around them all."""
    return max(2, cell // 32), max(8, cell // 8)


def _square(image: Image.Image, cell: int) -> Image.Image:
    """Scaled to fit a square cell, centred on the background."""
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
    """In the narrowest of three columns that holds all of them, else in the widest."""
    widths = [max(share * cell // 2, 7 * letters.size) for share in (2, 3, 4)]
    whole = [head + label for head, label in zip(heads or [""] * len(labels), labels, strict=True)]
    max_lines = max(1, max_lines)

    def holds_all(width: int) -> bool:
        return all(len(letters.wrap(label, width, max_lines + 1)) <= max_lines for label in whole)

    return _fit(labels, letters, next(filter(holds_all, widths), widths[-1]), max_lines, heads)


def _captions(captions: Sequence[Sequence[str | None]], letters: Lettering, cell: int) -> list[list[list[str]]]:
    """Lines below each picture; those of the whole sheet are made distinct."""
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
    """Lines of each label; of one that is blank, ``empty``."""

    def show(text: str) -> list[str]:
        return letters.wrap(text if text.strip() else empty, width, max_lines)

    def seen(lines: list[str]) -> tuple[bytes, ...]:
        return tuple(letters.draw(line).tobytes() for line in lines)

    return distinct(labels, show, seen, heads)


def _height(lines: Sequence[str], letters: Lettering) -> int:
    return len(lines) * letters.line_height


def _text(canvas: Image.Image, lines: list[str], letters: Lettering, x: int, y: int, align: float) -> None:
    """Lines that begin at ``x`` (align 0), are centred on it (0.5), or end there (1)."""
    for index, line in enumerate(lines):
        left = x - round(align * letters.width(line))
        canvas.paste(INK, (left, y + index * letters.line_height), letters.draw(line))


_warned: set[str] = set()


def _warn_of_missing(texts: Sequence[str]) -> None:
    """Once for all sheets of a run."""
    found = missing("".join(texts))
    if found and not _warned:
        log.warning(
            "warning: the typeface of the pictures, DejaVu Sans, has no %s; they show %s, and the pages have the text",
            " ".join(found[:8]) + (" …" if len(found) > 8 else ""),
            escape(found[0]),
        )
    _warned.update(found)


# Files


def cell_sides(picture: int, most: int) -> list[int]:
    """Sides of cells that pictures of a side look good in, up to ``most``: smaller ones, the same, whole multiples."""
    return [
        *(side for side in CELLS if side < min(picture, most)),
        *([most] if picture > most else range(picture, most + 1, picture)),
    ]


def save_sheet(path: Path, draw: Callable[[int], Image.Image], sides: Sequence[int], max_bytes: int) -> int:
    """Write a sheet with the largest cells that fit into ``max_bytes``; returns their side in pixels.

    Args:
        draw: makes the sheet, given the side of a cell.
        sides: to choose from, the smallest first.
    """
    fitting, best = sides[0], b""
    for side in sides:
        sheet = draw(side)
        shown = _reduce(sheet, max_bytes)
        blob = _encode(shown)
        if best and (len(blob) > max_bytes or _poor(sheet, shown)):
            break
        fitting, best = side, blob
    _write(path, best)
    return fitting


def save_png(path: Path, image: Image.Image, max_bytes: int | None = None) -> None:
    """Write a PNG whole, with fixed encoder settings and nothing but pixels in it.

    Above ``max_bytes`` the picture is reduced to a palette of ever fewer colours, at last of eight.
    """
    _write(path, _encode(image if max_bytes is None else _reduce(image, max_bytes)))


def _write(path: Path, blob: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(blob)


def _reduce(image: Image.Image, max_bytes: int) -> Image.Image:
    """The image itself, or with the first palette that makes it small enough, or with the last."""
    if len(_encode(image)) <= max_bytes:
        return image
    colourful = image.convert("RGB")
    coarse = colourful.point([round(round(value / 255 * 63) * 255 / 63) for value in range(256)] * 3)  # 20 times faster
    for colours, method in PALETTES:
        source = coarse if method == COVER else colourful
        reduced = source.quantize(colours, method=method, dither=Image.Dither.NONE)
        if len(_encode(reduced)) <= max_bytes:
            break
    return reduced


def _poor(image: Image.Image, shown: Image.Image) -> bool:
    """Whether a palette is seen at a glance."""
    difference = np.asarray(image.convert("RGB"), np.int32) - np.asarray(shown.convert("RGB"), np.int32)
    few = shown.mode == "P" and len(shown.getcolors() or ()) < ENOUGH - 1  # a median cut may leave one out
    return few and int((difference**2).sum(dtype=np.int64)) > MAX_ERROR**2 * difference.size


def _encode(image: Image.Image) -> bytes:
    clean = image.copy()
    clean.info = {}
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def shown_scale(scales: Sequence[float]) -> tuple[float, int]:
    """The adapter's strength that a slider shows, the nearest to 1 of those on a sample sheet; and its column there."""
    scale = min(scales, key=lambda scale: abs(scale - 1))
    return scale, 1 + scales.index(scale)


def at_scale(name: str, scale: float) -> str:
    return name if scale == 1 else f"{name} x {exact(scale)}"


def png(picture: Image.Image) -> bytes:
    """Bytes of a PNG file for an HTML page, quick to write."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
