"""Split into training and held-out images: by content or by a named split, with near-duplicates never across it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_dag.artifacts.manifest import Split
from lora_dag.core import seeding
from lora_dag.core.console import Problem, UserError, plural
from stages.prepare import near_duplicates
from stages.prepare.file_names import examples

if TYPE_CHECKING:
    from stages.prepare.checked_image import CheckedImage
    from stages.prepare.params import DatasetParams

Groups = list[list["CheckedImage"]]
"""Near-duplicates and equal files, at least two images in each group."""

LEAST = 2
"""Fewest images in each split of a dataset of four or more: one held-out image gives no confidence interval."""
FEW_HELDOUT = 5
"""Held-out images below which a note is logged: by Student's t, an interval over four images is 1.6 times as wide as
one with known variance."""


@dataclass(frozen=True)
class Assignment:
    split_of: dict[str, Split]
    """File name -> split, of every image that is used."""
    excluded: dict[str, str]
    """File name -> reason, of images in neither split."""
    groups: list[tuple[str, ...]] = field(default_factory=list)
    """Sorted file names of near-duplicates and of equal files, also of excluded ones, in sorted order."""
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Facts about the split that are no fault but worth knowing."""


def assign_splits(rows: Sequence[CheckedImage], dataset: DatasetParams, num_left_out: int = 0) -> Assignment:
    """Assign each image to a split. A near-duplicate of an image in the other split is excluded.

    By fraction: an image's split is drawn by its content. A group of near-duplicates has the split of its member with
    the smallest SHA-256, and members that drew the other split are excluded. So near-duplicates share a split, and new
    images can exclude an old one or bring it back, but never move it from one split to the other. If fewer than LEAST
    images are drawn for a split, those with the nearest draws are moved into it. Only these can move back, once more
    images are added. Every rule has this exception: it would have to hold out one of any two images.
    By name: the images of ``dataset.heldout_split`` are held out, and near-duplicates among the others are excluded.

    Args:
        num_left_out: number of bad images, for messages.

    Raises:
        UserError: a split is empty, or one image is on both sides of the named split.
    """
    groups = near_duplicate_groups(rows, dataset)
    drawn, moved = drawn_splits(rows, groups, dataset)
    excluded: dict[str, str] = {}
    for members in groups:
        first = anchor(members, drawn, dataset)
        group_split = drawn[first.entry.file_name]
        use = "held out" if group_split == "heldout" else "trained on"
        reason = f"near-duplicate of '{first.entry.file_name}', which is {use}"
        excluded |= {row.entry.file_name: reason for row in members if drawn[row.entry.file_name] != group_split}
    if dataset.heldout_split is not None:
        require_no_leak(groups, drawn, dataset)
    split_of = {name: split for name, split in drawn.items() if name not in excluded}
    require_both_splits(rows, split_of, len(excluded), num_left_out, dataset)
    return Assignment(
        split_of,
        excluded,
        sorted(tuple(sorted(row.entry.file_name for row in members)) for members in groups),
        split_warnings(rows, dataset) + large_group_warnings(rows, groups, excluded, dataset),
        moved_notes(drawn, moved, dataset) + few_heldout_notes(rows, groups, split_of, dataset),
    )


