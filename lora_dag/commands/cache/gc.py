"""Deletes encoded pictures and captions that no run has used for long: the store is a cache.

In: the state directory's store, which several clones may share.
Out: fewer entries in it. data/latents stays as it is, and a run that needs a deleted entry encodes it again.
An entry is used when it is written, and when a run of cache_latents puts it into data/latents.
Run: ``lora-dag gc --older-than 30d``, ``lora-dag gc --max-size 20GB``, or both; with ``--dry-run`` nothing is deleted
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_dag.artifacts.store import Store
from lora_dag.core.console import UserError, log, plural

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    age, size = "delete what was last used longer ago, such as 12h, 30d or 8w", "delete the least recently used down to"
    parser.add_argument("--older-than", type=seconds, metavar="AGE", help=age)
    parser.add_argument("--max-size", type=num_bytes, metavar="SIZE", help=f"{size} this size, such as 500MB or 20GB")
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, say how much it would be")


def seconds(text: str) -> float:
    return measure(text, SECONDS, "30d")


def num_bytes(text: str) -> float:
    return measure(text, BYTES, "20GB")


def measure(text: str, units: dict[str, int], example: str) -> float:
    """A number and its unit.

    Raises:
        argparse.ArgumentTypeError: it has another form.
    """
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(units)})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got '{text}'; expected a number and {', '.join(units)}, such as {example}")
    return float(found[1]) * units[found[2]]


@dataclass(frozen=True)
class File:
    path: Path
    last_use: float
    size: int

    @property
    def is_leftover(self) -> bool:
        """Of a write that was killed."""
        return self.path.name.startswith(".")


def main(args: argparse.Namespace) -> None:
    store = Store()
    if not store.root.is_dir():
        log.info("%s: no store, nothing to delete", store.root)
        return
    with store.alone():
        files = sorted(read_files(store), key=lambda file: (file.last_use, file.path))
        total, count = sum(file.size for file in files), plural(len(files), "entry", "entries")
        if args.older_than is None and args.max_size is None:
            raise UserError(
                f"{store.root}: {total / 1e6:.1f} MB in {count}; say what to delete: --older-than 30d, --max-size 20GB"
            )
        chosen = list(unused(files, args.older_than, args.max_size))
        for file in chosen:
            if not args.dry_run:
                file.path.unlink()
    freed = "would free" if args.dry_run else "freed"
    size = sum(file.size for file in chosen)
    log.info("%s %.1f MB of %.1f MB: %d of %s", freed, size / 1e6, total / 1e6, len(chosen), count)


def read_files(store: Store) -> Iterator[File]:
    for _, path in store.entries():
        status = path.stat()
        yield File(path, status.st_mtime, status.st_size)


def unused(files: list[File], older_than: float | None, max_size: float | None) -> Iterator[File]:
    """What to delete.

    Args:
        files: the least recently used first.
        older_than: seconds since the last use.
        max_size: bytes that may stay.
    """
    now, left = time.time(), sum(file.size for file in files)
    for file in files:
        is_old = older_than is not None and now - file.last_use > older_than
        is_too_much = max_size is not None and left > max_size
        if file.is_leftover or is_old or is_too_much:
            left -= file.size
            yield file
