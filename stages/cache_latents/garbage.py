"""``python -m stages.cache_latents --gc``: store entries that no committed experiment uses are deleted.

Used is what data/latents/manifest.json names in any commit that a ref reaches (branches, tags, remotes, stashes, DVC's
experiments), in the folders of this workspace and of experiments at work in .dvc/tmp, or under the present parameters,
also in smaller batches where memory is short. What else a run left, finished or killed, is freed whatever its age; no
run goes on meanwhile. A version that DVC's cache does not have, as in a fresh clone or after `dvc gc`, keeps nothing.
Where any other use cannot be known, nothing is freed without ``--force``.

Beside the entries, thumbnails of pictures that no version of reports/dataset/pictures.csv names are freed. Snapshots of
the Hub in <state>/hub stay, since the pins that name them may stand in folders that DVC tracks, and so do checkpoints
converted to the diffusers layout in <state>/bases: delete one by hand, and the stage that needs it makes it again.
Trainings in <state>/runs stay too: no commit names one, and a killed one may be wanted. What prepare remembers of
pictures, it bounds itself.
"""

from __future__ import annotations

import contextlib
import glob
import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

from lora_dag.artifacts.store import Store
from lora_dag.core.console import UserError, log, plural

FOLDERS = ("runs/*/latents*", ".dvc/tmp/exps/*/*/{here}data/latents")
"""Where caches lie that are in no commit: Snakemake's, and those of experiments at work outside of the workspace.

``here`` is this folder's path in the git repository, which DVC copies whole.
"""
LATENTS = "data/latents"
PICTURES = "reports/dataset/pictures.csv"
SHAPE = (AttributeError, KeyError, TypeError, RecursionError)
"""What taking apart a file of another shape raises."""
TABLES = (PICTURES, f"runs/*/{PICTURES}", f".dvc/tmp/exps/*/*/{{here}}{PICTURES}")


def collect(latents: Path, current: Callable[[], set[str]], *, dry_run: bool, force: bool) -> None:
    """Delete what is not used, and say how much.

    Args:
        current: keys under the present parameters; a UserError from it means that they cannot be known.

    Raises:
        UserError: outside of git, a run is at work, or not all use can be known and ``force`` is False.
    """
    store = Store()
    require_repository()
    if not store.root.is_dir():
        log.info("%s: no store, nothing to free", store.root)
        return
    with store.alone():
        history = History()
        locks, tables = history.versions("dvc.lock"), history.versions(PICTURES)
        used, problems = committed_keys(locks)
        at_work, damaged = folder_keys(latents)
        used |= at_work
        problems += [*damaged, *dict.fromkeys(history.problems), *shared_problems(store)]
        try:
            used |= current()
        except UserError as error:
            unknown_use = "until then it cannot be known which entries the present parameters use; or pass --force"
            problems += [f"{text}; {unknown_use}" for text in error.problems]
        if problems and not force:
            raise UserError(*problems)
        for problem in problems:
            log.warning("warning: %s", problem)
        sweep("thumbnails", (store.root / "thumbnails").glob("*/*"), used_pictures(tables), dry_run)
        sweep("entries", (path for _, path in store.entries()), used, dry_run)


def sweep(what: str, paths: Iterable[Path], used: set[str], dry_run: bool) -> None:
    """Delete files whose names before the suffix are not used."""
    num_files = num_freed = size = 0
    for path in list(paths):
        leftover = path.name.startswith(".")  # of a write that was killed
        num_files += not leftover
        if leftover or path.stem not in used:
            num_freed += not leftover
            with contextlib.suppress(FileNotFoundError):  # another process replaced a damaged thumbnail
                size += path.stat().st_size
                if not dry_run:
                    path.unlink()
    if num_files or what == "entries":
        freed = "would free" if dry_run else "freed"
        log.info("%s %.1f MB: %d of %d %s", freed, size / 1e6, num_freed, num_files, what)


# What commits use


