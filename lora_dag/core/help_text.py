"""Help of the commands and stages: the docstring of a module as paragraphs that fit the terminal."""

from __future__ import annotations

import argparse
import re
import textwrap

ITEM = re.compile(r"(?P<hang>  \S+ +|[A-Z][a-z]*: +)|[a-z ]+:$|\s")
"""Start of a line that is an item of its own: a row of a list, ``In: ...``, the head of a group."""


class HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter, which wraps each paragraph and item of a description by itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(wrap(item, width, indent) for item in split_items(text))


def split_items(text: str) -> list[str]:
    """Return the paragraphs and items of a text, each as one line; an empty line between two paragraphs stays."""
    items: list[str] = []
    for line in text.splitlines():
        if line and items and items[-1] and not ITEM.match(line):
            items[-1] += f" {line}"
        else:
            items.append(line)
    return items


def wrap(item: str, width: int, indent: str) -> str:
    """Return an item in lines of ``width`` columns; later lines begin under its text, behind ``In: `` or a name."""
    head = ITEM.match(item)
    hang = " " * len(head["hang"] or "") if head else ""
    return textwrap.fill(
        item,
        width,
        initial_indent=indent,
        subsequent_indent=indent + hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
