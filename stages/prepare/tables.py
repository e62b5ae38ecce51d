"""metadata.jsonl and metadata.csv -> rows with their places: ``FILE:N``, the line on which the row starts."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lora_dag.core.console import UserError, plural
from lora_dag.pictures.read import read_regular
from stages.prepare.captions import MAX_TEXT_BYTES, UTF16, decoded
from stages.prepare.listing import Problem
from stages.prepare.names import MAX_SHOWN, SUFFIXES, Root, checked_file, has_controls

MAX_METADATA_BYTES = 2**30
NOT_UTF8 = "not UTF-8 text; save the file as UTF-8"
FILE_NAME = "file_name"
DELIMITERS = (",", ";", "\t", "|")
"""Of CSV, as spreadsheets of several countries save it."""
BLANK_QUOTE = re.compile(r"\s+\"")
"""Where a cell starts like this, blanks after the delimiter are no part of the cells, or its quote would be text."""


@dataclass(frozen=True)
class Row:
    number: int
    """Line of the file."""
    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    file: str
    """Name relative to the root."""
    place: str
    columns: list[str]
    """Of any row, sorted."""
    rows: list[Row | Problem]
    """In the order of the file; a Problem where a row cannot be read."""


def read_table(root: Root, name: str) -> Table:
    """A metadata file's rows.

    Raises:
        UserError: it is no regular file, leaves the source, or cannot be read to its end.
    """
    place = root.place(name)
    try:
        path = root.folder / checked_file(name, root)
    except UserError as error:
        raise UserError(*(f"{place}: {problem}" for problem in error.problems)) from None
    blob = as_utf8(read_regular(path, name, MAX_METADATA_BYTES), place)
    return jsonl_table(blob, name, place) if name.endswith(".jsonl") else csv_table(blob, name, place)


def as_utf8(blob: bytes, place: str) -> bytes:
    """UTF-8 without a byte order mark; damaged lines stay as they are, so that a message can name each by its number.

    Raises:
        UserError: all of it is in another encoding.
    """
    if blob.startswith(UTF16):
        try:
            return decoded(blob).encode()
        except UnicodeError:
            raise UserError(f"{place}: {NOT_UTF8}") from None
    blob = blob.removeprefix(codecs.BOM_UTF8)
    if b"\0" in blob.partition(b"\n")[0]:
        raise UserError(f"{place}: {NOT_UTF8}")
    bad = [] if is_utf8(blob) else [n for n, line in enumerate(blob.splitlines(), start=1) if not is_utf8(line)]
    if len(bad) > 1 and blob.decode("utf-8", "ignore").isascii():  # no accent in it is UTF-8
        raise UserError(f"{place}: {len(bad)} lines, such as line {bad[0]}, are {NOT_UTF8}")
    return blob


def is_utf8(blob: bytes) -> bool:
    try:
        blob.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def jsonl_table(blob: bytes, name: str, place: str) -> Table:
    rows = [
        jsonl_row(line, number, f"{place}:{number}")
        for number, line in enumerate(blob.splitlines(), start=1)
        if line.strip()
    ]
    if len(rows) > len(good(rows)):
        refuse_other_json(blob.decode("utf-8", "replace").strip(), place)
    return Table(name, place, sorted({key for row in good(rows) for key in row.values}), rows)


def jsonl_row(line: bytes, number: int, place: str) -> Row | Problem:
    try:
        value = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Problem(place, NOT_UTF8)
    except UserError as error:
        return Problem(place, str(error))
    except (ValueError, RecursionError) as error:
        return Problem(place, f"no valid JSON ({error}); expected one object per line")
    if not isinstance(value, dict):
        return Problem(place, f"got {type(value).__name__}; expected one JSON object per line")
    return Row(number, place, value)


def refuse_other_json(text: str, place: str) -> None:
    """One line about the file, where it is JSON of another form than an object per line.

    Raises:
        UserError: it is.
    """
    for candidate, what in (
        (text, "one JSON value over several lines"),
        (f"[{text.rstrip(',')}]", "a ',' after lines"),
        (re.sub(r"\}\s*;\s*(?=\n|$)", "},", f"[{text}").rstrip(",") + "]", "a ';' after lines"),
    ):
        with contextlib.suppress(ValueError, RecursionError):
            if "\n" in text and json.loads(candidate):
                raise UserError(f"{place}: has {what}; write one JSON object per line, with nothing between them")


def parse_json(text: str) -> Any:
    """JSON in which no object has a key twice: the last one would win without a word.

    Raises:
        UserError: one has.
        ValueError, RecursionError: it is no JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(f"{json.dumps(twice)[:80]} stands there twice; remove one")
        return values

    return json.loads(text, object_pairs_hook=unique)


