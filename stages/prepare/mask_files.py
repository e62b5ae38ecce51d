"""Masks in files, with any picture suffix: in a folder under the picture's own name, or beside it with an ending.

``dataset.mask`` is the folder below a source, or ``*-masklabel`` for fox-masklabel.png beside fox.jpg.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from lora_dag.core.console import UserError
from stages.prepare.listing import Problem
from stages.prepare.names import Root, Tree, checked_file, checked_name, nfc, printable, scan, stem
from stages.prepare.subset_reader import SubsetReader


def take_out(tree: Tree, mask: str | None) -> list[str]:
    """Take the masks beside pictures out of a tree: those that ``dataset.mask`` gives the ending of."""
    ending = ending_of(mask)
    found = [name for name in tree.pictures if ending and stem(name).endswith(ending)]
    tree.pictures[:] = [name for name in tree.pictures if name not in set(found)]
    return found


def ending_of(mask: str | None) -> str:
    """``-masklabel`` of ``*-masklabel``; empty for a folder."""
    return nfc(mask[1:]) if mask and mask.startswith("*") else ""


def attach(reader: SubsetReader, beside: list[str]) -> None:
    """Give each entry its mask; one that has none becomes a problem.

    Regularization pictures may do without masks: the loss then looks at all of them.

    Args:
        beside: masks that ``take_out`` found.

    Raises:
        UserError: there is no folder of masks, or it leaves the source.
    """
    if reader.mask_folder is None:
        return
    optional = reader.subset.regularization
    if ending := ending_of(reader.mask_folder):
        masks = (
            None if optional and not beside else by_picture((stem(name).removesuffix(ending), name) for name in beside)
        )
    else:
        masks = masks_below(reader.root, reader.below, reader.mask_folder, optional)
    if masks is None:
        return
    of_pictures = {stem(name) for name in [*reader.names, *reader.unlisted]}
    of_pictures |= {stem(problem.file_name) for problem in reader.problems if problem.file_name}
    reader.warn_about(
        len(masks.keys() - of_pictures),
        f"mask in {reader.place} belongs to no picture and is left out",
        f"masks in {reader.place} belong to no picture and are left out",
    )
    listed, reader.entries = reader.entries, []
    for entry in listed:
        try:
            mask = mask_of(entry.file_name, masks, reader.root, reader.mask_folder)
        except UserError as error:
            reader.problems.append(Problem(entry.place, str(error), entry.file_name))
        else:
            reader.entries.append(replace(entry, mask=mask))


def masks_below(root: Root, below: str, mask: str, optional: bool) -> dict[str, list[str]] | None:
    """Name of a picture without its suffix, relative to the root -> its masks; None where there may be no folder.

    Raises:
        UserError: there is no such folder, or it leaves the source.
    """
    folder = root.on_disk(str(PurePosixPath(below) / mask))
    path = root.folder / folder
    if not path.is_dir():
        if optional:
            return None
        raise UserError(f"params.yaml dataset.mask: no folder '{mask}' in {root.place(below)}; add it, or null")
    if not root.holds(path / "x"):  # any name in it
        raise UserError(
            f"params.yaml dataset.mask: '{mask}' is a link that leaves {root.place('')}; put the masks there"
        )
    names = scan(root, folder).pictures
    return by_picture(
        (stem(str(PurePosixPath(below) / PurePosixPath(name).relative_to(folder))), name) for name in names
    )


def by_picture(masks: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """``stem`` of a picture -> names of its masks."""
    found: dict[str, list[str]] = {}
    for picture, name in masks:
        found.setdefault(picture, []).append(name)
    return found


def mask_of(name: str, masks: dict[str, list[str]], root: Root, mask: str) -> str:
    found = masks.get(stem(name), [])
    if not found:
        if ending := ending_of(mask):
            wanted = PurePosixPath(name).stem + ending
            raise UserError(f"'{name}' has no mask '{wanted}' beside it; add one, white all over for all of it")
        raise UserError(
            f"'{name}' has no mask in folder '{mask}'; add one of the same name, white all over for all of it"
        )
    if len(found) > 1:
        raise UserError(f"'{name}' has {len(found)} masks ({', '.join(map(printable, found))}); keep one")
    return checked_file(checked_name(found[0], root), root)
