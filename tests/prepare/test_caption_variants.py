from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from lora_dag.core.console import Problem
from stages.prepare.caption_variants import caption_warnings, captions_of, variant
from stages.prepare.listing import Entry
from tests.helpers.errors import assert_are, assert_is, invalid_setting
from tests.helpers.images import dataset

TAGS = "a cat, sofa, window, red, night"


def test_without_variants_captions_are_used_as_written() -> None:
    plain = dataset()
    assert captions_of(("one,two ", ""), "sks, ", plain) == ("sks, one,two ", ("sks, one,two ", "sks, "))
    assert captions_of(("",), "", plain) == ("", ("",))


def test_evaluation_uses_the_first_caption_as_written() -> None:
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


def test_variants_depend_only_on_caption_index_and_seed() -> None:
    def variants(num: int, captions: tuple[str, ...] = (TAGS,), seed: int = 0) -> tuple[str, ...]:
        params = dataset(shuffle_tags=True, tag_dropout=0.3, num_caption_variants=num, seed=seed)
        return captions_of(captions, "", params)[1]

    assert variants(50)[:7] == variants(7)
    assert variants(9, (TAGS, "x, y, z"))[::2] == variants(9)
    assert variants(9, ("x, y, z", TAGS))[1::2] == variants(9)
    assert variants(4, (TAGS, "x, y, z"))[: 2 * 2] == variants(2, (TAGS, "x, y, z"))
    assert variants(9, seed=1) != variants(9)


def test_shuffling_does_not_change_the_dropped_tags() -> None:
    ordered = dataset(tag_dropout=0.5, num_caption_variants=9)
    shuffled = dataset(tag_dropout=0.5, num_caption_variants=9, shuffle_tags=True)
    for index in range(9):
        tags = variant(TAGS, index, ordered).split(", ")
        assert sorted(variant(TAGS, index, shuffled).split(", ")) == sorted(tags)


def test_tags_are_split_at_commas() -> None:
    params = dataset(shuffle_tags=True, keep_tags=9, num_caption_variants=2)
    assert variant(" a cat ,,b,  c, ", 0, params) == "a cat, b, c"


def test_very_many_tags_are_fast() -> None:
    """Hashing the caption for every tag took hours."""
    caption = ", ".join(f"t{index}" for index in range(150_000))
    start = time.process_time()
    _, trained = captions_of((caption,), "", dataset(shuffle_tags=True, tag_dropout=0.1, num_caption_variants=3))
    assert time.process_time() - start < 10
    assert len(set(trained)) == 3


def test_variants_of_the_first_version_stay() -> None:
    """Their embeddings are cached by their text, and adapters were trained with them."""
    params = dataset(shuffle_tags=True, tag_dropout=0.3, num_caption_variants=2)
    assert captions_of((TAGS,), "", params)[1] == ("window, red, sofa, a cat", "night, red, sofa")


def test_keep_tags_needs_shuffle_or_dropout() -> None:
    with invalid_setting("setting-ignored", "keep_tags: 2", "shuffle_tags or tag_dropout"):
        dataset(keep_tags=2)


def test_loss_weight_has_a_bound() -> None:
    assert dataset(subsets=[{"path": ".", "loss_weight": 1000.0}])
    with pytest.raises(ValueError, match="less than or equal to 1000"):
        dataset(subsets=[{"path": ".", "loss_weight": 1e30}])


@pytest.mark.parametrize("key", ["caption_prefix", "instance_prompt"])
def test_control_characters_in_params(key: str) -> None:
    for changes in ({key: "sks\0, "}, {"subsets": [{"path": ".", key: "sks\0, "}]}):
        with invalid_setting("caption-characters", '"sks\\u0000, "'):
            dataset(**changes)
    assert dataset(**{key: "a\tb\n"})


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"shuffle_tags": True}, "shuffle_tags true"), ({"tag_dropout": 0.1}, "tag_dropout 0.1")],
)
def test_one_variant_is_refused(changes: dict[str, Any], key: str) -> None:
    with invalid_setting("caption-variants-frozen", "num_caption_variants: 1 with", key, "Set it to 8"):
        dataset(**changes)


