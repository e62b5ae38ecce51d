"""Images named by the rows of metadata.jsonl or metadata.csv, in a subset's folder and the folders below."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from lora_dag.core.console import Problem, UserError
from stages.prepare import captions, split_names
from stages.prepare.file_names import checked_file, checked_name, folded, name_clash, stem
from stages.prepare.file_tree import Tree
from stages.prepare.listing import RowProblem, row_problems
from stages.prepare.metadata_tables import Row, Table, read_table, valid_rows
from stages.prepare.subset_reader import SubsetReader, all_or_errors, collect_errors, instance_prompt, missing_column

OTHER_NAMES = {"file", "file_name", "file_path", "filename", "filepath", "image", "image_path", "img", "name", "path"}
"""Names of the column of file names in other programs, in lower case."""
Seen = dict[str, tuple[str, Table, Row]]
"""Folded name of an image -> its name, and the table and row that list it."""


def read_metadata(reader: SubsetReader, tree: Tree) -> None:
    refuse_two_kinds(reader, tree)
    tables = all_or_errors(lambda name: read_table(reader.root, name), tree.metadata)
    prompt = require_columns(reader, tables)
    seen: Seen = {}
    listed = set()
    for table in tables:
        for row in table.rows:
            if isinstance(row, RowProblem):
                reader.problems.append(row)
            else:
                listed.add(add_row(reader, table, row, prompt, seen))
    reader.unlisted = [name for name in tree.images if name not in listed]
    files = " and ".join(sorted({PurePosixPath(name).name for name in tree.metadata}))
    place = reader.place
    reader.warn_about(
        "image-unlisted",
        len(reader.unlisted),
        f"image in {place} is not in {files} and is ignored.",
        f"images in {place} are not in {files} and are ignored.",
    )
    stems = {stem(name) for name in tree.images}
    num_texts = sum(stem(name) in stems for name in tree.texts)
    reader.warn_about(
        "caption-file-ignored",
        num_texts,
        f".txt file in {place} is not read, since {files} has the captions.",
        f".txt files in {place} are not read, since {files} has the captions.",
    )
    reader.warn_about(
        "archive-ignored",
        len(tree.to_import),
        f".parquet or .tar file in {place} is not read beside {files}.",
        f".parquet or .tar files in {place} are not read beside {files}.",
    )


def refuse_two_kinds(reader: SubsetReader, tree: Tree) -> None:
    """Raise UserError for folders with both metadata.jsonl and metadata.csv."""
    folders: dict[str, list[str]] = {}
    for name in tree.metadata:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(PurePosixPath(name).name)
    problems = [
        Problem("metadata-ambiguous", f"the folder has both {' and '.join(names)}. Keep one of them.").at(
            reader.root.place("" if folder == "." else folder)
        )
        for folder, names in folders.items()
        if len(names) > 1
    ]
    if problems:
        raise UserError(*problems)


def require_columns(reader: SubsetReader, tables: list[Table]) -> tuple[str, ...] | None:
    """Return the instance prompt if it is the caption of every image, or None if each image has its own.

    Raises:
        UserError: a column is missing, or there are no rows. It is one line, not one per row.
    """
    rows = [row for table in tables for row in valid_rows(table.rows)]
    place = tables[0].place if len(tables) == 1 else f"{tables[0].place} and {len(tables) - 1} more"
    if not any(table.rows for table in tables):
        raise UserError(Problem("dataset-empty", f"{place}: the table has no rows. Add one row for each image."))
    columns = sorted({column for table in tables for column in table.columns})
    if not rows:  # each is a problem of its own
        return None
    if "file_name" not in columns:
        similar = next((f"Rename '{column}' to it" for column in columns if column.lower() in OTHER_NAMES), "Add it")
        listed = ", ".join(columns) or "no column"
        text = f"{place}: column 'file_name' is missing, and the table has {listed}. {similar}."
        raise UserError(Problem("column-missing", text))
    return instance_prompt(reader, reader.column in columns, place, missing_column(reader, columns, place))


def add_row(reader: SubsetReader, table: Table, row: Row, prompt: tuple[str, ...] | None, seen: Seen) -> str | None:
    """Add a row's image or the row's problems to the reader. Return the image's name if it is usable."""
    problems: list[Problem] = []
    texts = prompt or collect_errors(problems, lambda: captions.from_value(row.values, reader.column))
    split = collect_errors(
        problems, lambda: split_names.from_column(row.values.get("split"), reader.dataset.heldout_split)
    )
    name = collect_errors(problems, lambda: row_file(reader, table, row.values.get("file_name")))
    duplicate = duplicate_problem(name, table, row, seen) if name is not None else None
    problems += [duplicate] if duplicate else []
    file_name = None if duplicate else name  # the image belongs to the earlier row
    reader.problems += row_problems(problems, row.place, file_name)
    if name is not None and texts is not None and not problems:
        reader.add(name, texts, row.place, split)
    return name


def duplicate_problem(name: str, table: Table, row: Row, seen: Seen) -> Problem | None:
    """Return the problem that an earlier row already names the image, or None for a new image."""
    first, other, earlier = seen.setdefault(folded(name), (name, table, row))
    if earlier is row:
        return None
    location = f"on line {earlier.number}" if other is table else f"in {earlier.place}"
    if first == name:
        return Problem("image-listed-twice", f"'{name}' is already named {location}. Remove one of the two rows.")
    return name_clash(name, first, location)


def row_file(reader: SubsetReader, table: Table, name: Any) -> str:
    folder = str(PurePosixPath(table.file).parent)
    try:
        return checked_file(checked_name(name, reader.root, "" if folder == "." else folder), reader.root)
    except UserError as error:
        raise error.at("file_name") from None
