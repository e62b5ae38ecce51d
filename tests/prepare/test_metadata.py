from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tests.helpers.sources import captions, listed, problems, refusal, splits, write_files

EXPECTED = 'expected a string or a list of strings, "" for no caption'


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/raw with a.png to d.png, of which metadata.jsonl names a.png and b.png."""
    monkeypatch.chdir(tmp_path)
    folder = write_files(Path("data/raw"), "a.png", "b.png", "c.png", "d.png")
    write_rows(folder, [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}])
    return folder


def append(folder: Path, row: bytes) -> None:
    with (folder / "metadata.jsonl").open("ab") as file:
        file.write(row + b"\n")


# The cases of metadata.jsonl; {place} is the third line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            b'{"file_name": "../x.png", "text": "x"}',
            "file_name: '../x.png' leaves data/raw; expected a name relative to",
        ),
        (b'{"file_name": "s/../../x.png", "text": "x"}', "file_name: 's/../../x.png' leaves data/raw;"),
        (b'{"file_name": "/etc/x.png", "text": "x"}', "file_name: '/etc/x.png' leaves data/raw; expected a name"),
        (b'{"file_name": "x.png", "text": "x"}', "file_name: 'x.png' is no file in data/raw; add it or remove the row"),
        (b'{"file_name": "s\\\\x.png", "text": "x"}', "add it with / between folders or remove the row"),
        (b'{"file_name": "c.png"}', "no 'text' column; write the caption, or \"\" for none"),
        (b'{"file_name": "c.png", "text": null}', f"text: got null; {EXPECTED}"),
        (b'{"file_name": "c.png", "text": 3}', f"text: got 3; {EXPECTED}"),
        (b'{"file_name": "c.png", "text": NaN}', f"text: got NaN; {EXPECTED}"),
        (b'{"file_name": "c.png", "text": []}', f"text: got []; {EXPECTED}"),
        (b'{"file_name": "c.png", "text": ["x", 3]}', f'text: got ["x", 3]; {EXPECTED}'),
        (b'{"file_name": "c.png", "text": {"x": 3}}', f'text: got {{"x": 3}}; {EXPECTED}'),
        (b'{"file_name": "c.png", "text": "caf\xe9"}', "not UTF-8 text; save the file as UTF-8"),
        (b'{"file_name": "c.png", "text": "\\ud800"}', 'text: "\\ud800" holds half a character (a lone surrogate);'),
        (b'{"file_name": "c.png", "text": ["x", "\\ud800"]}', 'text: "\\ud800" holds half a character'),
        (b'{"file_name": "b.png", "text": "x"}', "'b.png' is named on line 2 already; remove one of the two rows"),
        (b'{"file_name": "./b.png", "text": "x"}', "'b.png' is named on line 2 already; remove one of the two rows"),
        (b"{oops", "no valid JSON (Expecting property name"),
        (b"[" * 100_000, "no valid JSON ("),
        (b'{"file_name": "c.png", "text": "x", "text": "y"}', '"text" stands there twice; remove one'),
        (b'{"file_name": "c.png", "text": "a\\u0000b"}', 'text: "a\\u0000b" holds a control character; write the'),
        (b'{"file_name": "c.png", "text": ["x", "\\u001b[31m"]}', 'text: "\\u001b[31m" holds a control character'),
        (b'["c.png"]', "got list; expected one JSON object per line"),
        (b'{"text": "x"}', "file_name: got null; expected the name of a picture in data/raw"),
        (b'{"file_name": 7, "text": "x"}', "file_name: got 7; expected the name of a picture in data/raw"),
        (b'{"file_name": "", "text": "x"}', 'file_name: got ""; expected the name of a picture in data/raw'),
        (b'{"file_name": ".", "text": "x"}', "file_name: '.' is not a regular file"),
        (b'{"file_name": "a\\u0000.png", "text": "x"}', 'file_name: "a\\u0000.png" holds a control character; rename'),
        (b'{"file_name": "a\\n.png", "text": "x"}', 'file_name: "a\\n.png" holds a control character; rename the file'),
        (b'{"file_name": "\\ud800.png", "text": "x"}', 'file_name: "\\ud800.png" holds a control character; rename'),
        (b'{"file_name": "-c.png", "text": "x"}', "file_name: '-c.png' starts with '-', which commands take for an"),
        (b'{"file_name": "outside.png", "text": "x"}', "file_name: 'outside.png' is a link that leaves data/raw; put"),
        (b'{"file_name": "away/x.png", "text": "x"}', "file_name: 'away/x.png' is a link that leaves data/raw; put"),
        (b'{"file_name": "dangling.png", "text": "x"}', "file_name: 'dangling.png' is no file in data/raw, but a link"),
        (b'{"file_name": "folder.png", "text": "x"}', "file_name: 'folder.png' is not a regular file; replace it by"),
        (b'{"file_name": "fifo.png", "text": "x"}', "file_name: 'fifo.png' is not a regular file; replace it by one"),
    ],
)
def test_bad_row(raw: Path, row: bytes, message: str) -> None:
    write_files(Path("data/elsewhere"), "x.png")
    (raw / "outside.png").symlink_to("../elsewhere/x.png")
    (raw / "away").symlink_to("../elsewhere")
    (raw / "dangling.png").symlink_to("nothing.png")
    (raw / "folder.png").mkdir()
    os.mkfifo(raw / "fifo.png")
    append(raw, row)
    listing = listed(raw)
    (problem,) = map(str, listing.problems)
    assert problem.startswith("data/raw/metadata.jsonl:3: ")
    assert message in problem
    assert [entry.file_name for entry in listing.entries] == ["a.png", "b.png"]


def test_everything_wrong_with_a_row_and_every_row_at_once(raw: Path) -> None:
    append(raw, b'{"file_name": "../x.png", "text": null}')
    append(raw, b"{")
    append(raw, b'{"file_name": "c.png", "text": 3}')
    append(raw, b'{"file_name": "a.png", "text": "again"}')
    found = listed(raw).problems
    assert [(problem.place.rpartition(":")[2], problem.file_name) for problem in found] == [
        ("3", None),
        ("3", None),
        ("4", None),
        ("5", "c.png"),
        ("6", None),  # the picture is line 1's, and stays
    ]


def test_captions_are_kept_as_written(raw: Path) -> None:
    texts: list[Any] = ["", "  ", "größer, 大きい", ["x", ""], "long " * 2000]
    rows = [{"file_name": name, "text": text} for name, text in zip(("a.png", "b.png", "c.png"), texts, strict=False)]
    write_rows(raw, [*rows, {"file_name": "d.png", "text": texts[3]}])
    assert list(captions(listed(raw)).values()) == [("",), ("  ",), ("größer, 大きい",), ("x", "")]
    write_rows(raw, [{"file_name": "a.png", "text": texts[4]}])
    assert captions(listed(raw)) == {"a.png": ("long " * 2000,)}


def test_unlisted_pictures_are_counted(raw: Path) -> None:
    write_files(raw, "sub/e.webp", "LICENSE", ".hidden.png", ".cache/x.png", c="not read")
    listing = listed(raw)
    assert listing.unlisted == ["c.png", "d.png", "sub/e.webp"]
    assert listing.warnings == [
        "3 pictures in data/raw are not in metadata.jsonl and are left out",
        "1 .txt file in data/raw is not read, since metadata.jsonl gives the captions",
    ]


def test_bom_crlf_and_blank_lines(raw: Path) -> None:
    rows = ['{"file_name": "a.png", "text": "größer"}', "", '{"file_name": "b.png", "text": 3}']
    (raw / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")
    listing = listed(raw)
    assert captions(listing) == {"a.png": ("größer",)}
    assert str(listing.problems[0]).startswith("data/raw/metadata.jsonl:3: text: got 3;")


@pytest.mark.parametrize(("name", "text"), [("metadata.jsonl", "\n"), ("metadata.csv", ""), ("metadata.csv", "text\n")])
def test_empty_metadata(raw: Path, name: str, text: str) -> None:
    (raw / "metadata.jsonl").unlink()
    (raw / name).write_text(text)
    assert refusal(raw) == f"data/raw/{name}: no rows; the dataset is empty"


def test_empty_folder(raw: Path) -> None:
    Path("data/none").mkdir()
    assert refusal("data/none") == (
        "data/none: no pictures and no metadata.jsonl; the dataset is empty (found nothing)"
    )


@pytest.mark.parametrize(
    "names", [("E.png", "e.png"), tuple(unicodedata.normalize(f, "é.png") for f in ("NFC", "NFD"))]
)
def test_names_that_collide_elsewhere(raw: Path, names: tuple[str, str]) -> None:
    write_files(raw, *names)
    write_rows(raw, [{"file_name": name, "text": "x"} for name in names])
    listing = listed(raw)
    (problem,) = listing.problems
    assert str(problem) == (
        f"data/raw/metadata.jsonl:2: '{names[1]}' and '{names[0]}' (on line 1) are one file where case or accents do"
        " not count; rename one"
    )
    assert list(captions(listing)) == [names[0]]


def test_accents_in_the_other_unicode_form_find_their_file(raw: Path) -> None:
    on_disk = unicodedata.normalize("NFD", "é.png")
    write_files(raw, on_disk)
    write_rows(raw, [{"file_name": unicodedata.normalize("NFC", "é.png"), "text": "x"}])
    listing = listed(raw)
    assert list(captions(listing)) == [on_disk]
    assert on_disk not in listing.unlisted


# Columns


def test_wrong_caption_column_is_one_line(raw: Path) -> None:
    assert refusal(raw, caption_column="caption") == (
        "params.yaml dataset.caption_column: 'caption' is no column of data/raw/metadata.jsonl; it has text"
    )
    assert refusal(raw, subsets=[{"path": ".", "caption_column": "x"}]).startswith(
        "params.yaml dataset.subsets.0.caption_column: 'x' is no column of"
    )
    write_rows(raw, [{"file_name": "a.png"}])
    assert refusal(raw).endswith("'text' is no column of data/raw/metadata.jsonl; it has file_name only")


def test_no_column_of_names_is_one_line(raw: Path) -> None:
    write_rows(raw, [{"image": "a.png", "text": "x"}] * 2)
    assert refusal(raw) == "data/raw/metadata.jsonl: no column 'file_name'; it has image, text; rename 'image' to it"


def test_split_column(raw: Path) -> None:
    rows = [{"file_name": "a.png", "text": "x", "split": "val"}, {"file_name": "b.png", "text": "x", "split": 3}]
    write_rows(raw, rows)
    assert splits(listed(raw)) == {"a.png": "val", "b.png": None}
    assert problems(raw, heldout_fraction=None, heldout_split="validation") == [
        "data/raw/metadata.jsonl:2: split: got 3; expected the name of a split, such as 'validation'"
    ]


# Other kinds of files


def write_csv(folder: Path, text: str | bytes) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_csv(raw: Path) -> None:
    write_csv(raw, '\ufefffile_name,text,n\r\na.png,"one, and\nmore",1\r\n\r\nb.png,,2\r\n../x.png,x,3\r\n')
    listing = listed(raw)
    assert captions(listing) == {"a.png": ("one, and\nmore",), "b.png": ("",)}
    assert [entry.place for entry in listing.entries] == ["data/raw/metadata.csv:2", "data/raw/metadata.csv:5"]
    assert str(listing.problems[0]).startswith("data/raw/metadata.csv:6: file_name: '../x.png' leaves data/raw;")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"c.png,a cat, black", "3 cells, and the header has 2 (file_name, text); put text with commas in quotes"),
        (b"c.png", "1 cell, and the header has 2 (file_name, text); put text with commas in quotes"),
        (b"c.png,caf\xe9", "not UTF-8 text; save the file as UTF-8"),
        (b"c.png,a \x07 cat", 'text: "a \\u0007 cat" holds a control character; write the caption as plain text'),
    ],
)
def test_bad_csv_row(raw: Path, row: bytes, message: str) -> None:
    write_csv(raw, b"file_name,text\na.png,one\n" + row + b"\n")
    listing = listed(raw)
    assert [str(problem).startswith(f"data/raw/metadata.csv:3: {message}") for problem in listing.problems] == [True]
    assert captions(listing) == {"a.png": ("one",)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'c.png,"two\nb.png,x', "a quote is not closed"),
        (b'c.png,"two\nb.png,"x"', "',' expected after '\"'"),
        (b'c.png,"a "red" cat"', "',' expected after '\"'"),
        (b"c.png," + b"x" * (2**20 + 1), "field larger than field limit (1048576)"),
    ],
)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_csv_that_cannot_be_read_to_its_end(raw: Path, row: bytes, message: str, on_bad: str) -> None:
    """How many rows are lost behind it nobody knows, so it is no row to skip."""
    write_csv(raw, b"file_name,text\na.png,one\n" + row + b"\nd.png,four\n")
    assert refusal(raw, on_bad=on_bad) == (
        f'data/raw/metadata.csv:3: no valid CSV ({message}); quote a cell as "...", with "" for " in it'
    )


def test_csv_cells_may_be_as_long_as_text_files(raw: Path) -> None:
    before = csv.field_size_limit()
    write_csv(raw, b"file_name,text\na.png," + b"x" * 2**20 + b"\n")
    assert captions(listed(raw)) == {"a.png": ("x" * 2**20,)}
    assert csv.field_size_limit() == before


ROWS = {
    "metadata.csv": "file_name,text\na.png,größer\nb.png,é\n",
    "metadata.jsonl": '{"file_name": "a.png", "text": "größer"}\n{"file_name": "b.png", "text": "é"}\n',
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_metadata_that_says_its_encoding(raw: Path, name: str, encoding: str) -> None:
    """As Excel's "Unicode text" and PowerShell write it."""
    (raw / "metadata.jsonl").unlink()
    (raw / name).write_text(ROWS[name], encoding=encoding)
    assert captions(listed(raw)) == {"a.png": ("größer",), "b.png": ("é",)}


