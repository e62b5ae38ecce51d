"""Inspection of every listed image and mask: hash, check, fit to a target size; all problems are collected."""

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

from lora_dag.artifacts.image_table import MAX_CUT, cropped_fraction, enlargement
from lora_dag.artifacts.manifest import Augmentation, Item
from lora_dag.core.console import Problem, UserError, plural
from lora_dag.images import checks, file_formats, masks
from lora_dag.images.checks import ImageFacts
from lora_dag.images.read import ReadImage
from stages.prepare import geometry, side_images
from stages.prepare.checked_image import CheckedImage
from stages.prepare.file_names import examples
from stages.prepare.geometry import Size
from stages.prepare.inspection_cache import InspectionCache
from stages.prepare.listing import Entry, RowProblem, row_problems

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

NUM_READERS = 4  # threads; Pillow and hashlib release Python's lock
AHEAD = 16  # images submitted to the threads at a time
MAX_ASPECT_ERROR = 0.01  # between a mask's shape and its image's
SINGULAR = {"are": "is", "have": "has", "state": "states", "hold": "holds"}
NO_LOSS = "so no pixel would count in the loss. Correct it, or set dataset.unmasked_weight above 0."


Result = tuple[CheckedImage, list[Problem]]
"""A usable image, and remarks: warnings about it as predicates."""


@dataclass(frozen=True)
class Inspected:
    rows: list[CheckedImage]
    """In the order of the entries, as are the problems."""
    problems: list[RowProblem]
    warnings: list[Problem]
    """One line for all images that a warning applies to."""
    num_inspected: int
    """Images that were inspected, fewer than all if the time ran out."""


def inspect(entries: list[Entry], dataset: DatasetParams, read: ReadImage, seconds: float = math.inf) -> Inspected:
    """Inspect every image and its mask. Results are cached by content.

    Args:
        seconds: time limit, after which the remaining images are skipped.
    """
    rows, problems = [], []
    end = time.monotonic() + seconds
    num_inspected = 0
    names_by_remark: dict[Problem, list[str]] = {}
    with InspectionCache("checked") as cache:
        results = in_order(entries, Inspector(dataset, read, cache))
        for entry, result in tqdm(results, desc="images", total=len(entries), disable=None, leave=False):
            if time.monotonic() > end:
                break
            num_inspected += 1
            if isinstance(result, UserError):
                problems += row_problems(result.problems, entry.place, entry.file_name)
                continue
            row, row_remarks = result
            rows.append(row)
            for remark in row_remarks:
                names_by_remark.setdefault(remark, []).append(entry.file_name)
    warnings = [remark_warning(remark, names) for remark, names in names_by_remark.items()]
    has_frames = any(remark.code == "image-first-frame" for remark in names_by_remark)
    warnings += heavy_crops(rows, dataset) + ineffective_settings(rows, dataset, has_frames)
    return Inspected(rows, problems, warnings + side_images.gray_twins(rows), num_inspected)


