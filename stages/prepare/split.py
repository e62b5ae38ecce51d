"""Which pictures are held out: a draw by content or a named split, and never a near-duplicate of one to train on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_dag.artifacts.manifest import Split
from lora_dag.core import seeding
from lora_dag.core.console import UserError, plural
from stages.prepare import duplicates
from stages.prepare.names import NUM_EXAMPLES

if TYPE_CHECKING:
    from stages.prepare.checked_picture import CheckedPicture
    from stages.prepare.params import DatasetParams


LEAST = 2
"""Pictures on either side, where there are four or more: with one held out, no interval can be told."""
FEW_HELDOUT = 5
"""Held-out pictures: by Student's t, an interval over four is 1.6 times as wide as one of known scatter."""


@dataclass(frozen=True)
class Assignment:
    sides: dict[str, Split]
    """file name -> side, of every picture that is used."""
    withheld: dict[str, str]
    """file name -> reason, of those in neither split."""
    groups: list[tuple[str, ...]] = field(default_factory=list)
    """File names of near-duplicates and of equal files, also of those withheld; each sorted, as is the list."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Facts about the split that are no fault and worth knowing."""


def assign(rows: Sequence[CheckedPicture], dataset: DatasetParams, num_left_out: int = 0) -> Assignment:
    """A side for every picture; what would be a near-duplicate of a picture on the other side is withheld.

    By fraction, a picture's side is a draw by its content, and a group of near-duplicates is on the side of the one
    with the smallest SHA-256; members that drew the other side are in neither split. So near-duplicates are on one
    side, and new pictures can withhold an old one or bring it back but never move it from one split to the other.
    Where fewer than LEAST are drawn for a side, those whose draws came nearest are moved there: these alone can go
    back, once more pictures are drawn for it. No rule could do without: it would have to hold out one of any two.
    By name, the pictures of ``dataset.heldout_split`` are held out and near-duplicates among the others are withheld.

    Args:
        num_left_out: pictures that are bad, for messages.

    Raises:
        UserError: a split is empty, or one picture is on both sides of the named split.
    """
    grouped = group(rows, dataset)
    own, moved = own_sides(rows, grouped, dataset)
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
    require_both_splits(rows, sides, len(withheld), num_left_out, dataset)
    names = sorted(tuple(sorted(row.entry.file_name for row in members)) for members in grouped)
    return Assignment(
        sides,
        withheld,
        names,
        warnings(rows, dataset) + large_groups(rows, grouped, withheld, dataset),
        moved_notes(own, moved, dataset) + few_heldout(rows, grouped, sides, dataset),
    )


