"""Data tracked by DVC that others cannot download: it has no remote, or one inside this clone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_dag.core.console import Problem, UserError
from lora_dag.core.params import read_yaml
from lora_dag.pipeline.git import git

STORE = ".dvc/store"
"""The folder of the remote ``bundled``: the demo's data, committed to git (base/bundle.py)."""
REMEDY = "Run `dvc remote add --default NAME URL`, then `dvc push`."

UNTRACKED = "neither DVC nor git tracks it, so others cannot download it. Run `dvc add {}`, then commit the .dvc file."


def unshared_data(sources: Iterable[str] = ()) -> list[Problem]:
    """Return a problem for each reason why others cannot download data; none without DVC or git.

    Args:
        sources: paths of the dataset and the base model. A path outside of the clone is skipped.
    """
    if not Path(".dvc").is_dir() or git("rev-parse", "--git-dir") is None:
        return []
    config = dvc_config()
    committed = set((git("ls-files", STORE) or b"").decode().split())
    untracked = [
        Problem("data-not-shared", f"{source}: {UNTRACKED.format(source)}")
        for source in dict.fromkeys(sources)
        if is_untracked(source)
    ]
    pointers_by_reason: dict[str, list[str]] = {}
    for pointer, out in tracked():
        digest = str(out.get("md5", ""))
        if f"{STORE}/files/md5/{digest[:2]}/{digest[2:]}" not in committed and (reason := obstacle(out, config)):
            pointers_by_reason.setdefault(reason, []).append(f"{pointer}")
    return untracked + [
        Problem("data-not-shared", f"{', '.join(dict.fromkeys(pointers))}: {reason}")
        for reason, pointers in pointers_by_reason.items()
    ]


def is_untracked(source: str) -> bool:
    """Return whether a path in the clone is tracked neither by DVC nor by git."""
    path = Path(source).resolve()
    if not path.exists() or not path.is_relative_to(Path().resolve()) or git("ls-files", "--", str(path)):
        return False
    outs = [(pointer.parent / str(out.get("path"))).resolve() for pointer, out in tracked()]
    return not any(path.is_relative_to(out) or out.is_relative_to(path) for out in outs)


def obstacle(out: dict[str, Any], config: dict[str, str]) -> str | None:
    """Return why others cannot download an output; None if a remote may have it."""
    name = out.get("remote") or config.get("core.remote")
    if out.get("remote") and out.get("push") is False:
        return (
            f"others cannot download this data: `push: false` excludes it from the remote '{name}'. "
            f"Delete the lines `remote:` and `push:` in the file. {REMEDY}"
        )
    if name is None:
        return f"others cannot download this data: no DVC remote is set. {REMEDY}"
    url = config.get(f"remote.{name}.url", "")
    if "://" not in url and Path(url).is_relative_to(Path().resolve()):
        return f"others cannot download this data: the remote '{name}' is a folder of this clone. {REMEDY}"
    return None


def tracked() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each .dvc file below the current folder with each of its outputs, except files that import data."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.dvc") or b""
    for name in filter(None, listed.decode().split("\0")):
        content: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # gate and DVC report damaged files
            content = read_yaml(Path(name))
        if not content.get("deps"):
            yield from ((Path(name), out) for out in content.get("outs") or [] if isinstance(out, dict))


def dvc_config() -> dict[str, str]:
    """Return all DVC settings, such as ``core.remote``."""
    done = subprocess.run([sys.executable, "-m", "dvc", "config", "--list"], capture_output=True, text=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
