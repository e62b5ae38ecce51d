"""The first line of each stage: which of the six it is, and why it runs, such as ``[3/6] train: lora.rank 8 -> 16``.

The reason is a comparison of settings, code and inputs with dvc.lock, which describes the last run until a stage ends.
It takes some milliseconds: data is compared by the digests that DVC has written, and never read.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.clone import PROJECT
from lora_dag.core.console import PATHS, log, plural
from lora_dag.core.labels import shorten

if TYPE_CHECKING:
    from lora_dag.core.params import Config

STAGES = ("prepare", "cache_latents", "train", "validate", "export", "report")
OUTPUT = {"prepare": "prepared", "cache_latents": "latents", "train": "adapter", "export": "export"}
"""Stage -> the artifact that it writes, by its name in ``console.PATHS``; reports for the other stages."""
CODE = ("lora_dag/", "stages/")
BLOCK = re.compile(r"^  (\w+):\n((?:    .*\n|\n)*)", re.MULTILINE)
"""One stage of dvc.lock: reading the whole file as YAML would take most of the time."""
DIGEST = re.compile(r"- path: (\S+)\n(?: +(?!md5)\w+: .*\n)* +md5: (\S+)")
MAX_REASONS = 3  # shown; the others are counted
MAX_VALUE = 40  # characters of a value
SMALL_FILE = 2**20  # bytes of a file that is hashed
MAX_FILES = 20_000  # of a folder whose files are counted


def log_stage_start(stage: str, config: Config, args: argparse.Namespace) -> None:
    """Log the first line of a stage; without a reason, where none is known. Raises nothing."""
    text = ""
    with contextlib.suppress(Exception):  # a line of the log must not end the stage
        text = describe(stage, config, args)
    log.info("[%d/%d] %s%s", STAGES.index(stage) + 1, len(STAGES), stage, f": {text}" if text else "")


def describe(stage: str, config: Config, args: argparse.Namespace) -> str:
    """Return why DVC runs the stage; in a sweep, where Snakemake prints its own reasons, return the output folder."""
    folders = {name: path for name, path in vars(args).items() if name in PATHS}
    if any(path != Path(PATHS[name]) for name, path in folders.items()):
        return f"writes {folders[OUTPUT.get(stage, 'reports')]}"
    if not Path("dvc.yaml").exists():
        return ""
    found = list(reasons(stage, config.tree))
    left = len(found) - MAX_REASONS
    return "; ".join(found[:MAX_REASONS]) + (f"; {plural(left, 'more change')}" if left > 0 else "")


def reasons(stage: str, tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs from the stage's last run, by the dvc.lock in the current folder.

    Args:
        tree: params.yaml, with overrides applied.
    """
    lock = Path("dvc.lock")
    stages = dict(BLOCK.findall(lock.read_text(encoding="utf-8"))) if lock.exists() else {}
    if stage not in stages:
        yield "first run"
        return
    from ruamel.yaml import YAML

    last = YAML(typ="safe", pure=True).load(stages[stage])
    recorded = last.get("params", {})
    yield from changed_settings(recorded.get("params.yaml", {}), tree)
    deps = {dep["path"].removeprefix(PROJECT): dep for dep in last.get("deps", [])}
    code = [path for path in deps if path.startswith(CODE)]
    if changed := [path for path in code if digest(Path(path)) != deps[path]["md5"]]:
        changed.sort(key=lambda path: path != f"stages/{stage}")
        more = f" and {len(changed) - MAX_REASONS} more" if len(changed) > MAX_REASONS else ""
        yield f"code changed: {', '.join(changed[:MAX_REASONS])}{more}"
    written = {path: md5 for text in stages.values() for path, md5 in DIGEST.findall(text.partition("    outs:\n")[2])}
    for path in deps.keys() - set(code):
        yield from changed_input(path, deps[path], written)


def changed_settings(recorded: Mapping[str, Any], tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``lora.rank 8 -> 16`` for each setting that differs from the recorded sections and keys."""
    for name, then in recorded.items():
        now: Any = tree
        for part in name.split("."):
            now = now.get(part) if isinstance(now, Mapping) else None
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            yield from (
                f"{name}.{key} {shown(then.get(key))} -> {shown(now.get(key))}"
                for key in dict(then) | dict(now)
                if then.get(key) != now.get(key)
            )
        elif then != now:
            yield f"{name} {shown(then)} -> {shown(now)}"


def shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    return shorten(text, MAX_VALUE)


def changed_input(path: str, last: Mapping[str, Any], written: Mapping[str, str]) -> Iterator[str]:
    """Yield that an input is new, where DVC's own records or a small file show it.

    Args:
        last: the dependency in dvc.lock.
        written: output -> md5 of the last run of the stage that wrote it.
    """
    pointer, here = Path(f"{path}.dvc"), Path(path)
    if here.is_file() and here.stat().st_size <= SMALL_FILE:
        now = digest(here)
    elif path in written:
        now = written[path]
    else:
        tracked = re.search(r"md5: (\S+)", pointer.read_text(encoding="utf-8")) if pointer.exists() else None
        now = tracked[1] if tracked else last["md5"]
    if now != last["md5"]:
        yield f"{path} changed"
    elif here.is_dir() and path not in written and last.get("nfiles", MAX_FILES) < MAX_FILES:
        count = count_files(here)
        if count != last["nfiles"]:
            yield f"{path} has {count:,} files, {last['nfiles']:,} before"


def count_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def digest(path: Path) -> str:
    """Return the md5 that DVC gives a file, or a folder of code."""
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    names = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    own = {
        name.as_posix(): file
        for name, file in names.items()
        if "__pycache__" not in name.parts and not any(part.startswith(".") for part in name.parts)
    }
    entries = [{"md5": digest(own[name]), "relpath": name} for name in sorted(own)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"
