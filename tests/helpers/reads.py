"""A record of the files that are read for their digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dag.core import kept_digests


def note_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which every file is added that is read for its digest."""
    read, reads = kept_digests.read_digest, list[Path]()

    def note(path: Path, bar: kept_digests.ByteBar) -> str:
        reads.append(path)
        return read(path, bar)

    monkeypatch.setattr(kept_digests, "read_digest", note)
    return reads
