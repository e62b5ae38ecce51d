"""Parquet files with embedded pictures and WebDataset .tar files -> entries; no picture's bytes are read.

Parquet: a column ``image`` of bytes (or the only one like it), and the caption column with a string or a list of them.
WebDataset: members with the same name up to its first dot belong together; one is the picture, and the caption stands
in the caption column of a ``.json``, else in a ``.txt``, of which each line that is not blank is one caption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import UserError
from lora_dag.pictures.containers import (
    SEPARATOR,
    TarIndex,
    image_column,
    image_leaves,
    index_tar,
    kind_of,
    open_parquet,
)
from stages.prepare import captions, side_files, split_names
from stages.prepare.listing import Problem
from stages.prepare.names import MAX_NAME, NUM_EXAMPLES, SUFFIXES, TEXTS, Root, checked_file, checked_name, nfc, short
from stages.prepare.scope import Scope, all_of, instance_prompt, no_column
from stages.prepare.tables import FLOOD, NOT_UTF8, NoText, parse_object, text_columns

if TYPE_CHECKING:
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class Sample:
    """A picture in a container with what stands beside it."""

    name: str
    """Relative to the root, such as ``00.tar::b.png``."""
    values: dict[str, Any]
    """The caption column and ``split``, where there are any."""
    text: tuple[str, ...] | None = None
    """Captions of a .txt member."""


@dataclass
class Shard:
    place: str
    columns: list[str] = field(default_factory=list)
    """Where a caption could be looked for, sorted."""
    samples: list[Sample | Problem] = field(default_factory=list)
    num_orphans: int = 0
    """Captions without a picture."""


def read_shards(scope: Scope, names: list[str]) -> None:
    if scope.mask_folder:
        raise UserError(
            f"params.yaml dataset.mask: '{scope.mask_folder}' is a folder, and {scope.place} holds containers, whose"
            " pictures can have a mask in their alpha channel only; set it to alpha or null"
        )
    is_named = names == [scope.below]  # a person named it, so that was checked, or is dataset.source and may be a link
    shards = all_of(lambda name: read_shard(scope.root, name, scope.column, is_named), names)
    place = shards[0].place if len(shards) == 1 else f"{shards[0].place} and {len(shards) - 1} more"
    columns = sorted({column for shard in shards for column in shard.columns})
    if not any(shard.samples for shard in shards):
        raise UserError(f"{place}: no pictures; the dataset is empty")
    if any(kind_of(name) == "tar" for name in names):
        found = [sample for shard in shards for sample in shard.samples if isinstance(sample, Sample)]
        bare = [each.name for each in found if each.text is None and scope.column not in each.values]
        side_files.refuse(scope, bare, [each.name for each in found])
    has_texts = any(getattr(sample, "text", None) is not None for shard in shards for sample in shard.samples)
    missing = no_column(scope, columns, place) if columns else no_texts(scope, place)
    prompt = instance_prompt(scope, has_texts or scope.column in columns, place, missing)
    for shard in shards:
        add_shard(scope, shard, prompt)
    num_orphans = sum(shard.num_orphans for shard in shards)
    scope.warn_about(
        num_orphans, f"caption in {place} belongs to no picture", f"captions in {place} belong to no picture"
    )


def no_texts(scope: Scope, place: str) -> str:
    return (
        f"{place}: pictures without captions; pack a .txt or a .json with '{scope.column}' beside each, or set"
        " dataset.instance_prompt to one caption for all"
    )


def add_shard(scope: Scope, shard: Shard, prompt: tuple[str, ...] | None) -> None:
    for sample in shard.samples:
        if isinstance(sample, Problem):
            scope.problems.append(sample)
            continue
        place = scope.root.place(sample.name)
        try:
            found = prompt or captions_of(sample, scope.column)
            split = split_names.from_column(sample.values.get("split"), scope.dataset.heldout_split)
        except UserError as error:
            scope.problems.append(Problem(place, str(error), scope.root.prefix + sample.name))
        else:
            scope.add(sample.name, found, place, split)


def captions_of(sample: Sample, column: str) -> tuple[str, ...]:
    if sample.values.get(column) == NoText(NOT_UTF8):
        raise UserError(NOT_UTF8)
    if column in sample.values:
        return captions.from_value(sample.values, column)
    if sample.text is None:
        cure = "pack a .txt beside it" if kind_of(sample.name.partition(SEPARATOR)[0]) == "tar" else "add that column"
        raise UserError(f"'{sample.name}' has no '{column}'; {cure}, or leave its file out")
    return sample.text


def read_shard(root: Root, name: str, column: str, is_checked: bool) -> Shard:
    """What a Parquet or .tar file holds.

    Args:
        is_checked: the name was checked already.

    Raises:
        UserError: it is no such file, damaged, or leaves the source.
    """
    place = root.place(name)
    if not is_checked:
        try:
            name = checked_file(checked_name(name, root), root)
        except UserError as error:
            raise UserError(*(f"{place}: {problem}" for problem in error.problems)) from None
    path = root.folder / name
    if kind_of(name) == "parquet":
        return read_parquet(path, root, name, column)
    return Grouping(root, name, path, index_tar(path, place), column).shard()


def read_parquet(path: Path, root: Root, name: str, column: str) -> Shard:
    place = root.place(name)
    with open_parquet(path, place) as file:
        images = image_column(file.schema_arrow, place)
        columns = sorted(set(file.schema_arrow.names) - {images})
        wanted = [key for key in dict.fromkeys((column, "split")) if key in columns]
        num_rows = file.metadata.num_rows
        if num_rows > FLOOD and num_empty(file, images) == num_rows:
            raise UserError(
                f"{place}: column '{images}' holds no picture in any of {num_rows:,} rows; embed their bytes"
            )
        values = text_columns(file, wanted, place) if wanted else {}
    rows = ({key: cells[index] for key, cells in values.items()} for index in range(num_rows))
    samples: list[Sample | Problem] = [Sample(f"{name}{SEPARATOR}{i}", row) for i, row in enumerate(rows)]
    return Shard(place, columns, samples)


def num_empty(file: pq.ParquetFile, images: str) -> int:
    """Rows whose bytes are null, as far as the file itself says so."""
    leaves = set(image_leaves(file, images))
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema in leaves]
    return sum(statistics.null_count for statistics in found if statistics and statistics.has_null_count)


@dataclass
class Group:
    """Members with one name up to its first dot."""

    pictures: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    jsons: list[str] = field(default_factory=list)


@dataclass
class Grouping:
    """A .tar file on its way to samples."""

    root: Root
    name: str
    path: Path
    index: TarIndex
    column: str

    def shard(self) -> Shard:
        result = Shard(self.root.place(self.name))
        for member in (*self.index.irregular, *self.index.repeated):
            if PurePosixPath(member).suffix.lower() in SUFFIXES:
                what = "stands there twice" if member in self.index.members else "is a link or device, not a picture"
                result.samples.append(Problem(self.place(member), f"'{short(member)}' {what}; pack the files anew"))
        columns: set[str] = set()
        for key, group in self.groups().items():
            if not group.pictures:
                result.num_orphans += bool(group.texts or group.jsons)
                continue
            sample = self.sample(key, group, columns)
            result.samples.append(sample)
        result.columns = sorted(columns)
        return result

    def groups(self) -> dict[str, Group]:
        found: dict[str, Group] = {}
        for member in self.index.members:
            folder, _, base = member.rpartition("/")
            if base.startswith("."):  # macOS packs a hidden file beside each
                continue
            group = found.setdefault(nfc(f"{folder}/{base.partition('.')[0]}"), Group())
            suffix = PurePosixPath(base).suffix.lower()
            if suffix in SUFFIXES:
                group.pictures.append(member)
            elif suffix in TEXTS:
                group.texts.append(member)
            elif suffix == ".json":
                group.jsons.append(member)
        return found

    def sample(self, key: str, group: Group, columns: set[str]) -> Sample | Problem:
        member = group.pictures[0]
        try:
            kinds = {"pictures": group.pictures, "caption members": group.texts, ".json members": group.jsons}
            for what, members in kinds.items():
                if len(members) > 1:
                    names = ", ".join(map(short, members[:NUM_EXAMPLES]))
                    raise UserError(f"'{short(key.lstrip('/'))}' has {len(members)} {what} ({names}); keep one")
            checked_name(member.replace(SEPARATOR, ":"), self.root, self.name)
            values = parse_object(self.read(group.jsons[0]), short(group.jsons[0])) if group.jsons else {}
            text = captions.from_text(self.read(group.texts[0]), short(group.texts[0])) if group.texts else None
        except UserError as error:
            return Problem(self.place(member), str(error))
        columns.update(values)
        wanted = {name: values[name] for name in (self.column, "split") if name in values}
        return Sample(f"{self.name}{SEPARATOR}{member}", wanted, text)

    def read(self, member: str) -> bytes:
        return self.index.read(self.path, member, short(member), captions.MAX_TEXT_BYTES)

    def place(self, member: str) -> str:
        shown = member if len(member) <= MAX_NAME else short(member)
        return self.root.place(f"{self.name}{SEPARATOR}{shown}")
