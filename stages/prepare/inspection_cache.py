"""Cache of inspection results by image content, so that a second run inspects only new images.

An SQLite file in <state>/store. Several processes may use it at once, and a kill loses nothing that was added. The
cache is optional: a damaged file is set aside and replaced, and if the disk is read-only or has no locks, images are
inspected again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import PIL

from lora_dag.core.console import warn
from lora_dag.core.files import sha256_file, sha256_json, state_dir
from lora_dag.images import checks

T = TypeVar("T")

MAX_OTHERS = 20_000
"""Unused values that stay in the file, the latest ones, about 1.3 KB each."""
LOCK_SECONDS = 10.0
"""Longest wait for another process that writes."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
TABLE = "CREATE TABLE IF NOT EXISTS found (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key))"
OTHERS = """DELETE FROM found WHERE rowid IN (
    SELECT rowid FROM found WHERE kind = ? AND key NOT IN (SELECT key FROM temp.used)
    ORDER BY rowid DESC LIMIT -1 OFFSET ?)"""


class InspectionCache:
    """A cache of JSON values by JSON keys, of one kind. Threads may share it. ``with`` closes it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.path = state_dir() / "store" / f"inspected-{code_version()}.sqlite"
        self._used: set[str] = set()
        self._added = False
        self._is_off = False
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> InspectionCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def find(self, key: Any) -> Any:
        """Return the value of a key, or None."""
        text = json.dumps(key, sort_keys=True)
        self._used.add(text)
        if self._database is None and not self.path.exists():
            return None
        row = self._attempt(
            lambda database: database.execute(
                "SELECT value FROM found WHERE kind = ? AND key = ?", (self.kind, text)
            ).fetchone()
        )
        return json.loads(row[0]) if row else None

    def add(self, key: Any, value: Any) -> None:
        row = (self.kind, json.dumps(key, sort_keys=True), json.dumps(value))
        self._used.add(row[1])
        self._added = True
        self._attempt(lambda database: database.execute("INSERT OR REPLACE INTO found VALUES (?, ?, ?)", row))

    def close(self) -> None:
        """Close the file. If values were added, first delete old unused ones and the files of other code versions."""
        if self._added:
            self._attempt(self._forget)
        self._disconnect()

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _forget(self, database: sqlite3.Connection) -> None:
        database.execute("CREATE TEMP TABLE used (key TEXT PRIMARY KEY)")
        database.execute("BEGIN")
        database.executemany("INSERT INTO temp.used VALUES (?)", ((key,) for key in self._used))
        database.execute(OTHERS, (self.kind, MAX_OTHERS))
        database.execute("COMMIT")
        for path in self.path.parent.glob("inspected-*.sqlite*"):
            if not path.name.startswith(self.path.name):
                path.unlink(missing_ok=True)

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Return the result of ``work``, or None if the cache cannot be used."""
        with self._lock:
            if self._is_off:
                return None
            try:
                if self._database is None:
                    self._database = open_database(self.path)
                return work(self._database)
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                self._set_aside_or_stop(error)
                return None

    def _set_aside_or_stop(self, error: Exception) -> None:
        if getattr(error, "sqlite_errorcode", None) in DAMAGED:
            warn("cache-damaged", f"{self.path}: the cache is damaged ({error}) and is replaced by an empty one.")
            self.path.replace(self.path.with_suffix(".sqlite-damaged"))
        else:
            warn("cache-unusable", f"{self.path}: {error}. Without this cache the next run inspects all images again.")
            self._is_off = True


def open_database(path: Path) -> sqlite3.Connection:
    """Open a database that commits each statement by itself.

    The rollback journal is SQLite's default: a write-ahead log needs shared memory, which network disks do not have.
    Writes do not wait for the disk: a power cut may damage the file, a kill cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))  # SQLite's default mode gives a group no write access
    database = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA synchronous = OFF")
    database.execute(TABLE)
    return database


def code_version() -> str:
    """Return a digest of the code that computes the values, ``lora_dag/images``, and of Pillow's version."""
    sources = sorted(Path(checks.__file__).parent.glob("*.py"))
    return sha256_json([[path.name, sha256_file(path)] for path in sources] + [PIL.__version__])[:12]
