"""Captions and prompts that a text encoder reads the beginning of: named once, in place of the libraries' own lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_dag.core.console import log, plural
from lora_dag.core.labels import distinct, shorten, warning_of_invisible

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

MAX_LISTED, MAX_LENGTH = 3, 80  # texts, characters


def warn_of_long_prompts(prompts: Sequence[str], family: Family, model: ModelParams) -> None:
    """Also of invisible characters in them."""
    texts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    for text in warning_of_invisible("prompt", texts):
        log.warning("warning: %s", text)
    warn_of_long("prompt", texts, family.count_tokens(model, texts), family.max_tokens(model))


def warn_of_long(noun: str, texts: Sequence[str], counts: Sequence[int], limit: int, by: str = "") -> int:
    """How many texts have more tokens than are read; the longest are named.

    Args:
        counts: tokens of each, without truncation.
    """
    long = sorted(((count, text) for count, text in zip(counts, texts, strict=True) if count > limit), reverse=True)
    if long:
        have = plural(len(long), f"{noun} has", f"{noun}s have")
        log.warning("warning: %s more than %d tokens; the rest is not read%s:", have, limit, by)
        shown = distinct([text for _, text in long[:MAX_LISTED]], lambda text: shorten(text, MAX_LENGTH), str)
        for (count, _), text in zip(long, shown, strict=False):
            log.warning("  %d tokens: %s", count, text)
    return len(long)
