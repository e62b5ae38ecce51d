"""The three promises under the real DVC and Snakemake, with a tiny base: what reruns, what is restored, equal bytes.

tests/dag/test_reruns.py tests what each change reruns, on stages that take a moment; here it is slow.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.helpers.changes import AFTER_TRAIN, CHANGES
from tests.helpers.checkout import Checkout, ran
from tests.helpers.workspace import REPOSITORY, make_image


@contextmanager
def changed(checkout: Checkout, **changes: Any) -> Iterator[set[str]]:
    """The stages that run after a change; afterwards everything is put back and restored without running a stage."""
    yield checkout.repro(**changes)
    checkout.git("checkout", "--quiet", "params.yaml")
    # report writes to git alone, so DVC runs it again; it takes a second
    assert ran(checkout.dvc("repro")) <= {"report"}
    assert checkout.git("status", "--porcelain") == ""


def test_nothing_runs_when_nothing_changed(reproduced: Checkout) -> None:
    assert reproduced.repro() == set()


@pytest.mark.slow
def test_a_lora_setting_reruns_train_and_later_stages_and_undoing_it_restores_results(reproduced: Checkout) -> None:
    before = reproduced.adapter()
    with changed(reproduced, lora__rank=4) as stages:
        assert stages == AFTER_TRAIN
        assert reproduced.adapter() != before
    assert reproduced.adapter() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"), CHANGES, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_change_reruns_only_the_stages_that_it_affects(
    reproduced: Checkout, change: dict[str, Any], expected: set[str]
) -> None:
    with changed(reproduced, **change) as stages:
        assert stages == expected


@pytest.mark.slow
def test_a_cache_setting_reruns_only_stages_whose_inputs_change(reproduced: Checkout) -> None:
    """Another batch size encodes again; what follows runs only where the last bits of the latents differ."""
    with changed(reproduced, cache__batch_size=3) as stages:
        assert {"cache_latents"} <= stages <= {"cache_latents", *AFTER_TRAIN}


@pytest.mark.slow
def test_an_edited_image_is_the_only_one_encoded(reproduced: Checkout) -> None:
    path = reproduced.path / "data/raw/00.png"
    original = path.read_bytes()
    path.unlink()
    make_image(100).save(path)
    output = reproduced.dvc("repro")
    assert ran(output) == {"prepare", "cache_latents", *AFTER_TRAIN}
    assert re.search(r"^images      encoded 1, reused 7$", output, re.MULTILINE)
    why = reproduced.python("-m", "lora_dag", "explain").stdout
    assert "- **data**: data/raw\n\nNot changed: parameters, base, code, environment." in why
    assert "| train | ran again: data/latents from cache_latents |" in why
    path.unlink()
    path.write_bytes(original)
    reproduced.dvc("repro")
    reproduced.git("checkout", "--quiet", "--", "data")
    assert reproduced.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_another_source_reruns_all_stages_and_encodes_only_new_images(reproduced: Checkout) -> None:
    reproduced.set(dataset__source="data/other")
    output = reproduced.dvc("repro")
    assert ran(output) == {"prepare", "cache_latents", *AFTER_TRAIN}
    assert re.search(r"^images      encoded 2, reused 6$", output, re.MULTILINE)
    assert re.search(r"^captions    encoded 2, reused 7$", output, re.MULTILINE)
    reproduced.git("checkout", "--quiet", "params.yaml")
    assert ran(reproduced.dvc("repro")) <= {"report"}
    assert reproduced.git("status", "--porcelain") == ""


def test_two_runs_from_scratch_are_bit_identical(reproduced: Checkout) -> None:
    """Without DVC's caches and with an empty state directory, every file in git comes out as it was."""
    before = reproduced.adapter()
    reproduced.run("rm", "-rf", ".state", "data/latents", "data/adapter")
    output = reproduced.dvc("repro", "--force", "--no-run-cache")
    assert ran(output) == {"prepare", "cache_latents", *AFTER_TRAIN}
    assert reproduced.adapter() == before
    assert reproduced.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_a_killed_training_resumes_bit_identically(reproduced: Checkout) -> None:
    change = ["--set", "train.num_steps=400", "--set", "train.snapshot_every_n_steps=100"]
    command = ["-m", "stages.train", *change, "--adapter", "out/a", "--train-reports", "out/ra"]
    reproduced.python(*command)
    undisturbed = reproduced.adapter("out/a")

    other = [word.replace("out/a", "out/b").replace("out/ra", "out/rb") for word in command]
    process = subprocess.Popen(
        [sys.executable, *other], cwd=reproduced.path, env=reproduced.environment, stdout=subprocess.DEVNULL
    )
    wait_for_checkpoint(reproduced, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (reproduced.path / "out/b").exists()
    output = reproduced.python(*other).stdout
    assert re.search(r"^resumed from step \d+$", output, re.MULTILINE)
    assert reproduced.adapter("out/b") == undisturbed
    for name in ("loss.csv", "metrics.json"):
        assert (reproduced.path / "out/rb" / name).read_bytes() == (reproduced.path / "out/ra" / name).read_bytes()
    reproduced.run("rm", "-rf", "out")


def wait_for_checkpoint(checkout: Checkout, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list((checkout.path / ".state/runs").glob("*/checkpoints/step-*.sha256"))) >= 2:
            return
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("no checkpoint was written")


def test_a_temporary_experiment_runs_what_is_affected_and_compares(reproduced: Checkout) -> None:
    head = reproduced.git("rev-parse", "HEAD")
    output = reproduced.dvc("exp", "run", "--temp", "--name", "rank-3", "--set-param", "lora.rank=3")
    assert ran(output) == AFTER_TRAIN
    assert reproduced.git("rev-parse", "HEAD") == head
    assert reproduced.git("status", "--porcelain") == ""
    page = reproduced.python("-m", "lora_dag", "compare", "HEAD", "rank-3").stdout
    assert re.search(r"lora\.rank.*2.*3", page)
    why = reproduced.python("-m", "lora_dag", "explain", "HEAD", "rank-3").stdout
    assert "- **parameters**: lora.rank 2 → 3\n\nNot changed: data, base, code, environment." in why
    assert "| validate | ran again: data/adapter from train |" in why
    (line,) = re.findall(r"^dvc (exp show .*)$", (REPOSITORY / "docs/experiments.md").read_text(), re.MULTILINE)
    rows = list(csv.DictReader(reproduced.dvc(*shlex.split(line, comments=True), "--csv").splitlines()))
    assert {row["lora.rank"] for row in rows if row["Experiment"] == "rank-3"} == {"3"}
    assert "val.loss" in rows[0] and not any("/" in column for column in rows[0])


def test_the_gate_detects_an_edited_report_without_the_data(reproduced: Checkout) -> None:
    gate = ("-m", "dvc", "repro", "--dry", "--allow-missing")
    up_to_date = "Data and pipelines are up to date."
    assert up_to_date in reproduced.python(*gate).stdout
    metrics = reproduced.path / "reports/metrics.json"
    metrics.write_text(metrics.read_text().replace("val.loss", "val.less", 1))
    done = reproduced.python(*gate, check=False)
    assert up_to_date not in done.stdout and "validate" in done.stdout + done.stderr
    reproduced.git("checkout", "--quiet", "reports")


def test_snakemake_gives_the_adapter_of_dvc_and_reruns_only_what_changed(reproduced: Checkout) -> None:
    reproduced.snakemake()
    assert reproduced.adapter("runs/raw/default-s0/adapter") == reproduced.adapter()
    assert "Nothing to be done" in reproduced.snakemake()
    reproduced.set(export__seed=5)
    plan = reproduced.snakemake("--dry-run", "--quiet", "rules")
    assert set(re.findall(r"^(prepare|cache_latents|train|validate|export|report)\s+1$", plan, re.MULTILINE)) == {
        "export",
        "report",
    }
    reproduced.git("checkout", "--quiet", "params.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_state_directory_is_one_line(reproduced: Checkout) -> None:
    state = reproduced.path / ".state"
    state.chmod(0o500)
    done = reproduced.python("-m", "stages.cache_latents", check=False)
    state.chmod(0o700)
    assert done.returncode == 2 and "Traceback" not in done.stderr
