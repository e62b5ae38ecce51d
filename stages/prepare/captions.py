"""Captions in a source: a string, a list of strings (training draws one per step), or the lines of a text file."""

from __future__ import annotations

import codecs
import json
import unicodedata
from typing import Any

from lora_dag.core.console import Problem, UserError

MAX_TEXT_BYTES = 2**20
"""Largest caption file or .json file beside an image."""
QUOTES = ('""', "''", "“”", "‘’", "„“", "«»", "「」", "``")
"""Pairs of marks around a quotation."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def from_value(values: dict[str, Any], column: str) -> tuple[str, ...]:
    """Return the captions in a column of a row.

    Raises:
        UserError: the column is missing, holds no text, or text with control characters.
    """
    if column not in values:
        text = f"column '{column}' is missing. Add it with the caption, or with \"\" for no caption."
        raise UserError(Problem("caption-missing", text))
    value = values[column]
    captions = value if isinstance(value, list) and value else [value]
    if not all(isinstance(caption, str) for caption in captions):
        got = json.dumps(value, default=str, ensure_ascii=False)[:80]
        text = f'{column}: got {got}, but a string or a list of strings is expected. Write "" for no caption.'
        raise UserError(Problem("caption-not-text", text))
    for caption in captions:
        if problem := character_problem(caption):
            raise UserError(problem.about(f"{column}: {json.dumps(caption)[:80]}"))
    return tuple(clean_line_ends(caption) for caption in captions)


def clean_line_ends(text: str) -> str:
    r"""Return text with \n for each line end of Windows and of old Macs: an \r would be a token of its own."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def character_problem(caption: str) -> Problem | None:
    """Return the problem with control characters or lone surrogates in a text, as a predicate. None for other text."""
    if caption.isprintable():
        return None
    kinds = {unicodedata.category(character) for character in caption if character not in "\n\r\t\x85"}
    if "Cs" in kinds:
        return Problem("caption-characters", "holds half a character (a lone surrogate). Write the text again.")
    if "Cc" in kinds:
        return Problem("caption-characters", "holds a control character. Write it as plain text.")
    return None


def is_quoted(caption: str) -> bool:
    """Return whether one pair of quote marks encloses the whole caption."""
    text = caption.strip()
    return len(text) > 2 and any(
        text[0] == pair[0] and text[-1] == pair[1] and not set(pair) & set(text[1:-1]) for pair in QUOTES
    )


def decoded(blob: bytes) -> str:
    """Return text from UTF-8, or from UTF-16 with a byte order mark, as some programs on Windows write it.

    Raises:
        UnicodeDecodeError: the encoding is another one.
    """
    return blob.decode("utf-16" if blob.startswith(UTF16) else "utf-8-sig")


def from_text(blob: bytes, name: str) -> tuple[str, ...]:
    """Return the captions in a .txt file: each line that is not blank is one. A blank file means an empty caption.

    Args:
        name: the file's name in messages.

    Raises:
        UserError: the file is not text, or has control characters.
    """
    try:
        text = decoded(blob)
    except UnicodeDecodeError:
        raise UserError(Problem("not-utf8", f"'{name}' is not UTF-8 text. Save it as UTF-8.")) from None
    if 3 * blob.count(0) > len(blob):
        text = f"'{name}' seems to be UTF-16 text without a byte order mark. Save it as UTF-8."
        raise UserError(Problem("not-utf8", text))
    if problem := character_problem(text):
        raise UserError(problem.about(f"'{name}'"))
    lines = clean_line_ends(text).split("\n")
    return tuple(line.strip() for line in lines if line.strip()) or ("",)