def committed_keys(locks: dict[str, bytes]) -> tuple[set[str], list[str]]:
    """Keys that committed versions of dvc.lock stand for, and a line for each reason why there may be more.

    Args:
        locks: object id -> bytes.
    """
    versions: set[str] = set()
    garbled = []
    for blob_id, lock in locks.items():
        try:
            versions |= latents_in(lock)
        except (YAMLError, ValueError, *SHAPE):
            garbled.append(blob_id)
    used: set[str] = set()
    absent, unreadable = [], []
    cache = cache_folder() if versions else Path()
    for version in sorted(versions):
        try:
            entries = json.loads(cached(cache, f"{version}.dir").read_bytes())
            digest = next(entry["md5"] for entry in entries if entry["relpath"] == "manifest.json")
            used |= keys_of(cached(cache, digest).read_bytes())
        except OSError:
            absent.append(version)
        except (ValueError, StopIteration, *SHAPE):
            unreadable.append(version)
    if absent:
        log.info("note: %s", elsewhere(absent))
    return used, unknown(garbled, unreadable)


def latents_in(lock: bytes) -> set[str]:
    """Digests of the versions of data/latents that a dvc.lock names.

    Raises:
        YAMLError, ValueError, or one of ``SHAPE``: it is no dvc.lock that we know.
    """
    stages = YAML(typ="safe", pure=True).load(lock.decode())["stages"].values()
    entries = [entry for stage in stages for entry in (*stage.get("deps", ()), *stage.get("outs", ()))]
    digests = {entry["md5"] for entry in entries if posixpath.normpath(entry["path"]) == LATENTS}
    if not all(re.fullmatch(r"[0-9a-f]{32}\.dir", digest) for digest in digests):
        raise ValueError("no digest of a folder")
    return {digest.removesuffix(".dir") for digest in digests}


def elsewhere(absent: list[str]) -> str:
    """About versions that were made on another machine, or that `dvc gc` has dropped here."""
    what = f"{plural(len(absent), 'committed version')} of {LATENTS} {'is' if len(absent) == 1 else 'are'}"
    return (
        f"{what} not in DVC's cache ({shortened(absent)}): the entries that only such versions use are freed too, and "
        "a run encodes them again when they are needed; `dvc fetch --all-commits cache_latents` keeps what a remote has"
    )


def unknown(garbled: list[str], unreadable: list[str]) -> list[str]:
    """Lines about lock files that cannot be read, and damaged versions of data/latents."""
    problems = []
    if garbled:
        what = f"{len(garbled)} committed dvc.lock (blob {shortened(garbled)})"
        problems.append(f"{what} cannot be read: the entries it uses cannot be known; pass --force to free them")
    if unreadable:
        what = f"{len(unreadable)} committed version{'s' * (len(unreadable) > 1)} of {LATENTS}"
        problems.append(
            f"{what} ({shortened(unreadable)}) cannot be read in DVC's cache: the entries used there cannot be known; "
            "pass --force to free them"
        )
    return problems


def shortened(digests: list[str]) -> str:
    return ", ".join(digest[:8] for digest in digests[:3]) + (", ..." if len(digests) > 3 else "")


def cached(folder: Path, digest: str) -> Path:
    return folder / "files" / "md5" / digest[:2] / digest[2:]


def keys_of(manifest: bytes) -> set[str]:
    """Every key that a data/latents/manifest.json names, of this version or an older one.

    Raises:
        ValueError, or one of ``SHAPE``: it is none.
    """
    tree = json.loads(manifest)
    keys = [key for row in tree["items"] for key in (*row["views"], *row.get("masks", ()))]
    return {*keys, *tree["captions"].values()}


def folder_keys(latents: Path) -> tuple[set[str], list[str]]:
    """Keys that folders in no commit use, and a line for each whose manifest cannot be read."""
    used: set[str] = set()
    problems = []
    for folder in dict.fromkeys((latents, *found(FOLDERS))):
        path = folder / "manifest.json"
        try:
            used |= keys_of(path.read_bytes())
        except FileNotFoundError:  # a run would write it anew
            continue
        except (OSError, ValueError, *SHAPE):
            what = "cannot be read: the entries it uses cannot be known"
            problems.append(f"{path}: {what}; delete it, or pass --force to free them")
    return used, problems


