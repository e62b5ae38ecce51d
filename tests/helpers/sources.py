"""Helpers for tests of sources: dataset params, small images, Parquet and .tar files, problems of a listing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lora_dag.core import params
from lora_dag.core.console import Problem, UserError
from stages.prepare.listing import Listing
from stages.prepare.params import DatasetParams
from stages.prepare.sources import list_entries
from tests.helpers.workspace import REPOSITORY, make_image

DEFAULTS = params.load(REPOSITORY / "params.yaml").section(DatasetParams).model_dump()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    return Path("data/raw")


def listed(source: Path | str, **changes: Any) -> Listing:
    """The entries of a source, under the repository's params.yaml with these changes."""
    return list_entries(DatasetParams.model_validate(DEFAULTS | {"source": str(source)} | changes))


def refusal(source: Path | str, **changes: Any) -> Problem:
    """Return the only problem that a source is refused with."""
    with pytest.raises(UserError) as caught:
        listed(source, **changes)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def problems(source: Path | str, **changes: Any) -> list[Problem]:
    return [problem.problem for problem in listed(source, **changes).problems]


def captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {entry.file_name: entry.captions for entry in listing.entries}


def splits(listing: Listing) -> dict[str, str | None]:
    return {entry.file_name: entry.split for entry in listing.entries}


def png(index: int = 0) -> bytes:
    buffer = io.BytesIO()
    make_image(index, 8).save(buffer, format="PNG")
    return buffer.getvalue()


def write_files(folder: Path, *names: str, **texts: str) -> Path:
    """Empty files, and with keywords .txt files (``a="cat"`` is a.txt): a listing opens no image."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def write_tar(path: Path, members: dict[str, bytes | str], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            blob = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def embedded(count: int) -> list[dict[str, Any]]:
    """Images as ``datasets`` embeds them."""
    return [{"bytes": png(index), "path": f"{index}.png"} for index in range(count)]
