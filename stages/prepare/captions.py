"""Captions as sources write them: a string, a list of strings (training draws one per step), or the lines of a .txt."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from stages.core.console import UserError

MAX_TEXT_BYTES = 2**20
"""Of a .txt or .json file beside a picture."""


def from_value(values: dict[str, Any], column: str) -> tuple[str, ...]:
    """The captions in a row's column.

    Raises:
        UserError: there are none, or something else than text.
    """
    if column not in values:
        raise UserError(f"no '{column}' column; write the caption, or \"\" for none")
    value = values[column]
    captions = value if isinstance(value, list) and value else [value]
    if not all(isinstance(caption, str) for caption in captions):
        got = json.dumps(value, default=str, ensure_ascii=False)[:80]
        raise UserError(f'{column}: got {got}; expected a string or a list of strings, "" for no caption')
    for caption in captions:
        refuse_half_characters(caption, column)
    return tuple(captions)


def refuse_half_characters(caption: str, column: str) -> None:
    if caption.isprintable() or not any(unicodedata.category(character) == "Cs" for character in caption):
        return
    raise UserError(f"{column}: {json.dumps(caption)[:80]} holds half a character (a lone surrogate); write it again")


def from_text(blob: bytes, shown: str) -> tuple[str, ...]:
    """The captions in a .txt file: each line that is not blank is one; a blank file says that there is no caption.

    Raises:
        UserError: it is no text.
    """
    try:
        text = blob.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"'{shown}' is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"'{shown}' holds a NUL character; write the caption as plain text")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return tuple(line.strip() for line in lines if line.strip()) or ("",)
