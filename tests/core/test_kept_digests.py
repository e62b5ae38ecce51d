"""Digests of files: read once, and again after every change."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lora_dag.core import kept_digests
from lora_dag.core.kept_digests import sha256_files
from tests.helpers.reads import note_reads
from tests.helpers.single_files import checkpoint, lay_out
from tests.helpers.workspace import Workspace

HOUR = 3600 * 10**9


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that did not change for an hour."""
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / "state"))
    wait(monkeypatch, HOUR)
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    return path


def wait(monkeypatch: pytest.MonkeyPatch, nanoseconds: int) -> None:
    """Set the clock ahead of the files' times."""
    now = kept_digests.time.time_ns
    monkeypatch.setattr(kept_digests.time, "time_ns", lambda: now() + nanoseconds)


def sha256(path: Path) -> str:
    """The digest by another function, which never keeps it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = note_reads(monkeypatch)
    link = file.with_name("another name")
    link.symlink_to(file)
    assert sha256_files([file]) == {file: sha256(file)} == sha256_files([file])
    assert sha256_files([link]) == {link: sha256(file)}
    assert reads == [file]


def test_an_edit_in_place_of_the_same_size_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256_files([file])
    times = file.stat()
    with file.open("r+b") as content:
        content.write(b"S")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and `rsync -t` leave it
    reads = note_reads(monkeypatch)
    assert sha256_files([file]) == {file: sha256(file)} and reads == [file]


def test_the_digest_of_a_file_that_just_changed_is_not_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait(monkeypatch, -HOUR)
    reads = note_reads(monkeypatch)
    sha256_files([file])
    sha256_files([file])
    wait(monkeypatch, kept_digests.TICK)
    sha256_files([file])
    sha256_files([file])
    assert reads == [file, file, file]


def test_a_change_while_the_file_is_read_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(bar: object, count: int) -> None:
        if file.stat().st_size == 12:
            with file.open("ab") as content:
                content.write(b"!")

    monkeypatch.setattr(kept_digests.ByteBar, "add_bytes", grow)
    sha256_files([file])
    reads = note_reads(monkeypatch)
    assert sha256_files([file]) == {file: sha256(file)} and reads == [file]


def test_new_hard_links_to_a_read_only_file_change_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `dvc checkout` makes them with cache.type hardlink, each time `dvc exp run --temp` is started."""
    file.chmod(0o444)
    sha256_files([file])
    file.with_name("link").hardlink_to(file)
    reads = note_reads(monkeypatch)
    sha256_files([file, file.with_name("link")])
    assert reads == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"file": 1, "sha256": "0"}'])
def test_a_damaged_record_is_written_again(file: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    sha256_files([file])
    kept_digests.record(file.stat()).write_text(content)
    reads = note_reads(monkeypatch)
    assert sha256_files([file]) == {file: sha256(file)} == sha256_files([file])
    assert reads == [file]


def test_a_state_directory_that_cannot_be_written_costs_only_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(file))
    reads = note_reads(monkeypatch)
    assert sha256_files([file]) == {file: sha256(file)} == sha256_files([file])
    assert reads == [file, file]


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_the_stages_read_each_weight_file_of_a_base_once(
    workspace: Workspace, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    wait(monkeypatch, HOUR)
    words = []
    if layout == "single file":
        lay_out(Path("data/mine"), tiny_base, checkpoint(tiny_base))
        words = ["--set", "model.pretrained=data/mine"]
    reads = note_reads(monkeypatch)
    workspace.run("prepare")
    for stage in ("cache_latents", "train", "validate", "export"):
        workspace.run(stage, *words)
    weights = [path.resolve() for path in reads if path.suffix == ".safetensors"]
    assert len(weights) == len(set(weights)) and len(weights) >= 3
