from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import assert_are, assert_is
from tests.helpers.sources import captions, listed, problems, refusal, splits, write_files
from tests.helpers.workspace import write_rows


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
    ("row", "expected"),
    [
        (b'{"file_name": "../x.png", "text": "x"}', ("name-outside-source", "file_name: '../x.png'", "data/raw")),
        (b'{"file_name": "s/../../x.png", "text": "x"}', ("name-outside-source", "'s/../../x.png'")),
        (b'{"file_name": "/etc/x.png", "text": "x"}', ("name-outside-source", "'/etc/x.png'")),
        (b'{"file_name": "x.png", "text": "x"}', ("file-missing", "file_name: 'x.png'", "data/raw")),
        (b'{"file_name": "s\\\\x.png", "text": "x"}', ("file-missing", "by '/'")),
        (b'{"file_name": "c.png"}', ("caption-missing", "'text'", '""')),
        (b'{"file_name": "c.png", "text": null}', ("caption-not-text", "text: got null", '""')),
        (b'{"file_name": "c.png", "text": 3}', ("caption-not-text", "text: got 3")),
        (b'{"file_name": "c.png", "text": NaN}', ("caption-not-text", "text: got NaN")),
        (b'{"file_name": "c.png", "text": []}', ("caption-not-text", "text: got []")),
        (b'{"file_name": "c.png", "text": ["x", 3]}', ("caption-not-text", 'text: got ["x", 3]')),
        (b'{"file_name": "c.png", "text": {"x": 3}}', ("caption-not-text", 'text: got {"x": 3}')),
        (b'{"file_name": "c.png", "text": "caf\xe9"}', ("not-utf8", "UTF-8")),
        (b'{"file_name": "c.png", "text": "\\ud800"}', ("caption-characters", 'text: "\\ud800"')),
        (b'{"file_name": "c.png", "text": ["x", "\\ud800"]}', ("caption-characters", 'text: "\\ud800"')),
        (b'{"file_name": "b.png", "text": "x"}', ("image-listed-twice", "'b.png'", "line 2")),
        (b'{"file_name": "./b.png", "text": "x"}', ("image-listed-twice", "'b.png'", "line 2")),
        (b"{oops", ("json-invalid", "(Expecting property name")),
        (b"[" * 100_000, ("json-invalid",)),
        (b'{"file_name": "c.png", "text": "x", "text": "y"}', ("json-key-twice", '"text"')),
        (b'{"file_name": "c.png", "text": "a\\u0000b"}', ("caption-characters", 'text: "a\\u0000b"')),
        (b'{"file_name": "c.png", "text": ["x", "\\u001b[31m"]}', ("caption-characters", 'text: "\\u001b[31m"')),
        (b'["c.png"]', ("json-not-object", "got list")),
        (b'{"text": "x"}', ("name-invalid", "file_name: got null", "data/raw")),
        (b'{"file_name": 7, "text": "x"}', ("name-invalid", "file_name: got 7")),
        (b'{"file_name": "", "text": "x"}', ("name-invalid", 'file_name: got ""')),
        (b'{"file_name": ".", "text": "x"}', ("file-not-regular", "file_name: '.'")),
        (b'{"file_name": "a\\u0000.png", "text": "x"}', ("name-unsafe", 'file_name: "a\\u0000.png"')),
        (b'{"file_name": "a\\n.png", "text": "x"}', ("name-unsafe", 'file_name: "a\\n.png"')),
        (
            b'{"file_name": "\\ud800.png", "text": "x"}',
            ("name-unsafe", 'file_name: "\\ud800.png"', "a byte that is not UTF-8"),
        ),
        (b'{"file_name": "-c.png", "text": "x"}', ("name-unsafe", "file_name: '-c.png'")),
        (b'{"file_name": "outside.png", "text": "x"}', ("name-outside-source", "file_name: 'outside.png'")),
        (b'{"file_name": "away/x.png", "text": "x"}', ("name-outside-source", "file_name: 'away/x.png'")),
        (b'{"file_name": "dangling.png", "text": "x"}', ("file-missing", "file_name: 'dangling.png'")),
        (b'{"file_name": "folder.png", "text": "x"}', ("file-not-regular", "file_name: 'folder.png'")),
        (b'{"file_name": "fifo.png", "text": "x"}', ("file-not-regular", "file_name: 'fifo.png'")),
    ],
)
def test_bad_row(raw: Path, row: bytes, expected: tuple[str, ...]) -> None:
    write_files(Path("data/elsewhere"), "x.png")
    (raw / "outside.png").symlink_to("../elsewhere/x.png")
    (raw / "away").symlink_to("../elsewhere")
    (raw / "dangling.png").symlink_to("nothing.png")
    (raw / "folder.png").mkdir()
    os.mkfifo(raw / "fifo.png")
    append(raw, row)
    listing = listed(raw)
    (problem,) = listing.problems
    assert problem.place == "data/raw/metadata.jsonl:3"
    assert_is(problem, *expected)
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
        ("6", None),  # the image is line 1's, and stays
    ]


