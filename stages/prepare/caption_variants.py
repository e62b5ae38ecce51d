"""Caption variants: tags in another order, tags left out. Seeded by the caption, so that each can be encoded once."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_dag.core import seeding
from lora_dag.core.console import plural
from lora_dag.core.labels import warning_of_invisible
from lora_dag.pages import marks
from stages.prepare.captions import is_quoted

if TYPE_CHECKING:
    from stages.prepare.listing import Entry
    from stages.prepare.params import DatasetParams

SEPARATORS = ",;|/，、；"
"""What people separate tags by; a blank is in every sentence."""
CLOSING = ",.;:!?"
""""sks," is a word with its mark: a blank follows it."""


def joined(prefix: str, caption: str) -> str:
    """A prefix before a caption, with a blank between two words, as kohya's trainers put it.

    A prefix keeps the blank that it ends with; one is added where a letter, digit or mark stands before a letter or
    digit, and neither is of a script without blanks between words.
    """
    if not prefix or not caption or not caption[0].isalnum() or not (prefix[-1].isalnum() or prefix[-1] in CLOSING):
        return prefix + caption
    is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in (prefix[-1], caption[0]))
    return prefix + caption if is_wide else f"{prefix} {caption}"


def captions_of(captions: tuple[str, ...], prefix: str, dataset: DatasetParams) -> tuple[str, tuple[str, ...]]:
    """The caption that evidence is measured with, and those that training draws from with equal weight.

    The first is the first caption as it was written. The others are variant 0 of each caption, then variant 1 of each,
    and so on, so that a larger ``num_caption_variants`` only adds to them. Variants that happen to be equal all stay:
    each is one draw of the augmentation, and the cache encodes equal captions once.

    Args:
        prefix: put before each of them, and never moved or dropped.
    """
    canonical = joined(prefix, captions[0])
    if not is_varied(dataset):
        return canonical, tuple(joined(prefix, caption) for caption in captions)
    indices = range(dataset.num_caption_variants)
    varied = (variant(caption, index, dataset) for index in indices for caption in captions)
    return canonical, tuple(joined(prefix, caption) for caption in varied)


def is_varied(dataset: DatasetParams) -> bool:
    return dataset.shuffle_tags or dataset.tag_dropout > 0


def tags_of(caption: str, separator: str) -> list[str]:
    return [tag.strip() for tag in caption.split(separator.strip() or None) if tag.strip()]


def as_caption(tags: list[str], separator: str) -> str:
    """Tags joined as people write them: a blank after "," but not after "，"."""
    mark = separator.strip()
    return (f"{mark} " if mark.isascii() else mark).join(tags) if mark else " ".join(tags)


def variant(caption: str, index: int, dataset: DatasetParams) -> str:
    """Variant ``index`` of a caption: a function of caption, index and ``dataset.seed``, whatever picture it is of.

    Every tag after the leading ``keep_tags`` draws its place and whether it stays by itself; all may go.
    """
    tags = tags_of(caption, dataset.tag_separator)
    leading, others = tags[: dataset.keep_tags], tags[dataset.keep_tags :]
    digest = hashlib.sha256(caption.encode()).hexdigest()

    def draws(purpose: str) -> list[float]:
        """A number in [0, 1) per tag; of ``random``, Python promises ``Random(int).random()`` for all versions."""
        stream = random.Random(seeding.key(dataset.seed, "tags", digest, index, purpose))
        return [stream.random() for _ in others]

    kept = [place for place, draw in enumerate(draws("drop")) if draw >= dataset.tag_dropout]
    if dataset.shuffle_tags:
        order = draws("order")
        kept.sort(key=lambda place: order[place])
    return as_caption([*leading, *(others[place] for place in kept)], dataset.tag_separator)


def warnings(entries: Iterable[Entry], dataset: DatasetParams) -> list[str]:
    """What of the captions is allowed but seldom meant."""
    subsets = dataset.as_subsets()
    entries = list(entries)
    written = [(caption, subsets[entry.subset].caption_prefix or "") for entry in entries for caption in entry.captions]
    texts = [caption for caption, _ in written if caption.strip()]
    found = mark_warnings([joined(prefix, caption) for caption, prefix in written])
    found += odd_texts([joined(prefix, caption) for caption, prefix in written], texts)
    num_tags = [len(tags_of(text, dataset.tag_separator)) for text in texts]
    if num_blank := num_tags.count(0):
        what = "commas" if dataset.tag_separator == "," else f"'{dataset.tag_separator}'"
        found.append(f"{plural(num_blank, 'caption holds', 'captions hold')} nothing but {what}")
    if not is_varied(dataset) and dataset.tag_separator != ",":
        found.append(
            f"dataset.tag_separator '{dataset.tag_separator}' changes nothing without dataset.shuffle_tags or"
            " dataset.tag_dropout"
        )
    if not is_varied(dataset) or not texts:
        return found
    found += without_effect(texts, num_tags, dataset)
    blank = [
        sum(not variant(caption, index, dataset) for index in range(dataset.num_caption_variants))
        for caption, prefix in dict.fromkeys(written)
        if tags_of(caption, dataset.tag_separator) and not prefix.strip()
    ]
    if any(blank):
        have = plural(sum(blank), "variant has", "variants have")
        found.append(
            f"{have} no tag left (of {plural(sum(map(bool, blank)), 'caption')}) and will be learned without a prompt;"
            f" lower dataset.tag_dropout {dataset.tag_dropout}, or raise dataset.keep_tags {dataset.keep_tags}"
        )
    return found


def odd_texts(captions: list[str], written: list[str]) -> list[str]:
    """Characters that are learned and that nobody means.

    Args:
        captions: with their prefixes.
        written: without, those that are not blank.
    """
    found = warning_of_invisible("caption", captions)
    if num_quoted := sum(map(is_quoted, written)):
        stand = plural(num_quoted, "caption stands", "captions stand")
        found.append(f"{stand} between quote marks, which are learned as words; remove them")
    return found


def without_effect(texts: list[str], num_tags: list[int], dataset: DatasetParams) -> list[str]:
    """A setting of tags that changes most captions not at all, and why; of two such settings the first."""
    for name, is_on, least, verb in (
        ("shuffle_tags", dataset.shuffle_tags, 2, "moves"),
        ("tag_dropout", dataset.tag_dropout > 0, 1, "drops"),
    ):
        least = max(dataset.keep_tags + least, 2)  # a caption of one tag can be dropped, which is hardly what is meant
        num_without = sum(count < least for count in num_tags)
        if is_on and 2 * num_without > len(texts):
            kept = f" (dataset.keep_tags keeps {dataset.keep_tags})" if dataset.keep_tags else ""
            return [
                f"dataset.{name} {verb} nothing in {num_without} of {plural(len(texts), 'caption')}, which have fewer"
                f" than {least} tags{kept}; tags are separated by '{dataset.tag_separator}'"
                f"{other_separator(texts, dataset)}"
            ]
    return []


def other_separator(texts: list[str], dataset: DatasetParams) -> str:
    """What most captions may be separated by instead, and the setting that says so."""
    counts = {mark: sum(mark in text for text in texts) for mark in SEPARATORS if mark != dataset.tag_separator}
    if not any(counts.values()) and not any(dataset.tag_separator in text for text in texts):  # long_hair smile
        counts[" "] = sum(len(text.split()) > 1 for text in texts)
    mark, count = max(counts.items(), key=lambda pair: pair[1])
    if 2 * count <= len(texts):
        return ""
    named = "blanks" if mark == " " else f"'{mark}'"
    return f", and {count} hold {named}: if these part the tags, set dataset.tag_separator to '{mark}'"


def mark_warnings(captions: list[str]) -> list[str]:
    """Marks that other trainers and interfaces act on; here they are words that the text encoder reads."""
    counts = marks.count(captions)
    if not counts:
        return []
    kinds = ", ".join(f"{name} in {count}" for name, count in counts.items())
    hold = plural(sum(map(marks.has_any, captions)), "caption holds", "captions hold")
    return [f"{hold} marks that other programs act on and that are learned as words here: {kinds}; remove them"]
