"""Every listed picture and mask, read once: hashed, checked, fitted to what the model sees; all problems together."""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from lora_dag.artifacts.manifest import Augmentation, Item
from lora_dag.artifacts.picture_table import MAX_CUT, cut_off, enlargement
from lora_dag.core.console import UserError, plural
from lora_dag.pictures import checks, formats, masks
from lora_dag.pictures.checks import Checked
from lora_dag.pictures.read import Read
from stages.prepare import geometry, side_files
from stages.prepare.checked_picture import CheckedPicture
from stages.prepare.geometry import Size
from stages.prepare.inspection_cache import InspectionCache
from stages.prepare.listing import Entry, Problem

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

NUM_READERS = 4  # threads; Pillow decodes and hashlib hashes outside of Python's lock
AHEAD = 16  # pictures handed to them at a time
MAX_ASPECT_ERROR = 0.01  # between a mask's shape and its picture's
NUM_EXAMPLES = 3
ONE = {"are": "is", "have": "has", "state": "states", "hold": "holds"}
NOTHING = "so that the loss would look at nothing; mend it, or set dataset.unmasked_weight above 0"


@dataclass(frozen=True)
class Inspected:
    rows: list[CheckedPicture]
    """In the order of the entries, as are the problems."""
    problems: list[Problem]
    warnings: list[str]
    """What is allowed but seldom meant, one line for all pictures that it is true of."""
    num_seen: int
    """Pictures that were looked at: fewer than there are where the time was up."""


def inspect(entries: list[Entry], dataset: DatasetParams, read: Read, seconds: float = math.inf) -> Inspected:
    """Look at every picture, and at its mask if it has one; what was seen is remembered by content.

    Args:
        seconds: stop after so many, which leaves the last pictures out.
    """
    rows, problems = [], []
    end = time.monotonic() + seconds
    num_seen = 0
    found: dict[str, list[str]] = {}
    with InspectionCache("checked") as cache:
        looked_at = in_order(entries, Inspector(dataset, read, cache))
        for entry, outcome in tqdm(looked_at, desc="pictures", total=len(entries), disable=None, leave=False):
            if time.monotonic() > end:
                break
            num_seen += 1
            if isinstance(outcome, UserError):
                problems += [Problem(entry.place, text, entry.file_name) for text in outcome.problems]
                continue
            row, texts = outcome
            rows.append(row)
            for text in texts:
                found.setdefault(text, []).append(entry.file_name)
    said = [f"{predicated(len(names), text)} ({shown(names)})" for text, names in found.items()]
    said += heavy_crops(rows, dataset) + without_effect(rows, dataset, found) + side_files.grey_twins(rows)
    return Inspected(rows, problems, said, num_seen)


def in_order(
    entries: Iterable[Entry], inspector: Inspector
) -> Iterator[tuple[Entry, tuple[CheckedPicture, list[str]] | UserError]]:
    """Each entry with its row and warnings or with its problems; few pictures are in memory at a time."""

    def look(entry: Entry) -> tuple[CheckedPicture, list[str]] | UserError:
        try:
            return inspector.examine(entry)
        except UserError as error:
            return error

    waiting: deque[tuple[Entry, Future[tuple[CheckedPicture, list[str]] | UserError]]] = deque()
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


