"""Every listed picture and mask, read once: hashed, checked, fitted to what the model sees; all problems together."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

import PIL
from tqdm import tqdm

from stages.core import pictures
from stages.core.console import UserError
from stages.core.files import state_dir, write_text
from stages.core.pictures import Checked
from stages.prepare import geometry
from stages.prepare.listing import Entry, Problem

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

NUM_READERS = 4  # threads; Pillow decodes and hashlib hashes outside of Python's lock
AHEAD = 16  # pictures handed to them at a time
MAX_REMEMBERED = 20_000  # checks of pictures of other datasets; 1.3 KB each
MAX_ASPECT_ERROR = 0.01  # between a mask's shape and its picture's
NUM_EXAMPLES = 3


class Files(Protocol):
    """Where pictures come from, such as ``PictureFiles``."""

    def read(self, file_name: str) -> bytes: ...


@dataclass(frozen=True)
class Row:
    """One picture that passed every check."""

    entry: Entry
    sha256: str
    """Of its bytes."""
    width: int
    """After EXIF rotation, as is the height."""
    height: int
    target_width: int
    """What the model sees."""
    target_height: int
    has_alpha: bool
    """Some pixel lets the background through."""
    thumbnail: str
    """``Checked.thumbnail``"""
    mask_sha256: str | None = None
    """Of the bytes of its mask's file."""

    @property
    def dhash(self) -> str:
        return pictures.dhash(self.thumbnail)


@dataclass(frozen=True)
class Inspected:
    rows: list[Row]
    """In the order of the entries, as are the problems."""
    problems: list[Problem]
    warnings: list[str]
    """What is allowed but seldom meant, one line for all pictures that it is true of."""


def inspect(entries: list[Entry], dataset: DatasetParams, files: Files) -> Inspected:
    """Look at every picture, and at its mask if it has one; what was seen is remembered by content."""
    memory = Memory()
    rows, problems = [], []
    found: dict[str, list[str]] = {}
    try:
        for entry, outcome in tqdm(
            in_order(entries, dataset, files, memory), desc="pictures", total=len(entries), disable=None, leave=False
        ):
            if isinstance(outcome, UserError):
                problems += [Problem(entry.place, text, entry.file_name) for text in outcome.problems]
                continue
            row, texts = outcome
            rows.append(row)
            for text in texts:
                found.setdefault(text, []).append(entry.file_name)
    finally:
        memory.save()
    return Inspected(
        rows, problems, [f"{len(names)} pictures {text} ({shown(names)})" for text, names in found.items()]
    )


def in_order(
    entries: Iterable[Entry], dataset: DatasetParams, files: Files, memory: Memory
) -> Iterator[tuple[Entry, tuple[Row, list[str]] | UserError]]:
    """Each entry with its row and warnings or with its problems; few pictures are in memory at a time."""

    def look(entry: Entry) -> tuple[Row, list[str]] | UserError:
        try:
            return examine(entry, dataset, files, memory)
        except UserError as error:
            return error

    waiting: deque[tuple[Entry, Future[tuple[Row, list[str]] | UserError]]] = deque()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(look, entry)))
                if len(waiting) >= AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def examine(entry: Entry, dataset: DatasetParams, files: Files, memory: Memory) -> tuple[Row, list[str]]:
    """One picture's row, and its warnings.

    Raises:
        UserError: the picture or its mask cannot be used.
    """
    name = entry.file_name
    sha256, checked = check(name, dataset, files, memory)
    problems: list[str] = []
    size, mask_sha256 = (0, 0), None
    try:
        size = geometry.fit(checked.width, checked.height, dataset)
    except UserError as error:
        problems.append(f"'{name}' {error}")
    try:
        mask_sha256 = check_mask(entry, checked, dataset, files, memory)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    row = Row(entry, sha256, checked.width, checked.height, *size, checked.has_alpha, checked.thumbnail, mask_sha256)
    return row, remarks(row, checked, dataset)


def check(name: str, dataset: DatasetParams, files: Files, memory: Memory) -> tuple[str, Checked]:
    """A file's SHA-256, and what is in it."""
    try:
        blob = files.read(name)
    except OSError as error:
        raise UserError(f"'{name}' cannot be read ({error.strerror or error}); restore it or remove it") from None
    sha256 = hashlib.sha256(blob).hexdigest()
    checked = memory.find(sha256, dataset.first_frame)
    if checked is None:
        checked = pictures.check_picture(blob, name, dataset.first_frame)
        memory.add(sha256, dataset.first_frame, checked)
    return sha256, checked


