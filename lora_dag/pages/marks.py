"""Marks in captions that other trainers and interfaces act on, such as weights and wildcards; here they are words."""

from __future__ import annotations

import re
from collections.abc import Iterable

MARKS = {
    "{a|b}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "|||": re.compile(r"\|\|\|"),
    "<lora:...>": re.compile(r"<(?:lora|lyco|hypernet|lora_?block)\w*:[^<>]*>", re.IGNORECASE),
    "(word:1.2)": re.compile(r"\([^()]*[^\W\d]\s*:\s*-?(?:\d?\.\d+|\d)\s*\)"),
    "[a:b:0.5]": re.compile(r"\[[^\[\]]*:[^\[\]]*:?\s*[0-9.]+\s*\]"),
    "((word))": re.compile(r"\({2,}[^()]+\){2,}"),
    "[[word]]": re.compile(r"\[{2,}[^\[\]]+\]{2,}"),
    "[trigger]": re.compile(r"\[(?:trigger|name|filewords)\]", re.IGNORECASE),
    "__wildcard__": re.compile(r"(?<!\w)__[\w/-]+__(?!\w)"),
    "BREAK": re.compile(r"(?<!\w)BREAK(?!\w)"),
    "embedding:name": re.compile(r"(?<!\w)embedding:\S+"),
    "--n": re.compile(r"(?:^|\s)--[a-z]{1,2}\s"),
    "\\(": re.compile(r"\\[()]"),
}
"""How each is written -> what finds it. Sources: the syntax of kohya's trainers, ai-toolkit, WebUI and ComfyUI."""


def count(captions: Iterable[str]) -> dict[str, int]:
    """Captions that hold each mark, for those that any does."""
    captions = list(captions)
    counts = {name: sum(bool(mark.search(caption)) for caption in captions) for name, mark in MARKS.items()}
    return {name: number for name, number in counts.items() if number}


def has_any(caption: str) -> bool:
    return any(mark.search(caption) for mark in MARKS.values())
