from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dag.core import locks
from tests.helpers.errors import refused
from tests.helpers.workspace import REPOSITORY


def test_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_dag.core.locks import lock\n"
        "with lock(Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        values = (f"{tmp_path}: process {holder.pid} ", f"`kill {holder.pid}`.")
        with refused("folder-locked", *values), locks.lock(tmp_path):
            pass
        (tmp_path / "lock").write_text("")  # the holder has not written its number yet
        with refused("folder-locked", f"{tmp_path}: another process ", "Wait for it.") as raised, locks.lock(tmp_path):
            pass
        assert "kill" not in raised.value.problems[0]
    finally:
        holder.kill()
        holder.wait()
    with locks.lock(tmp_path):  # the kernel has freed it
        assert locks.last_holder(tmp_path) == (str(os.getpid()), platform.node())
        (tmp_path / "lock").write_text("7 node-b")  # as a shared disk shows one of another machine
        with refused("folder-locked", "process 7 on node-b", "`kill 7` on node-b"), locks.lock(tmp_path):
            pass


def test_a_disk_without_locks_gives_them_to_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.lock(tmp_path):
        locks.require_held(tmp_path)
        with locks.lock(tmp_path, wait=True):
            locks.require_held(tmp_path)