def drawn_splits(
    rows: Sequence[CheckedImage], groups: Groups, dataset: DatasetParams
) -> tuple[dict[str, Split], list[str]]:
    """Return file name -> split, and the names of images that were moved so that each split has LEAST images."""
    drawn = {row.entry.file_name: drawn_split(row, dataset) for row in rows}
    moved: list[str] = []
    if dataset.heldout_split is not None:
        return drawn, moved
    in_groups = {row.entry.file_name for members in groups for row in members}
    units = [*groups, *([row] for row in rows if row.entry.file_name not in in_groups)]
    anchored = [(anchor(unit, drawn, dataset), unit) for unit in units]
    by_draw = sorted(
        (pair for pair in anchored if not is_regularization(pair[0], dataset)), key=lambda pair: draw(pair[0], dataset)
    )
    least = min(LEAST, len(by_draw) // 2)
    splits: tuple[Split, Split] = ("heldout", "train")
    for split, nearest in zip(splits, (by_draw, by_draw[::-1]), strict=True):
        others = [unit for first, unit in nearest if drawn[first.entry.file_name] != split]
        for unit in others[: max(0, least - (len(by_draw) - len(others)))]:
            names = [row.entry.file_name for row in unit if not is_regularization(row, dataset)]
            drawn |= dict.fromkeys(names, split)
            moved += names
    return drawn, moved


def drawn_split(row: CheckedImage, dataset: DatasetParams) -> Split:
    """Return the split of one image by its content or name, independent of other images. Regularization trains."""
    if is_regularization(row, dataset):
        return "train"
    if dataset.heldout_split is not None:
        return "heldout" if row.entry.split == dataset.heldout_split else "train"
    return "heldout" if draw(row, dataset) < (dataset.heldout_fraction or 0) else "train"


def draw(row: CheckedImage, dataset: DatasetParams) -> float:
    """Return a number in [0, 1), by the image's content."""
    return seeding.key(dataset.seed, "split", row.sha256) / 2**63


def is_regularization(row: CheckedImage, dataset: DatasetParams) -> bool:
    return dataset.as_subsets()[row.entry.subset].regularization


def near_duplicate_groups(rows: Sequence[CheckedImage], dataset: DatasetParams) -> Groups:
    if dataset.near_duplicate_bits is None:
        return groups_by(rows, lambda row: row.sha256)
    features = list(dict.fromkeys((row.thumbnail, row.detail) for row in rows))  # equal files have equal features
    thumbnails, details = zip(*features, strict=True) if features else ((), ())
    labels = near_duplicates.group_labels(thumbnails, dataset.near_duplicate_bits, dataset.flip, details)
    label_of = dict(zip(features, labels, strict=True))
    return groups_by(rows, lambda row: label_of[row.thumbnail, row.detail])


def groups_by(rows: Sequence[CheckedImage], key: Callable[[CheckedImage], object]) -> Groups:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [members for members in groups.values() if len(members) > 1]


def anchor(members: list[CheckedImage], drawn: dict[str, Split], dataset: DatasetParams) -> CheckedImage:
    """Return the member whose split decides that of the group."""

    def rank(row: CheckedImage) -> tuple[bool, str, bool, str]:
        is_named_train = dataset.heldout_split is not None and drawn[row.entry.file_name] == "train"
        return is_named_train, row.sha256, is_regularization(row, dataset), row.entry.file_name

    return min(members, key=rank)


# Checks


def require_no_leak(groups: Groups, drawn: dict[str, Split], dataset: DatasetParams) -> None:
    """Refuse a named split with one image on both sides: the same bytes, or the same pixels in another encoding.

    Raises:
        UserError: one problem for each such training image.
    """
    problems = []
    for members in groups:
        for same in [*groups_by(members, lambda row: row.sha256), *groups_by(members, visual_key)]:
            heldout = [row for row in same if drawn[row.entry.file_name] == "heldout"]
            others = [row for row in same if drawn[row.entry.file_name] == "train"]
            train = [row for row in others if not is_regularization(row, dataset)]
            problems += [
                Problem(
                    "split-leak",
                    f"{row.entry.place}: '{row.entry.file_name}' shows the same image as "
                    f"'{heldout[0].entry.file_name}', which dataset.heldout_split {dataset.heldout_split} holds out. "
                    "Remove one of the two.",
                )
                for row in train
                if heldout
            ]
    if problems:
        raise UserError(*dict.fromkeys(problems))


def visual_key(row: CheckedImage) -> tuple[int, int, str, str]:
    return row.width, row.height, row.thumbnail, row.detail


def require_both_splits(
    rows: Sequence[CheckedImage],
    split_of: dict[str, Split],
    num_excluded: int,
    num_left_out: int,
    dataset: DatasetParams,
) -> None:
    """Refuse an empty split, with advice that works for these images.

    Raises:
        UserError: a split is empty.
    """
    counts = {"excluded as near-duplicates": num_excluded, "bad and left out": num_left_out}
    unused = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    unused = f" ({unused})" if unused else ""
    filled = {split_of.get(row.entry.file_name) for row in rows if not is_regularization(row, dataset)}
    empty = next((split for split in ("heldout", "train") if split not in filled), None)
    if empty is None:
        return
    if dataset.heldout_split is None:
        raise UserError(unsplittable(rows, unused, dataset))
    fix = "Add images to it" if empty == "heldout" else "Add images to another split, such as train"
    if empty == "train" and num_excluded:
        fix += ", or set dataset.near_duplicate_bits to null if these are different images"
    text = (
        f"'{dataset.heldout_split}' of {plural(len(split_of), 'image')}{unused} leaves the {empty} split empty. {fix}."
    )
    raise UserError(Problem("split-empty", text).at(dataset.setting("heldout_split")))


def unsplittable(rows: Sequence[CheckedImage], unused: str, dataset: DatasetParams) -> Problem:
    """Return the problem that no fraction can split these images.

    Args:
        unused: counts of images that are not used, in parentheses, or "".
    """
    drawn = [row for row in rows if not is_regularization(row, dataset)]
    if not drawn:
        return Problem(
            "split-impossible",
            f"{dataset.source}: all images are for regularization{unused}, which is never held out."
            " Add images to learn from.",
        )
    if len(drawn) == 1:
        return Problem(
            "split-impossible",
            f"{dataset.source}: 1 image{unused} cannot be split. At least two are needed, since one is held out.",
        )
    if len({row.sha256 for row in drawn}) == 1:
        return Problem(
            "split-impossible",
            f"{dataset.source}: all {len(drawn)} images{unused} have the same bytes and cannot be split."
            " Add other images.",
        )
    return Problem(
        "split-impossible",
        f"{dataset.source}: all {len(drawn)} images{unused} are near-duplicates of each other and cannot be split. Add"
        f" other images, or change dataset.near_duplicate_bits from {dataset.near_duplicate_bits} to null if these are"
        " different.",
    )


def moved_notes(drawn: dict[str, Split], moved: list[str], dataset: DatasetParams) -> list[str]:
    """Return a note about images that were moved into a split with fewer than LEAST images."""
    if not moved:
        return []
    split = drawn[moved[0]]
    use = "held out" if split == "heldout" else "trained on"
    num_drawn = sum(each == split for each in drawn.values()) - len(moved)
    are = "is" if len(moved) == 1 else "are"
    return [
        f"dataset.heldout_fraction {dataset.heldout_fraction} drew {num_drawn} of {len(drawn)} images to be {use}."
        f" {examples(moved)} with the nearest draws {are} {use} as well, until more images are added."
    ]


def few_heldout_notes(
    rows: Sequence[CheckedImage], groups: Groups, split_of: dict[str, Split], dataset: DatasetParams
) -> list[str]:
    """Return a note about fewer than FEW_HELDOUT held-out images, with the fraction that holds out enough."""
    count = sum(split == "heldout" for split in split_of.values())
    if count >= FEW_HELDOUT:
        return []
    fix = "Add images."
    if dataset.heldout_split is None and (fraction := sufficient_fraction(rows, groups, dataset)) is not None:
        fix = f"Set dataset.heldout_fraction={fraction} to hold out {FEW_HELDOUT}."
    held_out = plural(count, "image is", "images are") + f" held out of {len(split_of)}"
    return [f"{held_out}, but fewer than {FEW_HELDOUT} seldom show a difference between settings. {fix}"]


def sufficient_fraction(rows: Sequence[CheckedImage], groups: Groups, dataset: DatasetParams) -> float | None:
    """Return the smallest fraction of two decimals that gives both splits FEW_HELDOUT images, or None."""
    for percent in range(1, 100):
        changed = dataset.model_copy(update={"heldout_fraction": percent / 100})
        drawn, _ = drawn_splits(rows, groups, changed)
        anchors = {row.entry.file_name: anchor(members, drawn, changed) for members in groups for row in members}
        used = [
            split
            for name, split in drawn.items()
            if name not in anchors or drawn[anchors[name].entry.file_name] == split
        ]
        if used.count("heldout") >= FEW_HELDOUT:
            return percent / 100 if used.count("train") >= FEW_HELDOUT else None
    return None


def large_group_warnings(
    rows: Sequence[CheckedImage], groups: Groups, excluded: dict[str, str], dataset: DatasetParams
) -> list[Problem]:
    """Return a warning about a group with most of the images, which is more often a fault of the hash."""
    largest = max(groups, key=len, default=[])
    if len({row.sha256 for row in largest}) < 3 or 2 * len(largest) <= len(rows):
        return []
    names = [row.entry.file_name for row in largest]
    num_excluded = sum(name in excluded for name in names)
    also = f", {num_excluded} of which {'is' if num_excluded == 1 else 'are'} left out" if num_excluded else ""
    text = f"{len(names)} of {len(rows)} images are near-duplicates of each other{also} ({examples(names)})."
    fix = f"If they are different, change dataset.near_duplicate_bits from {dataset.near_duplicate_bits} to null."
    return [Problem("near-duplicates-many", f"{text} {fix}")]


def split_warnings(rows: Sequence[CheckedImage], dataset: DatasetParams) -> list[Problem]:
    """Return warnings about equal files, and about splits of the source that are not held out."""
    problems = []
    num_copies = len(rows) - len({row.sha256 for row in rows})
    if num_copies:
        have = plural(num_copies, "image has", "images have")
        problems.append(Problem("image-copies", f"{have} the same bytes as another one, which therefore counts twice."))
    splits = sorted({row.entry.split for row in rows if row.entry.split and not is_regularization(row, dataset)})
    if len(splits) > 1 and dataset.heldout_split is None:
        text = (
            f"{dataset.setting('heldout_fraction')}: the splits of the source ({', '.join(splits)}) are ignored."
            " To hold out one of them, set dataset.heldout_split."
        )
        problems.append(Problem("split-ignored", text))
    elif len(splits) > 2:
        text = f"all splits of the source ({', '.join(splits)}) except {dataset.heldout_split} are trained on."
        problems.append(Problem("split-ignored", text))
    return problems
