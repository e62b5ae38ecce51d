"""The processes of a training: how many may share a step, and what is said of one that ended."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lora_dag.core.console import UserError
from stages.train import launch
from tests.helpers.settings import train_params


def test_the_first_process_that_ended_is_named_with_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launch.LOGS.mkdir()
    for number, text in ((1, ""), (2, "step 1\nno such layer\n")):
        launch.log_file(number).write_text(text)
    ended = [subprocess.Popen(["bash", "-c", script]) for script in ("exit 0", "exit 1", "kill -KILL $$")]
    assert str(launch.failure(ended)) == ("train: process 2 ended (no such layer; see logs/train-process-2.log)")
    assert str(launch.failure(ended[2:])) == (
        "train: process 1 ended (killed by signal 9; 9 is often for want of memory)"
    )
    assert launch.failure(ended[:1]) is None


@pytest.mark.parametrize(
    ("accumulation", "num_processes", "use"), [(1, 2, "use 2,"), (3, 2, "use 2 or 4,"), (4, 3, "use 3 or 6,")]
)
def test_processes_that_do_not_divide_a_step_are_refused(accumulation: int, num_processes: int, use: str) -> None:
    with pytest.raises(UserError) as caught:
        launch.require_share(train_params(f"gradient_accumulation_steps={accumulation}"), num_processes)
    assert f"the {accumulation} micro-batches of a step do not divide among {num_processes} processes" in str(
        caught.value
    )
    assert use in str(caught.value)
    launch.require_share(train_params("gradient_accumulation_steps=4"), 2)
