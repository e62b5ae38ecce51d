"""A picture's bytes by its name, wherever it stands: in a folder, a .tar, a Parquet file or a pinned Hub dataset.

``a/b.png`` is a file below dataset.source, ``shards/00.tar::b.png`` a member, ``train.parquet::17`` a row (from 0), and
``pin.yaml::a/b.png`` what a Hub dataset holds (``core/hub.py``). Nothing is unpacked to disk.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import stat
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from lora_dag.bases import hub
from lora_dag.core.console import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SEPARATOR = "::"
MAX_BYTES = 512 * 2**20
"""Of one picture: the largest that ``pictures.MAX_PIXELS`` admits has 480 MB without any compression (RGB, 16 bits)."""
MAX_GROUP_BYTES = 2 * 2**30
"""Of the pictures of one Parquet row group, which are read together."""
CACHED_BYTES = 512 * 2**20
"""Of row groups kept in memory; the last one always is."""
MAX_ROWS = 1_000_000
"""Of a Parquet file: a few KB can claim any number of equal ones."""
MAX_HEADER_BYTES = 64 * 2**10
"""Of a long name or of attributes in a .tar, which are read before the member that they are of."""
MAX_PADDING = 16 * 2**20
"""Zeros behind a .tar's end: tar writes 10 KB at a time, or what its -b says."""

MAX_SHOWN = 200
"""Characters of a list of columns in a message."""

Kind = Literal["parquet", "tar", "compressed", "pin"]
KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".tar": "tar",
    ".yaml": "pin",
    ".yml": "pin",
    **dict.fromkeys((".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"), "compressed"),
}
NO_FILE = (errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.ENAMETOOLONG)
"""What opening says of a socket, a link to itself or no possible name; anything else is the machine's fault."""
MAGIC = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def kind_of(name: str) -> Kind | None:
    """What a file's name says that it holds, if pictures."""
    return next((kind for suffix, kind in KINDS.items() if name.lower().endswith(suffix)), None)


class PictureFiles:
    """Reads any picture or mask of a dataset; safe to share between threads."""

    def __init__(self, source: str) -> None:
        path = Path(source)
        self._folder = path.parent if kind_of(path.name) and not path.is_dir() else path
        self._snapshots: dict[str, Path] = {}
        self._tars: dict[Path, TarIndex] = {}
        self._parquets = RowGroups()
        self._lock = threading.Lock()

    def read(self, file_name: str) -> bytes:
        """The bytes behind ``Item.file_name`` or ``Item.mask``.

        Raises:
            UserError: it is gone, no regular file, or too large to be a picture.
        """
        folder, name = self._folder, file_name
        outer, _, inner = name.partition(SEPARATOR)
        if inner and kind_of(outer) == "pin":
            folder, name = self._snapshot(outer), inner
            outer, _, inner = name.partition(SEPARATOR)
        if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
            raise UserError(f"'{file_name}' leaves dataset.source; run `python -m stages.prepare` again")
        kind = kind_of(outer) if inner else None
        if kind == "tar":
            return self._member(folder / outer, inner, file_name)
        if kind == "parquet":
            return self._parquets.read(folder / outer, inner, file_name)
        return read_regular(folder / name, file_name)

    def _snapshot(self, pin: str) -> Path:
        with self._lock:
            if pin not in self._snapshots:
                self._snapshots[pin] = hub.fetch(self._folder / pin, verify=False)  # whose pictures have digests
            return self._snapshots[pin]

    def _member(self, path: Path, member: str, file_name: str) -> bytes:
        with self._lock:
            if path not in self._tars:
                self._tars[path] = index_tar(path, file_name.removesuffix(SEPARATOR + member))
        if member not in self._tars[path].members:
            raise gone(file_name)
        return self._tars[path].read(path, member, file_name)


def gone(file_name: str) -> UserError:
    return UserError(f"'{file_name}' is no file any more; restore it, or run `python -m stages.prepare` again")


