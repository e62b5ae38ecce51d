"""Trainings that are stopped, killed, extended or shared between processes are bit-identical to undisturbed ones."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lora_dag.artifacts.adapter import FINAL
from lora_dag.core.tensors import load_tensors
from stages.train.interrupt import signal_name
from tests.helpers.errors import assert_line, codes_of
from tests.helpers.trainings import LONG, broken_off, signalled
from tests.helpers.workspace import Workspace

ADAPTER = Path("data/adapter") / FINAL
CONSTANT = ("--set", "train.lr_scheduler=constant", "--set", "train.snapshot_every_n_steps=2")


def train(workspace: Workspace, *argv: str) -> tuple[list[str], dict[str, bytes]]:
    """Return the log, and the files of data/adapter and reports/train."""
    lines = workspace.run("train", *argv)
    reports = {name: blob for name, blob in workspace.tree("reports/train").items() if name != "run.json"}
    return lines, workspace.tree("data/adapter") | reports


def start(workspace: Workspace, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.train", *argv]
    return subprocess.Popen(command, cwd=workspace.path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= step:
            return
    raise AssertionError("the training ended")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_same_command_resumes(
    encoded: Workspace, reference: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (*LONG, "--set", "train.checkpoint_every_n_steps=1000")
    with signalled(3, number), pytest.raises(SystemExit) as left:
        encoded.run("train", *argv)
    assert left.value.code == 128 + number
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped by ")]
    assert signal_name(number) in line and "step 4." in line
    assert not ADAPTER.exists()
    assert "resumed from step 4" in encoded.run("train", *argv)
    assert ADAPTER.read_bytes() == (reference / ADAPTER).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_from_outside_ends_a_process_with_its_code(encoded: Workspace, number: signal.Signals) -> None:
    argv = ("--set", "train.num_steps=60", "--set", "train.checkpoint_every_n_steps=1000")
    with start(encoded, *argv) as process:
        wait_for_step(process, 3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = [line for line in errors.splitlines() if line.startswith(f"stopped by {number.name}")]
    (done,) = map(int, re.findall(r"step (\d+)", line))
    assert 3 <= done < 60
    assert not ADAPTER.exists()
    lines, stopped = train(encoded, *argv)
    assert f"resumed from step {done}" in lines
    assert stopped == train(encoded, *argv, "--set", "train.checkpoint_every_n_steps=999")[1]


# More steps


def test_a_longer_run_with_a_constant_schedule_resumes_from_a_shorter_one(encoded: Workspace) -> None:
    _, fresh = train(encoded, *CONSTANT, "--set", "train.num_steps=7")
    os.environ["LORA_STATE_DIR"] += "-other"
    _, short = train(encoded, *CONSTANT, "--set", "train.num_steps=4")
    lines, longer = train(encoded, *CONSTANT, "--set", "train.num_steps=7")
    assert "resumed from step 4" in lines and longer == fresh
    lines, again = train(encoded, *CONSTANT, "--set", "train.num_steps=7")
    assert "resumed from step 7" in lines and again == fresh
    lines, shorter = train(encoded, *CONSTANT, "--set", "train.num_steps=4")
    assert shorter == short and not any(line.startswith("resumed from step 7") for line in lines)


def test_a_shorter_run_after_a_longer_one_keeps_its_own_checkpoints(encoded: Workspace) -> None:
    train(encoded, *CONSTANT, "--set", "train.num_steps=9")
    argv = (*CONSTANT, "--set", "train.num_steps=6", "--set", "train.checkpoint_every_n_steps=1")
    with broken_off(4):
        train(encoded, *argv)
    lines, _ = train(encoded, *argv)
    assert "resumed from step 4" in lines


def test_a_run_without_its_snapshots_restarts(encoded: Workspace) -> None:
    _, fresh = train(encoded, *CONSTANT, "--set", "train.num_steps=5")
    (folder,) = Path(os.environ["LORA_STATE_DIR"]).glob("runs/*/snapshots")
    shutil.rmtree(folder)
    lines, again = train(encoded, *CONSTANT, "--set", "train.num_steps=5")
    assert_line("\n".join(lines), "snapshot-missing", "step 2")
    assert again == fresh


def test_a_longer_run_with_a_cosine_schedule_restarts_with_a_reason(encoded: Workspace) -> None:
    train(encoded, "--set", "train.num_steps=4")
    lines, longer = train(encoded, "--set", "train.num_steps=6")
    (reason,) = [line for line in lines if line.startswith("restart ")]
    assert "cosine" in reason and "4 steps" in reason and "lr_scheduler: constant" in reason
    assert not any("resumed" in line for line in lines)
    os.environ["LORA_STATE_DIR"] += "-other"
    lines, fresh = train(encoded, "--set", "train.num_steps=6")
    assert longer == fresh and reason not in lines
    lines, _ = train(encoded, "--set", "train.num_steps=6", "--set", "lora.alpha=3")
    assert reason not in lines


# Settings that carry state


@pytest.mark.parametrize(
    "changes",
    [
        ["train.ema_decay=0.5"],
        ["train.optimizer=schedule_free", "train.lr_scheduler=constant"],
        ["train.optimizer=prodigy", "train.learning_rate=1.0"],
        ["train.optimizer=torch.optim.Adafactor", "train.gradient_accumulation_steps=2"],
        ["train.noise_offset=0.1", "train.multires_noise_discount=0.3", "train.input_perturbation=0.1"],
    ],
    ids=lambda changes: changes[0].partition(".")[2],
)
def test_a_killed_run_resumes_bit_identically(encoded: Workspace, changes: list[str]) -> None:
    argv = [
        word
        for change in (*changes, "train.num_steps=5", "train.checkpoint_every_n_steps=1")
        for word in ("--set", change)
    ]
    _, undisturbed = train(encoded, *argv)
    os.environ["LORA_STATE_DIR"] += "-other"
    with broken_off(3):
        train(encoded, *argv)
    lines, resumed = train(encoded, *argv)
    assert "resumed from step 3" in lines and resumed == undisturbed
    assert undisturbed != train(encoded, "--set", "train.num_steps=5")[1]


@pytest.mark.parametrize("change", ["train.gradient_checkpointing=true"])
def test_gradient_checkpointing_is_bit_identical(encoded: Workspace, change: str) -> None:
    dropout = ("--set", "lora.dropout=0.3")
    train(encoded, *dropout)
    plain = ADAPTER.read_bytes()
    train(encoded, *dropout, "--set", change)
    assert ADAPTER.read_bytes() == plain


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_identically_and_is_close_to_eager(encoded: Workspace) -> None:
    argv = ("--set", "train.compile=true", "--set", "train.checkpoint_every_n_steps=2", *CONSTANT)
    _, fresh = train(encoded, *argv, "--set", "train.num_steps=5")
    compiled = weights(encoded)
    os.environ["LORA_STATE_DIR"] += "-other"
    train(encoded, *argv, "--set", "train.num_steps=4")
    lines, longer = train(encoded, *argv, "--set", "train.num_steps=5")
    assert "resumed from step 4" in lines and longer == fresh
    train(encoded, *CONSTANT, "--set", "train.num_steps=5")
    for name, tensor in weights(encoded).items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)


def weights(workspace: Workspace) -> dict[str, torch.Tensor]:
    return load_tensors(workspace.path / ADAPTER)


# Several processes


ACCUMULATED = (
    "--set",
    "train.gradient_accumulation_steps=4",
    "--set",
    "train.num_steps=3",
    "--set",
    "lora.dropout=0.2",
)


def by_itself(workspace: Workspace) -> dict[str, bytes]:
    """Return the outputs of one new process: libraries loaded by the test process may change the choice of kernels."""
    assert workspace.process("train", *ACCUMULATED).returncode == 0
    reports = {name: blob for name, blob in workspace.tree("reports/train").items() if name != "run.json"}
    return workspace.tree("data/adapter") | reports


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_bit_identical_to_one(encoded: Workspace, num_processes: int) -> None:
    alone = by_itself(encoded)
    os.environ["LORA_STATE_DIR"] += "-other"
    done = encoded.process("train", *ACCUMULATED, "--set", f"runtime.num_processes={num_processes}")
    assert done.returncode == 0, done.stderr
    assert f"4 accumulated), shared by {num_processes} processes" in done.stdout
    reports = {name: blob for name, blob in encoded.tree("reports/train").items() if name != "run.json"}
    assert encoded.tree("data/adapter") | reports == alone


@pytest.mark.slow
def test_torchrun_is_bit_identical_to_one_process(encoded: Workspace) -> None:
    """`accelerate launch` calls torchrun for GPUs."""
    alone = by_itself(encoded)
    os.environ["LORA_STATE_DIR"] += "-other"
    machines = ["--set", "runtime.num_processes=2", "--set", "runtime.num_machines=2"]  # here both are this one
    argv = ["-m", "stages.train", *ACCUMULATED, *machines]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511", *argv]
    done = subprocess.run(command, cwd=encoded.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 accumulated), shared by 2 processes" in done.stdout
    assert ADAPTER.read_bytes() == alone[FINAL]


def test_several_machines_need_a_launcher(encoded: Workspace) -> None:
    done = encoded.process("train", *ACCUMULATED, "--set", "runtime.num_processes=4", "--set", "runtime.num_machines=2")
    assert done.returncode == 2
    assert_line(done.stderr, "needs-launcher", "--set runtime.num_machines: got 2", "profiles/slurm")
    done = encoded.process("train", "--set", "runtime.num_processes=3", "--set", "runtime.num_machines=2")
    assert done.returncode == 2
    assert_line(done.stderr, "uneven-processes", "--set runtime.num_processes: got 3", "num_machines (2)")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_in_one_line(encoded: Workspace) -> None:
    argv = ("--set", "train.gradient_accumulation_steps=2", "--set", "train.num_steps=500")
    with start(encoded, *argv, "--set", "runtime.num_processes=2") as process:
        wait_for_step(process, 3)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors
    assert_line(errors, "process-ended", "process 1", "signal 9")


def test_an_uneven_split_is_refused_by_every_process(encoded: Workspace) -> None:
    done = encoded.process("train", "--set", "runtime.num_processes=2")
    assert done.returncode == 2
    assert codes_of(done.stderr) == ["uneven-micro-batches"] and len(done.stderr.splitlines()) == 1
    assert_line(done.stderr, "uneven-micro-batches", "train.gradient_accumulation_steps: 2 processes", "Use 2,")


# Killed for real


@pytest.mark.slow
def test_ten_sigkills_at_random_moments_are_bit_identical(encoded: Workspace) -> None:
    argv = ("--set", "train.num_steps=60", "--set", "train.checkpoint_every_n_steps=1")
    _, undisturbed = train(encoded, *argv)
    os.environ["LORA_STATE_DIR"] += "-other"
    generator, kills, reached = random.Random(0), 0, set()
    while kills < 10:
        with start(encoded, *argv) as process:
            wait_for_step(process, 1)
            time.sleep(generator.uniform(0, 0.3))
            if process.poll() is not None:
                break
            process.kill()
            output, _ = process.communicate()
        kills += 1
        reached.add(output.count("step "))
    assert kills == 10
    lines, resumed = train(encoded, *argv)
    assert any(line.startswith("resumed") for line in lines) and resumed == undisturbed