@dataclass(frozen=True)
class Inspector:
    """Looks at one picture at a time; threads may share it."""

    dataset: DatasetParams
    read: Read
    cache: InspectionCache

    def examine(self, entry: Entry) -> tuple[CheckedPicture, list[str]]:
        """One picture's row, and its warnings.

        Raises:
            UserError: the picture or its mask cannot be used.
        """
        name = entry.file_name
        sha256, checked = self.check(name)
        problems: list[str] = []
        size, mask_sha256 = None, None
        try:
            size = geometry.fit(checked.width, checked.height, self.dataset)
        except UserError as error:
            problems.append(f"'{name}' {error}")
        try:
            mask_sha256 = self.check_mask(entry, checked)
            if size and self.dataset.crop == "center" and not self.dataset.unmasked_weight:
                self.check_mask_in_crop(entry, mask_sha256 or sha256, checked, size)
        except UserError as error:
            problems += error.problems
        if problems or size is None:
            raise UserError(*problems)
        row = CheckedPicture(
            entry,
            sha256,
            checked.width,
            checked.height,
            *size,
            checked.has_alpha,
            checked.thumbnail,
            mask_sha256,
            checked.detail,
        )
        return row, remarks(row, checked, self.dataset)

    def check(self, name: str) -> tuple[str, Checked]:
        """A file's SHA-256, and what is in it; a refused one is looked at again each time, for the message names it.

        Raises:
            UserError: there is no such file, or no picture in it that can be used.
            OSError: the machine cannot read it, which says nothing of the picture.
        """
        try:
            blob = self.read(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"'{name}' cannot be read ({error.strerror or error}); restore it or remove it") from None
        sha256 = hashlib.sha256(blob).hexdigest()
        key = [sha256, self.dataset.first_frame]
        known = self.cache.find(key)
        if known is not None:
            return sha256, restored(known)
        checked = checks.check_picture(blob, name, self.dataset.first_frame)
        self.cache.add(key, asdict(checked))
        return sha256, checked

    def check_mask(self, entry: Entry, picture: Checked) -> str | None:
        """SHA-256 of the mask's file, where it is one.

        Raises:
            UserError: the mask cannot be read, has another shape than the picture, hides all of it, or holds 0 and 1.
        """
        if self.dataset.mask == "alpha" and picture.alpha == (0, 0) and not self.dataset.unmasked_weight:
            raise UserError(f"'{entry.file_name}' is transparent all over, {NOTHING}")
        if entry.mask is None or self.dataset.mask == "alpha":
            return None
        sha256, mask = self.check(entry.mask)
        if abs(mask.width * picture.height / (mask.height * picture.width) - 1) > MAX_ASPECT_ERROR:
            is_across = abs(mask.height * picture.height / (mask.width * picture.width) - 1) <= MAX_ASPECT_ERROR
            cure = (
                "turn it as the picture's EXIF orientation does"
                if is_across
                else "make it of the picture's aspect ratio"
            )
            raise UserError(
                f"mask '{entry.mask}' has {mask.width} x {mask.height} pixels, another shape than the "
                f"{picture.width} x {picture.height} of '{entry.file_name}'; {cure}"
            )
        if mask.lightest == 0 and not self.dataset.unmasked_weight:
            raise UserError(f"mask '{entry.mask}' is black all over, {NOTHING}")
        if mask.lightest == 1:
            raise UserError(f"mask '{entry.mask}' holds 0 and 1, and white is 255; multiply it by 255")
        return sha256

    def check_mask_in_crop(self, entry: Entry, sha256: str, picture: Checked, size: Size) -> None:
        """A mask can show something in what is cut off alone; of random crops, ``cache_latents`` knows the places.

        Args:
            sha256: of the bytes that hold the mask.

        Raises:
            UserError: the centred crop holds nothing of it.
        """
        kind: Literal["alpha", "file"] = "alpha" if self.dataset.mask == "alpha" else "file"
        name = entry.file_name if kind == "alpha" else entry.mask
        uncut = picture.width * size[1] == picture.height * size[0]
        if uncut or name is None or (kind == "alpha" and not picture.has_alpha):
            return
        item = Item(entry.file_name, sha256, "", ("",), "train", picture.width, picture.height, *size)
        (view,) = Augmentation("center", False, self.dataset.seed).views(item, 1)
        key = [sha256, kind, picture.width, picture.height, view.crop, size, "is seen"]
        is_seen = self.cache.find(key)
        if is_seen is None:
            is_seen = bool(masks.cut_mask(masks.decode_mask(self.read(name), kind), item, view).any())
            self.cache.add(key, is_seen)
        if not is_seen:
            what = f"'{name}' is transparent" if kind == "alpha" else f"mask '{name}' is black"
            raise UserError(f"{what} all over the centred crop that the model sees, {NOTHING}")


def restored(fields: dict[str, Any]) -> Checked:
    """From JSON, which has no tuples."""
    alpha = None if fields["alpha"] is None else tuple(fields["alpha"])
    return Checked(**fields | {"alpha": alpha, "warnings": tuple(fields["warnings"])})


