"""Processes of a training: how many can share a step, and the error of a process that ended."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stages.train import launch
from tests.helpers.errors import assert_problem, refused
from tests.helpers.settings import train_params


def test_the_first_failed_process_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launch.LOGS.mkdir()
    for number, text in ((1, ""), (2, "step 1\nno such layer\n")):
        launch.log_file(number).write_text(text)
    ended = [subprocess.Popen(["bash", "-c", script]) for script in ("exit 0", "exit 1", "kill -KILL $$")]
    for processes, values in (
        (ended, ("process 2", "no such layer", "logs/train-process-2.log")),
        (ended[2:], ("process 1", "signal 9", "memory")),
    ):
        failure = launch.process_failure(processes)
        assert failure is not None
        assert_problem(failure, "process-ended", *values)
    assert launch.process_failure(ended[:1]) is None


@pytest.mark.parametrize(
    ("accumulation", "num_processes", "use"), [(1, 2, "Use 2,"), (3, 2, "Use 2 or 4,"), (4, 3, "Use 3 or 6,")]
)
def test_processes_that_cannot_share_a_step_are_refused(accumulation: int, num_processes: int, use: str) -> None:
    counts = (f"{num_processes} processes", f"{accumulation} micro-batches")
    with refused("uneven-micro-batches", "train.gradient_accumulation_steps", *counts, use):
        launch.require_even_split(train_params(f"gradient_accumulation_steps={accumulation}"), num_processes)
    launch.require_even_split(train_params("gradient_accumulation_steps=4"), 2)
