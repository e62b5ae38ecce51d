"""Previews of a training: images of its snapshots, and unchanged results of the training."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_dag.commands import preview
from lora_dag.core import seeding
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_tensors
from stages.train.run import Run
from tests.helpers.errors import refused
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import Workspace

Step = Callable[[Run, int], bool]
SETTINGS = ("--set", "lora.dropout=0.5", "--set", "train.learning_rate=0.05")


@pytest.fixture
def encoded(workspace: Workspace) -> Workspace:
    workspace.run("prepare")
    workspace.run("cache_latents")
    return workspace


@pytest.fixture
def begun(encoded: Workspace) -> Workspace:
    """Interrupt a training of four steps before step 3, with the snapshot of step 2."""
    with broken_off(3):
        encoded.run("train", *SETTINGS)
    return encoded


def previews() -> dict[str, Path]:
    return {path.name: path for path in sorted(Path(".state/previews").glob("*/*.png"))}


def by_stock_diffusers(snapshot: Path | None, prompt: str) -> np.ndarray:
    """Return an image of the snapshot, merged into the base by the formula at scale 1; uint8 [32, 32, 3]."""
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    tensors = load_tensors(snapshot) if snapshot else {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            pipeline.unet.get_submodule(name.removesuffix(".lora_A.weight")).weight.data += b @ a
    generator = seeding.generator(0, "sample", prompt)
    size = {"height": 32, "width": 32}
    return np.asarray(
        pipeline(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, **size).images[0]
    )


def test_a_snapshot_is_drawn_and_the_run_keeps_its_bytes(begun: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[Image.Image]] = []
    grid = preview.grid
    monkeypatch.setattr(preview, "grid", lambda images, *rest: drawn.append(images) or grid(images, *rest))
    before = begun.tree(".state/runs") | begun.tree("data")
    begun.run("preview", "--once")
    assert begun.tree(".state/runs") | begun.tree("data") == before
    assert list(previews()) == ["step-000000.png", "step-000002.png"]
    (snapshot,) = Path(".state/runs").glob("*/snapshots/*")
    for images, file in zip(drawn, (None, snapshot), strict=True):
        for image, prompt in zip(images, ("red apple", "blue boat"), strict=True):
            expected = by_stock_diffusers(file, prompt)
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2
    assert drawn[0][0].tobytes() != drawn[1][0].tobytes()


def test_preview_draws_new_snapshots_and_ends_with_the_training(
    begun: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training continues while the preview waits; its adapter equals that of a training without preview."""

    def goes_on(seconds: float) -> None:
        assert list(previews()) == ["step-000000.png", "step-000002.png"]
        assert begun.call("train", *SETTINGS)[-1].startswith("next")

    alive = iter([True, False])
    monkeypatch.setattr(preview.TrainingRun, "is_alive", lambda self: next(alive))
    monkeypatch.setattr(time, "sleep", goes_on)
    begun.run("preview")
    assert list(previews()) == ["step-000000.png", "step-000002.png", "step-000004.png"]
    adapter = begun.tree("data/adapter")
    monkeypatch.setenv("LORA_STATE_DIR", str(begun.path / "other"))
    begun.run("train", *SETTINGS)
    assert begun.tree("data/adapter") == adapter


def test_after_the_end_the_snapshots_of_data_adapter_are_drawn(encoded: Workspace) -> None:
    encoded.run("train", *SETTINGS)
    assert not list(Path(".state/runs").glob("*/snapshots"))
    encoded.run("preview", "--once")
    times = {name: path.stat().st_mtime_ns for name, path in previews().items()}
    assert list(times) == ["step-000000.png", "step-000002.png", "step-000004.png"]
    encoded.run("preview", "--once")
    assert {name: path.stat().st_mtime_ns for name, path in previews().items()} == times
    encoded.run("preview", "--once", "--set", "validate.seed=1")
    assert all(path.stat().st_mtime_ns > times[name] for name, path in previews().items()) and len(previews()) == 3


def test_the_newest_run_or_the_named_one(begun: Workspace) -> None:
    (first,) = Path(".state/runs").absolute().iterdir()
    time.sleep(0.01)
    begun.run("train", "--set", "train.num_steps=2")
    assert preview.find_run("").name != first.name and preview.find_run(first.name[:6]) == first
    training = preview.TrainingRun(first, Path("data/adapter"))
    assert list(training.snapshots()) == [2]  # data/adapter is the other's
    with refused("no-training", " zz", first.name):
        begun.run("preview", "--run", "zz")


def test_preview_without_a_training_is_refused(workspace: Workspace) -> None:
    with refused("no-training", "runs: ", "`dvc repro`", "`python -m stages.train`"):
        workspace.run("preview")
    assert not Path(".state").exists()


def test_a_run_of_another_base_is_refused(begun: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = Path(".state/runs").glob("*/inputs.json")
    inputs: dict[str, Any] = read_json(path)
    changed = inputs | {"base": inputs["base"] | {"unet": "0" * 64}}
    monkeypatch.setattr(preview.TrainingRun, "inputs", changed)
    with refused("base-changed", "another unet"):
        begun.run("preview", "--once")
    assert not previews()


def test_a_dead_process_is_no_training(begun: Workspace) -> None:
    (folder,) = Path(".state/runs").iterdir()
    assert preview.TrainingRun(folder, Path("data/adapter")).is_alive()  # this process broke it off
    (folder / "lock").write_text(f"{2**22 + 1} {platform.node()}")
    assert not preview.TrainingRun(folder, Path("data/adapter")).is_alive()
    (folder / "lock").write_text(f"{2**22 + 1} another.host")
    assert preview.TrainingRun(folder, Path("data/adapter")).is_alive()  # not to be known from here


@pytest.mark.parametrize("at", [8, -8])  # in the header, and in the numbers, which draw as if nothing were
def test_a_damaged_file_is_one_line_and_no_image(encoded: Workspace, at: int) -> None:
    encoded.run("train", *SETTINGS)
    path = Path("data/adapter/snapshots/step-000002.safetensors")
    whole = bytearray(path.read_bytes())
    whole[at] ^= 0xFF
    path.write_bytes(whole)
    with refused("snapshot-damaged", f"{path}: ", "`python -m stages.train`"):
        encoded.run("preview", "--once")
    assert set(previews()) == {"step-000000.png"}


def test_a_damaged_snapshot_of_a_living_run_is_one_line(begun: Workspace) -> None:
    (path,) = Path(".state/runs").glob("*/snapshots/*.safetensors")
    path.write_bytes(b"no snapshot")
    with refused("snapshot-damaged", f"{path}: "):
        begun.run("preview", "--once")


@pytest.mark.parametrize("text", ["[]", "{}", '{"lora": 5}'])
def test_inputs_of_another_kind_are_one_line(begun: Workspace, text: str) -> None:
    (path,) = Path(".state/runs").glob("*/inputs.json")
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{path}: "):
        begun.run("preview", "--once")
