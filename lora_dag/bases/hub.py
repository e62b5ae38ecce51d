"""A model of the Hugging Face Hub, pinned to one commit by a small YAML file that git or DVC versions::

    hub: owner/name
    revision: 0123456789abcdef0123456789abcdef01234567

The snapshot is downloaded once into the state directory; later runs need no network. Only the files of the model's
family are fetched (``resolve.py``). `lora-dag import` fetches datasets.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.events import AliasEvent

from lora_dag.core.console import REMEDIES, Problem, UserError, log, plural, warn
from lora_dag.core.files import from_json, sha256_json, state_dir, write_json
from lora_dag.core.kept_digests import sha256_files
from lora_dag.core.labels import as_yaml
from lora_dag.core.param_errors import unknown_setting
from lora_dag.core.params import read_yaml

Kind = Literal["dataset", "model"]
KEYS = ("hub", "revision")
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
COMMIT = r"[0-9a-f]{40}"
MAX_BYTES = 64 * 2**10
"""Limit on the size of a pin file."""
MAX_SHOWN = 120
"""Characters of a quoted value in a message."""
NEVER_FETCHED = ["*.py", "*.pkl", "*.pickle"]  # code, which no stage runs


@dataclass(frozen=True)
class Pin:
    """A repository of the Hub at one commit."""

    hub: str
    """owner/name"""
    revision: str
    """Commit, 40 hex digits."""
    files: tuple[str, ...] | None
    """Patterns of the files to fetch; None for all."""

    @property
    def folder(self) -> Path:
        """Folder of the snapshot; another selection of files has another folder."""
        selection = "" if self.files is None else "-" + sha256_json(sorted(self.files))[:8]
        return state_dir() / "hub" / "models" / self.hub.replace("/", "--") / (self.revision + selection)

    @property
    def marker(self) -> Path:
        """File that marks a complete snapshot, beside its folder, which has only the repository's files."""
        return self.folder.with_name(self.folder.name + ".json")


class FileState(TypedDict):
    """Size and digest of a downloaded file."""

    bytes: int
    sha256: str


def fetch(path: Path, verify: bool = True, pin: Pin | None = None) -> Path:
    """Return the folder with the snapshot of a pin file, and download it unless it is complete.

    Args:
        verify: compare the SHA-256 of every file with the downloaded one; otherwise only its size.
        pin: the pin, such as one with a selection of files; None to read it from the file.

    Raises:
        UserError: the pin file is invalid, the download fails, or the folder has extra files.
    """
    pin = pin or read_pin(path)
    recorded = read_marker(pin)
    changed = changed_files(pin.folder, recorded, verify)
    if recorded and not changed:
        if verify:
            refuse_extra_files(path, pin, recorded)
        return pin.folder
    if changed:
        files = plural(len(changed), "file was", "files were")
        text = f"{path}: {files} changed or deleted in its snapshot, such as {changed[0]}. They are downloaded again."
        warn("snapshot-changed", text)
    for name in changed:  # otherwise the client could keep the changed file
        (pin.folder / name).unlink(missing_ok=True)
    log.info("download    %s at %s from the Hugging Face Hub", pin.hub, pin.revision[:12])
    names = download(path, pin)
    write_json(pin.marker, file_states(pin.folder, names))
    return pin.folder


def is_fetched(pin: Pin) -> bool:
    """Return whether ``fetch`` needs no network, judged by the sizes of the files."""
    recorded = read_marker(pin)
    return bool(recorded) and not changed_files(pin.folder, recorded, verify=False)


