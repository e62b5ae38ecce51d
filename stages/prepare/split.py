"""Which pictures are held out: a draw by content or a named split, and never a near-duplicate of one to train on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.artifacts.manifest import Split
from stages.core import seeding
from stages.core.console import UserError
from stages.prepare import duplicates

if TYPE_CHECKING:
    from stages.prepare.inspection import CheckedPicture
    from stages.prepare.params import DatasetParams


@dataclass(frozen=True)
class Assignment:
    sides: dict[str, Split]
    """file name -> side, of every picture that is used."""
    withheld: dict[str, str]
    """file name -> reason, of those in neither split."""
    groups: list[tuple[str, ...]] = field(default_factory=list)
    """File names of near-duplicates and of equal files, also of those withheld; each sorted, as is the list."""
    warnings: list[str] = field(default_factory=list)


def assign(rows: Sequence[CheckedPicture], dataset: DatasetParams, num_left_out: int = 0) -> Assignment:
    """A side for every picture; what would be a near-duplicate of a picture on the other side is withheld.

    By fraction, a picture's side is a draw by its content, and a group of near-duplicates is on the side of the one
    with the smallest SHA-256; members that drew the other side are in neither split. So near-duplicates are on one
    side, and new pictures can withhold an old one or bring it back but never move it from one split to the other.
    By name, the pictures of ``dataset.heldout_split`` are held out and near-duplicates among the others are withheld.

    Args:
        num_left_out: pictures that are bad, for messages.

    Raises:
        UserError: a split is empty, or one picture is on both sides of the named split.
    """
    own = {row.entry.file_name: own_side(row, dataset) for row in rows}
    grouped = group(rows, dataset)
    withheld: dict[str, str] = {}
    for members in grouped:
        decides = anchor(members, own, dataset)
        side = own[decides.entry.file_name]
        where = "held out" if side == "heldout" else "trained on"
        reason = f"near-duplicate of '{decides.entry.file_name}', which is {where}"
        withheld |= {row.entry.file_name: reason for row in members if own[row.entry.file_name] != side}
    if dataset.heldout_split is not None:
        require_one_side(grouped, own, dataset)
    sides = {name: side for name, side in own.items() if name not in withheld}
    require_both_splits(sides, len(withheld), num_left_out, dataset)
    names = sorted(tuple(sorted(row.entry.file_name for row in members)) for members in grouped)
    return Assignment(sides, withheld, names, warnings(rows, dataset))


def own_side(row: CheckedPicture, dataset: DatasetParams) -> Split:
    """By content or by name alone, whatever else is in the dataset; regularisation pictures are trained on."""
    if regularizes(row, dataset):
        return "train"
    if dataset.heldout_split is not None:
        return "heldout" if row.entry.split == dataset.heldout_split else "train"
    draw = seeding.key(dataset.seed, "split", row.sha256) / 2**63  # [0, 1)
    return "heldout" if draw < (dataset.heldout_fraction or 0) else "train"


def regularizes(row: CheckedPicture, dataset: DatasetParams) -> bool:
    return dataset.as_subsets()[row.entry.subset].regularization


def group(rows: Sequence[CheckedPicture], dataset: DatasetParams) -> list[list[CheckedPicture]]:
    """Near-duplicates and equal files, at least two in each group."""
    if dataset.near_duplicate_bits is None:
        return gather(rows, lambda row: row.sha256)
    thumbnails = list(dict.fromkeys(row.thumbnail for row in rows))  # equal files have equal thumbnails
    labels = duplicates.components(thumbnails, dataset.near_duplicate_bits, dataset.flip)
    label_of = dict(zip(thumbnails, labels, strict=True))
    return gather(rows, lambda row: label_of[row.thumbnail])


def gather(rows: Sequence[CheckedPicture], key: Callable[[CheckedPicture], object]) -> list[list[CheckedPicture]]:
    found = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return [members for members in found.values() if len(members) > 1]


def anchor(members: list[CheckedPicture], own: dict[str, Split], dataset: DatasetParams) -> CheckedPicture:
    """The member whose side the group is on."""

    def rank(row: CheckedPicture) -> tuple[bool, str, bool, str]:
        named = dataset.heldout_split is not None and own[row.entry.file_name] == "train"
        return named, row.sha256, regularizes(row, dataset), row.entry.file_name

    return min(members, key=rank)


# Checks


def require_one_side(groups: list[list[CheckedPicture]], own: dict[str, Split], dataset: DatasetParams) -> None:
    """One picture, the same bytes or the same pixels under another encoding, on both sides is a mistake."""
    problems = []
    for members in groups:
        for same in [*gather(members, lambda row: row.sha256), *gather(members, seen)]:
            heldout = [row for row in same if own[row.entry.file_name] == "heldout"]
            train = [row for row in same if own[row.entry.file_name] == "train" and not regularizes(row, dataset)]
            problems += [
                f"{row.entry.place}: '{row.entry.file_name}' shows the same picture as '{heldout[0].entry.file_name}', "
                f"which is held out by dataset.heldout_split {dataset.heldout_split}; remove one of the two"
                for row in train
                if heldout
            ]
    if problems:
        raise UserError(*dict.fromkeys(problems))


def seen(row: CheckedPicture) -> tuple[int, int, str]:
    return row.width, row.height, row.thumbnail


def require_both_splits(sides: dict[str, Split], num_withheld: int, num_left_out: int, dataset: DatasetParams) -> None:
    counts = {"withheld as near-duplicates": num_withheld, "bad and left out": num_left_out}
    others = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    lost = f" ({others})" if others else ""
    for split, advice in (("heldout", "raise"), ("train", "lower")):
        if split in sides.values():
            continue
        if dataset.heldout_split is not None:
            where, cure = f"heldout_split: '{dataset.heldout_split}'", "add pictures to it"
        else:
            where = f"heldout_fraction: {dataset.heldout_fraction}"
            cure = f"{advice} it, add pictures, or try another dataset.seed"
        raise UserError(
            f"params.yaml dataset.{where} of {len(sides)} pictures{lost} leaves the {split} split empty; {cure}"
        )


def warnings(rows: Sequence[CheckedPicture], dataset: DatasetParams) -> list[str]:
    """What is allowed but seldom meant."""
    found = []
    num_twins = len(rows) - len({row.sha256 for row in rows})
    if num_twins:
        found.append(f"{num_twins} pictures have the same bytes as another one and weigh double")
    splits = sorted({row.entry.split for row in rows if row.entry.split and not regularizes(row, dataset)})
    if len(splits) > 1 and dataset.heldout_split is None:
        found.append(f"dataset.heldout_fraction looks past the splits {', '.join(splits)}; see heldout_split")
    elif len(splits) > 2:
        found.append(f"of the source's splits ({', '.join(splits)}), all but {dataset.heldout_split} are trained on")
    return found
