"""A sweep on a real Slurm by profiles/slurm: what jobs ask for, trainings killed and put back in the queue."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from ruamel.yaml import YAML

from tests.helpers import slurm
from tests.helpers.checkout import Checkout
from tests.helpers.trainings import process_with
from tests.helpers.workspace import REPOSITORY

PROFILE = REPOSITORY / "profiles/slurm/config.v9+.yaml"
TRAINING = {
    "runtime__device": "auto",  # which asks for a GPU, and trains on the CPU where Slurm's is none
    "train__num_steps": 200,
    "train__checkpoint_every_n_steps": 10,
    "train__snapshot_every_n_steps": 100,
    "train__gradient_accumulation_steps": 2,
}
SOON = ("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2")


def test_profile_never_asks_the_accounting_database() -> None:
    """The plugin's own choice may be sacct, which hangs where no slurmdbd answers."""
    profile = YAML(typ="safe").load(PROFILE.read_text())
    assert profile["executor"] == "slurm"
    assert profile["slurm-status-command"] == "squeue"
    assert profile["slurm-requeue"] is True  # else a job that Slurm itself puts back counts as failed
    assert profile["retries"] >= 1


class Cluster:
    """A checkout beside a Slurm, and the output of Snakemake there."""

    def __init__(self, checkout: Checkout, slurm: slurm.Slurm) -> None:
        self.checkout, self.path, self.slurm = checkout, checkout.path, slurm
        self.environment = checkout.environment

    def snakemake(self, output: IO[bytes], *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm", *SOON, *words]
        return subprocess.Popen(command, cwd=self.path, env=self.environment, stdout=output, stderr=output)

    def job(self, words: str) -> str:
        """The number of the job with these words in its comment."""
        return next(number for number, comment in self.slurm.jobs().items() if words in comment)

    def asked(self) -> list[str]:
        """What each job asked for, the ended ones too."""
        return self.slurm.ask("scontrol", "--oneliner", "show", "job").splitlines()

    def log(self, run: str) -> str:
        path = self.path / "runs/raw" / run / "logs/train.log"
        return path.read_text() if path.exists() else ""

    def step(self, run: str) -> int:
        return max([0, *map(int, re.findall(r"^step +(\d+)", self.log(run), re.MULTILINE))])

    def undisturbed(self, *words: str) -> str:
        """sha256 of the adapter that ``stages.train`` makes here and now, without Slurm and without checkpoints."""
        places = ["--latents", "runs/raw/latents", "--adapter", "out/adapter", "--train-reports", "out/reports"]
        changes = [word for change in words for word in ("--set", change)]
        command = [sys.executable, "-m", "stages.train", *changes, *places]
        environment = self.checkout.environment | {"LORA_STATE_DIR": str(self.path / "out/state")}
        subprocess.run(command, cwd=self.path, env=environment, check=True, capture_output=True)
        return self.checkout.adapter("out/adapter")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Cluster]:
    if reason := slurm.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    checkout = Checkout(folder / "checkout", tiny_base)
    checkout.set(**TRAINING)
    (folder / "daemons").mkdir()
    with slurm.Slurm(folder / "daemons") as running:
        yield Cluster(checkout, running)
    assert all(process.poll() is not None for process in running.daemons)


@pytest.mark.timeout(1800)  # seven minutes on two busy cores, of which Slurm holds a requeued job back for two
@pytest.mark.slow
def test_a_killed_and_a_requeued_training_end_in_the_bytes_of_undisturbed_ones(cluster: Cluster) -> None:
    """SIGKILL to the process (as for want of memory), to the whole job, and what Slurm does for a preempted one."""
    began = time.monotonic()
    ways: dict[str, Callable[[str], object]] = {
        "rank-2-s0": lambda job: os.kill(process_with(f"SLURM_JOB_ID={job}"), signal.SIGKILL),
        "rank-4-s0": lambda job: cluster.slurm.ask("scancel", "--signal=KILL", "--full", job),
        "rank-8-s0": lambda job: cluster.slurm.ask("scontrol", "requeue", job),
    }
    left: dict[str, tuple[int, float]] = {}

    def disturb() -> bool:
        for run in ways:
            if run not in left and cluster.step(run) > 25:
                ways[run](cluster.job(run))
                left[run] = cluster.step(run), time.monotonic()
        return len(left) == len(ways)

    with (cluster.path / "output.txt").open("wb") as output:
        sweep = cluster.snakemake(output, "--config", "grid={lora.rank: [2, 4, 8]}")
        wait(disturb, sweep)
        for run in ways:
            wait(lambda run=run: "resumed from step" in cluster.log(run), sweep)
            print(f"\n{run}: disturbed at step {left[run][0]}, after {time.monotonic() - left[run][1]:.0f} s", end=" ")
            print(*re.findall("resumed from.*", cluster.log(run)))
        assert sweep.wait(600) == 0, (cluster.path / "output.txt").read_text()
    print(f"{len(cluster.asked())} jobs in {time.monotonic() - began:.0f} s")
    for run in ways:
        found = re.search(r"^resumed from step (\d+)$", cluster.log(run), re.MULTILINE)
        assert found and left[run][0] - 10 <= int(found[1])  # a kill costs at most what follows the last checkpoint
        rank = run.split("-")[1]
        assert cluster.checkout.adapter(f"runs/raw/{run}/adapter") == cluster.undisturbed(f"lora.rank={rank}")


@pytest.mark.parametrize(
    ("machines", "seed", "asks"),
    [
        # Slurm's own variables make no distributed training of a job with one task
        (1, 1, ["NumNodes=1 ", "CPUs/Task=2 ", "gpu:2"]),
        (2, 2, ["NumNodes=2 ", "CPUs/Task=1 ", "gpu:1"]),
    ],
)
@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(cluster: Cluster, machines: int, seed: int, asks: list[str]) -> None:
    """Each has its CPU and its GPU; on one machine, and on two that torchrun joins."""
    cluster.checkout.set(runtime__num_processes=2, runtime__num_machines=machines)
    run = f"default-s{seed}"
    with (cluster.path / "output.txt").open("wb") as output:
        words = ["--config", f"seeds=[{seed}]", "--", f"runs/raw/{run}/adapter/adapter.json"]
        sweep = cluster.snakemake(output, *words)
        wait(lambda: cluster.step(run) > 25, sweep)
        cluster.slurm.ask("scancel", "--signal=USR1", cluster.job(run))  # to its processes, as before a time limit
        assert sweep.wait(600) == 0, (cluster.path / "output.txt").read_text()
    found = re.search(r"^resumed from step (\d+)$", cluster.log(run), re.MULTILINE)
    assert found and int(found[1]) > 25 and int(found[1]) % 10  # a checkpoint of its own
    asked, again = [line for line in cluster.asked() if run in line]
    print("\n" + again)
    assert all(words in asked for words in [*asks, "MinMemoryNode=16000M ", "TimeLimit=08:00:00 "])
    assert "shared by 2 processes" in cluster.log(run)
    cluster.checkout.set(runtime__num_processes=1, runtime__num_machines=1)
    assert cluster.checkout.adapter(f"runs/raw/{run}/adapter") == cluster.undisturbed(f"train.seed={seed}")


def wait(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert process.poll() is None, "ended before its time"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)
