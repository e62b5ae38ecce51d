from __future__ import annotations

from collections import Counter

import pytest

from stages.prepare.variants import captions_of, variant
from tests.images import dataset

TAGS = "a cat, sofa, window, red, night"


def test_without_variants_captions_are_used_as_written() -> None:
    plain = dataset()
    assert captions_of(("one,two ", ""), "sks, ", plain) == ("sks, one,two ", ("sks, one,two ", "sks, "))
    assert captions_of(("",), "", plain) == ("", ("",))


def test_evidence_is_measured_with_the_first_caption_as_written() -> None:
    params = dataset(shuffle_tags=True, tag_dropout=0.5, num_caption_variants=3)
    canonical, trained = captions_of((TAGS, "other"), "sks, ", params)
    assert canonical == f"sks, {TAGS}"
    assert len(trained) == 6
    assert all(caption.startswith("sks, ") for caption in trained)


def test_shuffled_variants_hold_the_same_tags_after_the_leading_ones() -> None:
    params = dataset(shuffle_tags=True, keep_tags=2, num_caption_variants=40)
    _, trained = captions_of((TAGS,), "", params)
    assert all(caption.split(", ")[:2] == ["a cat", "sofa"] for caption in trained)
    assert {tuple(sorted(caption.split(", "))) for caption in trained} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(trained)) == 6  # orders of three tags
    assert max(Counter(trained).values()) < 15


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_dropout_leaves_out_its_share_and_keeps_the_order(share: float) -> None:
    params = dataset(tag_dropout=share, keep_tags=1, num_caption_variants=1000)
    _, trained = captions_of((TAGS,), "", params)
    kept = [caption.split(", ") for caption in trained]
    assert all(tags[0] == "a cat" for tags in kept)
    assert all(tags == [tag for tag in TAGS.split(", ") if tag in tags] for tags in kept)
    assert sum(len(tags) - 1 for tags in kept) / 4000 == pytest.approx(1 - share, abs=0.03)


def test_all_tags_may_go() -> None:
    params = dataset(tag_dropout=0.99, num_caption_variants=20)
    assert "sks, " in captions_of(("a, b",), "sks, ", params)[1]
    assert "" in captions_of(("a, b",), "", params)[1]


def test_variants_depend_on_caption_index_and_seed_alone() -> None:
    def variants(num: int, captions: tuple[str, ...] = (TAGS,), seed: int = 0) -> tuple[str, ...]:
        params = dataset(shuffle_tags=True, tag_dropout=0.3, num_caption_variants=num, seed=seed)
        return captions_of(captions, "", params)[1]

    assert variants(50)[:7] == variants(7)
    assert variants(9, (TAGS, "x, y, z"))[::2] == variants(9)
    assert variants(9, ("x, y, z", TAGS))[1::2] == variants(9)
    assert variants(4, (TAGS, "x, y, z"))[: 2 * 2] == variants(2, (TAGS, "x, y, z"))
    assert variants(9, seed=1) != variants(9)


def test_shuffling_does_not_change_what_is_dropped() -> None:
    ordered = dataset(tag_dropout=0.5, num_caption_variants=9)
    shuffled = dataset(tag_dropout=0.5, num_caption_variants=9, shuffle_tags=True)
    for index in range(9):
        tags = variant(TAGS, index, ordered).split(", ")
        assert sorted(variant(TAGS, index, shuffled).split(", ")) == sorted(tags)


def test_tags_are_told_by_commas() -> None:
    params = dataset(shuffle_tags=True, keep_tags=9)
    assert variant(" a cat ,,b,  c, ", 0, params) == "a cat, b, c"