def parse_object(blob: bytes, shown: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        UserError: it holds something else.
    """
    try:
        value = parse_json(decoded(blob))
    except UnicodeDecodeError:
        raise UserError(f"'{shown}' is not UTF-8 text; save it as UTF-8") from None
    except UserError as error:
        raise UserError(f"'{shown}': {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{shown}' is no valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"'{shown}' holds a {type(value).__name__}; expected one JSON object")
    return value


def csv_table(blob: bytes, name: str, place: str) -> Table:
    text = blob.decode("utf-8", "surrogateescape")  # so that each bad row is told, not the first
    delimiter = delimiter_of(text)
    lines = csv_lines(text, delimiter, False, place)
    if any(BLANK_QUOTE.match(cell) for _, cells in lines for cell in cells):
        lines = csv_lines(text, delimiter, True, place)
    if lines and lines[0][1][0].startswith("sep="):  # a line of Excel's
        lines = lines[1:]
    if not lines:
        return Table(name, place, [], [])
    (start, first), *others = lines
    header = without_empty_ends([cell.strip() for cell in first], 0)
    if len(set(header)) < len(header):
        raise UserError(f"{place}:{start}: a column twice in the header {', '.join(header)}; rename one")
    if FILE_NAME not in header and any(PurePosixPath(cell).suffix.lower() in SUFFIXES for cell in header):
        shown = ", ".join(header)[:MAX_SHOWN]
        raise UserError(f"{place}:{start}: got {shown}; expected the names of the columns, such as {FILE_NAME},text")
    rows = [
        csv_row(header, without_empty_ends(cells, len(header)), number, f"{place}:{number}", delimiter)
        for number, cells in others
    ]
    if len(rows) > 2 and not good(rows) and all(len(cells) != len(header) for _, cells in others):
        raise UserError(
            f"{place}: no line has the {len(header)} cells of the header ({', '.join(header)}); separate cells with"
            f" {shown_delimiter(delimiter)}, and put text that holds it in quotes"
        )
    return Table(name, place, sorted(header), rows)


def delimiter_of(text: str) -> str:
    """What separates the header's cells, told by the column of file names; a comma where there is none."""
    header = next((line for line in text.splitlines() if line.strip() and not line.startswith("sep=")), "")
    for delimiter in DELIMITERS:
        if FILE_NAME in [cell.strip(' "') for cell in header.split(delimiter)]:
            return delimiter
    return ","


def csv_lines(text: str, delimiter: str, skips_blanks: bool, place: str) -> list[tuple[int, list[str]]]:
    """(line that a row starts on, its cells) of each row that is not empty.

    Raises:
        UserError: a quote is not closed, or what follows it is no delimiter.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=skips_blanks, strict=True)
    found: list[tuple[int, list[str]]] = []
    start = 1
    try:
        with cells_of(MAX_TEXT_BYTES):
            for cells in reader:
                if any(cells):
                    found.append((start, cells))
                start = reader.line_num + 1
    except csv.Error as error:  # nobody knows how many rows are behind it, so they are not left out either
        what = "a quote is not closed" if "unexpected end" in str(error) else error
        raise UserError(f'{place}:{start}: no valid CSV ({what}); quote a cell as "...", with "" for " in it') from None
    return found


def without_empty_ends(cells: list[str], least: int) -> list[str]:
    """Without the empty cells that a spreadsheet adds behind the last column."""
    count = len(cells)
    while count > least and not cells[count - 1]:
        count -= 1
    return cells[:count]


def shown_delimiter(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f"'{delimiter}'"


@contextmanager
def cells_of(num_characters: int) -> Iterator[None]:
    """Inside, a cell of CSV may have this many."""
    before = csv.field_size_limit(num_characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def csv_row(header: list[str], cells: list[str], number: int, place: str, delimiter: str) -> Row | Problem:
    if any("\udc80" <= character <= "\udcff" for cell in cells if has_controls(cell) for character in cell):
        return Problem(place, NOT_UTF8)
    if len(cells) != len(header):
        columns = f"the header has {len(header)} ({', '.join(header)})"
        held = "commas" if delimiter == "," else shown_delimiter(delimiter)
        return Problem(place, f"{plural(len(cells), 'cell')}, and {columns}; put text with {held} in quotes")
    return Row(number, place, dict(zip(header, cells, strict=True)))


def good(rows: Iterable[Row | Problem]) -> list[Row]:
    return [row for row in rows if isinstance(row, Row)]
