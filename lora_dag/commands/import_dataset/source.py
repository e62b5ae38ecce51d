"""Source of an import: the files of a file or folder on this machine, or of a dataset of the Hub at one commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_dag.bases import hub
from lora_dag.core.console import Problem, UserError, log, plural

COMMAND = "lora-dag import"
HUB_DATASET = re.compile(rf"(?:https://huggingface\.co/datasets/)?({hub.NAME})(?:@([\w./-]+))?/?")


@dataclass(frozen=True)
class Source:
    name: str
    """Name in messages: the path as given, or owner/name."""
    folder: Path
    """Folder of the files."""
    files: tuple[str, ...]
    """Sorted names below the folder, without hidden files."""
    is_file: bool = False
    revision: str | None = None
    """Commit of a Hub dataset."""
    license: str | list[str] | None = None
    """License in its card (README.md)."""

    def place(self, file: str) -> str:
        """Return the name of a file for messages."""
        return self.name if self.is_file else f"{self.name.rstrip('/')}/{file}"


def open_source(text: str, patterns: Sequence[str], download: Path) -> Source:
    """Return the files of a source. Files of a Hub dataset are downloaded into ``download``, unless they are there.

    Args:
        text: a path, or ``owner/name@revision``. A branch or tag is resolved to its commit.
        patterns: files of a Hub dataset to download. Empty for all.

    Raises:
        UserError: the file, folder or dataset does not exist, or cannot be downloaded.
    """
    path = Path(text).expanduser()
    if path.exists():
        if patterns:
            message = f"--files: {text} is on this machine, but --files is for Hub datasets. Name the file itself."
            raise UserError(Problem("option-without-effect", message))
        return open_local(text, path)
    hub_name = HUB_DATASET.fullmatch(text)
    if not hub_name:
        fix = "Name a file, a folder, or a dataset of the Hugging Face Hub such as owner/name@COMMIT."
        raise UserError(Problem("source-missing", f"{text}: the file or folder does not exist. {fix}"))
    return open_hub(hub_name[1], hub_name[2], patterns, download)


def open_local(text: str, path: Path) -> Source:
    if not path.is_dir() and not path.is_file():
        raise UserError(Problem("source-not-regular", f"{text}: the source is neither a file nor a folder. Name one."))
    if path.is_dir():
        return Source(text, path, files_below(path), license=license_of(path))
    return Source(text, path.parent, (path.name,), is_file=True)


def files_below(folder: Path) -> tuple[str, ...]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return tuple(sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts)))


def open_hub(name: str, revision: str | None, patterns: Sequence[str], download: Path) -> Source:
    """Download a dataset. After a kill, complete files are not downloaded again."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted_revision = revision or "the default branch"
    api = huggingface_hub.HfApi()
    with hub.user_errors(COMMAND, name, "dataset", wanted_revision):
        info = api.dataset_info(name, revision=revision)
    commit = str(info.sha)
    if revision != commit:
        log.info("revision    %s of %s is commit %s", wanted_revision, name, commit)
    names = sorted(sibling.rfilename for sibling in info.siblings or [])
    wanted = list(filter_repo_objects(names, allow_patterns=list(patterns) or None, ignore_patterns=hub.NEVER_FETCHED))
    if not wanted:
        found = ", ".join(names[:5]) or "no files"
        text = f"--files: no file of {name} matches {' '.join(patterns) or '*'}. The dataset has {found}."
        raise UserError(Problem("hub-no-match", text))
    log.info("download    %s of %s at %s", plural(len(wanted), "file"), name, commit[:12])
    with hub.user_errors(COMMAND, name, "dataset", commit):
        api.snapshot_download(
            name,
            repo_type="dataset",
            revision=commit,
            local_dir=download,
            allow_patterns=list(patterns) or None,
            ignore_patterns=hub.NEVER_FETCHED,
        )
    # The client returns an incomplete folder if it loses the connection in between.
    missing = [file for file in wanted if not (download / file).is_file()]
    if missing:
        text = f"{name}: {plural(len(missing), 'file')} did not arrive, such as {missing[0]}. Run the command again."
        raise UserError(Problem("hub-incomplete", text))
    stated = info.card_data.get("license") if info.card_data else None
    files = tuple(file for file in wanted if not file.startswith("."))
    return Source(name, download, files, revision=commit, license=stated)


def license_of(folder: Path) -> str | list[str] | None:
    """Return the license in the header of a folder's README.md, as in dataset cards of the Hub."""
    import huggingface_hub

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        return huggingface_hub.DatasetCard.load(card).data.get("license")
    except (ValueError, OSError):  # a README.md that is no dataset card
        return None
