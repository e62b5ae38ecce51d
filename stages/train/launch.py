"""Several processes on one training, with the bytes of one process: how they start and end.

A micro-batch is never split: process r of W computes the micro-batches r, r + W, ... of each step, and
stages/train/gradient_sum.py adds up their gradients. Nothing here imports torch, for a quick --help.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_dag.core.params import RuntimeParams
    from stages.train.params import TrainParams

LOGS = Path("logs")
PATIENCE = 10  # seconds that a process gets to end


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def sharing(runtime: RuntimeParams, arguments: Sequence[str]) -> Iterator[None]:
    """Inside, this is process 0, and this very command runs again as processes 1 to ``num_processes`` - 1.

    They find each other by torch.distributed's variables, as under ``torchrun`` and ``accelerate launch``, which set
    them themselves: then nothing is started here. What the others print goes to logs/train-process-N.log.

    Raises:
        UserError: one of the others ended, and why; or they are to be on other machines too.
    """
    started = "WORLD_SIZE" in os.environ
    if runtime.num_machines > 1 and not started:
        raise UserError(
            f"params.yaml runtime.num_machines: got {runtime.num_machines}, and a stage by itself reaches this machine "
            "alone; use `snakemake --workflow-profile profiles/slurm`, torchrun on each machine, or 1"
        )
    others = [] if started else launch(runtime.num_processes, arguments)
    if others:  # until the training loop notes signals itself: go through the finally below
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    except RuntimeError as error:  # a process that is gone shows as a broken connection
        raise failure(others) or error from None
    finally:  # without process 0 the others have nothing to do
        for process in others:
            process.kill()
            process.wait()


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def launch(num_processes: int, arguments: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    if num_processes == 1:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    LOGS.mkdir(exist_ok=True)
    others = []
    for number in range(1, num_processes):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        with log_file(number).open("wb") as output:
            command = [sys.executable, "-m", "stages.train", *arguments]
            others.append(subprocess.Popen(command, env=os.environ | own, stdout=output, stderr=output))
    return others


def log_file(number: int) -> Path:
    return LOGS / f"train-process-{number}.log"


def failure(others: list[subprocess.Popen[bytes]]) -> UserError | None:
    """Why the others are gone, where one of them is."""
    for number, process in enumerate(others, start=1):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(PATIENCE):
                lines = log_file(number).read_text(errors="replace").strip().splitlines()
                killed = f"killed by signal {-process.returncode}; 9 is often for want of memory"
                what = killed if process.returncode < 0 else f"{(lines or ['no output'])[-1]}; see {log_file(number)}"
                return UserError(f"train: process {number} ended ({what})")
    return None


def require_share(params: TrainParams, num_processes: int) -> None:
    """Raises UserError: the micro-batches of a step cannot be shared out evenly."""
    accumulation = params.gradient_accumulation_steps
    if accumulation % num_processes:
        below = accumulation - accumulation % num_processes
        near = f"{below} or {below + num_processes}" if below else str(num_processes)
        raise UserError(
            f"params.yaml train.gradient_accumulation_steps: the {accumulation} micro-batches of a step do not divide "
            f"among {num_processes} processes; use {near}, or another runtime.num_processes"
        )