def check_mask(entry: Entry, picture: Checked, dataset: DatasetParams, files: Files, memory: Memory) -> str | None:
    """SHA-256 of the mask's file, where it is one.

    Raises:
        UserError: the mask cannot be read, has another shape than the picture, or hides all of it.
    """
    nothing = "so that the loss would look at nothing; mend it, or set dataset.unmasked_weight above 0"
    if dataset.mask == "alpha" and picture.alpha == (0, 0) and not dataset.unmasked_weight:
        raise UserError(f"'{entry.file_name}' is transparent all over, {nothing}")
    if entry.mask is None or dataset.mask == "alpha":
        return None
    sha256, mask = check(entry.mask, dataset, files, memory)
    if abs(mask.width * picture.height / (mask.height * picture.width) - 1) > MAX_ASPECT_ERROR:
        raise UserError(
            f"mask '{entry.mask}' has {mask.width} x {mask.height} pixels, another shape than the "
            f"{picture.width} x {picture.height} of '{entry.file_name}'; make it of the picture's aspect ratio"
        )
    if mask.lightest == 0 and not dataset.unmasked_weight:
        raise UserError(f"mask '{entry.mask}' is black all over, {nothing}")
    return sha256


def remarks(row: Row, checked: Checked, dataset: DatasetParams) -> list[str]:
    """Predicates of what is allowed but seldom meant."""
    size = (row.target_width, row.target_height)
    unmoved = row.width * size[1] == row.height * size[0]
    found = {
        f"are {checked.format} files under another format's suffix": pictures.misnamed(row.entry.file_name, checked),
        "are enlarged, as dataset.max_upscale allows": geometry.enlargement(row.width, row.height, size) > 1,
        "have the shape that the model sees, so that dataset.crop random changes nothing": (
            dataset.crop == "random" and unmoved
        ),
        "have no transparent pixel, so that with dataset.mask alpha the loss looks at all of them": (
            dataset.mask == "alpha" and not checked.has_alpha
        ),
    }
    return [*checked.warnings, *(text for text, applies in found.items() if applies)]


def shown(names: list[str]) -> str:
    return ", ".join(names[:NUM_EXAMPLES]) + (", ..." if len(names) > NUM_EXAMPLES else "")


class Memory:
    """What was seen in pictures, by the SHA-256 of their bytes: a second run only hashes them.

    One line of CRC-32 and JSON each in <state>/store/, in a file per version of the check and of Pillow. Damaged lines
    are left out and their pictures checked again; so are pictures that were refused, whose message names the file.
    """

    def __init__(self) -> None:
        version = f"{pictures.CHECK_VERSION}-{PIL.__version__}"
        self.path: Path = state_dir() / "store" / f"checked-{version}.jsonl"
        self.old = dict(self._load())
        self.used: dict[tuple[str, bool], Checked] = {}
        self.changed = False

    def find(self, sha256: str, first_frame: bool) -> Checked | None:
        checked = self.used.get((sha256, first_frame)) or self.old.get((sha256, first_frame))
        if checked is not None:
            self.used[sha256, first_frame] = checked
        return checked

    def add(self, sha256: str, first_frame: bool, checked: Checked) -> None:
        self.used[sha256, first_frame] = checked
        self.changed = True

    def save(self) -> None:
        """Write it anew if there is anything new; the checks of this run last, and of the others the latest."""
        if not self.changed:
            return
        others = [item for item in self.old.items() if item[0] not in self.used][-MAX_REMEMBERED:]
        texts = [json.dumps([*key, asdict(checked)]) for key, checked in [*others, *self.used.items()]]
        write_text(self.path, "".join(f"{crc32(text.encode()):08x} {text}\n" for text in texts))

    def _load(self) -> Iterator[tuple[tuple[str, bool], Checked]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            crc, _, text = line.partition(" ")
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if int(crc, 16) == crc32(text.encode()):
                    sha256, first_frame, fields = json.loads(text)
                    alpha = None if fields["alpha"] is None else tuple(fields["alpha"])
                    yield (
                        (sha256, first_frame),
                        Checked(**fields | {"alpha": alpha, "warnings": tuple(fields["warnings"])}),
                    )