def test_captions_are_kept_as_written(raw: Path) -> None:
    texts: list[Any] = ["", "  ", "größer, 大きい", ["x", ""], "long " * 2000]
    rows = [{"file_name": name, "text": text} for name, text in zip(("a.png", "b.png", "c.png"), texts, strict=False)]
    write_rows(raw, [*rows, {"file_name": "d.png", "text": texts[3]}])
    assert list(captions(listed(raw)).values()) == [("",), ("  ",), ("größer, 大きい",), ("x", "")]
    write_rows(raw, [{"file_name": "a.png", "text": texts[4]}])
    assert captions(listed(raw)) == {"a.png": ("long " * 2000,)}


def test_unlisted_images_are_counted(raw: Path) -> None:
    write_files(raw, "sub/e.webp", "LICENSE", ".hidden.png", ".cache/x.png", c="not read")
    listing = listed(raw)
    assert listing.unlisted == ["c.png", "d.png", "sub/e.webp"]
    assert_are(
        listing.warnings,
        ("image-unlisted", "3 images in data/raw", "metadata.jsonl"),
        ("caption-file-ignored", "1 .txt file in data/raw", "metadata.jsonl"),
    )


def test_bom_crlf_and_blank_lines(raw: Path) -> None:
    rows = ['{"file_name": "a.png", "text": "größer"}', "", '{"file_name": "b.png", "text": 3}']
    (raw / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")
    listing = listed(raw)
    assert captions(listing) == {"a.png": ("größer",)}
    assert_is(listing.problems[0], "caption-not-text", "data/raw/metadata.jsonl:3: text: got 3")


@pytest.mark.parametrize(("name", "text"), [("metadata.jsonl", "\n"), ("metadata.csv", ""), ("metadata.csv", "text\n")])
def test_empty_metadata(raw: Path, name: str, text: str) -> None:
    (raw / "metadata.jsonl").unlink()
    (raw / name).write_text(text)
    assert_is(refusal(raw), "dataset-empty", f"data/raw/{name}: ")


def test_empty_folder(raw: Path) -> None:
    Path("data/none").mkdir()
    assert_is(refusal("data/none"), "dataset-empty", "data/none: ", "nothing")


@pytest.mark.parametrize(
    "names", [("E.png", "e.png"), tuple(unicodedata.normalize(f, "é.png") for f in ("NFC", "NFD"))]
)
def test_names_that_collide_elsewhere(raw: Path, names: tuple[str, str]) -> None:
    write_files(raw, *names)
    write_rows(raw, [{"file_name": name, "text": "x"} for name in names])
    listing = listed(raw)
    (problem,) = listing.problems
    assert_is(problem, "names-clash", "data/raw/metadata.jsonl:2: ", f"'{names[1]}'", f"'{names[0]}' (on line 1)")
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
    problem = refusal(raw, caption_column="caption")
    assert_is(
        problem,
        "column-missing",
        "params.yaml dataset.caption_column: 'caption'",
        "data/raw/metadata.jsonl",
        " Name text.",
    )
    problem = refusal(raw, subsets=[{"path": ".", "caption_column": "x"}])
    assert_is(problem, "column-missing", "params.yaml dataset.subsets.0.caption_column: 'x'")
    write_rows(raw, [{"file_name": "a.png"}])
    assert_is(refusal(raw), "column-missing", "'text'", "only file_name")


def test_missing_file_name_column_is_one_line(raw: Path) -> None:
    write_rows(raw, [{"image": "a.png", "text": "x"}] * 2)
    assert_is(
        refusal(raw), "column-missing", "data/raw/metadata.jsonl: ", "'file_name'", "image, text", "Rename 'image'"
    )


def test_split_column(raw: Path) -> None:
    rows = [{"file_name": "a.png", "text": "x", "split": "val"}, {"file_name": "b.png", "text": "x", "split": 3}]
    write_rows(raw, rows)
    assert splits(listed(raw)) == {"a.png": "val", "b.png": None}
    (problem,) = problems(raw, heldout_fraction=None, heldout_split="validation")
    assert_is(problem, "split-invalid", "data/raw/metadata.jsonl:2: split: got 3", "'validation'")


# Other kinds of files


def write_csv(folder: Path, text: str | bytes) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_csv(raw: Path) -> None:
    write_csv(raw, '\ufefffile_name,text,n\r\na.png,"one, and\nmore",1\r\n\r\nb.png,,2\r\n../x.png,x,3\r\n')
    listing = listed(raw)
    assert captions(listing) == {"a.png": ("one, and\nmore",), "b.png": ("",)}
    assert [entry.place for entry in listing.entries] == ["data/raw/metadata.csv:2", "data/raw/metadata.csv:5"]
    assert_is(listing.problems[0], "name-outside-source", "data/raw/metadata.csv:6: file_name: '../x.png'")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"c.png,a cat, black", ("csv-cells", "3 cells", "2 (file_name, text)", "','")),
        (b"c.png", ("csv-cells", "1 cell", "2 (file_name, text)")),
        (b"c.png,caf\xe9", ("not-utf8",)),
        (b"c.png,a \x07 cat", ("caption-characters", 'text: "a \\u0007 cat"')),
    ],
)
def test_bad_csv_row(raw: Path, row: bytes, expected: tuple[str, ...]) -> None:
    write_csv(raw, b"file_name,text\na.png,one\n" + row + b"\n")
    listing = listed(raw)
    (problem,) = listing.problems
    assert problem.place == "data/raw/metadata.csv:3"
    assert_is(problem, *expected)
    assert captions(listing) == {"a.png": ("one",)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'c.png,"two\nb.png,x', "a quote is not closed"),
        (b'c.png,"two\nb.png,"x"', "',' expected after '\"'"),
        (b'c.png,"a "red" cat"', "',' expected after '\"'"),
        (b"c.png," + b"x" * (2**20 + 1), "field larger than field limit (1048576)"),
    ],
)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_csv_that_cannot_be_read_to_its_end(raw: Path, row: bytes, reason: str, on_bad: str) -> None:
    """The number of lost rows is unknown, so on_bad skip does not apply."""
    write_csv(raw, b"file_name,text\na.png,one\n" + row + b"\nd.png,four\n")
    assert_is(refusal(raw, on_bad=on_bad), "csv-invalid", "data/raw/metadata.csv:3: ", f"({reason})")


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
def test_metadata_with_a_byte_order_mark(raw: Path, name: str, encoding: str) -> None:
    """Excel ("Unicode text") and PowerShell write UTF-16 with a byte order mark."""
    (raw / "metadata.jsonl").unlink()
    (raw / name).write_text(ROWS[name], encoding=encoding)
    assert captions(listed(raw)) == {"a.png": ("größer",), "b.png": ("é",)}


