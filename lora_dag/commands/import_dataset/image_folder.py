"""Samples -> a folder of images that prepare reads, and ``datasets`` as well: SPLIT/NAME and SPLIT/metadata.jsonl.

Written into FOLDER.partial, which takes its name when it is whole. After a kill the same images are found there by
their bytes and not written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lora_dag.commands.import_dataset.samples import Sample
from lora_dag.core.console import UserError
from lora_dag.core.files import write_json, write_text
from lora_dag.core.locks import writing
from lora_dag.pictures.formats import SUFFIXES, format_of
from stages.prepare import names
from stages.prepare.names import Root, checked_name, clash, folded
from stages.prepare.sources import UNFINISHED

MASKS = "masks"
METADATA = "metadata.jsonl"
PROVENANCE = "provenance.json"
BY_NUMBER = "--number names images by file and row"
CAPTION_COLUMN = "text"
"""As params.yaml has dataset.caption_column."""


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield ``folder``.partial, which holds what an earlier import was killed in; on success the folder in it named
    ``images`` takes the name ``folder``.

    Raises:
        UserError: ``folder`` exists, or another import is writing it.
    """
    if not folder.name:
        raise UserError(f"'{folder}': the folder to write needs a name of its own, such as data/mine")
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        if folder.exists():
            raise UserError(f"{folder}: exists already; name a new folder, or remove this one to import it again")
        if partial.exists() and not (partial / UNFINISHED).exists():
            raise UserError(f"{partial}: needed for the import, and exists without being one; rename it")
        (partial / "images").mkdir(parents=True, exist_ok=True)
        write_text(partial / UNFINISHED, f"`lora-dag import` did not finish {folder.name}; the same command goes on.\n")
        write_text(partial / ".gitignore", "*\n")
        try:
            yield partial
        except UserError:  # nothing half-written; a download is whole, and serves the corrected command
            shutil.rmtree(partial / "images")
            if not (partial / "download").exists():
                shutil.rmtree(partial)
            raise
        os.sync()  # of many small files, cheaper than one by one
        (partial / "images").replace(folder)
        shutil.rmtree(partial)


class ImageFolder:
    """Writes samples below a folder.

    Args:
        shown: the name that the folder takes when it is whole, for messages.
        numbered: name images by file and row, not as the source does.
    """

    def __init__(self, folder: Path, shown: Path, numbered: bool) -> None:
        self.folder, self.numbered = folder, numbered
        self.root = Root(folder, f"{shown}/")
        self.places: dict[str, tuple[str, str]] = {}
        """``folded`` file name -> the name, and the place of its sample."""
        self.parents: set[str] = set()
        """``folded`` folders of these files."""
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """Split -> rows of its metadata.jsonl."""
        self.written: set[str] = set()
        self.num_masks = 0

    def add(self, sample: Sample) -> None:
        """Write an image, and its mask.

        Raises:
            UserError: it is no image, or its name is unsafe or that of another image.
        """
        kind = format_of(sample.image)
        name = self.name_of(sample, kind)
        file_name = f"{checked_name(sample.split, self.root)}/{name}"
        first, place = self.places.setdefault(folded(file_name), (file_name, sample.place))
        parents = {folded(str(parent)) for parent in PurePosixPath(file_name).parents}
        if folded(file_name) in self.parents or parents & self.places.keys():
            raise UserError(f"'{name}': a file and a folder of this name are in the source; {BY_NUMBER}")
        self.parents |= parents
        if place != sample.place:
            same = f"'{name}' is the name of {place} too" if first == file_name else clash(file_name, first, place)
            raise UserError(f"{same}; {BY_NUMBER}")
        self.write(file_name, sample.image)
        if sample.mask is not None:
            suffix = SUFFIXES[format_of(sample.mask)][0]
            self.write(str(PurePosixPath(MASKS, file_name).with_suffix(suffix)), sample.mask)
            self.num_masks += 1
        row: dict[str, Any] = {"file_name": name}
        if sample.captions is not None:
            row[CAPTION_COLUMN] = sample.captions[0] if len(sample.captions) == 1 else list(sample.captions)
        self.rows[sample.split].append(row)

    def name_of(self, sample: Sample, kind: str) -> str:
        """The source's own name where it has one, with a suffix that an image has."""
        name = sample.number
        if sample.name is not None and not self.numbered:
            try:
                name = checked_name(sample.name, self.root)
            except UserError as error:
                raise UserError(f"{error}; {BY_NUMBER}") from None
        if PurePosixPath(name).suffix.lower() in names.SUFFIXES:
            return name
        return name + SUFFIXES[kind][0]

    def finish(self, provenance: dict[str, Any]) -> None:
        """Write what belongs to all images, and remove what an earlier import with other options left."""
        for split, rows in self.rows.items():
            if CAPTION_COLUMN in rows[0]:
                lines = [json.dumps(row, ensure_ascii=False) for row in rows]
                self.write(f"{split}/{METADATA}", ("\n".join(lines) + "\n").encode())
        write_json(self.folder / PROVENANCE, provenance)
        for path in self.folder.rglob("*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in self.written | {PROVENANCE}:
                path.unlink()

    def write(self, name: str, blob: bytes) -> None:
        write_once(self.folder / name, blob)
        self.written.add(name)


def write_once(path: Path, blob: bytes) -> None:
    """Leave a file alone that has these bytes, as an import that was killed may have left it."""
    if path.is_file() and path.read_bytes() == blob:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob)
