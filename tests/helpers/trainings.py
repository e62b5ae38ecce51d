"""Trainings in the workspace: undisturbed, interrupted by a test, or started by another program; and their outputs."""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lora_dag.artifacts.adapter import FINAL
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.core import params
from lora_dag.core.console import Problem, UserError
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_tensors
from lora_dag.families import sd
from stages.train.batches import Batch, Batches
from stages.train.noising import make_timesteps
from stages.train.run import Run
from tests.helpers.caches import write_mixed_cache
from tests.helpers.settings import train_params
from tests.helpers.workspace import TINY, Workspace, make_image, write_params, write_rows

LONG = ("--set", "train.num_steps=6", "--set", "lora.dropout=0.25", "--set", "train.prompt_dropout=0.5")
"""Six steps with everything random in them."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Return a folder where prepare, cache_latents and ``train LONG`` ran undisturbed."""
    folder = tmp_path_factory.mktemp("reference")
    write_params(folder / "params.yaml", TINY)
    (folder / "data/raw").mkdir(parents=True)
    for index in range(8):
        make_image(index).save(folder / f"data/raw/{index:02}.png")
    write_rows(folder / "data/raw", [{"file_name": f"{i:02}.png", "text": f"thing {i}"} for i in range(8)])
    (folder / "data/base").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_STATE_DIR", str(folder / ".state"))
        for stage, argv in (("prepare", ()), ("cache_latents", ()), ("train", LONG)):
            patch.setattr(sys, "argv", [stage, *argv])
            importlib.import_module(f"stages.{stage}.__main__").main()
    return folder


@pytest.fixture
def encoded(workspace: Workspace, reference: Path) -> Workspace:
    """Return the workspace with data/prepared and data/latents."""
    for name in ("prepared", "latents"):
        shutil.copytree(reference / "data" / name, workspace.path / "data" / name)
    return workspace


@pytest.fixture
def interrupt(workspace: Workspace) -> Callable[..., None]:
    """Return a function: ``interrupt(3, *argv)`` runs train and interrupts it instead of step 3."""

    def train(at: int, *argv: str) -> None:
        with broken_off(at):
            workspace.run("train", *argv)

    return train


def history() -> list[dict[str, float]]:
    with Path("reports/train/loss.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def outputs(workspace: Workspace) -> dict[str, bytes]:
    """Return the files that DVC or git track; run.json, with time and speed, is empty."""
    return workspace.tree("data/adapter") | workspace.tree("reports/train") | {"run.json": b""}


def squared_errors(batch: Batch, index: int) -> torch.Tensor:
    """Return the base's squared errors for one image of a batch, float64 [C, h, w], with v of Salimans & Ho 2022."""
    model = params.load(Path("params.yaml")).section(ModelParams)
    denoiser, t = sd.load_denoiser(model, torch.device("cpu")), batch.timesteps[index : index + 1]
    signal = sd.load_scheduler(model).alphas_cumprod[int(t)].double()
    latents, noise = batch.latents[index].double(), batch.noise[index].double()
    noisy_latents = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).float()[None]
    prompt = {name: tensor[index : index + 1] for name, tensor in batch.prompt.items()}
    with torch.no_grad():
        model_pred = sd.predict(denoiser, noisy_latents, t, prompt)[0].double()
    return (model_pred - (signal.sqrt() * noise - (1 - signal).sqrt() * latents)).square()


def weights() -> dict[str, torch.Tensor]:
    return load_tensors(Path("data/adapter") / FINAL)


def refusal(workspace: Workspace, *argv: str) -> Problem:
    """Return the only problem of a training, which must write nothing."""
    with pytest.raises(UserError) as caught:
        workspace.run("train", *argv)
    assert not Path("data/adapter").exists() and not Path("reports/train").exists()
    (problem,) = caught.value.problems
    return problem


def batches(cache: LatentCache, accumulation: int = 1) -> Batches:
    """Return batches with the tiny settings."""
    from diffusers import DDPMScheduler

    settings = train_params("batch_size=2", f"gradient_accumulation_steps={accumulation}")
    timesteps = make_timesteps(settings, DDPMScheduler(1000))
    return Batches(cache, cache.split("train"), settings, timesteps, torch.device("cpu"))


@pytest.fixture
def mixed(workspace: Workspace) -> Workspace:
    """Return the workspace with latents of three shapes."""
    write_mixed_cache()
    return workspace


@contextlib.contextmanager
def broken_off(at: int) -> Iterator[None]:
    """Interrupt a training inside the block instead of step ``at``; fail if there is none."""
    from stages.train import loop

    original = loop.training_step

    def training_step(run: Run, step: int) -> bool:
        if step == at:
            raise KeyboardInterrupt
        return original(run, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "training_step", training_step)
        yield


@contextlib.contextmanager
def signalled(at: int, number: signal.Signals) -> Iterator[None]:
    """Send a signal to the training inside the block before step ``at``."""
    from stages.train import loop

    original = loop.training_step

    def training_step(run: Run, step: int) -> bool:
        if step == at:
            os.kill(os.getpid(), number)
        return original(run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", training_step)
        yield


def process_with(variable: str) -> int:
    """Return the process id of the ``stages.train`` with ``NAME=value`` in its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"-m", b"stages.train"] and variable.encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process trains with {variable}")
