"""The folder of masks: each picture's mask stands there under the picture's own name, with any picture suffix."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import PurePosixPath

from stages.core.console import UserError
from stages.prepare.listing import Problem
from stages.prepare.names import Root, checked_file, checked_name, printable, scan
from stages.prepare.scope import Scope


def attach(scope: Scope) -> None:
    """Give each entry its mask; one that has none becomes a problem.

    Regularization pictures may do without the folder: the loss then looks at all of them.

    Raises:
        UserError: there is no folder of masks, or it leaves the source.
    """
    if scope.mask_folder is None:
        return
    masks = masks_below(scope.root, scope.below, scope.mask_folder, optional=scope.subset.regularization)
    if masks is None:
        return
    of_pictures = {stem(name) for name in scope.names}
    of_pictures |= {stem(name.removeprefix(scope.root.prefix)) for name in scope.unlisted}
    of_pictures |= {stem(p.file_name.removeprefix(scope.root.prefix)) for p in scope.problems if p.file_name}
    scope.warn_about(len(masks.keys() - of_pictures), f"masks in {scope.place} belong to no picture and are left out")
    listed = list(zip(scope.entries, scope.names, strict=True))
    scope.entries, scope.names = [], []
    for entry, name in listed:
        try:
            mask = scope.root.prefix + mask_of(name, masks, scope.root, scope.mask_folder)
        except UserError as error:
            scope.problems.append(Problem(entry.place, str(error), entry.file_name))
        else:
            scope.entries.append(replace(entry, mask=mask))
            scope.names.append(name)


def masks_below(root: Root, below: str, mask: str, optional: bool) -> dict[str, list[str]] | None:
    """Name of a picture without its suffix, relative to the root -> its masks; None where there may be no folder.

    Raises:
        UserError: there is no such folder, or it leaves the source.
    """
    folder = str(PurePosixPath(below) / mask)
    path = root.folder / folder
    if not path.is_dir():
        if optional:
            return None
        raise UserError(f"params.yaml dataset.mask: no folder '{mask}' in {root.place(below)}; add it, or null")
    if not root.holds(path / "x"):  # any name in it
        raise UserError(
            f"params.yaml dataset.mask: '{mask}' is a link that leaves {root.place('')}; put the masks there"
        )
    found: dict[str, list[str]] = {}
    for name in scan(root, folder).pictures:
        found.setdefault(stem(str(PurePosixPath(below) / PurePosixPath(name).relative_to(folder))), []).append(name)
    return found


def mask_of(name: str, masks: dict[str, list[str]], root: Root, mask: str) -> str:
    found = masks.get(stem(name), [])
    if not found:
        raise UserError(
            f"'{name}' has no mask in folder '{mask}'; add one of the same name, white all over for all of it"
        )
    if len(found) > 1:
        raise UserError(f"'{name}' has {len(found)} masks ({', '.join(map(printable, found))}); keep one")
    return checked_file(checked_name(found[0], root), root)


def stem(name: str) -> str:
    return os.path.splitext(name)[0]
