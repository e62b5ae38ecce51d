from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from lora_dag.core import files, tensors
from tests.helpers.errors import assert_line, refused
from tests.helpers.workspace import Workspace


def test_atomic_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    files.write_text(path, "one")
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["x.txt"]


def test_atomic_shows_nothing_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with files.atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / "x.json", {})
        tensors.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_json_bytes_do_not_depend_on_key_order(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": 1, "ä": [1.5]})
    files.write_json(tmp_path / "b.json", {"ä": [1.5], "x": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert files.read_json(tmp_path / "a.json") == {"x": 1, "ä": [1.5]}
    assert files.sha256_json({"x": 1, "y": 2}) == files.sha256_json({"y": 2, "x": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "c.json", {"x": float("nan")})
    assert not (tmp_path / "c.json").exists()


def test_state_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_STATE_DIR", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert files.state_dir() == Path(".state")
    monkeypatch.setenv("DVC_ROOT", "/repository")
    assert files.state_dir() == Path("/repository/.state")
    monkeypatch.setenv("LORA_STATE_DIR", "/elsewhere")
    assert files.state_dir() == Path("/elsewhere")


def test_a_file_in_the_place_of_a_folder_is_one_line(workspace: Workspace) -> None:
    Path("reports").write_text("mine")
    done = workspace.process("prepare")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert_line(done.stderr, "path-occupied", "reports/dataset: Not a directory")
    assert Path("reports").read_text() == "mine"


@pytest.mark.parametrize("blob", [b"", b"{", b"\xff", b"[" * 100_000])
def test_json_that_was_damaged_is_one_line(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(blob)
    with refused("artifact-damaged", "x.json: ", "`dvc repro`"):
        files.read_json(path)
