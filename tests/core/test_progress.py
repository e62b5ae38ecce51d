"""Bars on a terminal, lines elsewhere, and what a stage says that it will take."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from lora_dag.core import progress, time_estimate
from lora_dag.core.progress import Bar, ByteBar, counted, elapsed, show_elapsed
from lora_dag.core.time_estimate import Work, duration
from tests.helpers.workspace import REPOSITORY, Workspace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Value of ``time.monotonic``, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_where_there_is_no_terminal(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    with Bar("validate", 1000) as bar:
        clock[0] = 100.0  # loading
        bar.start()
        for clock[0] in (104.0, 109.0, 111.0, 115.0, 122.0):
            bar.add(10)
        bar.skip(700)
        clock[0] = 132.0
        bar.add(10)
    assert caplog.messages == [
        "validate         30 of 1000       2.7 /s  ETA 5.9 min",
        "validate         50 of 1000       2.3 /s  ETA 7.0 min",
        "validate         60 of 300       1.9 /s  ETA 2.1 min",
    ]


def test_short_work_shows_no_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    assert list(counted("nearest", "abc", 3)) == ["a", "b", "c"] and caplog.messages == []


def test_nothing_done_yet_shows_no_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    with Bar("validate", 10) as bar:
        clock[0] = 20.0
        bar.add(0)
    assert caplog.messages == []


ON_A_TERMINAL = """
import logging, sys
from lora_dag.core.console import log
from lora_dag.core.progress import Bar
logging.basicConfig(format="%(message)s", stream=sys.stdout)
log.setLevel("INFO")
with Bar("validate", 4) as bar:
    for index in range(4):
        bar.add()
        log.info("drawn %d", index)
