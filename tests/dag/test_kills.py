"""Trainings killed under DVC and Snakemake resume as docs/troubleshooting.md says, and end in the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_dag.core.locks import last_holder
from tests.helpers.checkout import Checkout
from tests.helpers.errors import assert_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 300
EVERY = 10  # steps from checkpoint to checkpoint


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Checkout:
    """Encoded and committed; only what trains is left to do."""
    made = Checkout(tmp_path_factory.mktemp("kills") / "checkout", tiny_base)
    made.set(train__num_steps=STEPS, train__checkpoint_every_n_steps=EVERY, train__snapshot_every_n_steps=100)
    made.dvc("repro", "cache_latents")
    made.commit("encoded")
    return made


def undisturbed(checkout: Checkout, *changes: str) -> str:
    """sha256 of the adapter of a training by itself, with a state directory of its own."""
    words = [word for change in changes for word in ("--set", change)]
    command = (sys.executable, "-m", "stages.train", *words, "--adapter", "logs/whole", "--train-reports", "logs/r")
    environment = checkout.environment | {"LORA_STATE_DIR": str(checkout.path / "logs/state")}
    subprocess.run(command, cwd=checkout.path, env=environment, check=True, capture_output=True, timeout=300)
    return checkout.adapter("logs/whole")


@contextmanager
def started(checkout: Checkout, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """In a process group of its own, as a terminal starts it; on until two checkpoints are written."""
    before = set(checkpoints(checkout))
    command = [sys.executable, "-m", *words]
    with (checkout.path / "logs/started.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=checkout.path, env=checkout.environment, stdout=log, stderr=log, start_new_session=True
        )
    wait_for(lambda: len(set(checkpoints(checkout)) - before) >= 2)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def checkpoints(checkout: Checkout) -> list[Path]:
    return list((checkout.path / ".state/runs").glob("*/checkpoints/step-*.sha256"))


def wait_for(condition: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newest(checkout: Checkout) -> int:
    """Step of the newest checkpoint."""
    return max(int(path.stem[5:]) for path in checkpoints(checkout))


def trainers(checkout: Checkout) -> list[int]:
    """Process ids of the trainings that are at work for this checkout."""
    holders = [last_holder(path.parent)[0] for path in (checkout.path / ".state/runs").glob("*/lock")]
    return [int(pid) for pid in holders if pid.isdigit() and is_alive(int(pid))]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return pid > 0 and status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def resumed(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"^resumed from step (\d+)$", output, re.MULTILINE)]


def refused(checkout: Checkout, *words: str) -> str:
    """Return the output of a command that must fail."""
    done = checkout.run(sys.executable, "-m", *words, check=False)
    assert done.returncode and "Traceback" not in done.stderr
    return done.stdout + done.stderr


def assert_refused(checkout: Checkout, pid: int, *words: str) -> None:
    """While the orphan holds its run (here it is halted), the newcomer names it and how to end it."""
    os.kill(pid, signal.SIGSTOP)
    output = refused(checkout, *words)
    os.kill(pid, signal.SIGCONT)
    assert_line(output, "folder-locked", f"process {pid} ", f"`kill {pid}`")


def stop(checkout: Checkout, pid: int) -> int:
    """``kill PID`` as in docs/troubleshooting.md; the step that it stopped after."""
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not is_alive(pid))
    return newest(checkout)


# DVC


def test_killed_under_dvc_repro(checkout: Checkout) -> None:
    """All of it; then DVC alone, which leaves an orphan."""
    expected = undisturbed(checkout)
    with started(checkout, "dvc", "repro") as process:
        os.killpg(process.pid, signal.SIGKILL)
    reached = newest(checkout)
    with started(checkout, "dvc", "repro") as process:
        process.kill()
    assert resumed((checkout.path / "logs/started.log").read_text()) == [reached]
    (orphan,) = trainers(checkout)
    assert_refused(checkout, orphan, "dvc", "repro", "train")
    reached = stop(checkout, orphan)
    assert resumed(checkout.dvc("repro", "train")) == [reached]
    assert checkout.adapter() == expected
    checkout.commit("trained")


def test_killed_in_a_temporary_experiment(checkout: Checkout) -> None:
    command = ("dvc", "exp", "run", "--temp", "--name", "temporary", "-S", "train.seed=1")
    expected = undisturbed(checkout, "train.seed=1")
    with started(checkout, *command) as process:
        os.killpg(process.pid, signal.SIGKILL)
    reached = newest(checkout)
    with started(checkout, *command) as process:
        process.kill()
    (orphan,) = trainers(checkout)
    assert_refused(checkout, orphan, *command)
    assert stop(checkout, orphan) > reached
    reached = newest(checkout)
    assert resumed(checkout.dvc(*command[1:])) == [reached]
    assert checkout.adapter_of("temporary") == expected


def test_an_orphan_that_came_to_its_end_cost_nothing(checkout: Checkout) -> None:
    command = ("dvc", "exp", "run", "--temp", "--name", "ended", "-S", "train.seed=2")
    expected = undisturbed(checkout, "train.seed=2")
    with started(checkout, *command) as process:
        process.kill()
    (orphan,) = trainers(checkout)
    wait_for(lambda: not is_alive(orphan))
    assert resumed(checkout.dvc(*command[1:])) == [STEPS]
    assert checkout.adapter_of("ended") == expected
    assert not checkpoints(checkout)  # of a cosine schedule: taken, and dropped


@pytest.mark.parametrize("orphaned", [False, True])
def test_killed_in_the_queue(checkout: Checkout, orphaned: bool) -> None:
    """The worker's whole group dies, or all of it but the training."""
    seed = f"train.seed={3 + orphaned}"
    queued = ("exp", "run", "--queue", "--name", f"queued-{orphaned}", "-S", seed)
    expected = undisturbed(checkout, seed)
    checkout.dvc(*queued)
    with started(checkout, "dvc", "queue", "start"):
        pass  # it ends by itself, and its worker goes on
    (training,) = trainers(checkout)
    group = [pid for pid in members(os.getpgid(training)) if not (orphaned and pid == training)]
    for pid in group:
        os.kill(pid, signal.SIGKILL)
    if orphaned:
        assert is_alive(training)
        stop(checkout, training)
    reached = newest(checkout)
    assert "Running" in checkout.dvc("queue", "status")  # for ever
    checkout.dvc("queue", "kill", queued[4])
    checkout.dvc("queue", "remove", queued[4])
    checkout.dvc(*queued)
    output = checkout.run(sys.executable, "-m", "dvc", "exp", "run", "--run-all", timeout=900).stdout
    assert resumed(output) == [reached]
    assert checkout.adapter_of(queued[4]) == expected


def members(group: int) -> list[int]:
    listed = subprocess.run(["ps", "-e", "-o", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in (line.split() for line in listed.splitlines()) if int(of) == group]


# Snakemake


def test_killed_under_snakemake(checkout: Checkout) -> None:
    """All of it; then Snakemake alone, which leaves a shell and the training; the lock is to be lifted by hand."""
    expected = undisturbed(checkout)
    log = checkout.path / "runs/raw/default-s0/logs/train.log"
    command = ("snakemake", "--cores", "1", "runs/raw/default-s0/adapter/adapter.json")
    with started(checkout, *command) as process:
        os.killpg(process.pid, signal.SIGKILL)
    reached = newest(checkout)
    assert "--unlock" in refused(checkout, *command)
    checkout.snakemake("--unlock")
    with started(checkout, *command) as process:
        process.kill()
    assert resumed(log.read_text()) == [reached]
    (orphan,) = trainers(checkout)
    checkout.snakemake("--unlock")
    assert_refused(checkout, orphan, *command)
    reached = stop(checkout, orphan)
    checkout.snakemake(*command[3:])
    assert resumed(log.read_text()) == [reached]
    assert checkout.adapter("runs/raw/default-s0/adapter") == expected
