from __future__ import annotations

import errno
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_dag.core import files
from lora_dag.core.console import UserError
from tests.conftest import REPOSITORY, Workspace


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
        files.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
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


def test_safetensors_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    # The library hashes metadata keys with a new seed at each call, so a few calls show an unsorted header.
    for number, order in enumerate(["abcdef", "fedcba"] * 4):
        tensors = {name: torch.full((3,), float(ord(name))) for name in order}
        files.save_tensors(tmp_path / str(number), tensors, {name: name * 2 for name in order})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert torch.equal(files.load_tensors(tmp_path / "0")["c"], torch.full((3,), 99.0))


def test_metadata_is_readable_by_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.arange(5)[::2]}
    files.save_tensors(tmp_path / "x", tensors, {"z": "größer", "a": "1"})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"z": "größer", "a": "1"}
        assert torch.equal(file.get_tensor("a"), tensors["a"])
        assert torch.equal(file.get_tensor("b"), tensors["b"])


def test_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_dag.core.files import lock\n"
        "with lock(Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError) as caught, files.lock(tmp_path):
            pass
        assert caught.value.problems == (
            f"{tmp_path}: process {holder.pid} is at work on this run; wait for it, or stop it: kill {holder.pid}",
        )
    finally:
        holder.kill()
        holder.wait()
    with files.lock(tmp_path):  # the kernel has freed it
        assert files.last_holder(tmp_path) == (str(os.getpid()), platform.node())
        (tmp_path / "lock").write_text("7 node-b")  # as a shared disk shows one of another machine
        message = "process 7 on node-b is at work on this run; wait for it, or stop it there: kill 7$"
        with pytest.raises(UserError, match=message), files.lock(tmp_path):
            pass


def test_a_disk_without_locks_gives_them_to_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.lock(tmp_path):
        files.require_held(tmp_path)
        with files.lock(tmp_path, wait=True):
            files.require_held(tmp_path)


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
    assert (done.returncode, done.stderr) == (
        2,
        "error: reports/dataset: Not a directory; remove or rename what stands in the place of a folder\n",
    )
    assert Path("reports").read_text() == "mine"


@pytest.mark.parametrize("blob", [b"", b"{", b"\xff", b"[" * 100_000])
def test_json_that_was_damaged_is_one_line(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(blob)
    with pytest.raises(UserError, match="x.json: damaged, no JSON"):
        files.read_json(path)
