"""An interrupted training resumes bit-identically; a run with other inputs starts from step 0."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lora_dag.artifacts.adapter import FINAL
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.bases import component_files
from lora_dag.core import params
from lora_dag.core.files import read_json
from lora_dag.core.locks import last_holder
from lora_dag.core.params import ModelParams
from lora_dag.families import sd
from stages.train import __main__ as train_main
from stages.train import identity, loop
from stages.train.build import build
from stages.train.checkpoints import Checkpoints
from stages.train.run import Run
from tests.helpers import forked
from tests.helpers.caches import write_mixed_cache
from tests.helpers.errors import assert_line
from tests.helpers.trainings import LONG, outputs, refusal, signalled, weights
from tests.helpers.workspace import REPOSITORY, Workspace, make_image


def make_run(*overrides: str) -> Run:
    config = params.load(Path("params.yaml"), overrides)
    digests = component_files.digests(config.section(ModelParams), sd.COMPONENTS)
    return build(config, sd, LatentCache(Path("data/latents")), digests)


def test_a_checkpoint_holds_every_part_that_has_a_state(encoded: Workspace) -> None:
    run = make_run("train.early_stop_patience=1", "train.snapshot_every_n_steps=1", "train.ema_decay=0.9")
    parts = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    expected = {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}
    assert set(expected) >= {"adapter", "optimizer", "lr_scheduler", "averaged", "early_stop", "history", "monitor"}
    assert run.stateful == expected and run.accelerator.scaler is None  # a scaler is float16's


def test_a_checkpoint_with_other_parts_is_not_resumed(
    encoded: Workspace, reference: Path, interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """An older version may have written such a checkpoint."""
    interrupt(3, *LONG)
    folder = make_run(*LONG[1::2]).checkpoints.folder
    state = Checkpoints(folder).load(2)
    assert state is not None and state.pop("step") == 2
    Checkpoints(folder).save(2, {name: part for name, part in state.items() if name != "history"})
    encoded.run("train", *LONG)
    assert_line("\n".join(caplog.messages), "checkpoint-of-other-version", str(folder.parent), "step 2")
    assert (Path("data/adapter") / FINAL).read_bytes() == (reference / "data/adapter" / FINAL).read_bytes()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_resumed_run_is_bit_identical(
    encoded: Workspace, reference: Path, interrupt: Callable[..., None], at: int, every: int
) -> None:
    argv = (*LONG, "--set", f"train.checkpoint_every_n_steps={every}")
    interrupt(at, *argv)
    assert not Path("data/adapter").exists()
    lines = encoded.run("train", *argv)
    done = at - at % every
    assert [line for line in lines if "resumed" in line] == ([f"resumed from step {done}"] if done else [])
    for name, blob in encoded.tree("data/adapter").items():
        assert blob == (reference / "data/adapter" / name).read_bytes(), name
    for name in ("loss.csv", "metrics.json"):
        assert Path("reports/train", name).read_bytes() == (reference / "reports/train" / name).read_bytes()


def test_two_interrupts_and_a_damaged_checkpoint_are_bit_identical(
    encoded: Workspace, reference: Path, interrupt: Callable[..., None]
) -> None:
    argv = (*LONG, "--set", "train.checkpoint_every_n_steps=1")
    interrupt(2, *argv)
    interrupt(5, *argv)
    (newest,) = Path(".state/runs").glob("*/checkpoints/step-000005.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    lines = encoded.run("train", *argv)
    assert "resumed from step 4" in lines
    assert_line("\n".join(lines), "checkpoint-damaged", newest.name)
    assert (Path("data/adapter") / FINAL).read_bytes() == (reference / "data/adapter" / FINAL).read_bytes()


def test_a_run_killed_before_a_step_is_bit_identical(encoded: Workspace, reference: Path) -> None:
    argv = (*LONG, "--set", "train.checkpoint_every_n_steps=1")

    def run() -> None:
        with signalled(4, signal.SIGKILL):
            encoded.run("train", *argv)

    assert forked.exit_code(run) == -signal.SIGKILL
    assert not Path("data/adapter").exists()
    assert "resumed from step 4" in encoded.run("train", *argv)
    for name, blob in encoded.tree("data/adapter").items():
        assert blob == (reference / "data/adapter" / name).read_bytes(), name


@pytest.mark.usefixtures("encoded")
def test_only_a_run_with_the_same_inputs_resumes(
    interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def resumed(*argv: str) -> bool:
        interrupt(3, *LONG, *argv)
        return "resumed from step 2" in caplog.messages

    assert not resumed()
    for change in ("lora.rank=3", "lora.alpha=4", "train.learning_rate=2e-3", "train.seed=1", "train.num_steps=7"):
        assert not resumed("--set", change), change
    for change in ("runtime.log_every_n_steps=2", "train.checkpoint_every_n_steps=5", "export.seed=9"):
        assert resumed("--set", change), change


def test_alpha_null_is_the_same_run_as_alpha_equal_to_rank(encoded: Workspace, interrupt: Callable[..., None]) -> None:
    """Adapter, record and checkpoint are the same."""
    patterns = ("--set", "lora.rank=4", "--set", "lora.rank_pattern={to_k: 3}")
    interrupt(3, *LONG, *patterns, "--set", "lora.alpha=null")
    argv = (*LONG, *patterns, "--set", "lora.alpha=4", "--set", "lora.alpha_pattern={to_k: 3}")
    assert "resumed from step 2" in encoded.run("train", *argv)
    written_out = outputs(encoded)
    encoded.run("train", *LONG, *patterns, "--set", "lora.alpha=null")
    assert outputs(encoded) == written_out
    assert '"alpha": 4.0' in written_out["adapter.json"].decode()


def test_other_latents_or_results_do_not_resume(
    encoded: Workspace, interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "RESULTS", identity.RESULTS + 1)
        interrupt(3)
        assert "resumed from step 2" not in caplog.messages
    make_image(50).save("data/raw/00.png")
    encoded.run("prepare")
    encoded.run("cache_latents")
    interrupt(3)
    assert "resumed from step 2" not in caplog.messages


GOES_ON = ("--set", "train.lr_scheduler=constant")  # keeps its checkpoints, for a longer run to go on from
EDITED = "restart     from step 0: the code of train has changed since this run finished"


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function: ``edit("new")`` gives the code of train this digest."""
    return lambda code: monkeypatch.setattr(train_main, "stage_digest", lambda *args: code)