def read_regular(path: Path, shown: str, limit: int = MAX_BYTES) -> bytes:
    """A regular file's bytes; ``shown`` names it in messages.

    Raises:
        UserError: it is gone, something else than a file, or has more than ``limit`` bytes.
        OSError: the machine cannot read it, with the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it, a FIFO would wait for its writer
    except (FileNotFoundError, NotADirectoryError):
        raise gone(shown) from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise UserError(f"'{shown}' cannot be opened ({error.strerror}); expected a regular file") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"'{shown}' is not a regular file; replace it by one")
        refuse_huge(status.st_size, shown, limit)
        with located(path), open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Inside, an open file is read; what goes wrong with that names no path by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def refuse_huge(num_bytes: int, shown: str, limit: int = MAX_BYTES) -> None:
    if num_bytes > limit:
        cure = "more than any picture of allowed size has" if limit == MAX_BYTES else "so shorten or split it"
        raise UserError(f"'{shown}' has {num_bytes:,} bytes; at most {limit:,} are read, {cure}")


def require_regular(path: Path, shown: str) -> None:
    """Libraries that open by path would wait at a FIFO."""
    if not path.exists():
        raise gone(shown)
    if not path.is_file():
        raise UserError(f"'{shown}' is not a regular file; expected a {path.suffix} file")


# WebDataset


@dataclass(frozen=True)
class TarIndex:
    """Where the members of a .tar stand; names without a leading ``./``."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Regular files: offset and size in bytes."""
    irregular: list[str] = field(default_factory=list)
    """Links, devices, pipes and sparse files."""
    repeated: list[str] = field(default_factory=list)

    def read(self, path: Path, member: str, shown: str, limit: int = MAX_BYTES) -> bytes:
        """A member's bytes.

        Raises:
            UserError: it is too large, or the file has been cut since it was indexed.
        """
        offset, size = self.members[member]
        refuse_huge(size, shown, limit)
        with located(path), path.open("rb") as file:
            file.seek(offset)
            blob = file.read(size)
        if len(blob) < size:
            raise UserError(f"'{shown}' is cut off; restore the .tar file")
        return blob


def index_tar(path: Path, shown: str) -> TarIndex:
    """Read the headers of an uncompressed .tar.

    Raises:
        UserError: it is compressed, damaged, cut off, goes on behind its end, or is no .tar at all.
    """
    require_regular(path, shown)
    with located(path), path.open("rb") as file:
        start = file.read(8)
        for magic, command in MAGIC.items():
            if start.startswith(magic):
                raise UserError(f"'{shown}' is compressed; members are read in place, so unpack it once: {command}")
        file.seek(0)
        try:
            index, end = read_headers(file)
        except RecursionError:
            raise UserError(f"'{shown}' is a damaged .tar file (headers of headers without end); restore it") from None
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise UserError(f"'{shown}' is no .tar file, or a damaged one ({error}); restore it") from None
        file.seek(end)  # tarfile stops without a word at a header that it cannot read
        if file.read(512) != bytes(512):
            raise UserError(f"'{shown}' is damaged or cut off after {len(index.members)} members; restore it")
        if any(file.read(MAX_PADDING)) or file.read(1):
            raise UserError(
                f"'{shown}' goes on behind its end mark, after {len(index.members)} members, as .tar files do that were"
                " joined by cat; unpack it with tar --ignore-zeros and pack it anew"
            )
    return index


def read_headers(file: BinaryIO) -> tuple[TarIndex, int]:
    """The members, and where the end mark should stand.

    Raises:
        tarfile.TarError, ValueError, OverflowError, RecursionError: it is damaged or no .tar file.
    """
    index, end = TarIndex(), 0
    with tarfile.open(fileobj=cast(BinaryIO, Headers(file)), mode="r:") as tar:
        for member in tar:
            if member.size < 0 or tar.offset <= end:  # else the same header would be read for ever
                raise tarfile.ReadError("a member of negative size")
            add_member(index, member)
            end = tar.offset
        return index, tar.offset


class Headers:
    """A file as ``tarfile`` may see it, which believes any size that a header claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tell = file, file.tell
        self._size = os.fstat(file.fileno()).st_size

    def seek(self, position: int) -> None:
        if not 0 <= position <= self._size:
            raise tarfile.ReadError("unexpected end of data")
        self._file.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def add_member(index: TarIndex, member: tarfile.TarInfo) -> None:
    name = str(PurePosixPath(member.name))
    if member.isdir():
        return
    if not member.isreg() or member.sparse:
        index.irregular.append(name)
    elif name in index.members:
        index.repeated.append(name)
    else:
        index.members[name] = (member.offset_data, member.size)


# Parquet


@contextmanager
def open_parquet(path: Path, shown: str) -> Iterator[pq.ParquetFile]:
    """Inside, a Parquet file is open; what pyarrow finds wrong with it is told as one line.

    Raises:
        UserError: it is gone, damaged or no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_regular(path, shown)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"'{shown}' has a column twice: {', '.join(names)}; rename one")
            if file.metadata.num_rows > MAX_ROWS:
                rows = f"{file.metadata.num_rows:,} rows; at most {MAX_ROWS:,} are read from one file"
                raise UserError(f"'{shown}' has {rows}, so split it")
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):  # the machine's fault, not the file's
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"'{shown}' is no Parquet file, or a damaged one ({reason}); restore it") from None


