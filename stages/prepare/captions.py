"""Captions as sources write them: a string, a list of strings (training draws one per step), or the lines of a file."""

from __future__ import annotations

import codecs
import json
import unicodedata
from typing import Any

from lora_dag.core.console import UserError

MAX_TEXT_BYTES = 2**20
"""Of a caption file or .json file beside a picture."""
QUOTES = ('""', "''", "“”", "‘’", "„“", "«»", "「」", "``")
"""Pairs of marks around a quotation."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def from_value(values: dict[str, Any], column: str) -> tuple[str, ...]:
    """The captions in a row's column.

    Raises:
        UserError: there are none, something else than text, or text with control characters.
    """
    if column not in values:
        raise UserError(f"no '{column}' column; write the caption, or \"\" for none")
    value = values[column]
    captions = value if isinstance(value, list) and value else [value]
    if not all(isinstance(caption, str) for caption in captions):
        got = json.dumps(value, default=str, ensure_ascii=False)[:80]
        raise UserError(f'{column}: got {got}; expected a string or a list of strings, "" for no caption')
    for caption in captions:
        odd = odd_characters(caption)
        if odd:
            raise UserError(f"{column}: {json.dumps(caption)[:80]} {odd}")
    return tuple(captions)


def odd_characters(caption: str) -> str | None:
    """A predicate of text that no tokenizer was made for, and no table can show; None for other text."""
    if caption.isprintable():
        return None
    kinds = {unicodedata.category(character) for character in caption if character not in "\n\r\t\x85"}
    if "Cs" in kinds:
        return "holds half a character (a lone surrogate); write it again"
    return "holds a control character; write the caption as plain text" if "Cc" in kinds else None


def is_quoted(caption: str) -> bool:
    """All of it stands between one pair of quote marks."""
    text = caption.strip()
    return len(text) > 2 and any(
        text[0] == pair[0] and text[-1] == pair[1] and not set(pair) & set(text[1:-1]) for pair in QUOTES
    )


def decoded(blob: bytes) -> str:
    """Text in UTF-8, or in UTF-16 that says so by its byte order mark, as some of Windows' programs write it.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    return blob.decode("utf-16" if blob.startswith(UTF16) else "utf-8-sig")


def from_text(blob: bytes, shown: str) -> tuple[str, ...]:
    """The captions in a .txt file: each line that is not blank is one; a blank file says that there is no caption.

    Raises:
        UserError: it is no text, or has control characters.
    """
    try:
        text = decoded(blob)
    except UnicodeDecodeError:
        raise UserError(f"'{shown}' is not UTF-8 text; save it as UTF-8") from None
    if 3 * blob.count(0) > len(blob):
        raise UserError(f"'{shown}' seems to be UTF-16 text without its mark; save it as UTF-8")
    odd = odd_characters(text)
    if odd:
        raise UserError(f"'{shown}' {odd}")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return tuple(line.strip() for line in lines if line.strip()) or ("",)
