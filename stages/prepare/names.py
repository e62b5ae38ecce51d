"""Names: which ones are safe to follow, and which files stand below a folder. Opens none of them.

No name and no link may lead out of dataset.source, and nothing but a regular file is ever opened.
"""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_dag.core.console import UserError
from lora_dag.pictures import formats

# What people mean as a picture; whether it is one, and of a kind that can be read, its content says.
SUFFIXES = {suffix for suffixes in formats.SUFFIXES.values() for suffix in suffixes}
SUFFIXES |= {".svg", ".avif", ".heic", ".heif", ".jxl"}
METADATA = ("metadata.jsonl", "metadata.csv")
TO_IMPORT = re.compile(r".*\.(parquet|tar|tar\.\w+|tgz|tbz2|txz)", re.IGNORECASE)
"""Files that hold many pictures, or the captions of many in a form that is not read: `lora-dag import` unpacks them."""
TEXTS = {".txt", ".caption"}
"""Suffixes of caption files beside pictures: most trainers' habit, and the default of kohya's."""
COMPANIONS = {".md", ".rst", ".dvc", ".npz", ".npy", ".pt", ".safetensors", ".xmp", ".ini", ".db"}
"""Suffixes of files that lie beside pictures and are nobody's loss, such as the caches of other trainers."""
SYSTEMS = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information", "lost+found"}
"""Folders that network disks, macOS, Windows and Linux make, in lower case: thumbnails, deleted files and the like."""
ABOUT = {"authors", "changelog", "copying", "credits", "licence", "license", "notice", "readme"}
"""Such files without their suffix, in lower case."""
MAX_NAME = 4096
"""Characters; no file system takes longer paths, but rows can hold them."""
MAX_SHOWN = 120
"""Characters of a name in a message."""
NUM_EXAMPLES = 3
"""Names in a message that is about many."""


