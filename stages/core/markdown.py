"""Tables and signed numbers for the pages that people read."""

from __future__ import annotations

from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"  # unlike a hyphen, it never ends a line


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---:") -> str:
    """A GitHub table; the first column to the left, the others by ``align``."""
    head = list(head)
    rule = [":---", *[align] * (len(head) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, f"| {' | '.join(rule)} |", *others])


def signed(value: float, spec: str = ".4f") -> str:
    """``+0.0120`` or ``−0.0120``."""
    return f"{value:+{spec}}".replace("-", MINUS)


def interval(low: float, high: float) -> str:
    """``[−0.0140, −0.0090]``"""
    return f"[{signed(low)}, {signed(high)}]"