def own_sides(
    rows: Sequence[CheckedPicture], grouped: list[list[CheckedPicture]], dataset: DatasetParams
) -> tuple[dict[str, Split], list[str]]:
    """file name -> side, and the names of those that were moved so that neither side has fewer than LEAST."""
    own = {row.entry.file_name: own_side(row, dataset) for row in rows}
    moved: list[str] = []
    if dataset.heldout_split is not None:
        return own, moved
    in_groups = {row.entry.file_name for members in grouped for row in members}
    units = [*grouped, *([row] for row in rows if row.entry.file_name not in in_groups)]
    drawn = [(anchor(unit, own, dataset), unit) for unit in units]
    drawn = sorted(
        (pair for pair in drawn if not regularizes(pair[0], dataset)), key=lambda pair: draw(pair[0], dataset)
    )
    least = min(LEAST, len(drawn) // 2)
    sides: tuple[Split, Split] = ("heldout", "train")
    for side, nearest in zip(sides, (drawn, drawn[::-1]), strict=True):
        others = [unit for first, unit in nearest if own[first.entry.file_name] != side]
        for unit in others[: max(0, least - (len(drawn) - len(others)))]:
            names = [row.entry.file_name for row in unit if not regularizes(row, dataset)]
            own |= dict.fromkeys(names, side)
            moved += names
    return own, moved


def own_side(row: CheckedPicture, dataset: DatasetParams) -> Split:
    """By content or by name alone, whatever else is in the dataset; regularization pictures are trained on."""
    if regularizes(row, dataset):
        return "train"
    if dataset.heldout_split is not None:
        return "heldout" if row.entry.split == dataset.heldout_split else "train"
    return "heldout" if draw(row, dataset) < (dataset.heldout_fraction or 0) else "train"


def draw(row: CheckedPicture, dataset: DatasetParams) -> float:
    """In [0, 1), by content."""
    return seeding.key(dataset.seed, "split", row.sha256) / 2**63


def regularizes(row: CheckedPicture, dataset: DatasetParams) -> bool:
    return dataset.as_subsets()[row.entry.subset].regularization


def group(rows: Sequence[CheckedPicture], dataset: DatasetParams) -> list[list[CheckedPicture]]:
    """Near-duplicates and equal files, at least two in each group."""
    if dataset.near_duplicate_bits is None:
        return gather(rows, lambda row: row.sha256)
    looks = list(dict.fromkeys((row.thumbnail, row.detail) for row in rows))  # equal files look alike
    thumbnails, details = zip(*looks, strict=True) if looks else ((), ())
    labels = duplicates.components(thumbnails, dataset.near_duplicate_bits, dataset.flip, details)
    label_of = dict(zip(looks, labels, strict=True))
    return gather(rows, lambda row: label_of[row.thumbnail, row.detail])


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


def seen(row: CheckedPicture) -> tuple[int, int, str, str]:
    return row.width, row.height, row.thumbnail, row.detail


def require_both_splits(
    rows: Sequence[CheckedPicture],
    sides: dict[str, Split],
    num_withheld: int,
    num_left_out: int,
    dataset: DatasetParams,
) -> None:
    """Refuse an empty split, with the cure that works for these pictures.

    Raises:
        UserError: one is empty.
    """
    counts = {"withheld as near-duplicates": num_withheld, "bad and left out": num_left_out}
    others = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    lost = f" ({others})" if others else ""
    kept = {sides.get(row.entry.file_name) for row in rows if not regularizes(row, dataset)}
    empty = next((side for side in ("heldout", "train") if side not in kept), None)
    if empty is None:
        return
    if dataset.heldout_split is not None:
        where = f"params.yaml dataset.heldout_split: '{dataset.heldout_split}' of {plural(len(sides), 'picture')}{lost}"
        cure = "add pictures to it" if empty == "heldout" else "add pictures to another split, such as train"
        if empty == "train" and num_withheld:
            cure += ", or set dataset.near_duplicate_bits to null if these are different"
        raise UserError(f"{where} leaves the {empty} split empty; {cure}")
    raise UserError(f"{dataset.source}: {one_side(rows, dataset)}{lost}")


def one_side(rows: Sequence[CheckedPicture], dataset: DatasetParams) -> str:
    """Why no fraction can split these pictures, and what to do."""
    drawn = [row for row in rows if not regularizes(row, dataset)]
    if not drawn:
        return "every picture is for regularization, and none of those is held out; add pictures to learn from"
    if len(drawn) == 1:
        return "1 picture cannot be split; at least two are needed, since one is held out"
    if len({row.sha256 for row in drawn}) == 1:
        return f"all {len(drawn)} pictures have the same bytes and cannot be split; add other pictures"
    return (
        f"all {len(drawn)} pictures are near-duplicates of each other (dataset.near_duplicate_bits:"
        f" {dataset.near_duplicate_bits}) and stay on one side of the split; add other pictures, or set"
        " dataset.near_duplicate_bits to null if these are different"
    )


def moved_notes(own: dict[str, Split], moved: list[str], dataset: DatasetParams) -> list[str]:
    if not moved:
        return []
    side = own[moved[0]]
    where = "held out" if side == "heldout" else "trained on"
    num_drawn = sum(each == side for each in own.values()) - len(moved)
    return [
        f"dataset.heldout_fraction {dataset.heldout_fraction} drew {num_drawn} of {len(own)} pictures to be {where};"
        f" {shown(moved)} came nearest and {'is' if len(moved) == 1 else 'are'} {where} as well, until more pictures"
        " are added"
    ]


def few_heldout(
    rows: Sequence[CheckedPicture], grouped: list[list[CheckedPicture]], sides: dict[str, Split], dataset: DatasetParams
) -> list[str]:
    """Fewer held-out pictures than can tell much, with the fraction that holds out enough of these."""
    count = sum(side == "heldout" for side in sides.values())
    if count >= FEW_HELDOUT:
        return []
    cure = "add pictures"
    if dataset.heldout_split is None and (fraction := enough(rows, grouped, dataset)) is not None:
        cure = f"dataset.heldout_fraction={fraction} holds out {FEW_HELDOUT} of these"
    held = plural(count, "picture is", "pictures are")
    return [f"{held} held out of {len(sides)}, and fewer than {FEW_HELDOUT} seldom tell settings apart; {cure}"]


def enough(rows: Sequence[CheckedPicture], grouped: list[list[CheckedPicture]], dataset: DatasetParams) -> float | None:
    """The smallest fraction of two decimals that holds out FEW_HELDOUT and trains on as many; None if none does."""
    for percent in range(1, 100):
        changed = dataset.model_copy(update={"heldout_fraction": percent / 100})
        own, _ = own_sides(rows, grouped, changed)
        anchors = {row.entry.file_name: anchor(members, own, changed) for members in grouped for row in members}
        kept = [side for name, side in own.items() if name not in anchors or own[anchors[name].entry.file_name] == side]
        if kept.count("heldout") >= FEW_HELDOUT:
            return percent / 100 if kept.count("train") >= FEW_HELDOUT else None
    return None


def large_groups(
    rows: Sequence[CheckedPicture],
    grouped: list[list[CheckedPicture]],
    withheld: dict[str, str],
    dataset: DatasetParams,
) -> list[str]:
    """A group of near-duplicates that holds most of the pictures is more often a fault of the measure."""
    largest = max(grouped, key=len, default=[])
    if len({row.sha256 for row in largest}) < 3 or 2 * len(largest) <= len(rows):
        return []
    names = [row.entry.file_name for row in largest]
    lost = sum(name in withheld for name in names)
    left_out = f", {lost} of which {'is' if lost == 1 else 'are'} left out" if lost else ""
    return [
        f"{len(names)} of {len(rows)} pictures are near-duplicates of each other{left_out} ({shown(names)}); if they"
        f" are different, set dataset.near_duplicate_bits {dataset.near_duplicate_bits} to null"
    ]


def shown(names: list[str]) -> str:
    return ", ".join(names[:NUM_EXAMPLES]) + (", ..." if len(names) > NUM_EXAMPLES else "")


def warnings(rows: Sequence[CheckedPicture], dataset: DatasetParams) -> list[str]:
    """What is allowed but seldom meant."""
    found = []
    num_twins = len(rows) - len({row.sha256 for row in rows})
    if num_twins:
        twins = plural(num_twins, "picture has", "pictures have")
        found.append(f"{twins} the same bytes as another one, so that it weighs double")
    splits = sorted({row.entry.split for row in rows if row.entry.split and not regularizes(row, dataset)})
    if len(splits) > 1 and dataset.heldout_split is None:
        found.append(f"dataset.heldout_fraction looks past the splits {', '.join(splits)}; see heldout_split")
    elif len(splits) > 2:
        found.append(f"of the source's splits ({', '.join(splits)}), all but {dataset.heldout_split} are trained on")
    return found