def in_order(entries: Iterable[Entry], inspector: Inspector) -> Iterator[tuple[Entry, Result | UserError]]:
    """Yield each entry with its result or its problems. At most AHEAD images are in memory at a time."""

    def result_or_error(entry: Entry) -> Result | UserError:
        try:
            return inspector.examine(entry)
        except UserError as error:
            return error

    waiting: deque[tuple[Entry, Future[Result | UserError]]] = deque()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(result_or_error, entry)))
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
    """Inspects one image at a time. Threads may share it."""

    dataset: DatasetParams
    read: ReadImage
    cache: InspectionCache

    def examine(self, entry: Entry) -> Result:
        """Return one checked image and its remarks.

        Raises:
            UserError: the image or its mask cannot be used.
        """
        name = entry.file_name
        sha256, facts = self.check(name)
        problems: list[Problem] = []
        size, mask_sha256 = None, None
        try:
            size = geometry.fit(facts.width, facts.height, self.dataset)
        except UserError as error:
            problems += error.about(f"'{name}'").problems
        try:
            mask_sha256 = self.check_mask(entry, facts)
            if size and self.dataset.crop == "center" and not self.dataset.unmasked_weight:
                self.check_mask_in_crop(entry, mask_sha256 or sha256, facts, size)
        except UserError as error:
            problems += error.problems
        if problems or size is None:
            raise UserError(*problems)
        row = CheckedImage(
            entry,
            sha256,
            facts.width,
            facts.height,
            *size,
            facts.has_alpha,
            facts.thumbnail,
            mask_sha256,
            facts.detail,
        )
        return row, remarks(row, facts, self.dataset)

    def check(self, name: str) -> tuple[str, ImageFacts]:
        """Return a file's SHA-256 and the facts about the image. Refusals are not cached, since they name the file.

        Raises:
            UserError: the file is missing, or holds no image that can be used.
            OSError: the machine cannot read the file.
        """
        try:
            blob = self.read(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            text = f"'{name}' cannot be read ({error.strerror or error}). Restore it or remove it."
            raise UserError(Problem("file-missing", text)) from None
        sha256 = hashlib.sha256(blob).hexdigest()
        key = [sha256, self.dataset.first_frame]
        known = self.cache.find(key)
        if known is not None:
            return sha256, restored(known)
        checked = checks.check_image(blob, name, self.dataset.first_frame)
        self.cache.add(key, asdict(checked))
        return sha256, checked

    def check_mask(self, entry: Entry, image: ImageFacts) -> str | None:
        """Return the SHA-256 of the mask file, or None without one.

        Raises:
            UserError: the mask cannot be read, has another shape than the image, hides all of it, or holds 0 and 1.
        """
        if self.dataset.mask == "alpha" and image.alpha == (0, 0) and not self.dataset.unmasked_weight:
            raise UserError(Problem("mask-empty", f"'{entry.file_name}' is fully transparent, {NO_LOSS}"))
        if entry.mask is None or self.dataset.mask == "alpha":
            return None
        sha256, mask = self.check(entry.mask)
        if abs(mask.width * image.height / (mask.height * image.width) - 1) > MAX_ASPECT_ERROR:
            is_turned = abs(mask.height * image.height / (mask.width * image.width) - 1) <= MAX_ASPECT_ERROR
            fix = "Turn it by the image's EXIF orientation." if is_turned else "Give it the image's aspect ratio."
            raise UserError(
                Problem(
                    "mask-shape",
                    f"mask '{entry.mask}' has {mask.width} x {mask.height} pixels, another shape than the "
                    f"{image.width} x {image.height} of '{entry.file_name}'. {fix}",
                )
            )
        if mask.lightest == 0 and not self.dataset.unmasked_weight:
            raise UserError(Problem("mask-empty", f"mask '{entry.mask}' is fully black, {NO_LOSS}"))
        if mask.lightest == 1:
            text = f"mask '{entry.mask}' holds 0 and 1, but white is 255. Multiply it by 255."
            raise UserError(Problem("mask-range", text))
        return sha256

    def check_mask_in_crop(self, entry: Entry, sha256: str, image: ImageFacts, size: Size) -> None:
        """Refuse a mask that is empty inside the center crop. Stage cache_latents checks random crops.

        Args:
            sha256: digest of the bytes that hold the mask.

        Raises:
            UserError: the mask is empty inside the center crop.
        """
        kind: Literal["alpha", "file"] = "alpha" if self.dataset.mask == "alpha" else "file"
        name = entry.file_name if kind == "alpha" else entry.mask
        is_uncropped = image.width * size[1] == image.height * size[0]
        if is_uncropped or name is None or (kind == "alpha" and not image.has_alpha):
            return
        item = Item(entry.file_name, sha256, "", ("",), "train", image.width, image.height, *size)
        (view,) = Augmentation("center", False, self.dataset.seed).views(item, 1)
        key = [sha256, kind, image.width, image.height, view.crop, size, "is visible"]
        is_visible = self.cache.find(key)
        if is_visible is None:
            is_visible = bool(masks.cut_mask(masks.decode_mask(self.read(name), kind), item, view).any())
            self.cache.add(key, is_visible)
        if not is_visible:
            subject = f"'{name}' is fully transparent" if kind == "alpha" else f"mask '{name}' is fully black"
            raise UserError(Problem("mask-empty", f"{subject} inside the center crop, {NO_LOSS}"))


def restored(fields: dict[str, Any]) -> ImageFacts:
    """Return facts from JSON, which has no tuples."""
    alpha = None if fields["alpha"] is None else tuple(fields["alpha"])
    return ImageFacts(**fields | {"alpha": alpha, "remarks": tuple(fields["remarks"])})


def remarks(row: CheckedImage, facts: ImageFacts, dataset: DatasetParams) -> list[Problem]:
    """Return warnings about a usable image, as predicates of several images."""
    size = (row.target_width, row.target_height)
    is_uncropped = row.width * size[1] == row.height * size[0]
    applying = [checks.REMARKS[code] for code in facts.remarks]
    if file_formats.has_wrong_suffix(row.entry.file_name, facts.format):
        applying.append(Problem("image-wrong-suffix", f"hold {facts.format} data under the suffix of another format."))
    if enlargement(row.width, row.height, size) > 1:
        applying.append(Problem("image-enlarged", "are enlarged, as dataset.max_upscale allows."))
    if dataset.crop == "random" and is_uncropped:
        text = "have the target's aspect ratio, so dataset.crop random has no effect on them."
        applying.append(Problem("image-never-cropped", text))
    if dataset.mask == "alpha" and not facts.has_alpha:
        applying.append(Problem("image-opaque", "have no transparent pixel, so dataset.mask alpha has no effect."))
    return applying


def heavy_crops(rows: list[CheckedImage], dataset: DatasetParams) -> list[Problem]:
    """Return a warning about images that lose much of what their captions describe."""
    shares = [cropped_fraction(row.width, row.height, (row.target_width, row.target_height)) for row in rows]
    heavy = [row for row, share in zip(rows, shares, strict=True) if share > MAX_CUT]
    if not heavy:
        return []
    lose = plural(len(heavy), "image loses", "images lose")
    names = examples([row.entry.file_name for row in heavy])
    text = f"{lose} more than a third of the area to the crop, up to {max(shares):.0%} ({names})."
    return [Problem("image-heavily-cropped", f"{text} {crop_fix(heavy, dataset)}")]


def crop_fix(heavy: list[CheckedImage], dataset: DatasetParams) -> str:
    """Return advice: aspect-ratio buckets with the ratio that these images need, if a computation shows they help."""
    by_hand = "Crop them yourself, so that the captions fit the rest."
    if dataset.aspect_buckets or dataset.resolution % dataset.bucket_step:
        return by_hand
    longest = max(max(row.width, row.height) / min(row.width, row.height) for row in heavy)
    ratio = max(dataset.max_aspect_ratio, geometry.ceil2(longest))
    changed = dataset.model_copy(update={"aspect_buckets": True, "max_aspect_ratio": ratio})
    try:
        sizes = [geometry.fit(row.width, row.height, changed) for row in heavy]
    except UserError:
        return by_hand
    if any(cropped_fraction(row.width, row.height, size) > MAX_CUT for row, size in zip(heavy, sizes, strict=True)):
        return by_hand
    wider = f" with dataset.max_aspect_ratio={ratio:g}" if ratio > dataset.max_aspect_ratio else ""
    return f"Set dataset.aspect_buckets=true{wider} to keep that area."


def ineffective_settings(rows: list[CheckedImage], dataset: DatasetParams, has_frames: bool) -> list[Problem]:
    """Return warnings about settings that have no effect on these images.

    Args:
        has_frames: some image has several frames or pages.
    """
    square = (dataset.resolution, dataset.resolution)
    repeats = {subset.repeats for subset in dataset.as_subsets()}
    reasons = {
        "background": (
            dataset.background.lower() != "#ffffff" and not any(row.has_alpha for row in rows),
            f"{dataset.background} has no effect, since no image has a transparent pixel.",
        ),
        "first_frame": (
            dataset.first_frame and not has_frames,
            "true has no effect, since no image has several frames or pages.",
        ),
        "max_aspect_ratio": (
            dataset.max_aspect_ratio != 2 and not dataset.aspect_buckets,
            f"{dataset.max_aspect_ratio:g} has no effect without dataset.aspect_buckets.",
        ),
        "aspect_buckets": (
            dataset.aspect_buckets and all((row.target_width, row.target_height) == square for row in rows),
            f"true has no effect, since the target size of every image is {square[0]} x {square[1]}.",
        ),
        "subsets": (
            len(repeats) == 1 and max(repeats) > 1,
            f"repeats {max(repeats)} has no effect, since it is equal for all images.",
        ),
    }
    return [
        Problem("setting-ignored", f"{dataset.setting(name)}: {text}")
        for name, (applies, text) in reasons.items()
        if applies and rows
    ]


def remark_warning(remark: Problem, names: list[str]) -> Problem:
    """Return ``1 image (a.png) is CMYK ...`` or ``2 images (a.png, b.png) are CMYK ...``."""
    verb, _, rest = remark.partition(" ")
    verb = SINGULAR.get(verb, verb) if len(names) == 1 else verb
    return Problem(remark.code, f"{plural(len(names), 'image')} ({examples(names)}) {verb} {rest}")