@pytest.mark.parametrize("name", ROWS)
def test_metadata_in_another_encoding_is_one_line(raw: Path, name: str) -> None:
    (raw / "metadata.jsonl").unlink()
    (raw / name).write_text(ROWS[name], encoding="utf-16-le")
    assert refusal(raw) == f"data/raw/{name}: not UTF-8 text; save the file as UTF-8"
    (raw / name).write_text(ROWS[name], encoding="cp1252")
    first = 2 if name.endswith(".csv") else 1
    assert refusal(raw) == (
        f"data/raw/{name}: 2 lines, such as line {first}, are not UTF-8 text; save the file as UTF-8"
    )
    (raw / name).write_bytes(ROWS[name].encode().replace("é".encode(), b"\xe9"))  # one line is damaged
    assert problems(raw) == [f"data/raw/{name}:{first + 1}: not UTF-8 text; save the file as UTF-8"]


def test_long_names_are_echoed_in_part(raw: Path) -> None:
    for name, text in (("x" * 10**6, "has 1,000,000 characters; at most 4,096 are a name"), ("y" * 200, "is no file")):
        write_rows(raw, [{"file_name": name, "text": "x"}])
        (problem,) = problems(raw)
        assert text in problem and len(problem) < 260


def test_csv_header(raw: Path) -> None:
    write_csv(raw, "file_name,text,text\na.png,x,y\n")
    assert refusal(raw) == "data/raw/metadata.csv:1: a column twice in the header file_name, text, text; rename one"
    (raw / "metadata.csv").write_text("image;text\na.png;x\n")
    assert refusal(raw) == "data/raw/metadata.csv: no column 'file_name'; it has image;text"
    (raw / "metadata.csv").write_text("Image,text\na.png,x\n")
    assert refusal(raw) == "data/raw/metadata.csv: no column 'file_name'; it has Image, text; rename 'Image' to it"
    (raw / "metadata.csv").write_text("a.png,a cat\nb.png,a dog\n")
    assert refusal(raw) == (
        "data/raw/metadata.csv:1: got a.png, a cat; expected the names of the columns, such as file_name,text"
    )


