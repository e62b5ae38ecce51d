"""Deletes encoded images and captions that no run has used recently: the store is a cache.

In: the state directory's store, which several clones may share.
Out: a smaller store. data/latents does not change, and a run that needs a deleted entry encodes it again.
An entry counts as used when it is written and when cache_latents copies it into data/latents.
Run: ``lora-dag gc --older-than 30d``, ``lora-dag gc --max-size 20GB``, or both; ``--dry-run`` deletes nothing
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_dag.artifacts.store import Store
from lora_dag.core.console import Problem, UserError, log, plural

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    age, size = (
        "delete entries unused for this time, such as 12h, 30d or 8w",
        "delete the least recently used entries down to",
    )
    parser.add_argument("--older-than", type=seconds, metavar="AGE", help=age)
    parser.add_argument("--max-size", type=num_bytes, metavar="SIZE", help=f"{size} this size, such as 500MB or 20GB")
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, only print how much would be freed")


def seconds(text: str) -> float:
    return parse_amount(text, SECONDS, "30d")


def num_bytes(text: str) -> float:
    return parse_amount(text, BYTES, "20GB")


def parse_amount(text: str, units: dict[str, int], example: str) -> float:
    """Return a number with a unit in seconds or bytes.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(units)})", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"got '{text}', but a number and one of {', '.join(units)} is expected. Write {example}, for example"
        )
    return float(match[1]) * units[match[2]]


@dataclass(frozen=True)
class StoreFile:
    """A file of the store."""

    path: Path
    last_use: float
    """Seconds since the epoch."""
    size: int
    """Bytes."""

    @property
    def is_leftover(self) -> bool:
        """Return whether the file remains from a write that was killed."""
        return self.path.name.startswith(".")


def main(args: argparse.Namespace) -> None:
    store = Store()
    if not store.root.is_dir():
        log.info("%s: no such folder, so nothing to delete", store.root)
        return
    with store.exclusive():
        files = sorted(read_files(store), key=lambda file: (file.last_use, file.path))
        total, count = sum(file.size for file in files), plural(len(files), "entry", "entries")
        if args.older_than is None and args.max_size is None:
            raise UserError(
                Problem(
                    "gc-without-limit",
                    f"{store.root}: {total / 1e6:.1f} MB in {count}, and no limit is given. "
                    "Add --older-than 30d or --max-size 20GB.",
                )
            )
        deleted = list(files_to_delete(files, args.older_than, args.max_size))
        for file in deleted:
            if not args.dry_run:
                file.path.unlink()
    freed = "would free" if args.dry_run else "freed"
    size = sum(file.size for file in deleted)
    log.info("%s %.1f MB of %.1f MB: %d of %s", freed, size / 1e6, total / 1e6, len(deleted), count)


def read_files(store: Store) -> Iterator[StoreFile]:
    for _, path in store.entries():
        status = path.stat()
        yield StoreFile(path, status.st_mtime, status.st_size)


def files_to_delete(files: list[StoreFile], older_than: float | None, max_size: float | None) -> Iterator[StoreFile]:
    """Yield the files to delete.

    Args:
        files: sorted by last use, the oldest first.
        older_than: seconds since the last use.
        max_size: bytes of the store afterwards.
    """
    now, left = time.time(), sum(file.size for file in files)
    for file in files:
        is_old = older_than is not None and now - file.last_use > older_than
        is_too_much = max_size is not None and left > max_size
        if file.is_leftover or is_old or is_too_much:
            left -= file.size
            yield file
