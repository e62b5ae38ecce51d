"""metadata.jsonl, metadata.csv and metadata.parquet -> rows with their places.

A place is ``FILE:N``: the line on which the row starts, or in Parquet the row, from 1.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.console import UserError
from stages.core.containers import open_parquet, read_regular
from stages.prepare.listing import Problem
from stages.prepare.names import Root, checked_file, has_controls

MAX_METADATA_BYTES = 2**30
NOT_UTF8 = "not UTF-8 text; save the file as UTF-8"


@dataclass(frozen=True)
class Row:
    number: int
    """Line, or row from 1."""
    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    file: str
    """Name relative to the root."""
    place: str
    unit: str
    """What ``Row.number`` counts: line or row."""
    columns: list[str]
    """Of any row, sorted."""
    rows: list[Row | Problem]
    """In the order of the file; a Problem where a row cannot be read."""


def read_table(root: Root, name: str, columns: Iterable[str]) -> Table:
    """A metadata file's rows; of Parquet, those columns alone.

    Raises:
        UserError: it is no regular file, leaves the source, or cannot be read at all.
    """
    place = root.place(name)
    try:
        path = root.folder / checked_file(name, root)
    except UserError as error:
        raise UserError(*(f"{place}: {problem}" for problem in error.problems)) from None
    if name.endswith(".parquet"):
        return parquet_table(path, name, place, columns)
    blob = read_regular(path, name, MAX_METADATA_BYTES).removeprefix(b"\xef\xbb\xbf")
    return jsonl_table(blob, name, place) if name.endswith(".jsonl") else csv_table(blob, name, place)


def jsonl_table(blob: bytes, name: str, place: str) -> Table:
    rows = [
        jsonl_row(line, number, f"{place}:{number}")
        for number, line in enumerate(blob.splitlines(), start=1)
        if line.strip()
    ]
    return Table(name, place, "line", sorted({key for row in good(rows) for key in row.values}), rows)


def jsonl_row(line: bytes, number: int, place: str) -> Row | Problem:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Problem(place, NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return Problem(place, f"no valid JSON ({error}); expected one object per line")
    if not isinstance(value, dict):
        return Problem(place, f"got {type(value).__name__}; expected one JSON object per line")
    return Row(number, place, value)


def csv_table(blob: bytes, name: str, place: str) -> Table:
    text = blob.decode("utf-8", "surrogateescape")  # so that each bad row is told, not the first
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[Row | Problem] = []
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not any(cells):
                continue
            if header:
                rows.append(csv_row(header, cells, number, f"{place}:{number}"))
                continue
            header = cells
            if len(set(header)) < len(header):
                raise UserError(f"{place}:{number}: a column twice in the header {', '.join(header)}; rename one")
    except csv.Error as error:
        rows.append(Problem(f"{place}:{start}", f"no valid CSV ({error}); the rows from here on are not read"))
    return Table(name, place, "line", sorted(header), rows)


def csv_row(header: list[str], cells: list[str], number: int, place: str) -> Row | Problem:
    if any("\udc80" <= character <= "\udcff" for cell in cells if has_controls(cell) for character in cell):
        return Problem(place, NOT_UTF8)
    if len(cells) != len(header):
        columns = f"the header has {len(header)} ({', '.join(header)})"
        return Problem(place, f"{len(cells)} cells, and {columns}; put text with commas in quotes")
    return Row(number, place, dict(zip(header, cells, strict=True)))


def parquet_table(path: Path, name: str, place: str, columns: Iterable[str]) -> Table:
    with open_parquet(path, place) as file:
        there = sorted(file.schema_arrow.names)
        wanted = [column for column in dict.fromkeys(columns) if column in there]
        table = file.read(columns=wanted)
        values = [as_list(table.column(column)) for column in wanted]
    rows = [
        Row(number, f"{place}:{number}", dict(zip(wanted, cells, strict=True)))
        for number, cells in enumerate(zip(*values, strict=True), start=1)
    ]
    return Table(name, place, "row", there, [problem_of(row) or row for row in rows])


class NotUtf8:
    """Stands for a value that cannot be decoded."""


def as_list(column: Any) -> list[Any]:
    """A column's values; Parquet does not promise that its strings are UTF-8."""

    def values() -> Iterator[Any]:
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield NotUtf8()

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return list(values())


def problem_of(row: Row) -> Problem | None:
    """What no later check of a row's values can tell."""
    if any(isinstance(value, NotUtf8) for value in row.values.values()):
        return Problem(row.place, NOT_UTF8)
    return None


def good(rows: Iterable[Row | Problem]) -> list[Row]:
    return [row for row in rows if isinstance(row, Row)]
