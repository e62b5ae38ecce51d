"""Tables metadata.jsonl and metadata.csv: rows with their places ``FILE:N``, where N is the first line of the row."""

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

from lora_dag.core.console import Problem, UserError, plural
from lora_dag.core.labels import type_name
from lora_dag.images.read import read_regular
from stages.prepare.captions import MAX_TEXT_BYTES, UTF16, decoded
from stages.prepare.file_names import MAX_SHOWN, Root, checked_file, has_controls
from stages.prepare.file_tree import IMAGE_SUFFIXES
from stages.prepare.listing import RowProblem, row_problems

MAX_METADATA_BYTES = 2**30
NOT_UTF8 = "is not UTF-8 text. Save the file as UTF-8."
FILE_NAME = "file_name"
DELIMITERS = (",", ";", "\t", "|")
"""Delimiters of CSV, which spreadsheets choose by country."""
BLANK_QUOTE = re.compile(r"\s+\"")
"""Start of a cell with a blank before its quote: then blanks after delimiters are skipped in the whole file."""


@dataclass(frozen=True)
class Row:
    number: int
    """First line of the row in the file."""
    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    file: str
    """Name relative to the root."""
    place: str
    columns: list[str]
    """Columns of any row, sorted."""
    rows: list[Row | RowProblem]
    """Rows in the order of the file, with a RowProblem for each that cannot be read."""


def read_table(root: Root, name: str) -> Table:
    """Return the rows of a metadata file.

    Raises:
        UserError: the file is not regular, is a link out of the source, or cannot be read to its end.
    """
    place = root.place(name)
    try:
        path = root.folder / checked_file(name, root)
    except UserError as error:
        raise error.at(place) from None
    blob = as_utf8(read_regular(path, name, MAX_METADATA_BYTES), place)
    return jsonl_table(blob, name, place) if name.endswith(".jsonl") else csv_table(blob, name, place)


def as_utf8(blob: bytes, place: str) -> bytes:
    """Return UTF-8 without a byte order mark. Damaged lines are kept, so that a message can name each by its number.

    Raises:
        UserError: the whole file is in another encoding.
    """
    if blob.startswith(UTF16):
        try:
            return decoded(blob).encode()
        except UnicodeError:
            raise UserError(Problem("not-utf8", f"{place}: the file {NOT_UTF8}")) from None
    blob = blob.removeprefix(codecs.BOM_UTF8)
    if b"\0" in blob.partition(b"\n")[0]:
        raise UserError(Problem("not-utf8", f"{place}: the file {NOT_UTF8}"))
    bad = [] if is_utf8(blob) else [n for n, line in enumerate(blob.splitlines(), start=1) if not is_utf8(line)]
    if len(bad) > 1 and blob.decode("utf-8", "ignore").isascii():  # not one accent is UTF-8
        text = f"{place}: {len(bad)} lines, such as line {bad[0]}, are not UTF-8 text. Save the file as UTF-8."
        raise UserError(Problem("not-utf8", text))
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
    if len(rows) > len(valid_rows(rows)):
        refuse_other_json(blob.decode("utf-8", "replace").strip(), place)
    return Table(name, place, sorted({key for row in valid_rows(rows) for key in row.values}), rows)


def jsonl_row(line: bytes, number: int, place: str) -> Row | RowProblem:
    try:
        value = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RowProblem("not-utf8", f"the line {NOT_UTF8}", place)
    except UserError as error:
        return row_problems(error.problems, place)[0]
    except (ValueError, RecursionError) as error:
        return RowProblem("json-invalid", f"the line is not valid JSON ({error}). Write one object per line.", place)
    if not isinstance(value, dict):
        text = f"got {type_name(value)}, but one JSON object per line is expected."
        return RowProblem("json-not-object", text, place)
    return Row(number, place, value)


def refuse_other_json(text: str, place: str) -> None:
    """Refuse JSON of another form than one object per line, with one line about the file.

    Raises:
        UserError: the file is JSON of another form.
    """
    for candidate, fault in (
        (text, "one JSON value over several lines"),
        (f"[{text.rstrip(',')}]", "a ',' after lines"),
        (re.sub(r"\}\s*;\s*(?=\n|$)", "},", f"[{text}").rstrip(",") + "]", "a ';' after lines"),
    ):
        with contextlib.suppress(ValueError, RecursionError):
            if "\n" in text and json.loads(candidate):
                text = f"{place}: the file has {fault}. Write one JSON object per line, with nothing between them."
                raise UserError(Problem("json-not-lines", text))