# Prefix


@pytest.mark.parametrize(
    ("prefix", "caption", "expected"),
    [
        ("sks", "thing 0", "sks thing 0"),
        ("sks,", "thing 0", "sks, thing 0"),
        ("sks, ", "thing 0", "sks, thing 0"),
        ("a photo of ", "thing 0", "a photo of thing 0"),
        ("a photo of", "thing 0", "a photo of thing 0"),
        ("sks:", "größer", "sks: größer"),
        ("лиса", "в снегу", "лиса в снегу"),
        ("画风，", "雪中的狐狸", "画风，雪中的狐狸"),
        ("画风", "雪中的狐狸", "画风雪中的狐狸"),
        ("pre-", "war car", "pre-war car"),
        ("style/", "fox", "style/fox"),
        ("sks", ", thing", "sks, thing"),
        ("sks", " thing", "sks thing"),
        ("sks, ", "", "sks, "),
        ("", "thing", "thing"),
    ],
)
def test_a_prefix_is_not_glued_to_the_first_word(prefix: str, caption: str, expected: str) -> None:
    assert captions_of((caption,), prefix, dataset()) == (expected, (expected,))
    varied = dataset(shuffle_tags=True, num_caption_variants=2)
    assert captions_of((caption,), prefix, varied)[0] == expected


def test_variants_are_joined_to_the_prefix_too() -> None:
    trained = captions_of(("a, b",), "sks", dataset(shuffle_tags=True, num_caption_variants=8))[1]
    assert set(trained) == {"sks a, b", "sks b, a"}


# Separators


@pytest.mark.parametrize(
    ("separator", "caption", "orders"),
    [
        (",", "a b,c", {"a b, c", "c, a b"}),
        ("，", "猫，雪", {"猫，雪", "雪，猫"}),
        (" ", "long_hair  smile", {"long_hair smile", "smile long_hair"}),
        (";", "a, b; c", {"a, b; c", "c; a, b"}),
        ("; ", "a, b;c", {"a, b; c", "c; a, b"}),
        ("|", "a|b", {"a| b", "b| a"}),
    ],
)
def test_tags_of_another_separator(separator: str, caption: str, orders: set[str]) -> None:
    params = dataset(shuffle_tags=True, num_caption_variants=16, tag_separator=separator)
    canonical, trained = captions_of((caption,), "", params)
    assert (canonical, set(trained)) == (caption, orders)


def warned(captions: list[str], **changes: Any) -> list[Problem]:
    params = dataset(**changes)
    return caption_warnings([Entry(f"{i}.png", (text,), "x") for i, text in enumerate(captions)], params)


SHUFFLED = {"shuffle_tags": True, "num_caption_variants": 8}


@pytest.mark.parametrize(
    ("captions", "separator"),
    [
        (["猫，雪，夜", "狐，雪"], "，"),
        (["1girl long_hair smile", "1boy short_hair"], " "),
        (["a; b; c", "d; e"], ";"),
        (["a|b", "c|d"], "|"),
        (["猫、雪", "狐、夜"], "、"),
    ],
)
def test_ineffective_shuffle_suggests_the_separator(captions: list[str], separator: str) -> None:
    (warning,) = warned(captions, **SHUFFLED)
    found = ("params.yaml dataset.shuffle_tags: ", "2 of 2 captions", "fewer than 2 tags")
    assert_is(warning, "setting-ignored", *found, f"dataset.tag_separator to '{separator}'")
    assert warned(captions, **SHUFFLED, tag_separator=separator) == []
    varied = captions_of((captions[0],), "", dataset(**SHUFFLED, tag_separator=separator))[1]
    assert len(set(varied)) > 1
    (warning,) = warned(captions, tag_dropout=0.2, num_caption_variants=8, keep_tags=1)
    assert_is(warning, "setting-ignored", "params.yaml dataset.tag_dropout: ", "2 of 2 captions")


