"""Text of users in limited space: no hidden characters, and different texts never look alike."""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from lora_dag.core.console import plural

T = TypeVar("T")

ELLIPSIS = "…"
EMPTY = "(empty)"
JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Indic scripts and emoji need."""
TAGS = "\U000e0000"
"""First of the invisible characters that spell flags."""
HIDDEN = ("Cc", "Cf", "Co", "Cs")
"""Unicode categories of control, format, private and surrogate characters."""
LONG_WORD = 12  # characters; a longer word is shown from CONTEXT characters before the first difference
CONTEXT = 4


def visible(text: str) -> str:
    """Return the text in one line with single blanks; invisible and direction characters become ``U+202E``."""
    line = " ".join(text.split())
    return "".join(escape(c) if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in line)


def invisible(text: str) -> set[str]:
    """Return the invisible characters, such as zero-width blanks, except those that words and emoji need."""
    if text.isprintable():
        return set()
    return {each for each in text if unicodedata.category(each) == "Cf" and each not in JOINERS and each < TAGS}


def invisible_character_warnings(noun: str, texts: Iterable[str]) -> list[str]:
    """Return one line about texts with invisible characters; no line without such texts."""
    sets = [characters for text in texts if (characters := invisible(text))]
    if not sets:
        return []
    have = plural(len(sets), f"{noun} has", f"{noun}s have")
    names = ", ".join(map(escape, sorted(set.union(*sets))[:5]))
    return [f"{have} invisible characters ({names}), which the text encoder reads. Remove them."]


def escape(character: str) -> str:
    return f"U+{ord(character):04X}"


def is_attached(character: str) -> bool:
    """Return whether the character modifies the one before it: accents, variation selectors, joiners."""
    return unicodedata.category(character)[0] == "M" or character in JOINERS


def numbered_heads(count: int) -> list[str]:
    """Return ``1. ``, ``2. ``: heads of rows whose whole text is elsewhere on the page."""
    return [f"{number}. " for number in range(1, count + 1)]


def exact_number(number: float) -> str:
    """Return the shortest text of exactly this number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def as_yaml(value: object) -> str:
    """Return a value as a person writes it in YAML, such as null, true, 2026-12-01, 'text' and {"lora.rank": 8}."""
    if isinstance(value, str | float):
        return repr(value)
    with contextlib.suppress(TypeError):  # YAML has dates, and keys that are lists
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def type_name(value: object) -> str:
    """Return the name of a value's type, such as ``list``; ``null`` for None."""
    return "null" if value is None else type(value).__name__


def shorten(text: str, max_length: int) -> str:
    line = visible(text)
    return line if len(line) <= max_length else line[: max_length - 1] + ELLIPSIS


def distinct(
    texts: Sequence[str],
    show: Callable[[str], T],
    seen: Callable[[T], Hashable],
    heads: Sequence[str] | None = None,
) -> list[T]:
    """Return each text as shown; the common beginning of texts that would look alike is omitted.

    If they still look alike (they differ in invisible characters), all are numbered.

    Args:
        show: shortens a text to the available space.
        seen: returns a key that is equal for shown texts that look alike.
        heads: put before each text, such as numbered_heads, and never omitted.
    """
    starts = dict.fromkeys(texts, 0)
    room = max(heads or [""], key=len)
    while alike := groups({text: seen(show(room + from_start(text, start))) for text, start in starts.items()}):
        begins = {text: max(starts[text], differs_at(group)) for group in alike for text in group}
        if starts | begins == starts:
            break
        starts |= begins
    starts |= {text: 0 for group in alike for text in group}
    if alike and heads is None:
        order = {text: number for number, text in enumerate(starts, 1)}
        heads = [f"{order[text]}. " for text in texts]
    shown = [from_start(text, starts[text]) for text in texts]
    return [show(head + text) for head, text in zip(heads or [""] * len(texts), shown, strict=True)]


def groups(seen: Mapping[str, Hashable]) -> list[list[str]]:
    """Return the groups of two or more texts that look alike."""
    by_look = defaultdict(list)
    for text, value in seen.items():
        by_look[value].append(text)
    return [group for group in by_look.values() if len(group) > 1]


def differs_at(texts: Sequence[str]) -> int:
    """Return the index where the first word begins that differs."""
    common = len(os.path.commonprefix(list(texts)))
    text = min(texts, key=len)
    word = text.rfind(" ", 0, common) + 1
    if common - word > LONG_WORD:
        word = common - CONTEXT
        while word and is_attached(text[word]):
            word -= 1
    return word


def from_start(text: str, start: int) -> str:
    return f"{ELLIPSIS} {text[start:]}" if start else text
