"""Tables and signed numbers for the pages that people read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from lora_dag.core.labels import EMPTY, distinct, escape, shorten, visible

BLANKS = re.compile(r"\s{2,}|^\s|\s$|[^\S ]")  # what a page shows like one blank, or not at all
MINUS = "\N{MINUS SIGN}"  # unlike a hyphen, it never ends a line


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---:") -> str:
    """A GitHub table; the first column to the left, the others by ``align``."""
    head = list(head)
    rule = [":---", *[align] * (len(head) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, f"| {' | '.join(rule)} |", *others])


def facts(head: str, pairs: Mapping[str, object], values: str = "") -> str:
    """A table of labels and values."""
    return table((head, values), [(label, str(value)) for label, value in pairs.items()], align=":---")


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def link(text: str, path: Path, folder: Path) -> str:
    """To a file, from a page in ``folder``."""
    return f"[{text}]({quote(Path(os.path.relpath(path, folder)).as_posix())})"


def image(text: str, path: Path, folder: Path) -> str:
    return f"!{link(text, path, folder)}"


def signed(value: float, spec: str = ".4f") -> str:
    """``+0.0120`` or ``−0.0120``; what is rounded to zero has no sign."""
    text = f"{value:+z{spec}}"
    return (text if float(text) else text[1:]).replace("-", MINUS)


def plain(value: float, spec: str) -> str:
    """``0.0120`` or ``−0.0120``; what is rounded to zero has no sign."""
    return f"{value:z{spec}}".replace("-", MINUS)


def interval(low: float, high: float, spec: str = ".4f") -> str:
    """``[−0.0140, −0.0090]``"""
    return f"[{signed(low, spec)}, {signed(high, spec)}]"


def decimals(*values: float, least: int) -> str:
    """Format of numbers that stand together: two digits of the largest, and ``least`` decimals or more."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return f".{max(least, 1 - math.floor(math.log10(largest)) if largest else 0)}f"


def code(text: str, max_length: int | None = 100) -> str:
    """Text of a dataset as a code span, where no page takes it for markup: one line, cut at ``max_length``."""
    line = visible(text) if max_length is None else shorten(text, max_length)
    if not line:
        return EMPTY
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def codes(texts: Sequence[str], max_length: int = 100) -> list[str]:
    """Code spans of texts that stand together; those that differ show it, however long they are, if only in blanks."""
    if len({visible(text) for text in texts}) < len({*texts}):
        texts = [BLANKS.sub(lambda found: "".join(f" {escape(c)} " for c in found[0]), text) for text in texts]
    return distinct(texts, lambda text: code(text, max_length), str)


def numbered(texts: Iterable[str]) -> str:
    """A list of whole texts, by the numbers that a sheet's rows have."""
    return "\n".join(f"{number}. {code(text, None)}" for number, text in enumerate(texts, 1))
