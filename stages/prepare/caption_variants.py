"""Caption variants: shuffled and dropped tags. Seeded by the caption, so that each variant is encoded once."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_dag.core import seeding
from lora_dag.core.console import Problem, plural
from lora_dag.core.labels import invisible_character_warnings
from lora_dag.pages import caption_syntax
from stages.prepare.captions import is_quoted

if TYPE_CHECKING:
    from stages.prepare.listing import Entry
    from stages.prepare.params import DatasetParams

SEPARATORS = ",;|/，、；"
"""Common separators of tags. A blank is not among them, since every sentence has blanks."""
CLOSING = ",.;:!?"
"""Marks at the end of a prefix, such as "sks,", that a blank follows."""


def with_prefix(prefix: str, caption: str) -> str:
    """Return the prefix and the caption, with a blank between two words, as kohya's trainers join them.

    A blank is added if the prefix ends with a letter, digit or mark and the caption begins with a letter or digit,
    unless one of these belongs to a script without blanks between words.
    """
    if not prefix or not caption or not caption[0].isalnum() or not (prefix[-1].isalnum() or prefix[-1] in CLOSING):
        return prefix + caption
    is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in (prefix[-1], caption[0]))
    return prefix + caption if is_wide else f"{prefix} {caption}"


def captions_of(captions: tuple[str, ...], prefix: str, dataset: DatasetParams) -> tuple[str, tuple[str, ...]]:
    """Return the caption for the evaluation, and the captions that training draws from with equal weight.

    The evaluation uses the first caption as written. Training uses variant 0 of each caption, then variant 1 of each,
    and so on, so that a larger ``num_caption_variants`` only adds variants. Equal variants all stay: each is one draw
    of the augmentation, and the cache encodes equal captions once.

    Args:
        prefix: text before each caption, never moved or dropped.
    """
    canonical = with_prefix(prefix, captions[0])
    if not is_varied(dataset):
        return canonical, tuple(with_prefix(prefix, caption) for caption in captions)
    indices = range(dataset.num_caption_variants)
    varied = (variant(caption, index, dataset) for index in indices for caption in captions)
    return canonical, tuple(with_prefix(prefix, caption) for caption in varied)


def is_varied(dataset: DatasetParams) -> bool:
    return dataset.shuffle_tags or dataset.tag_dropout > 0


def tags_of(caption: str, separator: str) -> list[str]:
    return [tag.strip() for tag in caption.split(separator.strip() or None) if tag.strip()]


def as_caption(tags: list[str], separator: str) -> str:
    """Return the tags joined by the separator, with a blank after "," but not after "，"."""
    mark = separator.strip()
    return (f"{mark} " if mark.isascii() else mark).join(tags) if mark else " ".join(tags)


def variant(caption: str, index: int, dataset: DatasetParams) -> str:
    """Return variant ``index`` of a caption, a function of caption, index and ``dataset.seed``, not of the image.

    Each tag after the leading ``keep_tags`` is dropped and moved independently. All of them may be dropped.
    """
    tags = tags_of(caption, dataset.tag_separator)
    leading, others = tags[: dataset.keep_tags], tags[dataset.keep_tags :]
    digest = hashlib.sha256(caption.encode()).hexdigest()

    def draws(purpose: str) -> list[float]:
        """Return a number in [0, 1) per tag. Python guarantees ``Random(int).random()`` across versions."""
        stream = random.Random(seeding.key(dataset.seed, "tags", digest, index, purpose))
        return [stream.random() for _ in others]

    indices = [i for i, draw in enumerate(draws("drop")) if draw >= dataset.tag_dropout]
    if dataset.shuffle_tags:
        order = draws("order")
        indices.sort(key=lambda i: order[i])
    return as_caption([*leading, *(others[i] for i in indices)], dataset.tag_separator)


def caption_warnings(entries: Iterable[Entry], dataset: DatasetParams) -> list[Problem]:
    """Return warnings about captions that are allowed but rarely intended."""
    subsets = dataset.as_subsets()
    entries = list(entries)
    written = [(caption, subsets[entry.subset].caption_prefix or "") for entry in entries for caption in entry.captions]
    texts = [caption for caption, _ in written if caption.strip()]
    full_captions = [with_prefix(prefix, caption) for caption, prefix in written]
    problems = mark_warnings(full_captions) + invisible_warnings(full_captions) + quote_warnings(texts)
    num_tags = [len(tags_of(text, dataset.tag_separator)) for text in texts]
    if num_blank := num_tags.count(0):
        hold = plural(num_blank, "caption holds", "captions hold")
        problems.append(Problem("caption-without-tags", f"{hold} no tag but '{dataset.tag_separator}'."))
    if not is_varied(dataset) and dataset.tag_separator != ",":
        problems.append(
            Problem(
                "setting-ignored",
                f"{dataset.setting('tag_separator')}: '{dataset.tag_separator}' has no effect without"
                " dataset.shuffle_tags or dataset.tag_dropout.",
            )
        )
    if not is_varied(dataset) or not texts:
        return problems
    problems += ineffective_tag_settings(texts, num_tags, dataset)
    blank = [
        sum(not variant(caption, index, dataset) for index in range(dataset.num_caption_variants))
        for caption, prefix in dict.fromkeys(written)
        if tags_of(caption, dataset.tag_separator) and not prefix.strip()
    ]
    if any(blank):
        have = plural(sum(blank), "caption variant has", "caption variants have")
        train = "trains" if sum(blank) == 1 else "train"
        problems.append(
            Problem(
                "caption-variant-empty",
                f"{have} no tag left, for {plural(sum(map(bool, blank)), 'caption')}, and {train} without a prompt."
                f" Lower dataset.tag_dropout {dataset.tag_dropout}, or raise dataset.keep_tags {dataset.keep_tags}.",
            )
        )
    return problems


def invisible_warnings(captions: list[str]) -> list[Problem]:
    return [Problem("invisible-characters", text) for text in invisible_character_warnings("caption", captions)]


def quote_warnings(captions: list[str]) -> list[Problem]:
    num_quoted = sum(map(is_quoted, captions))
    if not num_quoted:
        return []
    are = plural(num_quoted, "caption is", "captions are")
    return [Problem("caption-quoted", f"{are} enclosed in quote marks, which are learned as words. Remove them.")]


def ineffective_tag_settings(texts: list[str], num_tags: list[int], dataset: DatasetParams) -> list[Problem]:
    """Return a warning about the first tag setting that leaves most captions unchanged."""
    for name, is_on, least in (("shuffle_tags", dataset.shuffle_tags, 2), ("tag_dropout", dataset.tag_dropout > 0, 1)):
        least = max(dataset.keep_tags + least, 2)  # dropping the only tag of a caption is hardly intended
        num_without = sum(count < least for count in num_tags)
        if is_on and 2 * num_without > len(texts):
            keep_tags = f" (dataset.keep_tags is {dataset.keep_tags})" if dataset.keep_tags else ""
            return [
                Problem(
                    "setting-ignored",
                    f"{dataset.setting(name)}: has no effect on {num_without} of {plural(len(texts), 'caption')},"
                    f" which have fewer than {least} tags{keep_tags} by the separator '{dataset.tag_separator}'."
                    f"{other_separator(texts, dataset)}",
                )
            ]
    return []


def other_separator(texts: list[str], dataset: DatasetParams) -> str:
    """Return a sentence that suggests the separator that most captions hold, or "" for none."""
    counts = {mark: sum(mark in text for text in texts) for mark in SEPARATORS if mark != dataset.tag_separator}
    if not any(counts.values()) and not any(dataset.tag_separator in text for text in texts):  # long_hair smile
        counts[" "] = sum(len(text.split()) > 1 for text in texts)
    mark, count = max(counts.items(), key=lambda pair: pair[1])
    if 2 * count <= len(texts):
        return ""
    return f" If '{mark}', which {count} captions hold, separates their tags, set dataset.tag_separator to '{mark}'."


def mark_warnings(captions: list[str]) -> list[Problem]:
    """Return a warning about syntax of other trainers and interfaces, which the text encoder reads as words."""
    counts = caption_syntax.count_captions(captions)
    if not counts:
        return []
    kinds = ", ".join(f"{name} in {count}" for name, count in counts.items())
    hold = plural(sum(map(caption_syntax.contains_any, captions)), "caption holds", "captions hold")
    text = f"{hold} syntax of other programs, which is learned as words here: {kinds}. Remove it."
    return [Problem("caption-syntax", text)]
