"""Choose the adapter's name, the pages' title and the example prompt if no setting gives them.

In all functions ``export`` is section export of params.yaml as a mapping, ``source`` is dataset.source, and
``caption`` is a caption of the dataset.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from lora_dag.core.console import Problem

FEW_LETTERS = 3
"""Shorter words, such as "a" and "of", are ignored when prompts and captions are compared."""
FIRST_IDEOGRAPH = "\u3040"
"""Scripts from here on write words without blanks, so each character counts as a word."""


def adapter_name(export: Mapping[str, Any], source: str, caption: str) -> str:
    """Return export.name, else the name in export.datasets, else the folder's name in ASCII."""
    plain = unicodedata.normalize("NFKD", folder_name(source)).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:100]
    return str(export["name"] or dataset_entry(export, source, caption).get("name") or slug or "adapter")


def page_title(title: str | None, export: Mapping[str, Any], source: str, caption: str) -> str:
    """Return report.title, else the title in export.datasets, else the folder's name: Foxes for data/foxes."""
    own = re.sub(r"[\s_-]+", " ", folder_name(source)).strip()
    return str(title or dataset_entry(export, source, caption).get("title") or own[:1].upper() + own[1:] or "Adapter")


def example_prompt(export: Mapping[str, Any], source: str, caption: str) -> str:
    """Return export.prompt, else the prompt in export.datasets, else the caption."""
    return str(export["prompt"] or dataset_entry(export, source, caption).get("prompt") or caption)


def dataset_entry(export: Mapping[str, Any], source: str, caption: str) -> Mapping[str, Any]:
    """Return the dataset's entry of export.datasets.

    The result is empty if its prompt shares no word with the caption: the path has other images now.
    """
    entry = (export["datasets"] or {}).get(source) or {}
    return {} if unrelated_prompts([entry.get("prompt") or ""], [caption]) else entry


def folder_name(source: str) -> str:
    """Return ``foxes`` for ``data/foxes``."""
    return PurePosixPath(source).name


def unrelated_prompts(prompts: Iterable[str], captions: Iterable[str]) -> Problem | None:
    """Return the problem of prompts that share no word with any caption, without the place of the setting."""
    captions, prompts = list(captions), list(prompts)
    known = {word for caption in captions for word in distinct_words(caption)}
    used = {word for prompt in prompts for word in distinct_words(prompt)}
    if not known or not used or known & used:
        return None
    example = f"such as '{prompts[0]}' and '{captions[0]}'"
    text = f"no prompt shares a word with a caption ({example}). Describe your images."
    return Problem("prompts-unrelated", text)


def distinct_words(text: str) -> set[str]:
    whole = re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())
    single = {character for word in whole for character in word if character >= FIRST_IDEOGRAPH}
    return single | {word for word in whole if len(word) >= FEW_LETTERS}