log.info("end")
"""


def test_a_bar_on_a_terminal_with_whole_log_lines_above_it() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run([sys.executable, "-c", ON_A_TERMINAL], cwd=REPOSITORY, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    rows = [re.sub(r".*\r", "", row.rstrip("\r")) for row in shown.split("\n")]
    assert [row for row in rows if row] == ["drawn 0", "drawn 1", "drawn 2", "drawn 3", "end"]
    assert "validate:   0%" in shown and "validate:  75%" in shown


# What is planned is what is done


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("guidance_scale=1.0", "num_seeds=1", "drift_prompts=[]"),
        ("scales=[0.5, 1.0, 2.0]", "batch_size=3", "num_timesteps=3"),
    ],
)
def test_validate_counts_to_its_end(
    encoded: Workspace, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    encoded.run("train")
    monkeypatch.setattr(progress, "SECONDS", 0)
    words = [word for setting in settings for word in ("--set", f"validate.{setting}")]
    found = [line.split() for line in encoded.run("validate", *words) if line.startswith("validate ")]
    counts = [(int(done), int(total)) for _, done, _, total, *_ in found]
    assert len({total for _, total in counts}) == 1 and counts[-1][0] == counts[-1][1]
    assert passes_line(encoded.run("validate", *words)) == counts[-1][1]
    done = [count for count, _ in counts]
    assert done == sorted(done) and done[0] < done[-1] / 4
    again = encoded.run("validate", *words)
    assert not any(line.startswith("validate ") for line in again)  # all of it is kept


def passes_line(lines: list[str]) -> int:
    """Passes of the denoiser that validate announces."""
    (line,) = [line for line in lines if line.startswith("passes ")]
    return int(line.split()[3])


def test_export_counts_to_its_end(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded.run("train")
    monkeypatch.setattr(progress, "SECONDS", 0)
    lines = encoded.run("export", "--set", "export.formats=[diffusers, merged]", "--set", "export.resized_ranks=[1]")
    found = [line.split()[1:4] for line in lines if line.startswith("export ")]
    assert found == [[str(done), "of", "8"] for done in range(1, 9)]


# What it will take


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    return tmp_path


def announced(work: Work, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.INFO, logger="lora-dag")
    work.announce()
    return caplog.messages


def test_a_stage_says_what_it_will_take_by_the_last_run(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = {"dtype": "float32", "num_threads": 1}
    assert announced(Work("train", here, 100), caplog) == []  # nothing is known
    Work("train", here, 100).record(50, 30.0)
    assert announced(Work("train", here, 100), caplog) == []  # a minute, and no more
    assert announced(Work("train", here, 400), caplog) == ["time        about 4.0 min, by the last run here"]
    assert announced(Work("train", here, 20_000), caplog) == ["time        about 3.3 h, by the last run here"]
    assert announced(Work("train", here | {"dtype": "bfloat16"}, 400), caplog) == []
    assert announced(Work("export", here, 400), caplog) == []
    Work("train", here, 100).record(0, 5.0)  # nothing was done: nothing is learned
    assert announced(Work("train", here, 400), caplog) == ["time        about 4.0 min, by the last run here"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"amount": 0, "seconds": 9}', '{"amount": null, "seconds": 9}'])
def test_a_damaged_note_says_nothing(state: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    work = Work("train", {}, 1e9)
    work.record(1, 1.0)
    (path,) = state.glob("took/train-*.json")
    assert json.loads(path.read_text()) == {"amount": 1, "seconds": 1.0}
    path.write_text(text)
    assert announced(work, caplog) == []


def test_duration() -> None:
    assert [duration(seconds) for seconds in (7, 119, 120, 7200, 400_000)] == [
        "7 s",
        "119 s",
        "2.0 min",
        "2.0 h",
        "4.6 days",
    ]


def test_every_long_stage_says_it_before_it_loads_anything(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of what it has to do would take more than a minute; here, more than nothing."""
    monkeypatch.setattr(time_estimate, "SHORT", 0)
    again = {
        "cache_latents": (r"time        about \d+ s for 8 views, by the last run here", "cache.batch_size=3"),
        "train": (r"time        about \d+ s for 8 steps, by the last run here", "train.num_steps=8"),
        "validate": (r"time        at most about \d+ s, by the last run here", "validate.num_timesteps=3"),
        "export": (r"time        about \d+ s, by the last run here", "export.name=other"),
    }
    for stage, (expected, change) in again.items():
        first = encoded.run(stage)
        second = encoded.run(stage, "--set", change)
        assert not any(line.startswith("time") for line in first), stage
        (index,) = [index for index, line in enumerate(second) if re.fullmatch(expected, line)]
        assert index <= 4, stage
    assert len(list(Path(os.environ["LORA_STATE_DIR"]).glob("took/*.json"))) == 5
    other = encoded.run("train", "--set", "train.num_steps=9", "--set", "runtime.num_threads=2")
    assert not any(line.startswith("time") for line in other)  # nothing is known of two threads


def test_bytes_are_shown_in_mb(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    with ByteBar("hash", 6_000_000_000) as bar:
        for clock[0] in (5.0, 10.0):
            bar.add_bytes(600_000_001)
    assert caplog.messages == ["hash           1200 of 6000 MB     120.0 MB/s  ETA 40 s"]


def test_work_without_a_count_shows_its_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    with elapsed("load", "unet", every=0.05):
        time.sleep(0.12)
    with elapsed("load", "vae"):
        pass
    assert caplog.messages == ["load        unet: 0 s so far"] * 2


def test_slow_items_show_their_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    with Bar("export", 7) as bar:
        clock[0] = 50.0
        bar.add()
    assert caplog.messages == ["export            1 of 7      50.0 s each  ETA 5.0 min"]


def test_a_long_call_of_a_module_shows_its_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora-dag")
    module = Sleeper()
    show_elapsed(module, "decode", "images", every=0.2)
    for seconds in (0.5, 0.0):
        module(seconds)
    with pytest.raises(ValueError, match="sleep length"):
        module(-1.0)
    time.sleep(0.3)
    assert caplog.messages == ["decode      images: 0 s so far"] * 2


class Sleeper(torch.nn.Module):
    def forward(self, seconds: float) -> None:
        time.sleep(seconds)
