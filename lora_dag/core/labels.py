"""Text that people wrote, shown in little room: nothing in it hides, and two that differ never look alike."""

from __future__ import annotations

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
"""Invisible, and part of how Persian, Indic scripts and emoji are spelled."""
TAGS = "\U000e0000"
"""From here on, invisible characters spell flags."""
HIDDEN = ("Cc", "Cf", "Co", "Cs")
"""Categories of control and format characters, and of those without a meaning of their own."""
LONG_WORD = 12  # characters; a longer one is shown from a few before the first that differs
CONTEXT = 4


def visible(text: str) -> str:
    """On one line, with single blanks; characters that hide, or turn others round, as ``U+202E``."""
    line = " ".join(text.split())
    return "".join(escape(c) if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in line)


def invisible(text: str) -> set[str]:
    """Characters that nobody sees, such as zero-width blanks; without those that spell words and emoji."""
    if text.isprintable():
        return set()
    return {each for each in text if unicodedata.category(each) == "Cf" and each not in JOINERS and each < TAGS}


def warning_of_invisible(noun: str, texts: Iterable[str]) -> list[str]:
    """One line on the texts that hold such characters, if any does."""
    found = [characters for text in texts if (characters := invisible(text))]
    if not found:
        return []
    hold = plural(len(found), f"{noun} holds", f"{noun}s hold")
    names = ", ".join(map(escape, sorted(set.union(*found))[:5]))
    return [f"{hold} invisible characters ({names}), which the text encoder reads; remove them"]


def escape(character: str) -> str:
    return f"U+{ord(character):04X}"


def attached(character: str) -> bool:
    """Whether it is a part of the character before it: accents, variation selectors, joiners."""
    return unicodedata.category(character)[0] == "M" or character in JOINERS


def numbers(count: int) -> list[str]:
    """``1. ``, ``2. ``: heads of rows whose whole text is listed on a page."""
    return [f"{number}. " for number in range(1, count + 1)]


def exact(number: float) -> str:
    """As short as it can be without being another number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def shorten(text: str, max_length: int) -> str:
    line = visible(text)
    return line if len(line) <= max_length else line[: max_length - 1] + ELLIPSIS


def distinct(
    texts: Sequence[str],
    show: Callable[[str], T],
    seen: Callable[[T], Hashable],
    heads: Sequence[str] | None = None,
) -> list[T]:
    """What is shown of each text; of those that would look alike, the common beginning is left out.

    Where that does not tell them apart (they differ in what nobody sees), all are numbered.

    Args:
        show: a text as it is cut to its room.
        seen: what two that look alike have in common.
        heads: put before each text, such as numbers, and never left out; only the texts are made distinct.
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
    """Texts of which two or more are seen as one."""
    found = defaultdict(list)
    for text, value in seen.items():
        found[value].append(text)
    return [group for group in found.values() if len(group) > 1]


def differs_at(texts: Sequence[str]) -> int:
    """Where the word begins that tells them apart."""
    common = len(os.path.commonprefix(list(texts)))
    text = min(texts, key=len)
    word = text.rfind(" ", 0, common) + 1
    if common - word > LONG_WORD:
        word = common - CONTEXT
        while word and attached(text[word]):
            word -= 1
    return word


def from_start(text: str, start: int) -> str:
    return f"{ELLIPSIS} {text[start:]}" if start else text
