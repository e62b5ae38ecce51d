"""Lines for people: wrapped at words and colored on a terminal; one plain line per message in a pipe or a file.

Colors follow https://no-color.org: none where ``NO_COLOR`` is set, nor on a dumb terminal.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import unicodedata
from typing import TextIO

MIN_WIDTH = 40  # columns; a narrower terminal breaks lines itself
DEFAULT_WIDTH = 80  # columns of a terminal that does not know its size
LABEL = re.compile(r"(?:\S+ )*\S+ {2,}(?=\S)| +(?=\S)")
"""The first column of a log line, such as ``device      ``, or the blanks in its place."""
LABEL_WIDTH = 12  # columns
HEADS = re.compile(r"(error|warning|note|stopped by Ctrl-C): |\[\d/\d\] \w+|next {2,}")
WORD = re.compile(r"(?:[^\s`]|`[^`]*`)+")
"""Text without a blank; a command between backticks is one word, so that it can be copied."""
CODE = re.compile(r" \[[a-z0-9-]+\]$")
STYLES = {"error": "1;31", "warning": "1;33", "stopped by Ctrl-C": "1;33", "note": "36", "next": "1;32", "stage": "1"}
DIM = "2"


class Formatter(logging.Formatter):
    """The log record's text as the stream shows it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__("%(message)s")
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        return layout(super().format(record), self.stream)


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Print one message; on stderr, where no stream is given."""
    stream = stream or sys.stderr
    print(layout(text, stream), file=stream)


def layout(text: str, stream: TextIO) -> str:
    """Return the text as it is, or wrapped and colored where the stream is a terminal."""
    if not stream.isatty():
        return text
    columns = width(stream)
    lines = [text] if "\n" not in text else text.split("\n")
    is_page = len(lines) > 1
    wrapped = [line if is_page and is_verbatim(line) else wrap(line, columns) for line in lines]
    colored = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return "\n".join(paint(line) for line in wrapped) if colored else "\n".join(wrapped)


def width(stream: TextIO) -> int:
    """Columns of the terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    except (OSError, ValueError):
        return DEFAULT_WIDTH


def is_verbatim(line: str) -> bool:
    """Return whether a line of a Markdown page loses its shape when it is wrapped: a table row, or indented text."""
    return line.startswith(("|", "    ", "```"))


def wrap(line: str, columns: int) -> str:
    """Return the line with breaks between words, further lines indented under the text of the first.

    A word that is longer than a line stays whole, and so does the command of a ``next`` line: both can be copied.
    """
    head = HEADS.match(line)
    if columns < MIN_WIDTH or num_columns(line) <= columns or head and head[0].startswith("next"):
        return line
    label = LABEL.match(line)
    indent = len(head[0]) if head and head[1] else len(label[0]) if label else 2
    if indent > 2 * LABEL_WIDTH:
        indent = 2
    # The first words keep their own blanks, which align the label with the lines above.
    start = line[: label.end()] if label else ""
    rows, row, used = [], start, num_columns(start)
    for number, word in enumerate(WORD.findall(line[len(start) :])):
        size = num_columns(word)
        if number and used + 1 + size > columns:
            rows.append(row)
            row, used = " " * indent + word, indent + size
        else:
            row, used = (f"{row} {word}", used + 1 + size) if number else (row + word, used + size)
    return "\n".join([*rows, row])


def num_columns(text: str) -> int:
    """Return the columns that a terminal gives a text: two for wide characters, none for accents."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def paint(text: str) -> str:
    """Return the text with a colored head, such as ``error:``, and a dim code at its end."""
    head = HEADS.match(text)
    if not head:
        return text
    style = STYLES.get(head[1] or head[0].strip(), STYLES["stage"])
    end = CODE.search(text) if head[1] else None
    body, code = (text[: end.start()], text[end.start() :]) if end else (text, "")
    return f"{color(head[0].rstrip(), style)}{body[len(head[0].rstrip()) :]}{color(code, DIM) if code else ''}"


def color(text: str, style: str) -> str:
    return f"\033[{style}m{text}\033[0m"
