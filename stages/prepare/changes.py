"""What changed in the dataset since the version that git holds: changes.md and changes.png beside pictures.csv.

Neither git nor DVC tracks the two: they are no function of the stage's inputs, but of what was committed before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lora_dag.artifacts import picture_table
from lora_dag.artifacts.manifest import Item, Manifest, View, natural_key
from lora_dag.core.console import log
from lora_dag.core.files import sha256_file, write_text
from lora_dag.pages import thumbnails
from lora_dag.pages.dataset_changes import Changes, compare_tables
from lora_dag.pages.sheets import save_png
from lora_dag.pictures.pictures import load_view
from lora_dag.pipeline.git import git

MAX_THUMBNAILS = 2000  # pictures of one version that are kept small: the first ones by content, some 4 MB
GIT_SECONDS = 20
DIGITS = 12  # of a table's SHA-256


def report(manifest: Manifest, read: Callable[[str], bytes], folder: Path) -> None:
    """Say, list and draw what changed since the committed ``folder``/pictures.csv, and keep this version's thumbnails.

    A convenience beside the stage's outputs: whatever goes wrong here is said, and the stage goes on.
    """
    try:
        table = folder / "pictures.csv"
        committed = committed_table(table)
        changes = Changes()
        if committed is not None:
            changes = compare_tables(picture_table.parse(committed.decode("utf-8")), picture_table.load(table))
        keep_thumbnails(wanted(manifest.items, changes), manifest, read)
        log.info("changes     %s", write(changes, committed, folder))
    except Exception as error:
        log.warning("warning: what changed in the dataset is not shown (%s: %s)", type(error).__name__, error)


def committed_table(table: Path) -> bytes | None:
    """None where git holds no earlier version."""
    return git("show", f"HEAD:./{Path(os.path.relpath(table)).as_posix()}", timeout=GIT_SECONDS)


def write(changes: Changes, committed: bytes | None, folder: Path) -> str:
    """Both files, or neither where there is nothing to show; returns what to say."""
    page, drawn = folder / "changes.md", folder / "changes.png"
    drawn.unlink(missing_ok=True)
    if not changes or committed is None:
        page.unlink(missing_ok=True)
        return "none since the committed version" if committed else "not shown: git holds no earlier pictures.csv"
    image = thumbnails.changes_sheet(changes)
    if image:
        save_png(drawn, image, thumbnails.SHEET_MAX_BYTES)
    commit = (git("rev-parse", "--short", "HEAD", timeout=GIT_SECONDS) or b"").decode().strip()
    sections = [
        "# What changed in the dataset",
        f"Since commit `{commit}`: {changes.summary()}.",
        compared(committed, folder / "pictures.csv"),
        *(["![Thumbnails](changes.png)"] if image else []),
        changes.markdown(),
    ]
    write_text(page, "\n\n".join(sections) + "\n")
    return f"{changes.summary()} since the committed version; {page}"


def compared(committed: bytes, table: Path) -> str:
    """Which tables the page is of: it stays behind when another version's outputs are taken from a cache."""
    old, new = hashlib.sha256(committed).hexdigest()[:DIGITS], sha256_file(table)[:DIGITS]
    return (
        f"`{table.name}` was `{old}` and is `{new}`, the first digits of its SHA-256: where `sha256sum"
        f" {table.as_posix()}` says others, this page is of another version; `python -m stages.prepare` writes it anew."
    )


def wanted(items: list[Item], changes: Changes) -> list[Item]:
    """Pictures whose thumbnails this version needs now, or a later one as its past."""
    named = {sha256 for _, cells in thumbnails.shown(changes) for sha256, _ in cells}
    by_content = {item.sha256: item for item in sorted(items, key=lambda item: (item.sha256, item.file_name))}
    first = list(by_content)[:MAX_THUMBNAILS]
    return [by_content[sha256] for sha256 in dict.fromkeys([*first, *sorted(named & by_content.keys())])]


def keep_thumbnails(items: list[Item], manifest: Manifest, read: Callable[[str], bytes]) -> None:
    """Make those that the store lacks."""

    def make(item: Item) -> None:
        width, height = thumbnails.size_of(item.source_width, item.source_height)
        whole = View((0, 0, item.source_width, item.source_height), flip=False)
        small = replace(item, width=width, height=height)
        thumbnails.save(item.sha256, load_view(read(item.file_name), small, whole, manifest.preprocessing))

    missing = [item for item in items if not thumbnails.path_of(item.sha256).exists()]
    missing.sort(key=lambda item: natural_key(item.file_name))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in tqdm(pool.map(make, missing), desc="thumbnails", total=len(missing), disable=None, leave=False):
            pass
