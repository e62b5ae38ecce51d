"""Text in little room: legible in every script, and never two labels as one."""

from __future__ import annotations

import logging
import random
import unicodedata
import warnings
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from lora_dag.core.labels import distinct, exact_number, shorten, visible
from lora_dag.families.long_texts import warn_of_long_prompts
from lora_dag.pages import sheets
from lora_dag.pages.lettering import Lettering, legible, missing
from lora_dag.pages.markdown import code, codes, numbered
from lora_dag.pages.sheets import sheet
from tests.helpers.errors import assert_line

LETTERS = Lettering(14)
SCRIPTS = {
    "Latin": "The quick fox café é è ü ö ä ß ñ ç ø å ł š ž ő ğ ı Ÿ ạ ệ",
    "Greek": "αλεπού στο χιόνι Ω ώ",
    "Cyrillic": "лиса в снегу Я ї ё ґ",
    "Arabic": "ثعلب في الثلج پ گ ی",
    "Hebrew": "שועל בשלג",
    "signs": "– — € × ½ … “ ” ≤ → ∞ № ☃ ❤",
}


def ink(line: str) -> np.ndarray:
    return np.asarray(LETTERS.draw(line))


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_letters_of_each_script_are_drawn(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, of what has no glyph
        undefined = ink("\ufffe")
    drawn = {c: ink(c) for c in text if c != " "}
    for c, glyph in drawn.items():
        assert glyph.max() > 100, c
        assert glyph.shape != undefined.shape or (glyph != undefined).any(), c
    images = {glyph.tobytes() for glyph in drawn.values()}
    assert len(images) == len(drawn)  # a box would be the same for all
    assert legible(text) == text and not missing(text)


def test_arabic_letters_join_and_run_from_right_to_left() -> None:
    """The last letter of the word, Alef, is a plain upright stroke: it stands at the left."""
    word = ink("با")  # Beh, Alef
    columns = word.max(axis=0) > 128
    assert word[:, : word.shape[1] // 2].any(axis=1).sum() > word[:, word.shape[1] // 2 :].any(axis=1).sum()
    inner = np.flatnonzero(columns)
    assert columns[inner[0] : inner[-1] + 1].all()  # joined: no gap between the letters
    assert LETTERS.width("با") < LETTERS.width("ب") + LETTERS.width("ا")


def test_accents_stand_on_their_letters() -> None:
    assert (ink("e\u0301") == ink("é")).all()
    assert LETTERS.width("x\u0301\u0302") == LETTERS.width("x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fox 🦊 café", "fox U+1F98A café"),
        ("雪の狐", "U+96EA U+306E U+72D0"),
        ("a\tb\n\n c ", "a b c"),
        ("", ""),
        ("zero\u200bwidth", "zero U+200B width"),
        ("a\u200db", "a U+200D b"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # Persian needs it
        ("turned \u202eround", "turned U+202E round"),
        ("bell\x07 escape\x1b[2K", "bell U+0007 escape U+001B [2K"),
        ("👩\u200d🚀", "U+1F469 U+200D U+1F680"),
        ("🦊\ufe0f\u0301", "U+1F98A U+FE0F U+0301"),
        ("half \ud800", "half U+D800"),
        ("\u0301x", "U+0301 x"),
        ("cafe\u0301", "café"),
    ],
)
def test_what_has_no_glyph_or_hides_is_shown_by_its_code(text: str, shown: str) -> None:
    assert legible(text) == shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LETTERS.draw(legible(text))


def test_piled_up_accents_stay_in_their_line() -> None:
    assert LETTERS.draw("a" + "\u0301" * 50).height == LETTERS.line_height


def test_lines_fit_and_long_words_are_broken() -> None:
    text = "a short start, then photos/2023/IMG_0123456789_holiday_with_everybody_in_it_at_the_seaside.png, е\u0301 end"
    lines = LETTERS.wrap(text, 100, 20)
    assert all(LETTERS.width(line) <= 100 for line in lines)
    assert "".join("".join(lines).split()) == "".join(legible(text).split())
    assert {"2023/IMG_", "holiday_with_"} < set(lines)  # at signs
    short = LETTERS.wrap(text, 100, 2)
    assert len(short) == 2 and short[-1].endswith("…") and short[0] == lines[0]
    assert LETTERS.wrap("", 100, 3) == []


# Distinct


COMMON = "masterpiece, best quality, highly detailed, 1girl, solo, looking at viewer, smile, outdoors, long dress, "


def cut(text: str) -> str:
    return shorten(text, 30)


def test_the_common_beginning_is_left_out_where_labels_would_look_alike() -> None:
    ends = ["red hair, forest", "red hair, city", "blue hair, forest"]
    assert distinct([COMMON + end for end in ends], cut, str) == [
        "… red hair, forest",
        "… red hair, city",
        "… blue hair, forest",
    ]
    assert distinct([COMMON + "red", "a cat"], cut, str) == [cut(COMMON), "a cat"]
    files = [f"IMG_20230101_holiday_at_the_seaside_{number}.png" for number in (1, 2, 13)]
    assert distinct(files, cut, str) == ["… ide_1.png", "… ide_2.png", "… ide_13.png"]
    assert distinct([COMMON + "red", COMMON + "red hair"], cut, str) == ["… red", "… red hair"]
    assert distinct([COMMON, COMMON], cut, str) == [cut(COMMON)] * 2  # equal ones stay so


def test_labels_that_differ_in_what_nobody_sees_are_numbered() -> None:
    assert distinct(["a b", "a  b", "c"], cut, str) == ["1. a b", "2. a b", "3. c"]
    assert distinct(["a b", "a  b"], cut, str, ["(1) ", "(2) trained on: "]) == ["(1) a b", "(2) trained on: a b"]


def any_text(rng: random.Random) -> str:
    alphabets = (
        *("abcde ,.", "ABC xyz-_", "éüñł ", "лиса в", "ثعلب في", "שועל ", "雪中狐", "🦊🐺"),
        *("\u0301\u0308", "\u200b\u200c\u200d\u202e\u00ad\ufe0f", "\t\n \u00a0", "АВСABC"),
    )
    letters = rng.choice(alphabets) + rng.choice(alphabets)
    return "".join(rng.choice(letters) for _ in range(rng.choice([0, 1, 2, 3, 8, 30, 90])))


def any_labels(rng: random.Random) -> list[str]:
    begin, middle = any_text(rng) * rng.choice([0, 1]), any_text(rng)
    ways = (
        lambda: begin + any_text(rng),
        lambda: begin + middle + rng.choice("abcABCАВС \u200b"),
        lambda: begin + rng.choice("ab") + middle,
    )
    return [rng.choice(ways)() for _ in range(rng.randint(2, 6))]


@pytest.mark.parametrize("seed", range(12))
def test_two_labels_look_alike_only_if_they_are_equal(seed: int) -> None:
    """On the sheet itself: pixels left of the rows, above the columns, and below the images."""
    rng = random.Random(seed)
    labels = any_labels(rng)
    num, cell = len(labels), rng.choice([32, 64, 128])
    black = Image.new("RGB", (cell, cell))
    rows = sheet([[black]] * num, labels, None, cell)
    columns = sheet([[black] * num], None, labels, cell)
    captions = sheet([[black]] * num, None, None, cell, captions=[[label] for label in labels])
    gap, margin = sheets._spacing(cell)
    left = rows.width - margin - cell - 1
    tops = [margin + index * (cell + gap) for index in range(num)]
    pitch = (captions.height - 2 * margin + gap) // num
    places = {
        "row": [rows.crop((0, top, left, top + cell)) for top in tops],
        "column": [
            columns.crop(
                (margin + i * (cell + gap), 0, margin + i * (cell + gap) + cell, columns.height - margin - cell)
            )
            for i in range(num)
        ],
        "caption": [
            captions.crop((0, margin + i * pitch + cell, captions.width, margin + (i + 1) * pitch)) for i in range(num)
        ],
    }
    for what, crops in places.items():
        for a in range(num):
            for b in range(a):
                alike = crops[a].tobytes() == crops[b].tobytes()
                assert alike == (labels[a] == labels[b]), (what, labels[a], labels[b])


def test_row_labels_use_the_height_of_their_row() -> None:
    """B23: three prompts that share a hundred characters; beside 128 pixels all is shown, beside 64 what differs."""
    ends = ("red hair, forest", "red hair, city", "blue hair, forest")
    prompts = [COMMON + end for end in ends]
    large = sheets._row_labels(prompts, None, LETTERS, 128, 128 // LETTERS.line_height)
    assert [" ".join(lines) for lines in large] == prompts
    letters = Lettering(11)
    small = sheets._row_labels(prompts, ["1. ", "2. ", "3. "], letters, 64, 64 // letters.line_height)
    assert [" ".join(lines) for lines in small] == [f"{i}. … {end}" for i, end in enumerate(ends, 1)]


def test_letters_without_a_glyph_are_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "_warned", set())
    black = Image.new("RGB", (32, 32))
    with caplog.at_level(logging.WARNING):
        sheet([[black]], ["雪 red"], ["🦊"], 32)
        sheet([[black]], ["雪 blue"], None, 32)
        sheet([[black]], ["é Я ع"], None, 32)
    (record,) = caplog.records
    assert_line(record.message, "glyphs-missing", "DejaVu Sans", "雪 🦊", "U+96EA")


def test_the_same_text_is_the_same_bytes() -> None:
    black = Image.new("RGB", (64, 64))
    first, second = (sheet([[black]], [f"{text}"], None, 64) for text in [" ".join(SCRIPTS.values())] * 2)
    assert first.tobytes() == second.tobytes()


# On pages


def test_pages_show_whole_texts_by_their_rows_numbers() -> None:
    prompts = ["雪の中の狐", COMMON * 3, "a `b` | <i>c</i>", "two\nlines"]
    assert numbered(prompts) == "\n".join(
        ["1. `雪の中の狐`", f"2. `{(COMMON * 3).strip()}`", "3. `` a `b` | <i>c</i> ``", "4. `two lines`"]
    )


def test_code_spans_that_stand_together_differ_where_their_texts_do() -> None:
    long = "x, " * 60
    assert codes([long + "red", long + "blue"]) == ["`… red`", "`… blue`"]
    assert codes(["a b", "a  b", "a\nb"]) == ["`a b`", "`a U+0020 U+0020 b`", "`a U+000A b`"]
    assert codes(["same", "same"]) == ["`same`"] * 2
    rng = random.Random(0)
    for _ in range(200):
        texts = any_labels(rng)
        shown = codes(texts, 40)
        assert all((shown[a] == shown[b]) == (texts[a] == texts[b]) for a in range(len(texts)) for b in range(a)), texts


def test_visible_text_has_no_character_that_hides() -> None:
    shown = visible("".join(map(chr, range(0x3000))))
    assert {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} <= {"Cf"}
    assert {c for c in shown if unicodedata.category(c) == "Cf"} <= set("\u200c\u200d")
    assert code("\x1b[2Jhello\u202e") == "`U+001B[2JhelloU+202E`"


def test_numbers_on_labels_are_told_apart() -> None:
    assert [exact_number(value) for value in (1.0, 0.5, 0.3, 1e-7, 0.30000001, 1.0000001)] == [
        *("1", "0.5", "0.3", "1e-07", "0.30000001", "1.0000001")
    ]


def test_prompts_with_characters_that_nobody_sees_are_told(caplog: pytest.LogCaptureFixture) -> None:
    family = SimpleNamespace(count_tokens=lambda _, texts: [1] * len(texts), max_tokens=lambda _: 9)
    prompts = ["a \u200bfox", "fox", "\u202eowl", "👩\u200d🎨"]
    warn_of_long_prompts(prompts, cast(Any, family), cast(Any, None))
    (line,) = [record.getMessage() for record in caplog.records]
    assert_line(line, "invisible-characters", "2 prompts ", "(U+200B, U+202E)")
    caplog.clear()
    warn_of_long_prompts(["fox"], cast(Any, family), cast(Any, None))
    assert not caplog.records
