"""DVC's queue as in docs/experiments.md: parallel workers on one state directory, and a worker that was killed."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.checkout import Checkout
from tests.helpers.trainings import process_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SETTINGS = [
    "dataset.source=data/other",
    "train.num_steps=300",
    "train.checkpoint_every_n_steps=10",
    "train.snapshot_every_n_steps=100",
]
KILLED, OTHER = "rank-3", "rank-4"


def queue(checkout: Checkout, name: str) -> None:
    settings = [f"lora.rank={name[5:]}", *SETTINGS]
    words = [word for setting in settings for word in ("--set-param", setting)]
    checkout.dvc("exp", "run", "--queue", "--name", name, *words)


@pytest.fixture
def queued(reproduced: Checkout) -> Iterator[Checkout]:
    queue(reproduced, KILLED)
    queue(reproduced, OTHER)
    yield reproduced
    reproduced.run("dvc", "queue", "stop", "--kill", check=False)
    reproduced.run("dvc", "queue", "remove", "--all", check=False)


def test_parallel_workers_share_the_state_and_a_killed_one_is_recovered(queued: Checkout, tmp_path: Path) -> None:
    """Both encode the same new images at once; one dies with all that it started, as when memory runs out."""
    start_workers(queued)
    wait(lambda: step(queued, KILLED) > 25 and "Running" in status(queued)[OTHER])
    for process in family(KILLED):
        os.kill(process, signal.SIGKILL)
    time.sleep(1)
    assert status(queued)[KILLED] == "Running"  # DVC does not notice by itself

    queued.dvc("queue", "kill", KILLED)
    assert status(queued)[KILLED] == "Failed"
    queued.dvc("queue", "remove", KILLED)
    queue(queued, KILLED)
    start_workers(queued)
    wait(lambda: status(queued) == {KILLED: "Success", OTHER: "Success"})

    resumed = re.findall(r"^resumed from step (\d+)", queued.dvc("queue", "logs", KILLED), re.MULTILINE)
    assert resumed and int(resumed[0]) >= 20
    for name in (KILLED, OTHER):
        assert queued.adapter_of(name) == undisturbed(queued, name, tmp_path)
    assert queued.git("status", "--porcelain") == ""


def test_repro_temp_queue_and_snakemake_train_the_same_bytes(reproduced: Checkout) -> None:
    """One setting, trained anew each time: what the ways before have left is deleted."""
    change = ("--set-param", "lora.rank=5", "train")
    found = {}

    def trained(way: str, output: str, adapter: str) -> None:
        assert re.search(r"^step +4\b", output, re.MULTILINE) and "resumed" not in output, output
        found[way] = adapter
        reproduced.run("rm", "-rf", ".state/runs", ".dvc/cache/runs")

    output = reproduced.dvc("exp", "run", "--temp", "--name", "temp", *change)
    trained("temp", output, reproduced.adapter_of("temp"))
    reproduced.dvc("exp", "run", "--queue", "--name", "queued", *change)
    start_workers(reproduced)
    wait(lambda: status(reproduced) == {"queued": "Success"})
    trained("queue", reproduced.dvc("queue", "logs", "queued"), reproduced.adapter_of("queued"))
    run = "runs/raw/rank-5-s0"
    reproduced.snakemake(f"{run}/adapter/adapter.json", "--config", "grid={lora.rank: [5]}")
    trained("snakemake", (reproduced.path / run / "logs/train.log").read_text(), reproduced.adapter(f"{run}/adapter"))
    reproduced.set(lora__rank=5)
    trained("repro", reproduced.dvc("repro", "train"), reproduced.adapter())
    assert len(set(found.values())) == 1, found


def start_workers(checkout: Checkout) -> None:
    checkout.run("sh", "-c", "dvc queue start --jobs 2 > start.log 2>&1")  # they hold on to what they print to
    (checkout.path / "start.log").unlink()


def status(checkout: Checkout) -> dict[str, str]:
    """Name -> status of each task."""
    output = checkout.dvc("queue", "status")
    return dict(re.findall(r"^[0-9a-f]{7}\s+(\S+)\s.*\s(\w+)\s*$", output, re.MULTILINE))


def step(checkout: Checkout, name: str) -> int:
    """The last that the task's training has logged."""
    output = checkout.run("dvc", "queue", "logs", name, check=False).stdout
    return max([0, *map(int, re.findall(r"^step +(\d+)", output, re.MULTILINE))])


def family(name: str) -> list[int]:
    """The worker of an experiment, what runs it, and its training."""
    training = process_with(f"DVC_EXP_NAME={name}")
    return [parent(parent(training)), parent(training), training]


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def made(checkout: Checkout, name: str, path: str, folder: Path) -> Path:
    """An output of an experiment, brought into a folder."""
    target = folder / name / path
    target.parent.mkdir(parents=True, exist_ok=True)
    checkout.dvc("get", ".", path, "--rev", name, "--out", str(target))
    return target


def undisturbed(checkout: Checkout, name: str, folder: Path) -> str:
    """sha256 of the adapter that the experiment's settings give without DVC and with a state directory of its own."""
    changes = [word for change in (f"lora.rank={name[5:]}", *SETTINGS) for word in ("--set", change)]
    places = ["--latents", str(made(checkout, name, "data/latents", folder))]
    places += ["--adapter", str(folder / name / "whole"), "--train-reports", str(folder / name / "reports")]
    checkout.run("env", f"LORA_STATE_DIR={folder}", sys.executable, "-m", "stages.train", *changes, *places)
    return checkout.adapter(str(folder / name / "whole"))


def wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not done():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(1)