def test_captions_of_one_word_have_nothing_to_shuffle() -> None:
    (warning,) = warned(["fox", "owl", "a, b"], **SHUFFLED)
    assert_is(warning, "setting-ignored", "dataset.shuffle_tags", "2 of 3 captions", "fewer than 2 tags", "','")
    assert "tag_separator" not in warning
    assert warned(["a, b", "c, d", "fox"], **SHUFFLED) == []
    assert len(warned(["a, b", "c, d"], **SHUFFLED, keep_tags=1)) == 1


# Marks of other programs


@pytest.mark.parametrize(
    ("caption", "mark"),
    [
        ("a {red|blue} fox", "{a|b}"),
        ("sks dog ||| snow, night", "|||"),
        ("a fox <lora:ink:0.8>", "<lora:...>"),
        ("a (fox:1.2) in snow", "(word:1.2)"),
        ("a [fox:owl:0.5]", "[a:b:0.5]"),
        ("a ((fox)) in snow", "((word))"),
        ("[trigger], a fox", "[trigger]"),
        ("a __color__ fox", "__wildcard__"),
        ("a fox BREAK snow", "BREAK"),
        ("miku \\(vocaloid\\)", "\\("),
        ("a fox --n blurry", "--n"),
    ],
)
def test_syntax_of_other_programs_is_counted(caption: str, mark: str) -> None:
    assert_are(warned([caption, "a fox"]), ("caption-syntax", "1 caption", f"{mark} in 1"))
    assert_are(warned([caption, caption, "a {b|c}"], caption_prefix="x, "), ("caption-syntax", "3 captions"))


def test_plain_captions_have_no_syntax_warning() -> None:
    plain = ["a fox (red) at 10:30", "ratio 16:9 (16:9)", "what a break", "a [red] fox", "a dash -- and more"]
    plain += ["snake_case __init", "f(x) = {1, 2}", "a | b", "a <3 b", "half-timbered house, 1990s, 50mm f/1.8"]
    plain += ["sign: 'open (9:00-17:00)'", "open (from 9:00)", "a (fox: red) thing"]
    assert [text for text in plain if warned([text])] == []


# Characters that nobody means


@pytest.mark.parametrize("character", ["\u200b", "\ufeff", "\u202e", "\u2060", "\u00ad"])
def test_invisible_characters_are_listed_by_code_point(character: str) -> None:
    expected = ("invisible-characters", "1 caption", f"U+{ord(character):04X}")
    assert_are(warned([f"a{character} fox", "an owl"]), expected)
    assert_are(warned(["a fox"], caption_prefix=f"sks{character}, "), expected)
    assert_are(warned([character]), expected)


def test_joiners_of_emoji_and_words_are_allowed() -> None:
    assert warned(["👩\u200d🎨 paints", "می\u200cخواهم", "flag 🏴\U000e0067\U000e007f"]) == []


@pytest.mark.parametrize("pair", ['""', "“”", "''", "‘’", "«»", "「」"])
def test_quoted_captions_are_warned_about(pair: str) -> None:
    (warning,) = warned([f"{pair[0]}a fox{pair[1]}", f"{pair[0]}an owl{pair[1]} ", "a hen"])
    assert_is(warning, "caption-quoted", "2 captions")
    assert warned([f"{pair[0]}stop{pair[1]} and {pair[0]}go{pair[1]}", f"a sign, {pair[0]}stop{pair[1]}"]) == []


def test_ineffective_separator_is_warned_about() -> None:
    expected = ("setting-ignored", "params.yaml dataset.tag_separator: ';'", "dataset.shuffle_tags")
    assert_are(warned(["a; b"], tag_separator=";"), expected)