def test_edited_code_resumes_an_interrupted_run_and_restarts_a_finished_one(
    encoded: Workspace, interrupt: Callable[..., None], edit: Callable[[str], None]
) -> None:
    """A fixed message at step 9,000 costs no step; an edited loss does not reuse the old loss's adapter."""
    argv = (*LONG, *GOES_ON)
    edit("old")
    interrupt(3, *argv)
    edit("mended")
    lines = encoded.run("train", *argv)
    assert "resumed from step 2" in lines
    assert_line("\n".join(lines), "code-changed", "RESULTS", "stages/train/__init__.py")
    assert read_json(Path("reports/train/run.json"))["code"] == ["old", "mended"]
    assert "resumed from step 6" in encoded.run("train", *argv)
    ended = outputs(encoded)
    edit("other")
    lines = encoded.run("train", *argv)
    assert EDITED in lines and not any("resumed" in line for line in lines)
    assert read_json(Path("reports/train/run.json"))["code"] == ["other"]
    assert outputs(encoded) == ended


def test_an_edit_during_a_run_counts_for_the_next_run(
    encoded: Workspace, edit: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run trains the old loss, so the new loss must not resume its last checkpoint."""
    original = loop.training_step

    def training_step(run: Run, step: int) -> bool:
        if step == 3:
            edit("new")
        return original(run, step)

    monkeypatch.setattr(loop, "training_step", training_step)
    edit("old")
    encoded.run("train", *LONG, *GOES_ON)
    assert read_json(Path("reports/train/run.json"))["code"] == ["old"]
    lines = encoded.run("train", *LONG, *GOES_ON)
    assert EDITED in lines and not any("resumed" in line for line in lines)


def test_a_killed_start_does_not_hide_that_the_run_had_finished(
    encoded: Workspace, interrupt: Callable[..., None], edit: Callable[[str], None]
) -> None:
    """This includes an interrupted longer run, whose further steps are from the old code too."""
    edit("old")
    encoded.run("train", *LONG, *GOES_ON)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "log_plan", Mock(side_effect=KeyboardInterrupt))
        encoded.run("train", *LONG, *GOES_ON)
    interrupt(9, *LONG, *GOES_ON, "--set", "train.num_steps=10")
    edit("new")
    assert EDITED in encoded.run("train", *LONG, *GOES_ON, "--set", "train.num_steps=10")


def test_edited_code_does_not_write_the_adapter_of_a_run_killed_after_its_last_step(
    encoded: Workspace, interrupt: Callable[..., None], edit: Callable[[str], None]
) -> None:
    """Zero steps with the new loss would write the old loss's adapter; the same holds for a shorter run."""
    edit("old")
    interrupt(5, *LONG, *GOES_ON)
    edit("new")
    assert EDITED in encoded.run("train", *LONG, *GOES_ON, "--set", "train.num_steps=4")


HOLD = (
    "import sys; from pathlib import Path; from lora_dag.core.locks import lock\nwith lock(Path(sys.argv[1])): input()"
)


def test_a_second_process_on_the_same_run_is_refused(encoded: Workspace, interrupt: Callable[..., None]) -> None:
    interrupt(3)
    (folder,) = Path(".state/runs").resolve().iterdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE) as holder:
        while last_holder(folder)[0] != str(holder.pid):
            assert holder.poll() is None
        problem = refusal(encoded)
        assert holder.stdin
        holder.stdin.write(b"\n")
        holder.stdin.close()
    assert f"{folder}: process {holder.pid} " in problem and f"`kill {holder.pid}`" in problem
    assert "resumed from step 2" in encoded.run("train")


