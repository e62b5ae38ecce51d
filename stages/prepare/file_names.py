"""File names in sources: which are safe to open, how they are compared, and how messages show them.

No name and no link may lead out of dataset.source, and only regular files are opened.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_dag.core.console import Problem, UserError

MAX_NAME = 4096
"""Characters of a name. No file system takes longer paths, but rows can hold them."""
MAX_SHOWN = 120
"""Characters of a name in a message."""
NUM_EXAMPLES = 3
"""Names in a message about many images."""


@dataclass(frozen=True)
class Root:
    """The folder that no name may lead out of: dataset.source."""

    folder: Path
    label: str
    """Prefix of a name in messages, such as ``data/raw/``."""
    _real: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Folder -> its path without links."""
    _forms: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    """Folder -> for each name in it, ``nfc`` of the name -> the name."""

    def place(self, name: str) -> str:
        """Return the name of a file or folder for messages. "" is the root itself."""
        return self.label + printable(name) if name else self.label.rstrip("/") or "."

    def holds(self, path: Path) -> bool:
        """Return whether a path is inside. To follow a link in its last part, pass ``os.path.realpath``."""
        base, parent = self._resolved(str(self.folder)), self._resolved(str(path.parent))
        return parent == base or parent.startswith(base.rstrip(os.sep) + os.sep)

    def on_disk(self, name: str) -> str:
        """Return the name with each part in the Unicode form on disk, or unchanged if there is no such file."""
        path = PurePosixPath()
        for part in PurePosixPath(name).parts:
            if not os.path.lexists(self.folder / path / part):
                part = self._names_in(str(path)).get(nfc(part), part)
            path /= part
        return "" if path == PurePosixPath() else str(path)

    def _names_in(self, folder: str) -> dict[str, str]:
        if folder not in self._forms:
            try:
                self._forms[folder] = {nfc(name): name for name in os.listdir(self.folder / folder)}
            except OSError:
                self._forms[folder] = {}
        return self._forms[folder]

    def _resolved(self, folder: str) -> str:
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return self._real[folder]


def printable(name: str) -> str:
    """Return a name as one line of UTF-8, with control characters escaped."""
    return json.dumps(name) if has_controls(name) else name


def short(name: str) -> str:
    """Return a name for messages: ``printable``, and without its middle if it is very long."""
    name = printable(name)
    return name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN // 2]}...{name[-MAX_SHOWN // 2 + 3 :]}"


def examples(names: Sequence[str]) -> str:
    """Return the first few of many names for a message."""
    return ", ".join(map(short, names[:NUM_EXAMPLES])) + (", ..." if len(names) > NUM_EXAMPLES else "")


def has_controls(text: str) -> bool:
    """Return whether a text has control characters or lone surrogates, which bytes that are not UTF-8 become."""
    return not text.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def nfc(text: str) -> str:
    """Return the composed Unicode form. macOS and Linux write accents in different forms."""
    return unicodedata.normalize("NFC", text)


def stem(name: str) -> str:
    """Return ``nfc`` of a name without its suffix, which an image, its caption and its mask have in common."""
    return nfc(os.path.splitext(name)[0])


def folded(name: str) -> str:
    """Return a key that is equal for names that some file systems take for one file: case and accents are folded."""
    return nfc(nfc(name).casefold())


def name_clash(name: str, first: str, location: str = "") -> Problem:
    """Return the problem with two names that are equal when ``folded``.

    Args:
        location: row of the first name, where it is in a table.
    """
    other = f"'{first}' ({location})" if location else f"'{first}'"
    return Problem(
        "names-clash",
        f"'{name}' and {other} are one file on disks that ignore case or accents. Rename one of them.",
    )


def checked_name(name: Any, root: Root, below: str = "") -> str:
    """Return a name in the folder ``below``, relative to the root. The file need not exist.

    Raises:
        UserError: the value is no name, leads out of the folder, or is unsafe to pass on.
    """
    folder = root.place(below)
    if not isinstance(name, str) or not name:
        got = json.dumps(name, default=str)[:80]
        raise UserError(Problem("name-invalid", f"got {got}, but the name of an image in {folder} is expected."))
    if has_controls(name):
        text = f"{short(name)} holds a control character or a byte that is not UTF-8. Rename the file."
        raise UserError(Problem("name-unsafe", text))
    quoted = f"'{short(name)}'"
    if len(name) > MAX_NAME:
        text = f"{quoted} has {len(name):,} characters, but at most {MAX_NAME:,} are allowed. Rename the file."
        raise UserError(Problem("name-unsafe", text))
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        text = f"{quoted} leads out of {folder}. Write a name relative to that folder."
        raise UserError(Problem("name-outside-source", text))
    if not pure.parts:
        raise UserError(Problem("file-not-regular", f"{quoted} is a folder, but the name of an image is expected."))
    if any(part.startswith("-") for part in pure.parts):
        text = f"{quoted} starts with '-', which commands read as an option. Rename the file."
        raise UserError(Problem("name-unsafe", text))
    return str(PurePosixPath(below) / pure)


def checked_file(name: str, root: Root) -> str:
    """Return the name, in the Unicode form on disk, of a regular file inside the root.

    Raises:
        UserError: there is no such file, or it is a folder, a device, or a link that leads out of the root.
    """
    quoted = f"'{short(name)}'"
    name_on_disk = root.on_disk(name)
    path = root.folder / name_on_disk
    try:
        status = path.lstat()
    except OSError:
        slashes = " Separate folders by '/'." if "\\" in name else ""
        text = f"{quoted} is missing in {root.place('')}. Add the file or remove the row.{slashes}"
        raise UserError(Problem("file-missing", text)) from None
    is_link = stat.S_ISLNK(status.st_mode)
    if not root.holds(path) or (is_link and not root.holds(Path(os.path.realpath(path)))):
        raise UserError(
            Problem(
                "name-outside-source",
                f"{quoted} is a link that leads out of {root.place('')}. Put the file itself there (for files linked"
                " by DVC: `dvc config cache.type reflink,hardlink,copy`, then `dvc checkout --relink`).",
            )
        )
    if is_link and not path.exists():
        text = f"{quoted} in {root.place('')} is a broken link. Restore the file that it links to."
        raise UserError(Problem("file-missing", text))
    if not path.is_file():
        raise UserError(Problem("file-not-regular", f"{quoted} is not a regular file. Replace it by one."))
    return name_on_disk