DIALECTS = {
    "semicolons, as Excel in many countries": 'file_name;text\na.png;"one; more, and"\nb.png;two, three\n',
    "tabs": 'file_name\ttext\na.png\t"one; more, and"\nb.png\ttwo, three\n',
    "bars": "file_name|text\na.png|one; more, and\nb.png|two, three\n",
    "a line for Excel": 'sep=;\nfile_name;text\na.png;"one; more, and"\nb.png;two, three\n',
    "quoted names": '"file_name";"text"\n"a.png";"one; more, and"\n"b.png";"two, three"\n',
    "blanks before quotes": 'file_name, text\na.png, "one; more, and"\nb.png, "two, three"\n',
    "blanks around names": 'file_name , text\na.png,"one; more, and"\nb.png,"two, three"\n',
    "ends of lines of old Macs": 'file_name,text\ra.png,"one; more, and"\rb.png,"two, three"\r',
    "empty columns": 'file_name,text,,\na.png,"one; more, and",,\nb.png,"two, three",,\n',
    "columns in another order": 'text;file_name\n"one; more, and";a.png\ntwo, three;b.png\n',
}


@pytest.mark.parametrize("text", DIALECTS.values(), ids=list(DIALECTS))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_dialects_of_csv(raw: Path, text: str, encoding: str) -> None:
    write_csv(raw, text.encode(encoding))
    listing = listed(raw)
    assert captions(listing) == {"a.png": ("one; more, and",), "b.png": ("two, three",)}
    assert listing.problems == []


