"""A model of the Hugging Face Hub, pinned to one commit by a small YAML file that git or DVC versions::

    hub: owner/name
    revision: 0123456789abcdef0123456789abcdef01234567

The snapshot is downloaded once, into the state directory, and then needs no network. The model's family decides which
files are fetched (``resolve.py``). Datasets are imported by `lora-dag import`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.events import AliasEvent

from lora_dag.core.console import REMEDIES, UserError, log, plural
from lora_dag.core.files import from_json, sha256_file, sha256_json, state_dir, write_json
from lora_dag.core.param_errors import unknown
from lora_dag.core.params import read_yaml

Kind = Literal["dataset", "model"]
KEYS = ("hub", "revision")
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
COMMIT = r"[0-9a-f]{40}"
MAX_BYTES = 64 * 2**10
"""Of a pin file."""
MAX_SHOWN = 120
"""Characters of a value in a message."""
NEVER_FETCHED = ["*.py", "*.pkl", "*.pickle"]  # code, which no stage would run anyway


@dataclass(frozen=True)
class Pin:
    hub: str
    """owner/name"""
    revision: str
    """Commit, 40 hex digits."""
    files: tuple[str, ...] | None
    """Patterns of the files to fetch; None for all."""

    @property
    def folder(self) -> Path:
        """Where its snapshot stands; another choice of files is another folder."""
        chosen = "" if self.files is None else "-" + sha256_json(sorted(self.files))[:8]
        return state_dir() / "hub" / "models" / self.hub.replace("/", "--") / (self.revision + chosen)

    @property
    def marker(self) -> Path:
        """Says that the snapshot is whole; beside it, since a snapshot holds what the Hub holds and nothing else."""
        return self.folder.with_name(self.folder.name + ".json")


class FileState(TypedDict):
    """What a downloaded file was."""

    bytes: int
    sha256: str


def fetch(path: Path, verify: bool = True, pin: Pin | None = None) -> Path:
    """Folder with the snapshot that a pin file names, downloaded unless it is whole already.

    Args:
        verify: read every file and compare its SHA-256 with that of what was downloaded; else its size alone.
        pin: what the file says, where that is not all: such as a choice of files.

    Raises:
        UserError: the pin is none, the Hub does not give the files, or other files were put beside them.
    """
    pin = pin or read_pin(path)
    stated = read_marker(pin)
    spoiled = [name for name, state in stated.items() if not is_whole(pin.folder / name, state, verify)]
    if stated and not spoiled:
        if verify:
            refuse_strangers(path, pin, stated)
        return pin.folder
    if spoiled:
        log.warning(
            "warning: the snapshot of %s has %s changed or lost since the download, such as %s; fetching again",
            *(path, plural(len(spoiled), "file that was", "files that were"), spoiled[0]),
        )
    for name in spoiled:  # the client could take it for what the Hub holds
        (pin.folder / name).unlink(missing_ok=True)
    log.info("download    %s at %s from the Hugging Face Hub", pin.hub, pin.revision[:12])
    names = download(path, pin)
    write_json(pin.marker, {name: state_of(pin.folder / name) for name in names})
    return pin.folder


def is_fetched(pin: Pin) -> bool:
    """Whether ``fetch`` would not ask the Hub, by the sizes of the files."""
    stated = read_marker(pin)
    return bool(stated) and all(is_whole(pin.folder / name, state, verify=False) for name, state in stated.items())


def read_marker(pin: Pin) -> dict[str, FileState]:
    """Files of a download that came to its end; empty where none did."""
    try:
        stated = from_json(pin.marker.read_text(encoding="utf-8"))
        return {name: {"bytes": int(state["bytes"]), "sha256": str(state["sha256"])} for name, state in stated.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def is_whole(path: Path, state: FileState, verify: bool) -> bool:
    try:
        return path.stat().st_size == state["bytes"] and (not verify or sha256_file(path) == state["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return False


def refuse_strangers(path: Path, pin: Pin, stated: dict[str, FileState]) -> None:
    """What else stands in the snapshot would be taken for a part of the pinned commit."""
    there = {file.relative_to(pin.folder) for file in pin.folder.rglob("*") if not file.is_dir()}
    strangers = sorted(str(name) for name in there if str(name) not in stated and not hidden(name))
    if strangers:
        files = plural(len(strangers), f"file in {pin.folder} is", f"files in {pin.folder} are")
        found = f"{files} none of {pin.hub}, such as {strangers[0]}"
        raise UserError(f"{path}: {found}; move them to a folder of your own")


def hidden(name: Path) -> bool:
    """As the client's own ``.cache``; no listing looks at those."""
    return any(part.startswith(".") for part in name.parts)