@pytest.mark.parametrize("at", [1, 4])
def test_a_mixed_run_resumes_bit_identically(mixed: Workspace, interrupt: Callable[..., None], at: int) -> None:
    argv = (*LONG, "--set", "train.gradient_accumulation_steps=2", "--set", "train.checkpoint_every_n_steps=1")
    mixed.run("train", *argv)
    expected = outputs(mixed)
    shutil.rmtree("data/adapter")
    interrupt(at, *argv)
    assert f"resumed from step {at}" in mixed.run("train", *argv)
    assert outputs(mixed) == expected


@pytest.mark.parametrize("change", [{"repeats": 3}, {"loss_weight": 0.9}, {"captions": ("caption 0",)}], ids=str)
def test_other_weights_repeats_or_captions_are_another_run(
    workspace: Workspace, interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    write_mixed_cache()
    interrupt(3)
    interrupt(3)
    assert "resumed from step 2" in caplog.messages
    caplog.clear()
    write_mixed_cache(**change)
    interrupt(3)
    assert "resumed from step 2" not in caplog.messages


@pytest.mark.parametrize("target_modules", ["attention", "all-linear+conv"])
@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_every_kind_of_adapter_resumes_bit_identically(
    encoded: Workspace, interrupt: Callable[..., None], variant: str, target_modules: str
) -> None:
    changes = (f"lora.{variant}=true", f"lora.target_modules={target_modules}", "lora.rank_pattern={to_k: 3}")
    argv = tuple(word for change in changes for word in ("--set", change))
    interrupt(3, *argv)
    assert "resumed from step 2" in encoded.run("train", *argv)
    resumed = outputs(encoded)
    encoded.run("train", *argv)
    assert outputs(encoded) == resumed
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights().values())
    assert {len(tensor) for name, tensor in weights().items() if "to_k.lora_A" in name} == {3}
