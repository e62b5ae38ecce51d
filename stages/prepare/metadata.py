"""Pictures that rows of metadata.jsonl or metadata.csv name, in a subset's folder and those below."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from lora_dag.core.console import UserError
from stages.prepare import captions, split_names
from stages.prepare.listing import Problem
from stages.prepare.names import Tree, checked_file, checked_name, clash, folded, stem
from stages.prepare.subset_reader import SubsetReader, all_or_errors, collect_errors, instance_prompt, no_column
from stages.prepare.tables import Row, Table, good, read_table

OTHER_NAMES = {"file", "file_name", "file_path", "filename", "filepath", "image", "image_path", "img", "name", "path"}
"""What other programs call the column of file names, in lower case."""
Seen = dict[str, tuple[str, Table, Row]]
"""Folded name -> the name, and the row that it stands in."""


def read_metadata(reader: SubsetReader, tree: Tree) -> None:
    refuse_two_kinds(reader, tree)
    tables = all_or_errors(lambda name: read_table(reader.root, name), tree.metadata)
    prompt = require_columns(reader, tables)
    seen: Seen = {}
    named = set()
    for table in tables:
        for row in table.rows:
            if isinstance(row, Problem):
                reader.problems.append(row)
            else:
                named.add(add_row(reader, table, row, prompt, seen))
    reader.unlisted = [name for name in tree.pictures if name not in named]
    files = " and ".join(sorted({PurePosixPath(name).name for name in tree.metadata}))
    place = reader.place
    reader.warn_about(
        len(reader.unlisted),
        f"picture in {place} is not in {files} and is left out",
        f"pictures in {place} are not in {files} and are left out",
    )
    stems = {stem(name) for name in tree.pictures}
    num_texts = sum(stem(name) in stems for name in tree.texts)
    reader.warn_about(
        num_texts,
        f".txt file in {place} is not read, since {files} gives the captions",
        f".txt files in {place} are not read, since {files} gives the captions",
    )
    reader.warn_about(
        len(tree.to_import),
        f".parquet or .tar file in {place} is not read beside {files}",
        f".parquet or .tar files in {place} are not read beside {files}",
    )


def refuse_two_kinds(reader: SubsetReader, tree: Tree) -> None:
    folders: dict[str, list[str]] = {}
    for name in tree.metadata:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(PurePosixPath(name).name)
    problems = [
        f"{reader.root.place('' if folder == '.' else folder)}: {' and '.join(names)} in one folder; keep one"
        for folder, names in folders.items()
        if len(names) > 1
    ]
    if problems:
        raise UserError(*problems)


def require_columns(reader: SubsetReader, tables: list[Table]) -> tuple[str, ...] | None:
    """The instance prompt if it is every picture's caption; None if each has its own.

    Raises:
        UserError: one line, not one per row, where a column is named wrong or there are no rows.
    """
    rows = [row for table in tables for row in good(table.rows)]
    place = tables[0].place if len(tables) == 1 else f"{tables[0].place} and {len(tables) - 1} more"
    if not any(table.rows for table in tables):
        raise UserError(f"{place}: no rows; the dataset is empty")
    columns = sorted({column for table in tables for column in table.columns})
    if not rows:  # each is a problem of its own
        return None
    if "file_name" not in columns:
        other = next((f"; rename '{column}' to it" for column in columns if column.lower() in OTHER_NAMES), "")
        raise UserError(f"{place}: no column 'file_name'; it has {', '.join(columns) or 'no column at all'}{other}")
    return instance_prompt(reader, reader.column in columns, place, no_column(reader, columns, place))


def add_row(reader: SubsetReader, table: Table, row: Row, prompt: tuple[str, ...] | None, seen: Seen) -> str | None:
    """List a row's picture, or say everything that is wrong with the row; the picture's name, if it is one."""
    texts: list[str] = []
    found = prompt or collect_errors(texts, lambda: captions.from_value(row.values, reader.column))
    split = collect_errors(
        texts, lambda: split_names.from_column(row.values.get("split"), reader.dataset.heldout_split)
    )
    name = collect_errors(texts, lambda: row_file(reader, table, row.values.get("file_name")))
    twice = named_before(name, table, row, seen) if name is not None else None
    texts += [twice] if twice else []
    file_name = None if twice else name  # another row's picture is not this one's
    reader.problems += [Problem(row.place, text, file_name) for text in texts]
    if name is not None and found is not None and not texts:
        reader.add(name, found, row.place, split)
    return name


def named_before(name: str, table: Table, row: Row, seen: Seen) -> str | None:
    """What is wrong if an earlier row has the picture already."""
    first, other, earlier = seen.setdefault(folded(name), (name, table, row))
    if earlier is row:
        return None
    where = f"on line {earlier.number}" if other is table else f"in {earlier.place}"
    if first == name:
        return f"'{name}' is named {where} already; remove one of the two rows"
    return clash(name, first, where)


def row_file(reader: SubsetReader, table: Table, name: Any) -> str:
    folder = str(PurePosixPath(table.file).parent)
    try:
        return checked_file(checked_name(name, reader.root, "" if folder == "." else folder), reader.root)
    except UserError as error:
        raise UserError(*(f"file_name: {problem}" for problem in error.problems)) from None
