"""What was found in pictures, by content, so that a second run looks at what is new alone.

One line of CRC-32 and JSON each in <state>/store/KIND-DIGEST.jsonl, added as soon as it is known: a killed run loses
nothing, and several may write at once. Damaged and torn lines are left out, and their pictures looked at again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import PIL

from lora_dag.core.files import from_json, sha256_file, sha256_json, state_dir, write_text
from lora_dag.pictures import pictures

MAX_REMEMBERED = 20_000  # lines of other runs that are kept; 1.3 KB each


class Memory:
    """JSON keys and values; safe to share between threads; closed at the end of ``with``.

    The source of ``core/pictures.py``, which finds them, and Pillow's version name the file.
    """

    def __init__(self, kind: str) -> None:
        version = sha256_json([sha256_file(Path(pictures.__file__)), PIL.__version__])[:12]
        self.path = state_dir() / "store" / f"{kind}-{version}.jsonl"
        self._older = f"{kind}-*.jsonl"
        self._known: dict[str, Any] = {}
        """JSON of a key -> its value, the latest last."""
        self._used: set[str] = set()
        self._file: int | None = None
        self._lock = threading.Lock()
        with contextlib.suppress(FileNotFoundError):
            self._known = dict(parsed(self.path))

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def find(self, key: Any) -> Any:
        """The value, or None."""
        text = json.dumps(key, sort_keys=True)
        self._used.add(text)
        return self._known.get(text)

    def add(self, key: Any, value: Any) -> None:
        text = json.dumps(key, sort_keys=True)
        with self._lock:
            self._used.add(text)
            self._known[text] = value
            if self._file is None:
                self._file = opened(self.path)
            os.write(self._file, line_of(text, value).encode())  # one write, appended whole

    def close(self) -> None:
        """If anything was added: forget what too old runs found, and what other versions of the code did."""
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        others = [key for key in self._known if key not in self._used]
        if len(others) > MAX_REMEMBERED:
            kept = [*others[-MAX_REMEMBERED:], *(key for key in self._known if key in self._used)]
            write_text(self.path, "".join(line_of(key, self._known[key]) for key in kept))
        for path in self.path.parent.glob(self._older):
            if path != self.path:
                path.unlink(missing_ok=True)


def opened(path: Path) -> int:
    """Descriptor of a file to append lines to, the first of them to a whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def line_of(key: str, value: Any) -> str:
    """``key`` is JSON already."""
    text = f"[{key}, {json.dumps(value)}]"
    return f"{crc32(text.encode()):08x} {text}\n"


def parsed(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON of the key, and the value, of each undamaged line."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        crc, _, text = line.partition(" ")
        with contextlib.suppress(TypeError, ValueError):
            if int(crc, 16) == crc32(text.encode()):
                key, value = from_json(text)
                yield json.dumps(key, sort_keys=True), value
