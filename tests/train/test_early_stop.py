"""``train.early_stop_patience``: the step of the stop and a bit-identical adapter, also after interrupts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lora_dag.artifacts.adapter import Adapter
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.core import params
from lora_dag.core.files import read_json
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_tensors
from lora_dag.families import sd
from stages.train.early_stop import EarlyStop
from tests.helpers.errors import refused
from tests.helpers.settings import train_params
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import Workspace

CHANGES = (
    "train.num_steps=20",
    "train.learning_rate=0.05",  # learns in a few steps, then spoils
    "train.lr_scheduler=constant",
    "train.checkpoint_every_n_steps=1",
    "train.ema_decay=0.5",
    "lora.dropout=0.25",
)
LONG = tuple(word for change in CHANGES for word in ("--set", change))
STOPPING = (*LONG, "--set", "train.early_stop_patience=2")


@pytest.fixture
def encoded(workspace: Workspace) -> Workspace:
    workspace.run("prepare")
    workspace.run("cache_latents")
    return workspace


def heldout(lines: list[str]) -> dict[int, float]:
    words = [line.split() for line in lines if line.startswith("held-out ")]
    return {int(row[2]): float(row[4]) for row in words}


def asked(workspace: Workspace, *argv: str) -> tuple[EarlyStop, list[str]]:
    """After a run."""
    made: list[EarlyStop] = []
    should_stop = EarlyStop.should_stop

    def noted(self: EarlyStop, step: int, loss: float) -> bool:
        made[:] = [self]
        return should_stop(self, step, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStop, "should_stop", noted)
        lines = workspace.run("train", *argv)
    return made[0], lines


def test_early_stop_equals_the_snapshot_of_a_full_run(encoded: Workspace) -> None:
    encoded.run("train", *LONG)
    undisturbed = encoded.tree("data/adapter")
    lines = encoded.run("train", *STOPPING)
    losses = heldout(lines)
    end = max(losses)
    best = min(losses, key=losses.__getitem__)
    assert end < 20 and best == end - 4 and list(losses) == list(range(2, end + 1, 2))
    (line,) = [line for line in lines if line.startswith(f"early stop  at step {end}.")]
    assert line.endswith(f"dvc exp run -S export.step={best}")
    assert encoded.tree("data/adapter")["adapter.safetensors"] == undisturbed[f"snapshots/step-{end:06d}.safetensors"]
    adapter = Adapter.load(Path("data/adapter"))
    assert adapter.num_steps == end and adapter.snapshots == list(range(2, end, 2))
    metrics = read_json(Path("reports/train/metrics.json"))
    assert metrics["train.num_steps"] == end and metrics["train.images_seen"] == 2 * end
    assert len(Path("reports/train/loss.csv").read_text().splitlines()) == end + 1
    encoded.run("validate")
    assert f"\n{end}," in Path("reports/validate/curve.csv").read_text()
    encoded.run("export", "--set", f"export.step={best}")


def test_an_interrupted_early_stop_is_bit_identical(encoded: Workspace) -> None:
    lines = encoded.run("train", *STOPPING)
    losses, undisturbed = heldout(lines), encoded.tree("data/adapter")
    assert "resumed" not in "".join(lines)
    at = max(losses) - 3
    os.environ["LORA_STATE_DIR"] += "-other"

    with broken_off(at):
        encoded.run("train", *STOPPING)
    lines = encoded.run("train", *STOPPING)
    assert f"resumed from step {at}" in lines and encoded.tree("data/adapter") == undisturbed
    assert heldout(lines).items() <= losses.items()
    longer = encoded.run("train", *STOPPING, "--set", "train.num_steps=30")  # the schedule lets a longer run go on
    assert f"resumed from step {max(losses)}" in longer
    files = read_json(Path("data/adapter/adapter.json"))["files"]
    assert (
        files == Adapter.load(Path("data/adapter")).files and encoded.tree("data/adapter").keys() == undisturbed.keys()
    )


def test_heldout_rows_are_fixed_and_their_loss_equals_an_independent_computation(encoded: Workspace) -> None:
    """The loss is computed from the merged snapshot, with v of Salimans & Ho 2022, without dropout."""
    argv = ("--set", "lora.dropout=0.5", "--set", "train.learning_rate=0.05", "--set", "train.snapshot_every_n_steps=1")
    early_stop, lines = asked(encoded, *argv, "--set", "train.early_stop_patience=2")
    model = params.load(Path("params.yaml")).section(ModelParams)
    denoiser, scheduler = sd.load_denoiser(model, torch.device("cpu")), sd.load_scheduler(model)
    tensors = load_tensors(Path("data/adapter/snapshots/step-000003.safetensors"))
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            denoiser.get_submodule(name.removesuffix(".lora_A.weight")).weight.data += b @ a
    losses, names = [], []
    for batch in early_stop.rows.batches():
        assert len(batch.captions) == 2 and "" not in batch.captions
        noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        with torch.no_grad():
            model_pred = sd.predict(denoiser, noisy_latents, batch.timesteps, batch.prompt).double()
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps).double()
        losses += (model_pred - target).square().flatten(1).mean(1)[batch.weights > 0].tolist()
        names += batch.captions
    out = [item for item in LatentCache(Path("data/latents")).items if item.split == "heldout"]
    assert set(names) == {item.caption for item in out} and len(losses) == 4 * len(out)
    assert heldout(lines)[3] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_patience_counts_snapshots_since_the_lowest() -> None:
    early_stop = EarlyStop(None, patience=2)  # type: ignore[arg-type]
    losses = [float("nan"), 3.0, 2.0, 2.5, 1.0, 1.0, float("nan")]
    assert [early_stop.should_stop(step, loss) for step, loss in enumerate(losses)] == [False] * 6 + [True]


def test_patience_is_recorded_only_if_set(encoded: Workspace) -> None:
    assert "early_stop_patience" not in train_params().recorded(set())
    assert train_params("early_stop_patience=2").recorded({"seed"})["early_stop_patience"] == 2
    with refused("patience-too-long", "--set train.early_stop_patience: got 3", "(3)"):
        train_params("early_stop_patience=3")


def test_early_stop_without_heldout_images_is_refused(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    split = LatentCache.split
    monkeypatch.setattr(LatentCache, "split", lambda self, name: split(self, name) if name == "train" else [])
    with refused("no-heldout-images", "train.early_stop_patience", "dataset.heldout_fraction"):
        encoded.run("train", *STOPPING)
    assert not Path("data/adapter").exists()


@pytest.mark.slow
def test_two_processes_stop_early_bit_identically(encoded: Workspace) -> None:
    argv = (*STOPPING, "--set", "train.gradient_accumulation_steps=2")
    assert encoded.process("train", *argv).returncode == 0
    alone = encoded.tree("data/adapter")
    os.environ["LORA_STATE_DIR"] += "-other"
    done = encoded.process("train", *argv, "--set", "runtime.num_processes=2")
    assert done.returncode == 0, done.stderr
    assert "early stop" in done.stdout and encoded.tree("data/adapter") == alone
