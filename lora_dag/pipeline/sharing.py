"""Data that DVC tracks and that nobody else can get: no remote is set for it, or one that lies inside this clone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dag.core.console import UserError
from lora_dag.core.params import read_yaml
from lora_dag.pipeline.git import git

STORE = ".dvc/store"
"""The folder of the remote ``bundled``: the demo's data, committed to git (base/bundle.py)."""
CURE = "`dvc remote add --default NAME URL`, then `dvc push`"


def unshared() -> list[str]:
    """A line per reason why others cannot get data of a .dvc file; none without DVC or git."""
    config = dvc_config()
    if config is None:
        return []
    committed = set((git("ls-files", STORE) or b"").decode().split())
    found: dict[str, list[str]] = {}
    for pointer, out in tracked():
        digest = str(out.get("md5", ""))
        if f"{STORE}/files/md5/{digest[:2]}/{digest[2:]}" not in committed and (reason := why(out, config)):
            found.setdefault(reason, []).append(f"{pointer}")
    return [f"{', '.join(dict.fromkeys(pointers))}: {reason}" for reason, pointers in found.items()]


def why(out: dict[str, Any], config: dict[str, str]) -> str | None:
    """What keeps others from getting an output; None where a remote may hold it."""
    name = out.get("remote") or config.get("core.remote")
    if out.get("remote") and out.get("push") is False:
        return (
            f"nobody else can get this data: `push: false` keeps it out of the remote '{name}'; delete the lines "
            f"`remote:` and `push:` there, {CURE}"
        )
    if name is None:
        return f"nobody else can get this data: no DVC remote is set; {CURE}"
    url = config.get(f"remote.{name}.url", "")
    if "://" not in url and Path(url).is_relative_to(Path().resolve()):
        return f"nobody else can get this data: the remote '{name}' is a folder of this clone; {CURE}"
    return None


def tracked() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each .dvc file below the current folder, and each output of it; not of those that import from elsewhere."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.dvc") or b""
    for name in filter(None, listed.decode().split("\0")):
        content: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # gate and DVC name a file that is damaged or deleted
            content = read_yaml(Path(name))
        if not content.get("deps"):
            yield from ((Path(name), out) for out in content.get("outs") or [] if isinstance(out, dict))


def dvc_config() -> dict[str, str] | None:
    """Every setting of DVC's, such as ``core.remote``; None where this is no project of DVC's."""
    done = subprocess.run([sys.executable, "-m", "dvc", "config", "--list"], capture_output=True, text=True)
    if done.returncode:
        return None
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
