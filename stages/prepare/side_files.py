"""Pictures that other tools make beside those to train on, told by their names: masks, control pictures, thumbnails.

Without captions of their own they would be trained on under the caption that all pictures share.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from lora_dag.core.console import UserError, plural
from lora_dag.pictures.likeness import thumbnail_pixels
from stages.prepare.mask_files import ending_of
from stages.prepare.names import NUM_EXAMPLES, short, stem

if TYPE_CHECKING:
    from stages.prepare.checked_picture import CheckedPicture
    from stages.prepare.subset_reader import SubsetReader

MASKS = {"mask", "masks", "masklabel", "matte", "mattes", "alphamask", "alphamasks"}
"""``masklabel`` is OneTrainer's."""
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
"""Of the pictures that have a side picture: fewer ``fox-pose.png`` may be pictures of their own. A mask never is."""


def refuse(reader: SubsetReader, bare: Iterable[str], names: Iterable[str]) -> None:
    """Refuse pictures that seem to be of other tools' making.

    Args:
        bare: pictures that have no caption of their own.
        names: all pictures of the source.

    Raises:
        UserError: one line for each ending and folder.
    """
    problems = []
    below = [reader.relative_name(name) for name in names]
    for (kind, word), sides in sorted(grouped([reader.relative_name(name) for name in bare], below).items()):
        shown = ", ".join(map(short, sides[:NUM_EXAMPLES])) + (", ..." if len(sides) > NUM_EXAMPLES else "")
        what = "masks" if word in MASKS else "side pictures, such as control pictures or thumbnails,"
        cure = f"set dataset.mask to '{kind}', or " if is_readable(kind, word, sides, below) else ""
        look = plural(len(sides), "picture looks", "pictures look")
        problems.append(
            f"{reader.place}: {look} like {what} of others ({shown}); {cure}move them out of it;"
            " to train on them, write a caption for each"
        )
    if problems:
        raise UserError(*problems)


def grouped(bare: list[str], names: list[str]) -> dict[tuple[str, str], list[str]]:
    """(``*-masklabel``, ``mask_*`` or a folder's name, the word in it) -> side pictures."""
    stems = {stem(name) for name in names}
    bases = {PurePosixPath(base).name for base in stems if side_folder(base) is None}
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in bare:
        own = stem(name)
        ending, beginning = ENDING.fullmatch(own), BEGINNING.fullmatch(own)
        base = PurePosixPath(ending[1] if ending else own).name
        folder = side_folder(own)
        if ending and ending[1] in stems:
            found[f"*{ending[2]}", ending[3].lower()].append(name)
        elif beginning and beginning[1] + beginning[4] in stems:
            found[f"{beginning[2]}*", beginning[3].lower()].append(name)
        elif folder is not None and (base in bases or PurePosixPath(own).name in bases):
            found[folder, words_of(folder)[0]].append(name)
    return {key: sides for key, sides in found.items() if key[1] in MASKS or len(sides) >= LEAST_SHARE * len(bases)}


def side_folder(name: str) -> str | None:
    """The first folder of a name that is called like side pictures."""
    folders = PurePosixPath(name).parts[:-1]
    return next((folder for folder in folders if words_of(folder)), None)


def words_of(folder: str) -> list[str]:
    words = re.split(r"[-_. ]", folder.lower())
    return [word for word in words if word in MASKS or word in OTHERS]


def is_readable(kind: str, word: str, sides: list[str], names: list[str]) -> bool:
    """``dataset.mask`` set to the ending or folder gives each of them to the picture that it is of."""
    if word not in MASKS:
        return False
    if ending_of(kind):
        return True
    stems = {stem(name) for name in names}
    return all(stem(name).partition("/")[0] == kind and stem(name).partition("/")[2] in stems for name in sides)


def grey_twins(rows: Iterable[CheckedPicture]) -> list[str]:
    """Warn of grey pictures that are named like a colour picture of their size and caption, such as masks and depth."""
    grey: list[CheckedPicture] = []
    colourful: list[CheckedPicture] = []
    for row in rows:
        (grey if is_grey(row) else colourful).append(row)
    by_stem = {stem(row.entry.file_name): row for row in colourful}
    by_base = {PurePosixPath(stem(row.entry.file_name)).name: row for row in colourful}
    found = []
    for row in grey:
        own = stem(row.entry.file_name)
        starts = [own[: match.start()] for match in re.finditer(r"[-_. ]+", own)]
        twin = next((by_stem[start] for start in starts if start in by_stem), by_base.get(PurePosixPath(own).name))
        if twin and alike(row, twin):
            found.append(row.entry.file_name)
    if not found:
        return []
    shown = ", ".join(map(short, found[:NUM_EXAMPLES])) + (", ..." if len(found) > NUM_EXAMPLES else "")
    are = plural(len(found), "picture is", "pictures are")
    return [
        f"{are} grey and named like a colour picture of the same size and caption ({shown}); if they are masks or"
        " control pictures, move them out of the source, or set dataset.mask"
    ]


def alike(one: CheckedPicture, other: CheckedPicture) -> bool:
    return (one.width, one.height, one.entry.captions) == (other.width, other.height, other.entry.captions)


def is_grey(row: CheckedPicture) -> bool:
    return bool(np.ptp(thumbnail_pixels(row.thumbnail).astype(int), axis=-1).max() <= 2)
