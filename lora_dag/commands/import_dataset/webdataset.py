"""WebDataset files (.tar): members with one name up to its first dot -> samples.

One member is the image; ``.json`` holds the caption column, else each line of ``.txt`` or ``.caption`` is one caption;
``a.mask.png`` is the mask of ``a.jpg``. Read by ``tarfile``: the reader of ``datasets`` refuses a file that mixes .png
and .jpg images, and takes one that was cut off for a whole one.
"""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_dag.commands.import_dataset.samples import Columns, Sample
from lora_dag.core.console import UserError
from stages.prepare import captions
from stages.prepare.listing import Problem
from stages.prepare.names import NUM_EXAMPLES, SUFFIXES, TEXTS, nfc, short
from stages.prepare.side_files import MASKS
from stages.prepare.tables import parse_object

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
END_READ = 2**20
"""Bytes behind a file's end mark that are looked at in one read."""


@dataclass
class Group:
    """Members with one name up to its first dot."""

    images: list[tarfile.TarInfo] = field(default_factory=list)
    masks: list[tarfile.TarInfo] = field(default_factory=list)
    texts: list[tarfile.TarInfo] = field(default_factory=list)
    jsons: list[tarfile.TarInfo] = field(default_factory=list)


@dataclass(frozen=True)
class TarShard:
    path: Path
    place: str
    split: str
    columns: Columns
    groups: dict[str, Group]
    """Of those with an image, by their common name."""
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.groups)

    def samples(self) -> Iterator[Sample | Problem]:
        yield from self.problems
        with tarfile.open(self.path, "r:") as tar:
            for number, (key, group) in enumerate(self.groups.items()):
                place = f"{self.place}::{short(group.images[0].name)}"
                try:
                    yield self.sample(tar, key, group, number, place)
                except UserError as error:
                    yield Problem(place, str(error))

    def sample(self, tar: tarfile.TarFile, key: str, group: Group, number: int, place: str) -> Sample:
        kinds = {"images": group.images, "masks": group.masks, "caption members": group.texts, ".json": group.jsons}
        for what, members in kinds.items():
            if len(members) > 1:
                names = ", ".join(short(member.name) for member in members[:NUM_EXAMPLES])
                raise UserError(f"'{short(key)}' has {len(members)} {what} ({names}); keep one")
        (image,) = group.images
        return Sample(
            place,
            str(PurePosixPath(image.name)),
            read_member(tar, image),
            self.captions(tar, group),
            self.split,
            f"{PurePosixPath(self.place).stem}-{number:06}",
            read_member(tar, group.masks[0]) if group.masks else None,
        )

    def captions(self, tar: tarfile.TarFile, group: Group) -> tuple[str, ...] | None:
        column = self.columns.caption
        if column is None:
            return None
        if group.jsons:
            record = parse_object(read_member(tar, group.jsons[0]), short(group.jsons[0].name))
            if column in record:
                return captions.from_value(record, column)
        if group.texts:
            return captions.from_text(read_member(tar, group.texts[0]), short(group.texts[0].name))
        cure = f"a .txt, or a .json with '{column}', beside it (--caption-column names another key)"
        raise UserError(f"no caption; pack {cure}, or import without captions: --no-captions")


def open_tar(path: Path, place: str, split: str, columns: Columns) -> TarShard:
    """A .tar file whose members were listed to its end.

    Raises:
        UserError: it is compressed, damaged, cut off, joined from several files, or no .tar at all.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if cure := next((command for magic, command in COMPRESSED.items() if start.startswith(magic)), None):
        raise UserError(f"{place}: compressed; unpack it first: {cure}")
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            require_end(tar, len(members), place)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if getattr(error, "errno", errno.EINVAL) != errno.EINVAL:  # that is a place that no file has
            raise
        reason = str(error) or type(error).__name__
        raise UserError(f"{place}: no .tar file, or a damaged one ({reason}); restore it") from None
    groups, problems = grouped(members, place)
    return TarShard(path, place, split, columns, groups, problems)


def require_end(tar: tarfile.TarFile, num_members: int, place: str) -> None:
    """``tarfile`` stops without an error at a header that it cannot read, and at the end mark of the first of two files
    that were joined.

    Raises:
        UserError: it did.
    """
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"{place}: damaged or cut off after {num_members} members; restore it")
    while rest := file.read(END_READ):
        if any(rest):
            raise UserError(
                f"{place}: goes on behind its end mark, after {num_members} members, as .tar files do that were joined"
                " by cat; unpack it with tar --ignore-zeros and pack it anew"
            )


def grouped(members: list[tarfile.TarInfo], place: str) -> tuple[dict[str, Group], list[Problem]]:
    """The groups that have an image; and images that are links, devices or in the file twice."""
    groups: dict[str, Group] = {}
    problems = []
    seen: set[str] = set()
    for member in members:
        path = PurePosixPath(member.name)
        suffix = path.suffix.lower()
        if member.isdir() or path.name.startswith("."):  # macOS packs a hidden file beside each
            continue
        if str(path) in seen or not member.isreg() or member.sparse:
            if suffix in SUFFIXES:
                what = "is in the file twice" if str(path) in seen else "is a link or device, not an image"
                problems.append(Problem(f"{place}::{short(member.name)}", f"{what}; pack the files anew"))
            continue
        seen.add(str(path))
        base, _, rest = path.name.partition(".")
        group = groups.setdefault(nfc(str(path.parent / base)), Group())
        if suffix in SUFFIXES:
            (group.masks if rest.partition(".")[0].lower() in MASKS else group.images).append(member)
        elif suffix in TEXTS:
            group.texts.append(member)
        elif suffix == ".json":
            group.jsons.append(member)
    return {key: group for key, group in groups.items() if group.images}, problems


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A regular file's bytes.

    Raises:
        UserError: the .tar file changed since its members were listed.
    """
    try:
        file = tar.extractfile(member)
        assert file is not None  # regular
        return file.read()
    except tarfile.TarError as error:
        raise UserError(f"changed while it was read ({error}); restore the .tar file") from None
