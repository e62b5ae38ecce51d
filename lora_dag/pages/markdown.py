"""Write tables, lists, links and numbers of the pages as Markdown."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from lora_dag.core.labels import EMPTY, distinct, escape, shorten, visible

BLANKS = re.compile(r"\s{2,}|^\s|\s$|[^\S ]")  # blanks that a page shows as one blank, or hides
MINUS = "\N{MINUS SIGN}"  # unlike a hyphen, it never ends a line


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---:") -> str:
    """Return a GitHub table; the first column is left-aligned, the others by ``align``."""
    head = list(head)
    rule = [":---", *[align] * (len(head) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, f"| {' | '.join(rule)} |", *others])


def facts(head: str, pairs: Mapping[str, object], values: str = "") -> str:
    """Return a table of labels and values."""
    return table((head, values), [(label, str(value)) for label, value in pairs.items()], align=":---")


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def link(text: str, path: Path, folder: Path) -> str:
    """Return a link to a file, for a page in ``folder``."""
    return f"[{text}]({quote(Path(os.path.relpath(path, folder)).as_posix())})"


def image(text: str, path: Path, folder: Path) -> str:
    return f"!{link(text, path, folder)}"


def signed(value: float, spec: str = ".4f") -> str:
    """Return ``+0.0120`` or ``−0.0120``; a value that rounds to zero has no sign."""
    text = f"{value:+z{spec}}"
    return (text if float(text) else text[1:]).replace("-", MINUS)


def plain(value: float, spec: str) -> str:
    """Return ``0.0120`` or ``−0.0120``; a value that rounds to zero has no sign."""
    return f"{value:z{spec}}".replace("-", MINUS)


def interval(low: float, high: float, spec: str = ".4f") -> str:
    """Return ``[−0.0140, −0.0090]``."""
    return f"[{signed(low, spec)}, {signed(high, spec)}]"


def decimals(*values: float, least: int) -> str:
    """Return the format for a group of numbers: two digits of the largest, and at least ``least`` decimals."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return f".{max(least, 1 - math.floor(math.log10(largest)) if largest else 0)}f"


def code(text: str, max_length: int | None = 100) -> str:
    """Return text as a code span in one line, cut at ``max_length``, so that it is never read as markup."""
    line = visible(text) if max_length is None else shorten(text, max_length)
    if not line:
        return EMPTY
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def codes(texts: Sequence[str], max_length: int = 100) -> list[str]:
    """Return code spans of a group of texts; different texts look different, even if only blanks differ."""
    if len({visible(text) for text in texts}) < len({*texts}):
        texts = [BLANKS.sub(lambda found: "".join(f" {escape(c)} " for c in found[0]), text) for text in texts]
    return distinct(texts, lambda text: code(text, max_length), str)


def numbered(texts: Iterable[str]) -> str:
    """Return a numbered list of whole texts, with the numbers of a sheet's rows."""
    return "\n".join(f"{number}. {code(text, None)}" for number, text in enumerate(texts, 1))
