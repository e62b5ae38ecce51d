"""Caption variants: tags in another order, tags left out. Seeded by the caption, so that each can be encoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core import seeding

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

SEPARATOR = ","


def captions_of(captions: tuple[str, ...], prefix: str, dataset: DatasetParams) -> tuple[str, tuple[str, ...]]:
    """The caption that evidence is measured with, and those that training draws from with equal weight.

    The first is the first caption as it was written. The others are variant 0 of each caption, then variant 1 of each,
    and so on, so that a larger ``num_caption_variants`` only adds to them. Variants that happen to be equal all stay:
    each is one draw of the augmentation, and the cache encodes equal captions once.

    Args:
        prefix: put before each of them, and never moved or dropped.
    """
    canonical = prefix + captions[0]
    if not dataset.shuffle_tags and not dataset.tag_dropout:
        return canonical, tuple(prefix + caption for caption in captions)
    indices = range(dataset.num_caption_variants)
    return canonical, tuple(prefix + variant(caption, index, dataset) for index in indices for caption in captions)


def variant(caption: str, index: int, dataset: DatasetParams) -> str:
    """Variant ``index`` of a caption: a function of caption, index and ``dataset.seed``, whatever picture it is of.

    Every tag after the leading ``keep_tags`` draws its place and whether it stays by itself; all may go.
    """
    tags = [tag.strip() for tag in caption.split(SEPARATOR) if tag.strip()]
    leading, others = tags[: dataset.keep_tags], list(enumerate(tags))[dataset.keep_tags :]

    def draw(purpose: str, place: int) -> float:
        return seeding.key(dataset.seed, "tags", caption, index, purpose, place) / 2**63  # [0, 1)

    if dataset.shuffle_tags:
        others.sort(key=lambda tag: draw("order", tag[0]))
    kept = [tag for place, tag in others if draw("drop", place) >= dataset.tag_dropout]
    return f"{SEPARATOR} ".join([*leading, *kept])
