"""Stop on Ctrl-C, SIGTERM and SIGUSR1 (Slurm, before a job ends): finish the step, write a checkpoint, exit."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

from lora_dag.core import terminal
from lora_dag.core.console import RESUME, log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Signal handlers that record the first signal inside ``with``. A second Ctrl-C stops the process at once.

    Other signals may arrive twice: Slurm sends them to every process, and launchers forward them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Record the signal and restore the usual effect of Ctrl-C."""
        if self.received is None:
            self.received = signal.Signals(number)
            log.warning("%s received: this step is finished, then a checkpoint is written", signal_name(self.received))
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def exit(self, step: int) -> None:
        """Exit with the signal's exit code, so that DVC and Snakemake know that the stage has not finished."""
        received = self.received or signal.SIGTERM
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has written ^C on its last line
        text = f"a checkpoint was written after step {step}. {RESUME}"
        terminal.write_line(f"stopped by {signal_name(received)}: {text}")
        sys.exit(128 + received)


def signal_name(number: signal.Signals) -> str:
    return "Ctrl-C" if number == signal.SIGINT else number.name