def read_marker(pin: Pin) -> dict[str, FileState]:
    """Return the files of a completed download; empty if there is none."""
    try:
        files = from_json(pin.marker.read_text(encoding="utf-8"))
        return {name: {"bytes": int(state["bytes"]), "sha256": str(state["sha256"])} for name, state in files.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def changed_files(folder: Path, recorded: Mapping[str, FileState], verify: bool) -> list[str]:
    """Return the files that lack the recorded size or, with ``verify``, the recorded digest."""
    sizes = {name: file_size(folder / name) for name in recorded}
    same = [name for name, state in recorded.items() if sizes[name] == state["bytes"]]
    found = sha256_files(folder / name for name in same) if verify else {}
    changed = {name for name in same if verify and found[folder / name] != recorded[name]["sha256"]}
    return [name for name in recorded if name in changed or name not in same]


def file_size(path: Path) -> int | None:
    """Return a file's bytes; None if there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def refuse_extra_files(path: Path, pin: Pin, recorded: dict[str, FileState]) -> None:
    """Raise UserError for other files in the snapshot, which would be loaded as a part of the pinned commit."""
    files = {file.relative_to(pin.folder) for file in pin.folder.rglob("*") if not file.is_dir()}
    extra = sorted(str(name) for name in files if str(name) not in recorded and not is_hidden(name))
    if extra:
        text = f"{path}: {plural(len(extra), 'file')} in {pin.folder} not from {pin.hub}, such as {extra[0]}."
        raise UserError(Problem("snapshot-extra-files", f"{text} Move them to another folder."))


def is_hidden(name: Path) -> bool:
    """Return whether a path has a part such as the client's ``.cache``, which no loader reads."""
    return any(part.startswith(".") for part in name.parts)


def file_states(folder: Path, names: Iterable[str]) -> dict[str, FileState]:
    """Return size and digest of each file."""
    paths = {name: folder / name for name in names}
    digests = sha256_files(paths.values())
    return {name: {"bytes": path.stat().st_size, "sha256": digests[path]} for name, path in paths.items()}


def read_pin(path: Path) -> Pin:
    """Read and check a pin file.

    Raises:
        UserError: every problem of the file.
    """
    if not path.is_file():
        text = f"{path}: no such file, but a YAML file with the keys hub and revision is expected."
        raise UserError(Problem("pin-missing", text))
    refuse_aliases(path)
    tree = read_yaml(path)
    problems: list[Problem] = [
        unknown_setting(str(path), str(key)[:MAX_SHOWN], KEYS, "key") for key in tree if key not in KEYS
    ]
    problems += [problem.about(str(path)) for problem in (hub_problem(tree), revision_problem(tree)) if problem]
    if problems:
        raise UserError(*problems)
    return Pin(tree["hub"], tree["revision"], None)


def page(name: str, kind: Kind) -> str:
    """Return the address of a repository's page."""
    return f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"


def refuse_aliases(path: Path) -> None:
    """Raise UserError for a large file or one with aliases, whose few lines can expand to gigabytes."""
    if path.stat().st_size > MAX_BYTES:
        text = f"{path}: {path.stat().st_size:,} bytes, but a file that pins a model has at most {MAX_BYTES:,}."
        raise UserError(Problem("pin-too-large", text))
    with contextlib.suppress(YAMLError, ValueError, RecursionError):  # read_yaml reports these
        for event in YAML(typ="safe", pure=True).parse(path.read_text(encoding="utf-8")):
            if isinstance(event, AliasEvent):
                place, alias = f"{path}:{event.start_mark.line + 1}", event.anchor[:MAX_SHOWN]
                raise UserError(Problem("pin-alias", f"{place}: got the alias *{alias}. Write the value itself."))


def hub_problem(tree: dict[str, Any]) -> Problem | None:
    name = tree.get("hub")
    if isinstance(name, str) and re.fullmatch(NAME, name):
        return None
    text = f"hub: got {short_repr(name)}, but owner/name is expected, as in {page('owner/name', 'model')}."
    return Problem("pin-hub", text)


def revision_problem(tree: dict[str, Any]) -> Problem | None:
    revision = tree.get("revision")
    if isinstance(revision, str) and re.fullmatch(COMMIT, revision):
        return None
    if isinstance(revision, int | float):
        return Problem("pin-revision", f"revision: got the number {short_repr(revision)}. Put the commit in quotes.")
    got = "missing" if revision is None else f"got {short_repr(revision)}"
    name = str(tree.get("hub")) if not hub_problem(tree) else "owner/name"
    return Problem(
        "pin-revision",
        f"revision: {got}, but a commit of 40 hex digits is expected, because branches and tags can change. "
        f"Find it at {page(name, 'model')}/commits/main, or run "
        f"python -c \"import huggingface_hub as h; print(h.model_info('{name}').sha)\"",
    )


def short_repr(value: Any) -> str:
    """Return the value as YAML writes it, cut after MAX_SHOWN characters."""
    text = as_yaml(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def download(path: Path, pin: Pin) -> list[str]:
    """Download the snapshot, resuming an earlier download, and return the names of its files.

    Raises:
        UserError: the Hub cannot be reached, or this user cannot read such a repository, commit or files.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    patterns = list(pin.files) if pin.files else None
    # First, because snapshot_download returns a half-filled folder as the snapshot if it cannot reach the Hub.
    available = list_files(path, pin)
    wanted = list(filter_repo_objects(available, allow_patterns=patterns, ignore_patterns=NEVER_FETCHED))
    if not wanted:
        examples = ", ".join(available[:5]) or "no files"
        text = f"{path} files: no file of {pin.hub} matches {patterns or ['*']}. It has {examples}."
        raise UserError(Problem("hub-no-match", text))
    with user_errors(path, pin.hub, "model", pin.revision):
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
        text = f"{path}: {plural(len(missing), 'file')} of {pin.hub} did not arrive, such as {missing[0]}."
        raise UserError(Problem("hub-incomplete", f"{text} Run the same command to resume."))
    return wanted


def list_files(path: Path, pin: Pin) -> list[str]:
    """Return the names of all files of the pinned commit.

    Raises:
        UserError: the same as for ``download``.
    """
    import huggingface_hub

    with user_errors(path, pin.hub, "model", pin.revision):
        info = huggingface_hub.model_info(pin.hub, revision=pin.revision)
    return sorted(sibling.rfilename for sibling in info.siblings or [])


@contextlib.contextmanager
def user_errors(place: str | Path, name: str, kind: Kind, revision: str) -> Iterator[None]:
    """Turn failures of requests to the Hub into a UserError.

    Args:
        place: the pin file or the argument that names the repository, for messages.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        text = f"{place} hub: {name} is gated. Accept its terms at {page(name, kind)} and run `hf auth login`."
        raise UserError(Problem("hub-gated", text)) from None
    except errors.RevisionNotFoundError:
        text = f"{place} revision: {name} has no commit {revision}. See {page(name, kind)}/commits/main."
        raise UserError(Problem("hub-no-revision", text)) from None
    except errors.RepositoryNotFoundError:
        text = f"{place} hub: {page(name, kind)} does not exist or is private."
        raise UserError(Problem("hub-no-repository", f"{text} Check the name, or run `hf auth login`.")) from None
    except Exception as error:  # the client's HTTP library has many
        if getattr(error, "errno", None) in REMEDIES:  # such as no space left
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        text = f"{place}: {name} cannot be downloaded ({reason}). Run the same command to resume."
        raise UserError(Problem("hub-failed", text)) from None
