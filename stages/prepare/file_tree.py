"""The files below a folder of images, sorted by kind from their names. No file is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from lora_dag.images import file_formats
from stages.prepare.file_names import Root, nfc

IMAGE_SUFFIXES = {suffix for suffixes in file_formats.SUFFIXES.values() for suffix in suffixes}
IMAGE_SUFFIXES |= {".svg", ".avif", ".heic", ".heif", ".jxl"}
"""Suffixes of files that are listed as images. The content decides later whether the format is supported."""
METADATA = ("metadata.jsonl", "metadata.csv")
TO_IMPORT = re.compile(r".*\.(parquet|tar|tar\.\w+|tgz|tbz2|txz)", re.IGNORECASE)
"""Files that hold many images or captions and that no stage reads: `lora-dag import` unpacks them."""
TEXTS = {".txt", ".caption"}
"""Suffixes of caption files beside images: .txt of most trainers, and the default of kohya's trainers."""
COMPANIONS = {".md", ".rst", ".dvc", ".npz", ".npy", ".pt", ".safetensors", ".xmp", ".ini", ".db"}
"""Suffixes of files beside images that are ignored silently, such as the caches of other trainers."""
SYSTEMS = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information", "lost+found"}
"""Folders that network disks, macOS, Windows and Linux make, in lower case, such as thumbnails and deleted files."""
ABOUT = {"authors", "changelog", "copying", "credits", "licence", "license", "notice", "readme"}
"""Names without their suffix, in lower case, of files about a dataset."""


@dataclass(frozen=True)
class Tree:
    """Files below a folder, without hidden files and ``SYSTEMS``: sorted names, relative to the root."""

    images: list[str] = field(default_factory=list)
    """Files with an image suffix, whatever their content."""
    texts: list[str] = field(default_factory=list)
    """Files with a suffix of caption files."""
    metadata: list[str] = field(default_factory=list)
    to_import: list[str] = field(default_factory=list)
    """Parquet and .tar files, also compressed."""
    links: list[str] = field(default_factory=list)
    """Links to folders, and broken links. They are not followed, so that no image is listed twice."""
    others: list[str] = field(default_factory=list)
    """Other files."""


def scan(root: Root, below: str, mask: str | None = None) -> Tree:
    """Return every file below a folder, without the folder of masks."""
    tree = Tree()
    masks = nfc(str(PurePosixPath(below) / mask)) if mask else None
    todo = [below]
    while todo:
        folder = todo.pop()
        with os.scandir(root.folder / folder) as entries:
            for entry in entries:
                name = str(PurePosixPath(folder) / entry.name)
                if entry.name.startswith(".") or entry.name.lower() in SYSTEMS or nfc(name) == masks:
                    continue
                if not sort_in(tree, name, entry):
                    todo.append(name)
    for names in (tree.images, tree.texts, tree.metadata, tree.to_import, tree.links, tree.others):
        names.sort()
    return tree


def sort_in(tree: Tree, name: str, entry: os.DirEntry[str]) -> bool:
    """Add a file to its list. Return False for a folder, which the caller enters."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.name in METADATA:
        tree.metadata.append(name)
    elif suffix in IMAGE_SUFFIXES:
        tree.images.append(name)
    elif entry.is_dir(follow_symlinks=False):
        return False
    elif entry.is_symlink() and not entry.is_file():
        tree.links.append(name)
    elif TO_IMPORT.fullmatch(entry.name):
        tree.to_import.append(name)
    elif suffix in TEXTS:
        tree.texts.append(name)
    else:
        tree.others.append(name)
    return True


def is_about(name: str) -> bool:
    """Return whether a file is a readme, a license or the like, or the provenance.json of `lora-dag import`."""
    return PurePosixPath(name).stem.lower() in ABOUT or name == "provenance.json"


def is_companion(name: str) -> bool:
    """Return whether a file is certainly neither an image nor a caption."""
    return is_about(name) or PurePosixPath(name).suffix.lower() in COMPANIONS
