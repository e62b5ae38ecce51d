"""Write samples as a folder of images that prepare and ``datasets`` read: SPLIT/NAME and SPLIT/metadata.jsonl.

The files are written into FOLDER.partial, which is renamed to FOLDER at the end. After a kill, files with the same
bytes are not written again.
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
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import write_json, write_text
from lora_dag.core.locks import writing
from lora_dag.images.file_formats import SUFFIXES, identify_format
from stages.prepare import file_tree
from stages.prepare.file_names import Root, checked_name, folded, name_clash
from stages.prepare.sources import UNFINISHED

MASKS = "masks"
METADATA = "metadata.jsonl"
PROVENANCE = "provenance.json"
BY_NUMBER = "Or use --number to name images by file and row."
CAPTION_COLUMN = "text"
"""Default of dataset.caption_column."""


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield ``folder``.partial, with files of an earlier import that was killed. On success its subfolder ``images`` is
    renamed to ``folder``.

    Raises:
        UserError: ``folder`` exists, or another import is writing it.
    """
    if not folder.name:
        raise UserError(
            Problem("folder-without-name", f"'{folder}' has no name. Name a new folder, such as data/mine.")
        )
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        if folder.exists():
            text = f"{folder}: the folder exists already. Name a new one, or remove this one to import it again."
            raise UserError(Problem("folder-exists", text))
        if partial.exists() and not (partial / UNFINISHED).exists():
            text = f"{partial}: the import needs this name, but it exists and is no unfinished import. Rename it."
            raise UserError(Problem("folder-exists", text))
        (partial / "images").mkdir(parents=True, exist_ok=True)
        write_text(
            partial / UNFINISHED, f"`lora-dag import` did not finish {folder.name}. Run the same command to resume.\n"
        )
        write_text(partial / ".gitignore", "*\n")
        try:
            yield partial
        except UserError:  # a complete download stays for the corrected command
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
        final_folder: final name of the folder, for messages.
        numbered: name images by file and row instead of their names in the source.
    """

    def __init__(self, folder: Path, final_folder: Path, numbered: bool) -> None:
        self.folder, self.numbered = folder, numbered
        self.root = Root(folder, f"{final_folder}/")
        self.places: dict[str, tuple[str, str]] = {}
        """``folded`` file name -> the name, and the place of its sample."""
        self.parents: set[str] = set()
        """``folded`` folders of these files."""
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """Split -> rows of its metadata.jsonl."""
        self.written: set[str] = set()
        self.num_masks = 0

    def add(self, sample: Sample) -> None:
        """Write an image and its mask.

        Raises:
            UserError: the bytes are no image, or the name is unsafe or belongs to another image.
        """
        try:
            kind = identify_format(sample.image)
        except UserError as error:
            raise error.about("the image") from None
        name = self.name_of(sample, kind)
        if folded(sample.split) == MASKS:
            text = f"the split '{sample.split}' has the name of the folder for masks. Rename the split in the source."
            raise UserError(Problem("split-named-masks", text))
        file_name = f"{checked_name(sample.split, self.root)}/{name}"
        first, place = self.places.setdefault(folded(file_name), (file_name, sample.place))
        parents = {folded(str(parent)) for parent in PurePosixPath(file_name).parents}
        if folded(file_name) in self.parents or parents & self.places.keys():
            text = f"'{name}' is the name of a file and of a folder in the source. Rename one of them. {BY_NUMBER}"
            raise UserError(Problem("names-clash", text))
        self.parents |= parents
        if place != sample.place:
            problem = (
                Problem("names-clash", f"'{name}' is also the name of {place}. Rename one of them.")
                if first == file_name
                else name_clash(file_name, first, place)
            )
            raise UserError(Problem(problem.code, f"{problem} {BY_NUMBER}"))
        self.write(file_name, sample.image)
        if sample.mask is not None:
            try:
                suffix = SUFFIXES[identify_format(sample.mask)][0]
            except UserError as error:
                raise error.about("the mask") from None
            self.write(str(PurePosixPath(MASKS, file_name).with_suffix(suffix)), sample.mask)
            self.num_masks += 1
        row: dict[str, Any] = {"file_name": name}
        if sample.captions is not None:
            row[CAPTION_COLUMN] = sample.captions[0] if len(sample.captions) == 1 else list(sample.captions)
        self.rows[sample.split].append(row)

    def name_of(self, sample: Sample, kind: str) -> str:
        """Return the name in the source if there is one, with a suffix of images.

        Raises:
            UserError: the name is unsafe.
        """
        name = sample.number
        if sample.name is not None and not self.numbered:
            try:
                name = checked_name(sample.name, self.root)
            except UserError as error:
                raise UserError(*(Problem(each.code, f"{each} {BY_NUMBER}") for each in error.problems)) from None
        if PurePosixPath(name).suffix.lower() in file_tree.IMAGE_SUFFIXES:
            return name
        return name + SUFFIXES[kind][0]

    def finish(self, provenance: dict[str, Any]) -> None:
        """Write the metadata and the provenance, and remove files of an earlier import with other options."""
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
    """Write a file unless it already has these bytes from an import that was killed."""
    if path.is_file() and path.read_bytes() == blob:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob)
