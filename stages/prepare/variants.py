"""Caption variants: tags in another order, tags left out. Seeded by the caption, so that each can be encoded once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stages.core import seeding

if TYPE_CHECKING:
    from stages.prepare.listing import Entry
    from stages.prepare.params import DatasetParams

TAG_SEPARATOR = ","


def captions_of(captions: tuple[str, ...], prefix: str, dataset: DatasetParams) -> tuple[str, tuple[str, ...]]:
    """The caption that evidence is measured with, and those that training draws from with equal weight.

    The first is the first caption as it was written. The others are variant 0 of each caption, then variant 1 of each,
    and so on, so that a larger ``num_caption_variants`` only adds to them. Variants that happen to be equal all stay:
    each is one draw of the augmentation, and the cache encodes equal captions once.

    Args:
        prefix: put before each of them, and never moved or dropped.
    """
    canonical = prefix + captions[0]
    if not is_varied(dataset):
        return canonical, tuple(prefix + caption for caption in captions)
    indices = range(dataset.num_caption_variants)
    return canonical, tuple(prefix + variant(caption, index, dataset) for index in indices for caption in captions)


def is_varied(dataset: DatasetParams) -> bool:
    return dataset.shuffle_tags or dataset.tag_dropout > 0


def tags_of(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(TAG_SEPARATOR) if tag.strip()]


def variant(caption: str, index: int, dataset: DatasetParams) -> str:
    """Variant ``index`` of a caption: a function of caption, index and ``dataset.seed``, whatever picture it is of.

    Every tag after the leading ``keep_tags`` draws its place and whether it stays by itself; all may go.
    """
    tags = tags_of(caption)
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
    return f"{TAG_SEPARATOR} ".join([*leading, *(others[place] for place in kept)])


def warnings(entries: Iterable[Entry], dataset: DatasetParams) -> list[str]:
    """What of the captions is allowed but seldom meant."""
    subsets = dataset.as_subsets()
    written = [(caption, subsets[entry.subset].caption_prefix or "") for entry in entries for caption in entry.captions]
    num_commas = sum(bool(caption.strip()) and not tags_of(caption) for caption, _ in written)
    found = [f"{num_commas} captions hold nothing but commas"] if num_commas else []
    if not is_varied(dataset):
        return found
    longest = max((len(tags_of(caption)) for caption, _ in written), default=0)
    if 0 < longest <= dataset.keep_tags:
        found.append(
            f"no caption has more than {longest} tags, so that with dataset.keep_tags {dataset.keep_tags} none is moved"
            " or dropped"
        )
    blank = [
        sum(not variant(caption, index, dataset) for index in range(dataset.num_caption_variants))
        for caption, prefix in dict.fromkeys(written)
        if tags_of(caption) and not prefix.strip()
    ]
    if any(blank):
        found.append(
            f"{sum(blank)} variants of {sum(map(bool, blank))} captions have no tag left and are learned without a"
            f" prompt; lower dataset.tag_dropout {dataset.tag_dropout}, or raise dataset.keep_tags {dataset.keep_tags}"
        )
    return found