def used_pictures(tables: dict[str, bytes]) -> set[str]:
    """Digests of the pictures that any version of the dataset holds or held.

    Args:
        tables: committed versions of pictures.csv.
    """
    blobs = [*tables.values(), *(path.read_bytes() for path in found(TABLES))]
    return {digest.decode() for blob in blobs for digest in re.findall(rb"\b[0-9a-f]{64}\b", blob)}


def found(patterns: Iterable[str]) -> list[Path]:
    here = glob.escape(prefix())
    return [path for pattern in patterns for path in Path().glob(pattern.format(here=here))]


def shared_problems(store: Store) -> list[str]:
    here = Path().resolve()
    if store.root.resolve().is_relative_to(here):
        return []
    return [
        f"{store.root}: stands outside of {here.name} and may serve other repositories, whose use cannot be known; "
        "pass --force to free what this one does not use"
    ]


# git and DVC


def require_repository() -> None:
    """Raises UserError where there is no git repository."""
    try:
        prefix()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            "--gc: no git repository here, so what experiments use cannot be known; nothing is freed"
        ) from None


def prefix() -> str:
    """This folder's path in the repository, such as ``projects/icons/``; empty at the top."""
    return git("rev-parse", "--show-prefix").rstrip("\n")


class History:
    """What a ref, HEAD or a stash reaches; with a line for everything of it that git cannot read."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        listed = subprocess.run(
            ("git", "for-each-ref", "--format=%(refname)"), capture_output=True, text=True, check=True
        )
        self.problems += [unread(line) for line in listed.stderr.splitlines()]  # "warning: ignoring broken ref ..."
        refs = listed.stdout.splitlines()
        head = git("rev-parse", "--quiet", "--verify", "HEAD", check=False).split()  # none before the first commit
        self.commits = list(dict.fromkeys(self._lines("rev-list", [*refs, *head, *stashed(refs)])))

    def versions(self, name: str) -> dict[str, bytes]:
        """Object id -> bytes of every distinct version of a file of this folder."""
        path = f":(top,literal){prefix()}{name}"
        changes = self._lines("diff-tree", self.commits, "-r", "-m", "--root", "--raw", "--no-abbrev", "--", path)
        blobs = dict.fromkeys(line.split()[3] for line in changes if line.startswith(":"))
        found = {}
        for blob in (blob for blob in blobs if set(blob) != {"0"}):  # zeros: the file was deleted
            done = subprocess.run(("git", "cat-file", "blob", blob), capture_output=True)
            if done.returncode:
                self.problems.append(
                    unread(f"{name}, blob {blob[:8]}: {last_line(done.stderr.decode(errors='replace'))}")
                )
            else:
                found[blob] = done.stdout
        return found

    def _lines(self, command: str, given: list[str], *options: str) -> list[str]:
        """What git prints for all that is given; where it fails, for each by itself."""
        words = (command, "--stdin", *options)
        try:
            return git(*words, given="".join(f"{line}\n" for line in given)).splitlines()
        except subprocess.CalledProcessError as error:
            if len(given) == 1:
                self.problems.append(unread(last_line(error.stderr)))
                return error.stdout.splitlines()
        return [line for one in given for line in self._lines(command, [one], *options)]


def unread(said: str) -> str:
    return f"git: {said}: what was committed there cannot be known; run `git fsck`, or pass --force to free it"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]


def stashed(refs: Iterable[str]) -> Iterable[str]:
    """Older stashes stand in the logs of their refs alone, also those of queued experiments."""
    return [
        commit
        for ref in refs
        if ref.startswith(("refs/stash", "refs/exps")) and ref.endswith("stash")
        for commit in git("log", "--walk-reflogs", "--format=%H", ref, check=False).split()
    ]


def git(*words: str, given: str | None = None, check: bool = True) -> str:
    done = subprocess.run(
        ("git", *words), input=given, capture_output=True, encoding="utf-8", errors="replace", check=check
    )
    return done.stdout


def cache_folder() -> Path:
    """DVC's cache, wherever its configuration puts it.

    Raises:
        UserError: DVC does not say.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--gc: `dvc cache dir` fails ({last_line(done.stderr)}); nothing is freed")
    return Path(done.stdout.strip())
