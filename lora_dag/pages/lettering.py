"""Draw text in one typeface, DejaVu Sans, with matplotlib's layout: every machine gives the same pixels.

Pillow's basic layout does not join Arabic letters and does not write from right to left. Its better layout (raqm)
needs FriBiDi on the machine. Matplotlib's wheel contains HarfBuzz, SheenBidi and the typeface.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lora_dag.core.labels import ELLIPSIS, HIDDEN, JOINERS, escape, is_attached

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

LINE_SPACING = 1.3
SUBPIXELS = 64  # FreeType's units per pixel


@cache
def font(size: int) -> FT2Font:
    import matplotlib as mpl
    from matplotlib.ft2font import FT2Font

    face = FT2Font(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    face.set_size(size, 72)
    return face


@cache
def glyphs() -> frozenset[int]:
    """Return the code points of the typeface: Latin, Greek, Cyrillic, Arabic, Hebrew, signs; no Chinese, no emoji."""
    return frozenset(font(16).get_charmap())


@lru_cache(10_000)  # takes a millisecond, and ``wrap`` measures the same beginnings many times
def width(line: str, size: int) -> int:
    """Return the width of a line in whole pixels."""
    font(size).set_text(line)
    return -(-font(size).get_width_height()[0] // SUBPIXELS)


def missing(text: str) -> list[str]:
    """Return the characters of a text that the typeface cannot draw, in their order."""
    letters = unicodedata.normalize("NFC", text)
    return [c for c in dict.fromkeys(letters) if ord(c) not in glyphs() and unicodedata.category(c) not in HIDDEN]


def legible(text: str) -> str:
    """Return the text in one line, with ``U+1F98A`` for each character that the typeface cannot draw."""
    parts: list[str] = []
    before, drawn = "", False
    for c in unicodedata.normalize("NFC", " ".join(text.split())):
        joins = drawn and unicodedata.bidirectional(before) == "AL"  # elsewhere a joiner only hides
        shows = joins if c in JOINERS else unicodedata.category(c) not in HIDDEN
        drawn = ord(c) in glyphs() and shows and (drawn or not is_attached(c))
        parts.append(c if drawn else f" {escape(c)} ")
        before = c
    return " ".join("".join(parts).split())


@dataclass(frozen=True)
class Lettering:
    """Typeface at a size in pixels."""

    size: int

    @property
    def line_height(self) -> int:
        return round(self.size * LINE_SPACING)

    def width(self, line: str) -> int:
        return width(line, self.size)

    def draw(self, line: str) -> Image.Image:
        """Draw a line as an image of mode "L"; its height is fixed, even with many accents."""
        face = font(self.size)
        face.set_text(line)
        face.draw_glyphs_to_bitmap(antialiased=True)
        ink = np.asarray(face.get_image())  # with a margin of one pixel
        above = (face.get_width_height()[1] - face.get_descent()) // SUBPIXELS + 1  # rows over the base line
        up, down = (metric * self.size / face.units_per_EM for metric in (face.ascender, -face.descender))
        base = round((self.line_height - up - down) / 2 + up)
        image = Image.new("L", (ink.shape[1], self.line_height))
        image.paste(Image.fromarray(ink), (0, base - above))
        return image

    def wrap(self, text: str, width: int, max_lines: int) -> list[str]:
        """Return legible lines no wider than ``width`` pixels; longer words are broken, and the rest is cut."""
        lines: list[str] = []
        words, line = legible(text).split()[::-1], ""
        while words and len(lines) <= max_lines:
            word = words.pop()
            longer = f"{line} {word}" if line else word
            if self.width(longer) <= width:
                line = longer
                continue
            full = line if line and self.width(word) <= width else self.start_of(longer, width).rstrip()
            words += [rest] if (rest := longer[len(full) :].lstrip()) else []
            lines.append(full)
            line = ""
        lines += [line] if line else []
        if len(lines) <= max_lines:
            return lines
        last = self.start_of(lines[max_lines - 1], width - self.width(ELLIPSIS))
        return [*lines[: max_lines - 1], last.rstrip(" ,.") + ELLIPSIS]

    def start_of(self, word: str, width: int) -> str:
        """Return the start of a text that fits: at least one character with its accents, up to a sign if possible."""
        end = 0
        for stop in range(1, len(word) + 1):
            if stop < len(word) and is_attached(word[stop]):
                continue
            if end and self.width(word[:stop]) > width:
                break
            end = stop
        sign = max(word.rfind(c, 0, end) for c in "-_/. ") + 1
        return word[: sign if sign > end // 2 and end < len(word) else end]
