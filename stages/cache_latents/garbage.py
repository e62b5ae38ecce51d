"""``python -m stages.cache_latents --gc``: store entries that no committed experiment uses are deleted.

Used is what data/latents/manifest.json names in any commit that a ref reaches (branches, tags, remotes, stashes, DVC's
experiments), in the folders of this workspace and of experiments at work in .dvc/tmp, or under the present parameters.
An entry's age does not matter: no run of cache_latents goes on meanwhile, and what it left is used by one of these.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from stages.artifacts.store import Store
from stages.core.console import UserError, log

FOLDERS = ("runs/latents", ".dvc/tmp/exps/*/*/data/latents")
"""Where caches lie that are in no commit: Snakemake's, and those of experiments at work outside of the workspace."""
LATENTS = "data/latents"


def collect(latents: Path, current: Callable[[], set[str]], *, dry_run: bool, force: bool) -> None:
    """Delete what is not used, and say how much.

    Args:
        current: keys under the present parameters; a UserError from it means that there are none.

    Raises:
        UserError: outside of git, a run is at work, or not all use can be known and ``force`` is False.
    """
    store = Store()
    root = repository()
    if not store.root.is_dir():
        log.info("%s: no store, nothing to free", store.root)
        return
    with store.alone():
        used, problems = committed_keys()
        problems += shared_problems(store, root)
        if problems and not force:
            raise UserError(*problems)
        for folder in (latents, *(path for pattern in FOLDERS for path in Path().glob(pattern))):
            used |= manifest_keys(folder / "manifest.json")
        try:
            used |= current()
        except UserError as error:
            log.info("params      no entries under the present ones (%s)", error.problems[0])
        sweep(store, used, dry_run)


def sweep(store: Store, used: set[str], dry_run: bool) -> None:
    num_entries = num_freed = size = 0
    for _, path in list(store.entries()):
        leftover = path.name.startswith(".")  # of a write that was killed
        num_entries += not leftover
        if leftover or path.stem not in used:
            num_freed += not leftover
            size += path.stat().st_size
            if not dry_run:
                path.unlink()
    log.info("%s %.1f MB: %d of %d entries", "would free" if dry_run else "freed", size / 1e6, num_freed, num_entries)


# What commits use


def committed_keys() -> tuple[set[str], list[str]]:
    """Keys that commits use, and a line for each reason why there may be more."""
    versions: set[str] = set()
    garbled = []
    for blob_id, lock in lock_files().items():
        found = re.findall(rf"path: {LATENTS}\n(?:\s+(?!path:)\w+: .*\n)*?\s+md5: ([0-9a-f]{{32}})\.dir\n", lock)
        versions |= set(found)
        if len(found) != lock.count(f"path: {LATENTS}\n"):
            garbled.append(blob_id)
    used: set[str] = set()
    absent = []
    cache = cache_folder() if versions else Path()
    for version in sorted(versions):
        try:
            entries = json.loads(cached(cache, f"{version}.dir").read_bytes())
            digest = next(entry["md5"] for entry in entries if entry["relpath"] == "manifest.json")
            used |= keys_of(json.loads(cached(cache, digest).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            absent.append(version)
    return used, unknown(garbled, absent)


def unknown(garbled: list[str], absent: list[str]) -> list[str]:
    """Lines about lock files that cannot be read, and versions of data/latents whose manifest is not here."""
    problems = []
    if garbled:
        what = f"{len(garbled)} committed dvc.lock (blob {shortened(garbled)})"
        problems.append(f"{what} cannot be read: the entries it uses cannot be known; pass --force to free them")
    if absent:
        what = f"{len(absent)} committed version{'s are' if len(absent) > 1 else ' is'}"
        problems.append(
            f"{what} not in DVC's cache ({shortened(absent)}): their entries cannot be known; "
            "run `dvc fetch --all-commits cache_latents` first or pass --force"
        )
    return problems


def shortened(digests: list[str]) -> str:
    return ", ".join(digest[:8] for digest in digests[:3]) + (", ..." if len(digests) > 3 else "")


def cached(folder: Path, digest: str) -> Path:
    return folder / "files" / "md5" / digest[:2] / digest[2:]


def keys_of(manifest: dict) -> set[str]:
    """Every key that a data/latents/manifest.json names, of this version or an older one."""
    rows = manifest["items"]
    return {key for row in rows for key in (*row["views"], *row.get("masks", ()))} | set(manifest["captions"].values())


def manifest_keys(path: Path) -> set[str]:
    """Of a folder in the workspace; none where it is absent or cut off, since a run would write it anew."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return keys_of(json.loads(path.read_bytes()))
    return set()


def shared_problems(store: Store, root: Path) -> list[str]:
    if store.root.resolve().is_relative_to(root):
        return []
    return [
        f"{store.root}: stands outside of {root.name} and may serve other repositories, whose use cannot be known; "
        "pass --force to free what this one does not use"
    ]


# git and DVC


def repository() -> Path:
    """The top folder of the git repository.

    Raises:
        UserError: there is none.
    """
    try:
        return Path(git("rev-parse", "--show-toplevel").strip()).resolve()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            "--gc: no git repository here, so what experiments use cannot be known; nothing is freed"
        ) from None


def lock_files() -> dict[str, str]:
    """Object id -> text of every distinct dvc.lock, in this folder, that a ref, HEAD or a stash reaches."""
    prefix = git("rev-parse", "--show-prefix").strip()
    commits = git("rev-list", "--all", *head(), *stashed()).split()
    wanted = "".join(f"{commit}:{prefix}dvc.lock\n" for commit in commits)
    checked = git("cat-file", "--batch-check=%(objectname) %(objecttype)", given=wanted).splitlines()
    blobs = dict.fromkeys(line.split()[0] for line in checked if line.endswith(" blob"))
    return {blob: git("cat-file", "blob", blob) for blob in blobs}


def head() -> list[str]:
    """HEAD, detached or not; nothing before the first commit."""
    return ["HEAD"] if git("rev-parse", "--quiet", "--verify", "HEAD", check=False).strip() else []


def stashed() -> Iterable[str]:
    """Older stashes stand in the logs of their refs alone, also those of queued experiments."""
    refs = git("for-each-ref", "--format=%(refname)", "refs/stash", "refs/exps").split()
    return [
        commit
        for ref in refs
        if ref.endswith("stash")
        for commit in git("log", "--walk-reflogs", "--format=%H", ref, check=False).split()
    ]


def git(*words: str, given: str | None = None, check: bool = True) -> str:
    done = subprocess.run(("git", *words), input=given, capture_output=True, text=True, encoding="utf-8", check=check)
    return done.stdout


def cache_folder() -> Path:
    """DVC's cache, wherever its configuration puts it.

    Raises:
        UserError: DVC does not say.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"--gc: `dvc cache dir` fails ({said}); nothing is freed")
    return Path(done.stdout.strip())