def state_of(path: Path) -> FileState:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_pin(path: Path) -> Pin:
    """A checked pin file.

    Raises:
        UserError: every problem with it, one line each.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a YAML file with the keys hub and revision")
    refuse_bombs(path)
    tree = read_yaml(path)
    problems = [unknown(str(path), str(key)[:MAX_SHOWN], KEYS) for key in tree if key not in KEYS]
    problems += [f"{path} {text}" for text in (hub_problem(tree), revision_problem(tree)) if text]
    if problems:
        raise UserError(*problems)
    return Pin(tree["hub"], tree["revision"], None)


def page(name: str, kind: Kind) -> str:
    return f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"


def refuse_bombs(path: Path) -> None:
    """A few lines of YAML whose aliases name aliases are gigabytes when written out."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; a file that pins a model has at most {MAX_BYTES:,}")
    with contextlib.suppress(YAMLError, ValueError, RecursionError):  # read_yaml says what is wrong
        for event in YAML(typ="safe", pure=True).parse(path.read_text(encoding="utf-8")):
            if isinstance(event, AliasEvent):
                raise UserError(
                    f"{path}:{event.start_mark.line + 1}: an alias (*{event.anchor[:MAX_SHOWN]}); write the value"
                    " itself"
                )


def hub_problem(tree: dict[str, Any]) -> str:
    name = tree.get("hub")
    if isinstance(name, str) and re.fullmatch(NAME, name):
        return ""
    return f"hub: got {shown(name)}; expected owner/name, as in {page('owner/name', 'model')}"


def revision_problem(tree: dict[str, Any]) -> str:
    revision = tree.get("revision")
    if isinstance(revision, str) and re.fullmatch(COMMIT, revision):
        return ""
    if isinstance(revision, int | float):
        return f"revision: got the number {shown(revision)}; put the commit in quotes"
    got = "missing" if revision is None else f"got {shown(revision)}"
    name = str(tree.get("hub")) if not hub_problem(tree) else "owner/name"
    return (
        f"revision: {got}; expected a commit of 40 hex digits, since what a branch, a tag or nothing names can change"
        f" and no run could be repeated; find it at {page(name, 'model')}/commits/main, or with"
        f" python -c \"import huggingface_hub as h; print(h.model_info('{name}').sha)\""
    )


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def download(path: Path, pin: Pin) -> list[str]:
    """Fetch the snapshot, going on where an earlier download was killed; the names of its files.

    Raises:
        UserError: the Hub cannot be reached, or has no such repository, commit or files, or not for this person.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    patterns = list(pin.files) if pin.files else None
    # Asked first, since snapshot_download takes a folder half full for the snapshot where it cannot reach the Hub.
    there = list_files(path, pin)
    wanted = list(filter_repo_objects(there, allow_patterns=patterns, ignore_patterns=NEVER_FETCHED))
    if not wanted:
        shown = ", ".join(there[:5]) or "no files"
        raise UserError(f"{path} files: no file of {pin.hub} matches {patterns or ['*']}; it has {shown}")
    with explained(path, pin.hub, "model", pin.revision):
        huggingface_hub.snapshot_download(
            pin.hub,
            repo_type="model",
            revision=pin.revision,
            local_dir=pin.folder,
            allow_patterns=patterns,
            ignore_patterns=NEVER_FETCHED,
        )
    missing = [name for name in wanted if not (pin.folder / name).is_file()]
    if missing:
        raise UserError(
            f"{path}: {plural(len(missing), 'file')} of {pin.hub} did not arrive, such as {missing[0]}; run again"
        )
    return wanted


def list_files(path: Path, pin: Pin) -> list[str]:
    """Names of all files of the pinned commit, as the Hub says.

    Raises:
        UserError: as ``download``.
    """
    import huggingface_hub

    with explained(path, pin.hub, "model", pin.revision):
        info = huggingface_hub.model_info(pin.hub, revision=pin.revision)
    return sorted(sibling.rfilename for sibling in info.siblings or [])


@contextlib.contextmanager
def explained(where: str | Path, name: str, kind: Kind, revision: str) -> Iterator[None]:
    """Inside, the Hub is asked for a repository; what goes wrong there becomes a UserError.

    Args:
        where: the pin file or the argument that names the repository, for messages.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        cure = f"accept its terms at {page(name, kind)} and run `hf auth login`"
        raise UserError(f"{where} hub: {name} is gated; {cure}") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where} revision: {name} has no commit {revision}; see {page(name, kind)}/commits/main"
        ) from None
    except errors.RepositoryNotFoundError:
        cure = "check the name, or run `hf auth login` if it is private"
        raise UserError(f"{where} hub: no {kind} {page(name, kind)}; {cure}") from None
    except Exception as error:  # whatever the client's HTTP library raises
        if getattr(error, "errno", None) in REMEDIES:  # the disk's fault, such as no space left
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{where}: {name} cannot be downloaded ({reason}); run again, it goes on from there") from None