@dataclass(frozen=True)
class Root:
    """The folder that no name may leave: dataset.source."""

    folder: Path
    label: str
    """Before a name in messages, such as ``data/raw/``."""
    _real: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Folder -> where it really stands."""
    _forms: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    """Folder -> what it holds: ``nfc`` of each name, and the name."""

    def place(self, name: str) -> str:
        """How a message names a file or folder; "" is the root itself."""
        return self.label + printable(name) if name else self.label.rstrip("/") or "."

    def holds(self, path: Path) -> bool:
        """Whether a path, its own last link not followed, stands inside; ask for its target by ``os.path.realpath``."""
        base, parent = self._resolved(str(self.folder)), self._resolved(str(path.parent))
        return parent == base or parent.startswith(base.rstrip(os.sep) + os.sep)

    def on_disk(self, name: str) -> str:
        """The name with each part in the Unicode form that the disk has; as it is where there is no such file."""
        found = PurePosixPath()
        for part in PurePosixPath(name).parts:
            if not os.path.lexists(self.folder / found / part):
                part = self._listed(str(found)).get(nfc(part), part)
            found /= part
        return "" if found == PurePosixPath() else str(found)

    def _listed(self, folder: str) -> dict[str, str]:
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
    """A name in one line of UTF-8, whatever it holds."""
    return json.dumps(name) if has_controls(name) else name


def short(name: str) -> str:
    """A name as a message quotes it, ``printable`` and without the middle of a very long one."""
    name = printable(name)
    return name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN // 2]}...{name[-MAX_SHOWN // 2 + 3 :]}"


def has_controls(text: str) -> bool:
    """Control characters, or half characters (lone surrogates), which bytes that are no UTF-8 turn into as well."""
    return not text.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def nfc(text: str) -> str:
    """Equal for texts that differ in the Unicode form of their accents alone; macOS and Linux write different ones."""
    return unicodedata.normalize("NFC", text)


def stem(name: str) -> str:
    """``nfc`` of a name without its suffix: what a picture, its caption and its mask have in common."""
    return nfc(os.path.splitext(name)[0])


def folded(name: str) -> str:
    """Equal for names that are one file where case or the Unicode form of accents does not count."""
    return nfc(nfc(name).casefold())


def clash(name: str, first: str, where: str = "") -> str:
    """What is wrong with two names that are equal when ``folded``."""
    other = f"'{first}' ({where})" if where else f"'{first}'"
    return f"'{name}' and {other} are one file where case or accents do not count; rename one"


def checked_name(name: Any, root: Root, below: str = "") -> str:
    """A name that stays inside ``below``, relative to the root; whether there is such a file is not asked.

    Raises:
        UserError: it is no name, leaves the folder, or is unsafe to hand on.
    """
    folder = root.place(below)
    if not isinstance(name, str) or not name:
        raise UserError(f"got {json.dumps(name, default=str)[:80]}; expected the name of a picture in {folder}")
    if has_controls(name):
        raise UserError(f"{short(name)} holds a control character; rename the file")
    shown = short(name)
    if len(name) > MAX_NAME:
        raise UserError(f"'{shown}' has {len(name):,} characters; at most {MAX_NAME:,} are a name, rename the file")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(f"'{shown}' leaves {folder}; expected a name relative to that folder")
    if not pure.parts:
        raise UserError(f"'{shown}' is not a regular file; expected a picture")
    if any(part.startswith("-") for part in pure.parts):
        raise UserError(f"'{shown}' starts with '-', which commands take for an option; rename the file")
    return str(PurePosixPath(below) / pure)


def checked_file(name: str, root: Root) -> str:
    """The name, as it stands on disk, of a regular file inside the root; its accents may be in another Unicode form.

    Raises:
        UserError: there is none, or what stands there is no file or a link that leaves the root.
    """
    shown = short(name)
    form = root.on_disk(name)
    path = root.folder / form
    try:
        status = path.lstat()
    except OSError:
        slashes = " with / between folders" if "\\" in name else ""
        raise UserError(f"'{shown}' is no file in {root.place('')}; add it{slashes} or remove the row") from None
    is_link = stat.S_ISLNK(status.st_mode)
    if not root.holds(path) or (is_link and not root.holds(Path(os.path.realpath(path)))):
        raise UserError(
            f"'{shown}' is a link that leaves {root.place('')}; put the picture itself there"
            " (pictures linked by DVC: dvc config cache.type reflink,hardlink,copy, then dvc checkout --relink)"
        )
    if is_link and not path.exists():
        raise UserError(f"'{shown}' is no file in {root.place('')}, but a link to nothing; restore what it links to")
    if not path.is_file():
        raise UserError(f"'{shown}' is not a regular file; replace it by one")
    return form


@dataclass(frozen=True)
class Tree:
    """What stands below a folder, hidden files and ``SYSTEMS`` left out; sorted names, relative to the root."""

    pictures: list[str] = field(default_factory=list)
    """By suffix, whatever they are."""
    texts: list[str] = field(default_factory=list)
    """Caption files, by suffix."""
    metadata: list[str] = field(default_factory=list)
    to_import: list[str] = field(default_factory=list)
    """Parquet and .tar files, compressed ones too."""
    links: list[str] = field(default_factory=list)
    """To folders, or to nothing; not followed, so that nothing is met twice."""
    others: list[str] = field(default_factory=list)
    """Other files."""


def scan(root: Root, below: str, mask: str | None = None) -> Tree:
    """Every file below a folder, without the folder of masks."""
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
    for names in (tree.pictures, tree.texts, tree.metadata, tree.to_import, tree.links, tree.others):
        names.sort()
    return tree


def sort_in(tree: Tree, name: str, entry: os.DirEntry[str]) -> bool:
    """Put a file where it belongs; False for a folder, which is the caller's to enter."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.name in METADATA:
        tree.metadata.append(name)
    elif suffix in SUFFIXES:
        tree.pictures.append(name)
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
    """A readme, a licence or the like, whatever its suffix, and what `lora-dag import` writes of the source."""
    return PurePosixPath(name).stem.lower() in ABOUT or name == "provenance.json"


def is_companion(name: str) -> bool:
    """A file that nobody means as a picture or a caption."""
    return is_about(name) or PurePosixPath(name).suffix.lower() in COMPANIONS
