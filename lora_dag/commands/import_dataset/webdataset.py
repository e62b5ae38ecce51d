"""WebDataset files (.tar): members with the same name up to its first dot are one sample.

One member is the image. ``.json`` holds the caption column, or each line of ``.txt`` or ``.caption`` is one caption.
``a.mask.png`` is the mask of ``a.jpg``. ``tarfile`` reads the members: the reader of ``datasets`` refuses a file that
mixes .png and .jpg images, and does not notice one that was cut off.
"""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_dag.commands.import_dataset.samples import Columns, Sample
from lora_dag.core.console import Problem, UserError
from stages.prepare import captions
from stages.prepare.file_names import NUM_EXAMPLES, nfc, short
from stages.prepare.file_tree import IMAGE_SUFFIXES, TEXTS
from stages.prepare.listing import RowProblem, row_problems
from stages.prepare.metadata_tables import parse_object
from stages.prepare.side_images import MASKS

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
END_READ = 2**20
"""Bytes after a file's end mark that are checked in one read."""


@dataclass
class Group:
    """Members with the same name up to its first dot."""

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
    """Groups with an image, by their common name."""
    problems: list[RowProblem]

    def __len__(self) -> int:
        return len(self.groups)

    def samples(self) -> Iterator[Sample | RowProblem]:
        yield from self.problems
        with tarfile.open(self.path, "r:") as tar:
            for number, (key, group) in enumerate(self.groups.items()):
                place = f"{self.place}::{short(group.images[0].name)}"
                try:
                    yield self.sample(tar, key, group, number, place)
                except UserError as error:
                    yield from row_problems(error.problems, place)

    def sample(self, tar: tarfile.TarFile, key: str, group: Group, number: int, place: str) -> Sample:
        kinds = {"images": group.images, "masks": group.masks, "caption members": group.texts, ".json": group.jsons}
        for noun, members in kinds.items():
            if len(members) > 1:
                names = ", ".join(short(member.name) for member in members[:NUM_EXAMPLES])
                text = f"'{short(key)}' has {len(members)} {noun} ({names}). Keep one."
                raise UserError(Problem("sample-ambiguous", text))
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
        text = (
            f"the image has no caption. Add a .txt member or a .json member with '{column}' of the same name, choose"
            " another key with --caption-column, or use --no-captions."
        )
        raise UserError(Problem("caption-missing", text))


def open_tar(path: Path, place: str, split: str, columns: Columns) -> TarShard:
    """Return a .tar file after listing its members to the end.

    Raises:
        UserError: the file is compressed, damaged, cut off, joined from several files, or no .tar file.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if command := next((command for magic, command in COMPRESSED.items() if start.startswith(magic)), None):
        raise UserError(Problem("archive-compressed", f"{place}: the file is compressed. Unpack it with {command}."))
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            require_end(tar, len(members), place)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if getattr(error, "errno", errno.EINVAL) != errno.EINVAL:  # EINVAL: an offset that no file has
            raise
        reason = str(error) or type(error).__name__
        text = f"{place}: the file is damaged or is no .tar file ({reason}). Restore it."
        raise UserError(Problem("shard-damaged", text)) from None
    groups, problems = group_members(members, place)
    return TarShard(path, place, split, columns, groups, problems)


def require_end(tar: tarfile.TarFile, num_members: int, place: str) -> None:
    """Require an end mark after the last member, and nothing after the end mark.

    ``tarfile`` stops without an error at an invalid header, and at the end mark of the first of two joined files.

    Raises:
        UserError: the file is cut off or joined from several files.
    """
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        text = f"{place}: the file is damaged or cut off after {num_members} members. Restore it."
        raise UserError(Problem("shard-damaged", text))
    while rest := file.read(END_READ):
        if any(rest):
            text = (
                f"{place}: data follows the end mark after {num_members} members, as in .tar files joined by cat."
                " Unpack it with tar --ignore-zeros and pack it again."
            )
            raise UserError(Problem("shard-joined", text))


def group_members(members: list[tarfile.TarInfo], place: str) -> tuple[dict[str, Group], list[RowProblem]]:
    """Return the groups with an image, and problems for images that are links, devices or in the file twice."""
    groups: dict[str, Group] = {}
    problems = []
    seen: set[str] = set()
    for member in members:
        path = PurePosixPath(member.name)
        suffix = path.suffix.lower()
        if member.isdir() or path.name.startswith("."):  # macOS packs a hidden file beside each
            continue
        if str(path) in seen or not member.isreg() or member.sparse:
            if suffix in IMAGE_SUFFIXES:
                member_place = f"{place}::{short(member.name)}"
                if str(path) in seen:
                    text = "the member is in the file twice. Pack the files again."
                    problems.append(RowProblem("member-twice", text, member_place))
                else:
                    text = "the member is a link or device, not an image. Pack the images themselves."
                    problems.append(RowProblem("member-not-regular", text, member_place))
            continue
        seen.add(str(path))
        base, _, rest = path.name.partition(".")
        group = groups.setdefault(nfc(str(path.parent / base)), Group())
        if suffix in IMAGE_SUFFIXES:
            (group.masks if rest.partition(".")[0].lower() in MASKS else group.images).append(member)
        elif suffix in TEXTS:
            group.texts.append(member)
        elif suffix == ".json":
            group.jsons.append(member)
    return {key: group for key, group in groups.items() if group.images}, problems


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a regular member.

    Raises:
        UserError: the .tar file changed after its members were listed.
    """
    try:
        file = tar.extractfile(member)
        assert file is not None  # regular
        return file.read()
    except tarfile.TarError as error:
        text = f"the .tar file changed while it was read ({error}). Restore it and run the command again."
        raise UserError(Problem("shard-changed", text)) from None