def remarks(row: CheckedPicture, checked: Checked, dataset: DatasetParams) -> list[str]:
    """Predicates of what is allowed but seldom meant."""
    size = (row.target_width, row.target_height)
    unmoved = row.width * size[1] == row.height * size[0]
    found = {
        f"hold {checked.format} data under another format's suffix": formats.misnamed(
            row.entry.file_name, checked.format
        ),
        "are enlarged, as dataset.max_upscale allows": enlargement(row.width, row.height, size) > 1,
        "have the shape that the model sees, so that dataset.crop random changes nothing": (
            dataset.crop == "random" and unmoved
        ),
        "have no transparent pixel, so that with dataset.mask alpha the loss looks at all of them": (
            dataset.mask == "alpha" and not checked.has_alpha
        ),
    }
    return [*checked.warnings, *(text for text, applies in found.items() if applies)]


def heavy_crops(rows: list[CheckedPicture], dataset: DatasetParams) -> list[str]:
    """Pictures whose captions tell of much that the model does not see."""
    shares = [cut_off(row.width, row.height, (row.target_width, row.target_height)) for row in rows]
    heavy = [row for row, share in zip(rows, shares, strict=True) if share > MAX_CUT]
    if not heavy:
        return []
    lose = plural(len(heavy), "picture loses", "pictures lose")
    names = shown([row.entry.file_name for row in heavy])
    return [
        f"{lose} more than a third of the area to the crop, up to {max(shares):.0%} ({names}); {cure(heavy, dataset)}"
    ]


def cure(heavy: list[CheckedPicture], dataset: DatasetParams) -> str:
    """Buckets, with the ratio that these pictures need, where they help; computed, not guessed."""
    by_hand = "cut them to shape yourself, so that the caption fits what is left"
    if dataset.aspect_buckets or dataset.resolution % dataset.bucket_step:
        return by_hand
    longest = max(max(row.width, row.height) / min(row.width, row.height) for row in heavy)
    ratio = max(dataset.max_aspect_ratio, geometry.ceil2(longest))
    changed = dataset.model_copy(update={"aspect_buckets": True, "max_aspect_ratio": ratio})
    try:
        sizes = [geometry.fit(row.width, row.height, changed) for row in heavy]
    except UserError:
        return by_hand
    if any(cut_off(row.width, row.height, size) > MAX_CUT for row, size in zip(heavy, sizes, strict=True)):
        return by_hand
    wider = f" with dataset.max_aspect_ratio={ratio:g}" if ratio > dataset.max_aspect_ratio else ""
    return f"dataset.aspect_buckets=true{wider} keeps them"


def without_effect(rows: list[CheckedPicture], dataset: DatasetParams, said: Iterable[str]) -> list[str]:
    """Settings that change nothing on these pictures.

    Args:
        said: what was warned of.
    """
    square = (dataset.resolution, dataset.resolution)
    repeats = {subset.repeats for subset in dataset.as_subsets()}
    found = {
        f"dataset.background {dataset.background} changes nothing: no picture has a transparent pixel": (
            dataset.background.lower() != "#ffffff" and not any(row.has_alpha for row in rows)
        ),
        "dataset.first_frame changes nothing: no picture has several frames or pages": (
            dataset.first_frame and checks.SEVERAL not in said
        ),
        f"dataset.max_aspect_ratio {dataset.max_aspect_ratio:g} changes nothing without dataset.aspect_buckets": (
            dataset.max_aspect_ratio != 2 and not dataset.aspect_buckets
        ),
        f"dataset.aspect_buckets changes nothing: every picture is seen as {square[0]} x {square[1]}": (
            dataset.aspect_buckets and all((row.target_width, row.target_height) == square for row in rows)
        ),
        f"repeats {max(repeats)} in dataset.subsets changes nothing: it is the same for all pictures": (
            len(repeats) == 1 and max(repeats) > 1
        ),
    }
    return [text for text, applies in found.items() if applies and rows]


def predicated(count: int, text: str) -> str:
    """``2 pictures are CMYK``, ``1 picture is CMYK``: a predicate of pictures, said of so many."""
    verb, _, rest = text.partition(" ")
    return f"1 picture {ONE.get(verb, verb)} {rest}" if count == 1 else f"{count:,} pictures {text}"


def shown(names: list[str]) -> str:
    return ", ".join(names[:NUM_EXAMPLES]) + (", ..." if len(names) > NUM_EXAMPLES else "")