def test_blanks_in_csv_are_kept_where_no_quote_follows_them(raw: Path) -> None:
    write_csv(raw, 'file_name,text\na.png, one\nb.png,"  two"\nc.png,"a ""b"", c"\n')
    assert captions(listed(raw)) == {"a.png": (" one",), "b.png": ("  two",), "c.png": ('a "b", c',)}


def test_a_wrong_delimiter_is_not_blamed_on_rows(raw: Path) -> None:
    write_csv(raw, "file_name,text\na.png;one\nb.png;two\nc.png;three\n")
    assert refusal(raw) == (
        "data/raw/metadata.csv: no line has the 2 cells of the header (file_name, text); separate cells with ',', and"
        " put text that holds it in quotes"
    )
    (raw / "metadata.csv").write_text("file_name;text\na.png;one; two\nb.png;three\n")
    assert problems(raw) == [
        "data/raw/metadata.csv:2: 3 cells, and the header has 2 (file_name, text); put text with ';' in quotes"
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[\n{"file_name": "a.png", "text": "x"},\n{"file_name": "b.png", "text": "y"}\n]\n', "one JSON value over"),
        ('{\n"a.png": {"text": "x"}\n}\n', "one JSON value over several lines"),
        ('{"file_name": "a.png", "text": "x"},\n{"file_name": "b.png", "text": "y"},\n', "a ',' after lines"),
        ('{"file_name": "a.png", "text": "x; y"};\n{"file_name": "b.png", "text": "y"};\n', "a ';' after lines"),
    ],
)
def test_json_of_another_form_is_not_blamed_on_rows(raw: Path, text: str, what: str) -> None:
    (raw / "metadata.jsonl").write_text(text)
    found = refusal(raw)
    assert found.startswith(f"data/raw/metadata.jsonl: has {what}")
    assert found.endswith("; write one JSON object per line, with nothing between them")


def test_two_kinds_in_one_folder(raw: Path) -> None:
    (raw / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert refusal(raw) == "data/raw: metadata.csv and metadata.jsonl in one folder; keep one"


def test_a_picture_in_two_metadata_files(raw: Path) -> None:
    write_files(raw / "sub", "e.png")
    append(raw, json.dumps({"file_name": "sub/e.png", "text": "x"}).encode())
    write_rows(raw / "sub", [{"file_name": "e.png", "text": "x"}])
    assert problems(raw) == [
        "data/raw/sub/metadata.jsonl:1: 'sub/e.png' is named in data/raw/metadata.jsonl:3 already; remove one of the"
        " two rows"
    ]
    append(raw / "sub", b'{"file_name": "../a.png", "text": "x"}')
    assert "file_name: '../a.png' leaves data/raw/sub; expected a name relative to that folder" in problems(raw)[1]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_is_no_file(raw: Path, kind: str, name: str) -> None:
    path = raw / name
    (raw / "metadata.jsonl").rename("data/metadata.jsonl")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("../metadata.jsonl")
    what = f"'{name}' is a link that leaves data/raw; " if kind == "link" else f"'{name}' is not a regular file; "
    assert refusal(raw).startswith(f"data/raw/{name}: {what}")
