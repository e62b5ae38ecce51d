"""Dataset report for reviewers: reports/dataset/{metrics.json,images.csv,contact.png}.

The files depend only on the manifest and the images.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_dag.artifacts import image_table, metrics
from lora_dag.artifacts.manifest import Item, Manifest
from lora_dag.core.console import plural
from lora_dag.images.color_measures import chroma, dark_share
from lora_dag.images.decode import load_view
from lora_dag.images.masks import load_mask
from lora_dag.images.read import ReadImage
from lora_dag.pages.sheets import MAX_BYTES, cell_sides, save_sheet, sheet
from stages.prepare.geometry import Size
from stages.prepare.inspection_cache import InspectionCache

NUM_MEASURED = 512  # training images, at most, in the means of chroma and dark_share
NUM_SIZES = 40  # largest number of sizes with a count of their own
COLUMNS, MIN_COLUMNS = 8, 5  # of the contact sheet; fewer than 5 would cut off its title
TRAIN_ROWS, CELL = 4, 80
LETTERBOX = "#eaeef2"
MASKED = 128  # gray of masked pixels
MASKED_SHARE = 0.75  # share of that gray where the mask is 0


def write_report(
    manifest: Manifest,
    left_out: Sequence[tuple[str, str]],
    groups: Sequence[tuple[str, ...]],
    num_unlisted: int,
    read: ReadImage,
    folder: Path,
) -> None:
    """Write the three files into ``folder``.

    Args:
        left_out: (file name, reason) of each image that is not used.
        groups: file names of near-duplicates and of equal files, also of unused ones.
        num_unlisted: number of images that no row names.
    """
    content = {item.file_name: item.sha256 for item in manifest.items}
    groups = [group for group in groups if len({content.get(name, name) for name in group}) > 1]  # not equal files
    values = count(manifest.items, left_out, groups, num_unlisted) | measure(manifest, read)
    metrics.save(folder / "metrics.json", values)
    image_table.save(folder / "images.csv", table(manifest.items, left_out, groups))
    sides = cell_sides(max(max(size_of(item)) for item in manifest.items), CELL)
    save_sheet(folder / "contact.png", contact_sheet(manifest, read), sides, MAX_BYTES["contact"])


# Numbers


def count(
    items: list[Item], left_out: Sequence[tuple[str, str]], groups: Sequence[tuple[str, ...]], num_unlisted: int
) -> dict[str, metrics.Value]:
    """Return the counts that a reviewer compares between two versions of a dataset."""
    splits = Counter(item.split for item in items)
    sizes = Counter(size_of(item) for item in items)
    words = [len(item.caption.split()) for item in items]
    counts: dict[str, metrics.Value] = {
        "num_images": len(items),
        "num_train": splits["train"],
        "num_heldout": splits["heldout"],
        "num_left_out": len(left_out),
        "num_unlisted": num_unlisted,
        "num_near_duplicate_groups": len(groups),
        "num_buckets": len(sizes),
        "num_masked": sum(item.mask is not None for item in items),
        "num_captions": len({caption for item in items for caption in item.captions}),
        "caption_words_median": statistics.median(words),
        "caption_words_max": max(words),
    }
    num_regularization = sum(item.regularization for item in items)
    if num_regularization:
        counts["num_regularization"] = num_regularization
    if len(sizes) > 1:
        largest = sorted(sizes, key=lambda size: (-sizes[size], size))[:NUM_SIZES]
        counts |= {f"bucket.{width}x{height}": sizes[width, height] for width, height in largest}
    return counts


def measure(manifest: Manifest, read: ReadImage) -> dict[str, metrics.Value]:
    """Return means of the color measures over at most NUM_MEASURED training images, chosen by content, or None."""
    train = [item for item in manifest.items if item.split == "train" and not item.regularization]
    sample = by_content(train)[:NUM_MEASURED]
    with InspectionCache("measured") as cache:
        pairs = [measure_one(manifest, item, read, cache) for item in sample]
    names = ("chroma", "dark_share")
    return {name: statistics.fmean(pair[i] for pair in pairs) if pairs else None for i, name in enumerate(names)}


def measure_one(manifest: Manifest, item: Item, read: ReadImage, cache: InspectionCache) -> list[float]:
    """Return chroma and dark share of an image as the model sees it. Only new images are decoded."""
    (view,) = manifest.augmentation.views(item, 1)
    key = [item.sha256, item.width, item.height, asdict(view), manifest.preprocessing]
    known = cache.find(key)
    if known is None:
        array = np.asarray(first_view(manifest, item, read))
        known = [chroma(array), dark_share(array)]
        cache.add(key, known)
    return known


# The table


def table(
    items: list[Item], left_out: Sequence[tuple[str, str]], groups: Sequence[tuple[str, ...]]
) -> list[image_table.Row]:
    first_of = {name: min(group) for group in groups for name in group}
    rows = [row_of(item, first_of.get(item.file_name, "")) for item in items]
    return rows + [
        {
            "file_name": name,
            "split": image_table.LEFT_OUT,
            "near_duplicates": first_of.get(name, ""),
            "reason": reason,
        }
        for name, reason in left_out
    ]


def row_of(item: Item, near_duplicates: str) -> image_table.Row:
    return {
        "file_name": item.file_name,
        "split": item.split,
        "width": str(item.source_width),
        "height": str(item.source_height),
        "bucket": f"{item.width}x{item.height}",
        "repeats": str(item.repeats),
        "captions": item.caption,
        "num_captions": str(len(item.captions)),
        "captions_digest": digest(item.captions) if len(item.captions) > 1 else "",
        "sha256": item.sha256,
        "near_duplicates": near_duplicates,
    }


def digest(captions: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(captions, ensure_ascii=False).encode()).hexdigest()[:12]


# The contact sheet


def contact_sheet(manifest: Manifest, read: ReadImage) -> Callable[[int], Image.Image]:
    """Return a function from the side of a cell in pixels to the contact sheet.

    The sheet shows a sample, chosen by content, as the model sees it: rows of training images by size, then at most
    one row of regularization images and one of held-out images.
    """
    labeled_rows = sample_rows(manifest.items)
    columns = max(MIN_COLUMNS, *(len(items) for _, items in labeled_rows))
    rows = [padded([cell(manifest, item, read) for item in items], columns) for _, items in labeled_rows]
    captions = [padded([item.caption for item in items], columns) for _, items in labeled_rows]
    labels = [label for label, _ in labeled_rows]
    return lambda side: sheet(rows, labels, None, side, title(manifest), captions)


def padded(row: list[Any], columns: int) -> list[Any]:
    return [*row, *[None] * (columns - len(row))]


def title(manifest: Manifest) -> str:
    splits = Counter(item.split for item in manifest.items)
    sizes = sorted({size_of(item) for item in manifest.items})
    pixels = f"{sizes[0][0]} x {sizes[0][1]} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes"
    masked = ", gray where masked" if any(item.mask for item in manifest.items) else ""
    crop = manifest.augmentation.crop
    return (
        f"{plural(splits['train'], 'image')} to train on, {splits['heldout']} held out, {pixels}, {crop} crop{masked}"
    )


def sample_rows(items: list[Item]) -> list[tuple[str, list[Item]]]:
    """Return (label, at most COLUMNS images) of each row."""
    train = [item for item in items if item.split == "train" and not item.regularization]
    rows = rows_by_size(by_content(train))
    for label, others in (
        ("regularization", [item for item in items if item.regularization]),
        ("held-out", [item for item in items if item.split == "heldout"]),
    ):
        if others:
            rows.append((label, by_content(others)[:COLUMNS]))
    return rows


def rows_by_size(items: list[Item]) -> list[tuple[str, list[Item]]]:
    """Return at most TRAIN_ROWS rows, divided among the most frequent sizes by their number of images, wide to tall."""
    by_size: dict[Size, list[Item]] = defaultdict(list)
    for item in items:
        by_size[size_of(item)].append(item)
    num_rows = dict.fromkeys(sorted(by_size, key=lambda size: (-len(by_size[size]), size))[:TRAIN_ROWS], 1)
    for _ in range(TRAIN_ROWS - len(num_rows)):
        incomplete = [size for size, rows in num_rows.items() if len(by_size[size]) > rows * COLUMNS]
        if incomplete:
            num_rows[max(incomplete, key=lambda size: len(by_size[size]) / num_rows[size])] += 1
    rows = []
    for size in sorted(num_rows, key=lambda size: (-size[0] / size[1], size)):
        label = "train" if len(by_size) == 1 else f"train {size[0]}x{size[1]}"
        sample = sorted(by_size[size][: num_rows[size] * COLUMNS], key=lambda item: item.file_name)
        rows += [(label, sample[start : start + COLUMNS]) for start in range(0, len(sample), COLUMNS)]
    return rows


def by_content(items: list[Item]) -> list[Item]:
    """Return the items in order of their content, so that a sample changes little with the dataset."""
    return sorted(items, key=lambda item: (item.sha256, item.file_name))


def size_of(item: Item) -> Size:
    return item.width, item.height


def cell(manifest: Manifest, item: Item, read: ReadImage) -> Image.Image:
    """Return an image as the model sees it, grayed where it is masked, in a square with bars of another color."""
    image = first_view(manifest, item, read)
    if item.mask:
        image = gray_out(image, first_mask(manifest, item, read))
    side = max(image.size)
    square = Image.new("RGB", (side, side), LETTERBOX)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def gray_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the image with masked pixels mixed with gray.

    Args:
        mask: float32 [H, W], 0 to 1.
    """
    pixels = np.asarray(image, np.float32)  # [H, W, 3]
    share = MASKED_SHARE * (1 - mask[..., None])
    return Image.fromarray((pixels * (1 - share) + MASKED * share).round().astype(np.uint8))


def first_view(manifest: Manifest, item: Item, read: ReadImage) -> Image.Image:
    (view,) = manifest.augmentation.views(item, 1)
    return load_view(read(item.file_name), item, view, manifest.preprocessing)


def first_mask(manifest: Manifest, item: Item, read: ReadImage) -> np.ndarray:
    (view,) = manifest.augmentation.views(item, 1)
    if item.mask == "alpha":
        return load_mask(read(item.file_name), item, view, manifest.preprocessing, "alpha")
    return load_mask(read(item.mask or ""), item, view, manifest.preprocessing, "file")
