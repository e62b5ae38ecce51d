"""Start and end of several processes that share one training, bit-identical to one process.

A micro-batch is never split: process r of W computes the micro-batches r, r + W, ... of each step, and
stages/train/gradient_sum.py adds their gradients. This module does not import torch, so that --help is quick.
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

from lora_dag.core.console import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_dag.core.params import RuntimeParams
    from stages.train.params import TrainParams

LOGS = Path("logs")
END_TIMEOUT = 10  # seconds to wait for the end of a process


def rank() -> int:
    """Return this process's number, 0 for the first."""
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def other_processes(runtime: RuntimeParams, arguments: Sequence[str]) -> Iterator[None]:
    """Run the same command as processes 1 to ``num_processes`` - 1 inside the block; this process is number 0.

    The processes connect by torch.distributed's variables. ``torchrun`` and ``accelerate launch`` set them themselves;
    then no process is started here. The output of the other processes goes to logs/train-process-N.log.

    Raises:
        UserError: another process ended early, or several machines are configured without a launcher.
    """
    started = "WORLD_SIZE" in os.environ
    if runtime.num_machines > 1 and not started:
        text = (
            f"{runtime.setting('num_machines')}: got {runtime.num_machines}, but this command starts processes on one "
            "machine only. Run `snakemake --workflow-profile profiles/slurm` or torchrun, or set it to 1."
        )
        raise UserError(Problem("needs-launcher", text))
    others = [] if started else start_processes(runtime.num_processes, arguments)
    if others:  # until the training loop handles signals itself: run the finally block below
        signal.signal(signal.SIGTERM, exit_on_signal)
        signal.signal(signal.SIGUSR1, exit_on_signal)
    try:
        yield
    except RuntimeError as error:  # a broken connection is the sign of a process that ended
        raise process_failure(others) or error from None
    finally:  # the others cannot continue without process 0
        for process in others:
            process.kill()
            process.wait()


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Exit with the signal's exit code."""
    sys.exit(128 + number)


def start_processes(num_processes: int, arguments: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Start the other processes, with this process's arguments."""
    if num_processes == 1:
        return []
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    LOGS.mkdir(exist_ok=True)
    others = []
    for number in range(1, num_processes):
        ranks = {"RANK": str(number), "LOCAL_RANK": str(number)}
        with log_file(number).open("wb") as output:
            command = [sys.executable, "-m", "stages.train", *arguments]
            others.append(subprocess.Popen(command, env=os.environ | ranks, stdout=output, stderr=output))
    return others


def log_file(number: int) -> Path:
    return LOGS / f"train-process-{number}.log"


def process_failure(others: list[subprocess.Popen[bytes]]) -> UserError | None:
    """Return the error of the first other process that failed, or None."""
    for number, process in enumerate(others, start=1):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(END_TIMEOUT):
                lines = log_file(number).read_text(errors="replace").strip().splitlines()
                reason = f"with: {(lines or ['no output'])[-1]}"
                if process.returncode < 0:
                    reason = f"by signal {-process.returncode} (9: often out of memory)"
                text = f"train: process {number} ended {reason}. Read {log_file(number)}."
                return UserError(Problem("process-ended", text))
    return None


def require_even_split(params: TrainParams, num_processes: int) -> None:
    """Raise UserError if the processes cannot share the micro-batches of a step evenly."""
    accumulation = params.gradient_accumulation_steps
    if accumulation % num_processes:
        below = accumulation - accumulation % num_processes
        near = f"{below} or {below + num_processes}" if below else str(num_processes)
        text = (
            f"{params.setting('gradient_accumulation_steps')}: {num_processes} processes cannot share {accumulation} "
            f"micro-batches evenly. Use {near}, or change runtime.num_processes."
        )
        raise UserError(Problem("uneven-micro-batches", text))