@pytest.mark.parametrize("name", ROWS)
def test_metadata_in_another_encoding_is_one_line(raw: Path, name: str) -> None:
    (raw / "metadata.jsonl").unlink()
    (raw / name).write_text(ROWS[name], encoding="utf-16-le")
    assert_is(refusal(raw), "not-utf8", f"data/raw/{name}: ")
    (raw / name).write_text(ROWS[name], encoding="cp1252")
    first = 2 if name.endswith(".csv") else 1
    assert_is(refusal(raw), "not-utf8", f"data/raw/{name}: 2 lines", f"line {first},")
    (raw / name).write_bytes(ROWS[name].encode().replace("é".encode(), b"\xe9"))  # one line is damaged
    assert_are(problems(raw), ("not-utf8", f"data/raw/{name}:{first + 1}: "))


def test_long_names_are_echoed_in_part(raw: Path) -> None:
    for name, expected in (
        ("x" * 10**6, ("name-unsafe", "1,000,000 characters", "4,096")),
        ("y" * 200, ("file-missing",)),
    ):
        write_rows(raw, [{"file_name": name, "text": "x"}])
        (problem,) = problems(raw)
        assert_is(problem, *expected)
        assert len(problem) < 260


def test_csv_header(raw: Path) -> None:
    write_csv(raw, "file_name,text,text\na.png,x,y\n")
    assert_is(refusal(raw), "column-twice", "data/raw/metadata.csv:1: ", "file_name, text, text")
    (raw / "metadata.csv").write_text("image;text\na.png;x\n")
    assert_is(refusal(raw), "column-missing", "data/raw/metadata.csv: ", "'file_name'", "image;text")
    (raw / "metadata.csv").write_text("Image,text\na.png,x\n")
    assert_is(refusal(raw), "column-missing", "Image, text", "Rename 'Image'")
    (raw / "metadata.csv").write_text("a.png,a cat\nb.png,a dog\n")
    assert_is(refusal(raw), "csv-without-header", "data/raw/metadata.csv:1: got a.png, a cat", "file_name,text")


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


