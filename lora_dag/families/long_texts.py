"""Warns once of captions and prompts that the text encoder truncates, instead of the libraries' own warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_dag.core.console import log, plural, warn
from lora_dag.core.labels import distinct, invisible_character_warnings, shorten

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

MAX_LISTED, MAX_LENGTH = 3, 80  # texts, characters


def warn_of_long_prompts(prompts: Sequence[str], family: Family, model: ModelParams) -> None:
    """Warn of prompts with too many tokens or with invisible characters."""
    texts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    for text in invisible_character_warnings("prompt", texts):
        warn("invisible-characters", text)
    warn_of_long("prompt", texts, family.count_tokens(model, texts), family.max_tokens(model))


def warn_of_long(noun: str, texts: Sequence[str], counts: Sequence[int], limit: int, by: str = "") -> int:
    """Warn of texts with more tokens than ``limit``, list the longest, and return their number.

    Args:
        counts: tokens of each text, without truncation.
        by: addition to the message, such as the reader of the texts.
    """
    long = sorted(((count, text) for count, text in zip(counts, texts, strict=True) if count > limit), reverse=True)
    if long:
        have = plural(len(long), f"{noun} has", f"{noun}s have")
        warn("text-too-long", f"{have} more than {limit} tokens. The rest is not used{by}:")
        excerpts = distinct([text for _, text in long[:MAX_LISTED]], lambda text: shorten(text, MAX_LENGTH), str)
        for (count, _), text in zip(long, excerpts, strict=False):
            log.warning("  %d tokens: %s", count, text)
    return len(long)
