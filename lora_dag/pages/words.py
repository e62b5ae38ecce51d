"""The words of a card where no setting gives them: of the dataset, never those of another one.

``export`` is section export of params.yaml as a mapping, ``source`` is dataset.source, ``caption`` one of its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

FEW_LETTERS = 3
"""Shorter words, such as "a" and "of", tie no prompt to a caption."""
FIRST_IDEOGRAPH = "\u3040"
"""From here on, scripts write words without blanks: a character counts as a word."""


def name_of(export: Mapping[str, Any], source: str, caption: str) -> str:
    """export.name, else that of the dataset in export.datasets, else its folder's name, in ASCII."""
    plain = unicodedata.normalize("NFKD", folder(source)).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:100]
    return str(export["name"] or of_dataset(export, source, caption).get("name") or slug or "adapter")


def title_of(title: str | None, export: Mapping[str, Any], source: str, caption: str) -> str:
    """report.title, else that of the dataset in export.datasets, else its folder's name: Foxes for data/foxes."""
    own = re.sub(r"[\s_-]+", " ", folder(source)).strip()
    return str(title or of_dataset(export, source, caption).get("title") or own[:1].upper() + own[1:] or "Adapter")


def prompt_of(export: Mapping[str, Any], source: str, caption: str) -> str:
    """export.prompt, else that of the dataset in export.datasets, else the caption."""
    return str(export["prompt"] or of_dataset(export, source, caption).get("prompt") or caption)


def of_dataset(export: Mapping[str, Any], source: str, caption: str) -> Mapping[str, Any]:
    """Its entry; nothing where other pictures lie at the same path now, whose captions have no word of the prompt."""
    found = (export["datasets"] or {}).get(source) or {}
    return {} if strangers([found.get("prompt") or ""], [caption]) else found


def folder(source: str) -> str:
    """Of data/foxes: foxes."""
    return PurePosixPath(source).name


def strangers(prompts: Iterable[str], captions: Iterable[str]) -> str:
    """What to say where no prompt has a word of any caption; empty where one has, or there are no words."""
    captions, prompts = list(captions), list(prompts)
    known = {word for caption in captions for word in words(caption)}
    asked = {word for prompt in prompts for word in words(prompt)}
    if not known or not asked or known & asked:
        return ""
    example = f"'{prompts[0]}' and '{captions[0]}' for example"
    return f"params.yaml validate.prompts: no prompt has a word of any caption ({example}); describe your own pictures"


def words(text: str) -> set[str]:
    found = re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())
    single = {character for word in found for character in word if character >= FIRST_IDEOGRAPH}
    return single | {word for word in found if len(word) >= FEW_LETTERS}
