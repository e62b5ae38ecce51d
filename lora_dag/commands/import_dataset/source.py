"""SOURCE of an import -> its files on this machine: a file, a folder, or a dataset of the Hub at one commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_dag.bases import hub
from lora_dag.core.console import UserError, log, plural

HUB_DATASET = re.compile(rf"(?:https://huggingface\.co/datasets/)?({hub.NAME})(?:@([\w./-]+))?/?")


@dataclass(frozen=True)
class Source:
    name: str
    """As messages name it: the path as it was given, or owner/name."""
    folder: Path
    """Holds the files."""
    files: tuple[str, ...]
    """Below the folder, sorted; hidden ones left out."""
    is_file: bool = False
    revision: str | None = None
    """Commit of a Hub dataset."""
    license: str | list[str] | None = None
    """As its card (README.md) states it."""

    def place(self, file: str) -> str:
        """How a message names one of the files."""
        return self.name if self.is_file else f"{self.name.rstrip('/')}/{file}"


def open_source(text: str, patterns: Sequence[str], download: Path) -> Source:
    """The files of a source; those of a Hub dataset are downloaded into ``download``, unless they are there already.

    Args:
        text: a path, or ``owner/name@revision``; a revision that can move is resolved to its commit.
        patterns: of a Hub dataset, the files to download; empty for all.

    Raises:
        UserError: there is no such file, folder or dataset, or the Hub does not give it.
    """
    path = Path(text).expanduser()
    if path.exists():
        if patterns:
            raise UserError(f"--files: {text} is on this machine; name the folder or the file itself in its place")
        return on_this_machine(text, path)
    named = HUB_DATASET.fullmatch(text)
    if not named:
        raise UserError(
            f"{text}: no such file or folder; expected one, or a dataset of the Hugging Face Hub such as"
            " owner/name@COMMIT"
        )
    return from_hub(named[1], named[2], patterns, download)


def on_this_machine(text: str, path: Path) -> Source:
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{text}: is neither a file nor a folder")
    if path.is_dir():
        return Source(text, path, files_below(path), license=license_of(path))
    return Source(text, path.parent, (path.name,), is_file=True)


def files_below(folder: Path) -> tuple[str, ...]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return tuple(sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts)))


def from_hub(name: str, revision: str | None, patterns: Sequence[str], download: Path) -> Source:
    """A download that was killed goes on: files that are whole are not fetched again."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted_revision = revision or "the default branch"
    api = huggingface_hub.HfApi()
    with hub.explained(name, name, "dataset", wanted_revision):
        info = api.dataset_info(name, revision=revision)
    commit = str(info.sha)
    if revision != commit:
        log.info("revision    %s of %s is commit %s", wanted_revision, name, commit)
    there = sorted(sibling.rfilename for sibling in info.siblings or [])
    wanted = list(filter_repo_objects(there, allow_patterns=list(patterns) or None, ignore_patterns=hub.NEVER_FETCHED))
    if not wanted:
        shown = ", ".join(there[:5]) or "no files"
        raise UserError(f"--files: no file of {name} matches {list(patterns) or ['*']}; it has {shown}")
    log.info("download    %s of %s at %s", plural(len(wanted), "file"), name, commit[:12])
    with hub.explained(name, name, "dataset", commit):
        api.snapshot_download(
            name,
            repo_type="dataset",
            revision=commit,
            local_dir=download,
            allow_patterns=list(patterns) or None,
            ignore_patterns=hub.NEVER_FETCHED,
        )
    # The client takes a folder half full for the snapshot where it loses the Hub in between.
    missing = [file for file in wanted if not (download / file).is_file()]
    if missing:
        raise UserError(f"{name}: {plural(len(missing), 'file')} did not arrive, such as {missing[0]}; run again")
    stated = info.card_data.get("license") if info.card_data else None
    files = tuple(file for file in wanted if not file.startswith("."))
    return Source(name, download, files, revision=commit, license=stated)


def license_of(folder: Path) -> str | list[str] | None:
    """What the header of a folder's README.md states, as the Hub's dataset cards do."""
    import huggingface_hub

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        return huggingface_hub.DatasetCard.load(card).data.get("license")
    except (ValueError, OSError):  # a README.md of another kind
        return None