def image_column(schema: pa.Schema, shown: str) -> str:
    """The column with the pictures: ``image``, else the only struct with bytes, else the only binary column.

    ``datasets`` writes a struct of bytes and path; other tools write the bytes alone.

    Raises:
        UserError: there is none, or more than one.
    """
    import pyarrow.types as types

    def is_bytes(kind: pa.DataType) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_bytes(kind: pa.DataType) -> bool:
        index = kind.get_field_index("bytes") if types.is_struct(kind) else -1
        return index >= 0 and is_bytes(kind.field(index).type)

    structs = [field.name for field in schema if holds_bytes(field.type)]
    binaries = [field.name for field in schema if is_bytes(field.type)]
    if "image" in structs + binaries:
        return "image"
    candidates = structs or binaries
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(f"'{shown}' has pictures in {', '.join(candidates)}; name the column to use 'image'")
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)[:MAX_SHOWN]
    raise UserError(f"'{shown}' has no column of embedded pictures, such as 'image' with bytes; it has {there}")


@dataclass(frozen=True)
class ParquetLayout:
    column: str
    """With the pictures."""
    first_rows: list[int]
    """Of each row group, and the number of rows last."""
    num_bytes: list[int]
    """Of each row group's pictures, unpacked."""


class RowGroups:
    """Pictures in Parquet files; a row can be read with its whole row group only, so the last groups stay in memory."""

    def __init__(self) -> None:
        self._layouts: dict[Path, ParquetLayout] = {}
        self._groups: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, row: str, file_name: str) -> bytes:
        shown = file_name.removesuffix(SEPARATOR + row)
        with self._lock:
            if path not in self._layouts:
                self._layouts[path] = parquet_layout(path, shown)
            layout = self._layouts[path]
            if not (row.isascii() and row.isdigit() and int(row) < layout.first_rows[-1]):
                raise gone(file_name)
            group = bisect.bisect_right(layout.first_rows, int(row)) - 1
            values = self._group(path, layout, group, shown)
        value = values[int(row) - layout.first_rows[group]].as_py()
        blob = value["bytes"] if isinstance(value, dict) else value
        if blob is None:
            raise UserError(f"'{file_name}' holds no picture; embed its bytes or remove the row")
        refuse_huge(len(blob), file_name)
        return blob

    def _group(self, path: Path, layout: ParquetLayout, group: int, shown: str) -> pa.ChunkedArray:
        if (path, group) in self._groups:
            self._groups.move_to_end((path, group))
            return self._groups[path, group]
        if layout.num_bytes[group] > MAX_GROUP_BYTES:
            raise UserError(
                f"'{shown}' has a row group with {layout.num_bytes[group]:,} bytes of pictures; at most"
                f" {MAX_GROUP_BYTES:,} are read at once, so write it with smaller row groups"
            )
        kept = sum(self._layouts[known].num_bytes[number] for known, number in self._groups)
        while self._groups and kept + layout.num_bytes[group] > CACHED_BYTES:
            (known, number), _ = self._groups.popitem(last=False)
            kept -= self._layouts[known].num_bytes[number]
        with open_parquet(path, shown) as file:
            leaf = next(name for name in image_leaves(file, layout.column))
            self._groups[path, group] = file.read_row_group(group, columns=[leaf]).column(0)
        return self._groups[path, group]


def parquet_layout(path: Path, shown: str) -> ParquetLayout:
    with open_parquet(path, shown) as file:
        column = image_column(file.schema_arrow, shown)
        leaves = set(image_leaves(file, column))
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        chunks = [[group.column(index) for index in range(group.num_columns)] for group in groups]
        return ParquetLayout(
            column,
            [0, *itertools.accumulate(group.num_rows for group in groups)],
            [sum(c.total_uncompressed_size for c in columns if c.path_in_schema in leaves) for columns in chunks],
        )


def image_leaves(file: pq.ParquetFile, column: str) -> list[str]:
    """Path of what holds the bytes: a struct's ``bytes``, or the column itself."""
    paths = [file.schema.column(index).path for index in range(len(file.schema))]
    return [path for path in paths if path in (column, f"{column}.bytes")]