def test_blanks_in_csv_are_kept_before_unquoted_text(raw: Path) -> None:
    write_csv(raw, 'file_name,text\na.png, one\nb.png,"  two"\nc.png,"a ""b"", c"\n')
    assert captions(listed(raw)) == {"a.png": (" one",), "b.png": ("  two",), "c.png": ('a "b", c',)}


def test_wrong_delimiter_is_one_line(raw: Path) -> None:
    write_csv(raw, "file_name,text\na.png;one\nb.png;two\nc.png;three\n")
    assert_is(refusal(raw), "csv-cells", "data/raw/metadata.csv: ", "2 cells", "(file_name, text)", "','")
    (raw / "metadata.csv").write_text("file_name;text\na.png;one; two\nb.png;three\n")
    assert_are(problems(raw), ("csv-cells", "data/raw/metadata.csv:2: ", "3 cells", "';'"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[\n{"file_name": "a.png", "text": "x"},\n{"file_name": "b.png", "text": "y"}\n]\n', "one JSON value over"),
        ('{\n"a.png": {"text": "x"}\n}\n', "one JSON value over several lines"),
        ('{"file_name": "a.png", "text": "x"},\n{"file_name": "b.png", "text": "y"},\n', "a ',' after lines"),
        ('{"file_name": "a.png", "text": "x; y"};\n{"file_name": "b.png", "text": "y"};\n', "a ';' after lines"),
    ],
)
def test_json_of_another_form_is_one_line(raw: Path, text: str, fault: str) -> None:
    (raw / "metadata.jsonl").write_text(text)
    assert_is(refusal(raw), "json-not-lines", "data/raw/metadata.jsonl: ", fault)


def test_two_kinds_in_one_folder(raw: Path) -> None:
    (raw / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert_is(refusal(raw), "metadata-ambiguous", "data/raw: ", "metadata.csv and metadata.jsonl")


def test_an_image_in_two_metadata_files(raw: Path) -> None:
    write_files(raw / "sub", "e.png")
    append(raw, json.dumps({"file_name": "sub/e.png", "text": "x"}).encode())
    write_rows(raw / "sub", [{"file_name": "e.png", "text": "x"}])
    (problem,) = problems(raw)
    assert_is(
        problem, "image-listed-twice", "data/raw/sub/metadata.jsonl:1: 'sub/e.png'", "in data/raw/metadata.jsonl:3"
    )
    append(raw / "sub", b'{"file_name": "../a.png", "text": "x"}')
    assert_is(problems(raw)[1], "name-outside-source", "file_name: '../a.png'", "data/raw/sub")


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_is_not_a_regular_file(raw: Path, kind: str, name: str) -> None:
    path = raw / name
    (raw / "metadata.jsonl").rename("data/metadata.jsonl")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("../metadata.jsonl")
    code = "name-outside-source" if kind == "link" else "file-not-regular"
    assert_is(refusal(raw), code, f"data/raw/{name}: '{name}'")
