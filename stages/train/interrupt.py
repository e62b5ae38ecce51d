"""SIGTERM, SIGUSR1 (what Slurm sends before it ends a job) and Ctrl-C: finish the step, write a checkpoint, go."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

from lora_dag.core.console import log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Inside ``with``, notes a signal instead of dying of it; a second Ctrl-C has its usual effect.

    Other signals may come twice: Slurm sends them to every process, and launchers pass on what they get.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            log.warning("%s: stopping after this step", self.received.name)
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def leave(self, step: int) -> None:
        """Exit as a process does that died of the signal: DVC and Snakemake see that nothing was finished."""
        received = self.received or signal.SIGTERM
        print(f"error: stopped after step {step}, checkpoint written; the same command resumes", file=sys.stderr)
        sys.exit(128 + received)
