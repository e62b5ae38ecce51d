"""Side images of other tools, recognized by their names: masks, control images, thumbnails.

Without captions of their own they would be trained on under the caption that all images share.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from lora_dag.core.console import Problem, UserError, plural
from lora_dag.images.perceptual_hash import thumbnail_pixels
from stages.prepare.file_names import examples, stem
from stages.prepare.mask_files import ending_of

if TYPE_CHECKING:
    from stages.prepare.checked_image import CheckedImage
    from stages.prepare.subset_reader import SubsetReader

MASKS = {"mask", "masks", "masklabel", "matte", "mattes", "alphamask", "alphamasks"}
"""Words for masks. ``masklabel`` is of OneTrainer."""
OTHERS = {
    *(
        "canny",
        "cond",
        "condition",
        "conditioning",
        "condlabel",
        "control",
        "controlnet",
        "depth",
        "depthmap",
        "depths",
    ),
    *("edge", "edges", "hed", "hint", "hints", "lineart", "mlsd", "normal", "normalmap", "normals", "openpose", "pose"),
    *(
        "poses",
        "preview",
        "previews",
        "scribble",
        "seg",
        "segmentation",
        "softedge",
        "thumb",
        "thumbnail",
        "thumbnails",
    ),
    "thumbs",
}
WORD = "|".join(sorted(MASKS | OTHERS, key=len, reverse=True))
ENDING = re.compile(rf"(.+?)([-_. ]+({WORD}))", re.IGNORECASE)
BEGINNING = re.compile(rf"(.*/|)(({WORD})[-_. ]+)([^/]+)", re.IGNORECASE)
LEAST_SHARE = 0.5
"""Least share of images with a side image: a few ``fox-pose.png`` may be images to train on. A mask never is."""


def refuse(reader: SubsetReader, bare: Iterable[str], names: Iterable[str]) -> None:
    """Refuse images that seem to be side images.

    Args:
        bare: images without a caption of their own.
        names: all images of the source.

    Raises:
        UserError: one line for each ending and folder.
    """
    problems = []
    relative = [reader.relative_name(name) for name in names]
    groups = side_groups([reader.relative_name(name) for name in bare], relative)
    for (kind, word), sides in sorted(groups.items()):
        seem = plural(len(sides), "image seems", "images seem")
        noun = "masks" if word in MASKS else "control images or thumbnails"
        fix = f"Set dataset.mask to '{kind}', move" if is_readable(kind, word, sides, relative) else "Move"
        text = (
            f"{reader.place}: {seem} to be {noun} of other images ({examples(sides)})."
            f" {fix} them out of the folder, or write a caption for each to train on them."
        )
        problems.append(Problem("side-images", text))
    if problems:
        raise UserError(*problems)


def side_groups(bare: list[str], names: list[str]) -> dict[tuple[str, str], list[str]]:
    """Return (``*-masklabel``, ``mask_*`` or a folder's name, the word in it) -> side images."""
    stems = {stem(name) for name in names}
    bases = {PurePosixPath(base).name for base in stems if side_folder(base) is None}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in bare:
        own = stem(name)
        ending, beginning = ENDING.fullmatch(own), BEGINNING.fullmatch(own)
        base = PurePosixPath(ending[1] if ending else own).name
        folder = side_folder(own)
        if ending and ending[1] in stems:
            groups[f"*{ending[2]}", ending[3].lower()].append(name)
        elif beginning and beginning[1] + beginning[4] in stems:
            groups[f"{beginning[2]}*", beginning[3].lower()].append(name)
        elif folder is not None and (base in bases or PurePosixPath(own).name in bases):
            groups[folder, words_of(folder)[0]].append(name)
    return {key: sides for key, sides in groups.items() if key[1] in MASKS or len(sides) >= LEAST_SHARE * len(bases)}


def side_folder(name: str) -> str | None:
    """Return the first folder of a name that is named like side images."""
    folders = PurePosixPath(name).parts[:-1]
    return next((folder for folder in folders if words_of(folder)), None)


def words_of(folder: str) -> list[str]:
    words = re.split(r"[-_. ]", folder.lower())
    return [word for word in words if word in MASKS or word in OTHERS]


def is_readable(kind: str, word: str, sides: list[str], names: list[str]) -> bool:
    """Return whether ``dataset.mask`` set to the ending or folder would match each of them to its image."""
    if word not in MASKS:
        return False
    if ending_of(kind):
        return True
    stems = {stem(name) for name in names}
    return all(stem(name).partition("/")[0] == kind and stem(name).partition("/")[2] in stems for name in sides)


def gray_twins(rows: Iterable[CheckedImage]) -> list[Problem]:
    """Return a warning about gray images that are named like a color image of their size and caption."""
    gray: list[CheckedImage] = []
    colorful: list[CheckedImage] = []
    for row in rows:
        (gray if is_gray(row) else colorful).append(row)
    by_stem = {stem(row.entry.file_name): row for row in colorful}
    by_base = {PurePosixPath(stem(row.entry.file_name)).name: row for row in colorful}
    names = []
    for row in gray:
        own = stem(row.entry.file_name)
        starts = [own[: match.start()] for match in re.finditer(r"[-_. ]+", own)]
        twin = next((by_stem[start] for start in starts if start in by_stem), by_base.get(PurePosixPath(own).name))
        if twin and has_same_size_and_captions(row, twin):
            names.append(row.entry.file_name)
    if not names:
        return []
    are = plural(len(names), "image is", "images are")
    text = f"{are} gray and named like a color image of the same size and caption ({examples(names)})."
    fix = "If they are masks or control images, move them out of the source, or set dataset.mask."
    return [Problem("gray-twins", f"{text} {fix}")]


def has_same_size_and_captions(one: CheckedImage, other: CheckedImage) -> bool:
    return (one.width, one.height, one.entry.captions) == (other.width, other.height, other.entry.captions)


def is_gray(row: CheckedImage) -> bool:
    return bool(np.ptp(thumbnail_pixels(row.thumbnail).astype(int), axis=-1).max() <= 2)
