"""Mask files with any image suffix: in a folder under the image's own name, or beside the image with an ending.

``dataset.mask`` is the folder below a source, or ``*-masklabel`` for fox-masklabel.png beside fox.jpg.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from lora_dag.core.console import Problem, UserError
from stages.prepare.file_names import Root, checked_file, checked_name, nfc, printable, stem
from stages.prepare.file_tree import Tree, scan
from stages.prepare.listing import row_problems
from stages.prepare.subset_reader import SubsetReader


def take_out(tree: Tree, mask: str | None) -> list[str]:
    """Remove the masks beside images, by the ending in ``dataset.mask``, from a tree and return them."""
    ending = ending_of(mask)
    masks = [name for name in tree.images if ending and stem(name).endswith(ending)]
    tree.images[:] = [name for name in tree.images if name not in set(masks)]
    return masks


def ending_of(mask: str | None) -> str:
    """Return ``-masklabel`` for ``*-masklabel``, and "" for a folder."""
    return nfc(mask[1:]) if mask and mask.startswith("*") else ""


def attach(reader: SubsetReader, beside: list[str]) -> None:
    """Attach each entry's mask. An entry without a mask becomes a problem.

    Regularization images need no masks: the loss then covers all of their pixels.

    Args:
        beside: masks that ``take_out`` returned.

    Raises:
        UserError: the folder of masks is missing, or it is a link that leads out of the source.
    """
    if reader.mask_folder is None:
        return
    optional = reader.subset.regularization
    if ending := ending_of(reader.mask_folder):
        masks = (
            None if optional and not beside else by_image((stem(name).removesuffix(ending), name) for name in beside)
        )
    else:
        masks = masks_below(reader, reader.mask_folder, optional)
    if masks is None:
        return
    of_images = {stem(name) for name in [*reader.names, *reader.unlisted]}
    of_images |= {stem(problem.file_name) for problem in reader.problems if problem.file_name}
    reader.warn_about(
        "mask-without-image",
        len(masks.keys() - of_images),
        f"mask in {reader.place} belongs to no image and is ignored.",
        f"masks in {reader.place} belong to no image and are ignored.",
    )
    listed, reader.entries = reader.entries, []
    for entry in listed:
        try:
            mask = mask_of(entry.file_name, masks, reader.root, reader.mask_folder)
        except UserError as error:
            reader.problems += row_problems(error.problems, entry.place, entry.file_name)
        else:
            reader.entries.append(replace(entry, mask=mask))


def masks_below(reader: SubsetReader, mask: str, optional: bool) -> dict[str, list[str]] | None:
    """Return the name of an image without its suffix, relative to the root -> its masks.

    Args:
        mask: the folder of masks in ``dataset.mask``.
        optional: return None if the folder is missing.

    Raises:
        UserError: the folder is missing, or it is a link that leads out of the source.
    """
    root, subset = reader.root, PurePosixPath(reader.relative_folder)
    folder = root.on_disk(str(subset / mask))
    path = root.folder / folder
    if not path.is_dir():
        if optional:
            return None
        text = f"{reader.dataset.setting('mask')}: {reader.place} has no folder '{mask}'. Add it, or set null."
        raise UserError(Problem("mask-folder-missing", text))
    if not root.holds(path / "x"):  # any name in it
        place = reader.dataset.setting("mask")
        text = f"{place}: '{mask}' is a link that leads out of {root.place('')}. Put the masks themselves there."
        raise UserError(Problem("name-outside-source", text))
    names = scan(root, folder).images
    return by_image((stem(str(subset / PurePosixPath(name).relative_to(folder))), name) for name in names)


def by_image(masks: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the ``stem`` of an image -> names of its masks.

    Args:
        masks: (stem of the image, name of the mask).
    """
    names: dict[str, list[str]] = {}
    for image, name in masks:
        names.setdefault(image, []).append(name)
    return names


def mask_of(name: str, masks: dict[str, list[str]], root: Root, mask: str) -> str:
    """Return the name of an image's mask.

    Raises:
        UserError: the image has no mask, or several.
    """
    names = masks.get(stem(name), [])
    if not names:
        if ending := ending_of(mask):
            expected = f"'{PurePosixPath(name).stem + ending}' beside it"
        else:
            expected = f"of the same name in folder '{mask}'"
        text = f"'{name}' has no mask {expected}. Add one. A white mask covers the whole image."
        raise UserError(Problem("mask-missing", text))
    if len(names) > 1:
        text = f"'{name}' has {len(names)} masks ({', '.join(map(printable, names))}). Keep one."
        raise UserError(Problem("mask-ambiguous", text))
    return checked_file(checked_name(names[0], root), root)