def parse_json(text: str) -> Any:
    """Return the value of JSON text. A key that is in an object twice is refused, since the last one would win.

    Raises:
        UserError: a key is in an object twice.
        ValueError, RecursionError: the text is not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(
                Problem("json-key-twice", f"the object has the key {json.dumps(twice)[:80]} twice. Remove one.")
            )
        return values

    return json.loads(text, object_pairs_hook=unique)


def parse_object(blob: bytes, name: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        name: the file's name in messages.

    Raises:
        UserError: the file holds something else.
    """
    try:
        value = parse_json(decoded(blob))
    except UnicodeDecodeError:
        raise UserError(Problem("not-utf8", f"'{name}' is not UTF-8 text. Save it as UTF-8.")) from None
    except UserError as error:
        raise error.at(f"'{name}'") from None
    except (ValueError, RecursionError) as error:
        raise UserError(Problem("json-invalid", f"'{name}' is not valid JSON ({error}). Correct it.")) from None
    if not isinstance(value, dict):
        text = f"'{name}' holds {type_name(value)}, but one JSON object is expected."
        raise UserError(Problem("json-not-object", text))
    return value


def csv_table(blob: bytes, name: str, place: str) -> Table:
    text = blob.decode("utf-8", "surrogateescape")  # so that all bad rows are reported, not only the first
    delimiter = delimiter_of(text)
    lines = csv_lines(text, delimiter, False, place)
    if any(BLANK_QUOTE.match(cell) for _, cells in lines for cell in cells):
        lines = csv_lines(text, delimiter, True, place)
    if lines and lines[0][1][0].startswith("sep="):  # written by Excel
        lines = lines[1:]
    if not lines:
        return Table(name, place, [], [])
    (start, first), *others = lines
    header = without_empty_ends([cell.strip() for cell in first], 0)
    if len(set(header)) < len(header):
        text = f"{place}:{start}: the header {', '.join(header)} has a column twice. Rename one."
        raise UserError(Problem("column-twice", text))
    if FILE_NAME not in header and any(PurePosixPath(cell).suffix.lower() in IMAGE_SUFFIXES for cell in header):
        got = ", ".join(header)[:MAX_SHOWN]
        text = f"{place}:{start}: got {got}, but the first line must name the columns. Add {FILE_NAME},text above it."
        raise UserError(Problem("csv-without-header", text))
    rows = [
        csv_row(header, without_empty_ends(cells, len(header)), number, f"{place}:{number}", delimiter)
        for number, cells in others
    ]
    if len(rows) > 2 and not valid_rows(rows) and all(len(cells) != len(header) for _, cells in others):
        text = (
            f"{place}: no line has the {len(header)} cells of the header ({', '.join(header)})."
            f" Separate cells by {delimiter_name(delimiter)}, and put text that holds it in quotes."
        )
        raise UserError(Problem("csv-cells", text))
    return Table(name, place, sorted(header), rows)


def delimiter_of(text: str) -> str:
    """Return the delimiter of the header, found by the column of file names, or a comma without such a column."""
    header = next((line for line in text.splitlines() if line.strip() and not line.startswith("sep=")), "")
    for delimiter in DELIMITERS:
        if FILE_NAME in [cell.strip(' "') for cell in header.split(delimiter)]:
            return delimiter
    return ","


def csv_lines(text: str, delimiter: str, skips_blanks: bool, place: str) -> list[tuple[int, list[str]]]:
    """Return (first line of a row, its cells) of each row that is not empty.

    Raises:
        UserError: a quote is not closed, or no delimiter follows it.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=skips_blanks, strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        with max_cell_size(MAX_TEXT_BYTES):
            for cells in reader:
                if any(cells):
                    rows.append((start, cells))
                start = reader.line_num + 1
    except csv.Error as error:  # the number of further rows is unknown, so on_bad skip does not apply
        reason = "a quote is not closed" if "unexpected end" in str(error) else error
        text = f'{place}:{start}: the row is not valid CSV ({reason}). Quote a cell as "...", with "" for " in it.'
        raise UserError(Problem("csv-invalid", text)) from None
    return rows


def without_empty_ends(cells: list[str], least: int) -> list[str]:
    """Return the cells without the empty ones that a spreadsheet adds after the last column.

    Args:
        least: number of cells to keep.
    """
    count = len(cells)
    while count > least and not cells[count - 1]:
        count -= 1
    return cells[:count]


def delimiter_name(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f"'{delimiter}'"


@contextmanager
def max_cell_size(num_characters: int) -> Iterator[None]:
    """Set the largest size of a CSV cell inside ``with``."""
    before = csv.field_size_limit(num_characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def csv_row(header: list[str], cells: list[str], number: int, place: str, delimiter: str) -> Row | RowProblem:
    if any("\udc80" <= character <= "\udcff" for cell in cells if has_controls(cell) for character in cell):
        return RowProblem("not-utf8", f"the row {NOT_UTF8}", place)
    if len(cells) != len(header):
        text = (
            f"the row has {plural(len(cells), 'cell')}, but the header has {len(header)} ({', '.join(header)})."
            f" Put text with {delimiter_name(delimiter)} in quotes."
        )
        return RowProblem("csv-cells", text, place)
    return Row(number, place, dict(zip(header, cells, strict=True)))


def valid_rows(rows: Iterable[Row | RowProblem]) -> list[Row]:
    return [row for row in rows if isinstance(row, Row)]
