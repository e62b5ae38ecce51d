"""Find special syntax of other programs in captions, such as weights and wildcards; here it is plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable

SYNTAX = {
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
"""Example -> pattern. Sources: the syntax of kohya's trainers, ai-toolkit, WebUI and ComfyUI."""


def count_captions(captions: Iterable[str]) -> dict[str, int]:
    """Return example -> number of captions with this syntax, for syntax that occurs."""
    captions = list(captions)
    counts = {name: sum(bool(pattern.search(caption)) for caption in captions) for name, pattern in SYNTAX.items()}
    return {name: number for name, number in counts.items() if number}


def contains_any(caption: str) -> bool:
    return any(pattern.search(caption) for pattern in SYNTAX.values())
