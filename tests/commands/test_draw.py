"""Several adapter files on one sheet, compared with diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_dag.commands import draw
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.pages.sheets import cut
from tests.helpers.adapters import adapt
from tests.helpers.errors import refused
from tests.helpers.workspace import Workspace

SHEET = Path("compare/adapters.png")


@pytest.fixture
def files(workspace: Workspace) -> Workspace:
    """Write a.safetensors, b.safetensors with biases, and data/latents."""
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    for name, mode in (("a", "none"), ("b", "lora_only")):
        adapt(workspace, bias=mode)
        workspace.run("export", "--set", "export.formats=[diffusers]")
        shutil.copy("data/export/diffusers/pytorch_lora_weights.safetensors", f"{name}.safetensors")
    return workspace


def columns(count: int) -> list[list[bytes]]:
    """Return the images of each column."""
    with Image.open(SHEET) as sheet:
        rows = cut(sheet.convert("RGB"), 2, count, 128)
    return [[np.asarray(cell)[2:-2, 2:-2].tobytes() for cell in column] for column in zip(*rows, strict=True)]


def test_every_combination_of_the_scales_is_a_column(files: Workspace) -> None:
    reports = files.tree("reports")
    lines = files.run("draw", "a.safetensors:0,1", "b.safetensors:0,0.5")
    drawn = ["a 0, b 0", "a 0, b 0.5", "a 1, b 0", "a 1, b 0.5"]
    assert [line.removeprefix("drawn       ") for line in lines if line.startswith("drawn")] == drawn
    base, neither, second, first, both = columns(5)
    assert base == neither
    assert len({tuple(column) for column in (base, first, second, both)}) == 4
    assert files.tree("reports") == reports


def test_one_file_at_scale_1_equals_the_samples_of_validate(files: Workspace) -> None:
    files.run("draw", "b.safetensors")
    base, alone = columns(2)
    files.run("validate", "--set", "validate.scales=[1]")  # data/adapter is b
    with Image.open("reports/samples.png") as sheet:
        rows = cut(sheet.convert("RGB"), 2, 2, 128)
    expected = [np.asarray(row[1])[2:-2, 2:-2].astype(int) for row in rows]
    found = [np.frombuffer(cell, np.uint8).reshape(expected[0].shape).astype(int) for cell in alone]
    assert all(np.abs(one - other).max() <= 2 for one, other in zip(found, expected, strict=True))


def test_files_that_cannot_be_drawn(files: Workspace) -> None:
    def check(text: str, code: str, *values: str) -> None:
        with refused(code, *values):
            files.run("draw", text)
        assert not SHEET.exists()

    check("a.safetensors:x", "invalid-scale", "a.safetensors:x: got 'x'", "a.safetensors:0.8")
    check("none.safetensors:1", "file-missing", "none.safetensors: ")
    Path("broken.safetensors").write_bytes(b"\0" * 100)
    check("broken.safetensors:1", "adapter-damaged", "broken.safetensors")
    tensors, header = load_tensors(Path("a.safetensors")), load_metadata(Path("a.safetensors"))
    save_tensors(Path("c.safetensors"), tensors, header | {"lora_dag": '{"base": {"unet": "0"}}'})
    check("c.safetensors", "base-changed", "c.safetensors", "unet", "`dvc repro`")
    save_tensors(Path("d.safetensors"), tensors, header | {"lora_dag": '{"lora_config": {"algo": "loha"}}'})
    check("d.safetensors", "adapter-not-loadable", "d.safetensors", "lora.algo loha", "validate.scales")
    save_tensors(Path("e.safetensors"), {"weight": next(iter(tensors.values()))}, {"format": "pt"})
    check("e.safetensors", "adapter-not-loadable", "e.safetensors")


@pytest.mark.parametrize("scale", ["nan", "inf", "1e300", "-1001"])
def test_a_scale_out_of_range_is_refused(scale: str) -> None:
    with refused("invalid-scale", f"a.safetensors:{scale}", "-1000 to 1000"):
        draw.parse_entry(f"a.safetensors:{scale}")


def test_a_partly_loaded_file_is_refused(workspace: Workspace) -> None:
    """diffusers silently ignores tensors whose names it does not know."""
    adapt(workspace)
    workspace.run("export", "--set", "export.formats=[diffusers]")
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    own, export = (
        Path("data/adapter/adapter.safetensors"),
        Path("data/export/diffusers/pytorch_lora_weights.safetensors"),
    )
    draw.require_readable(pipeline.unet, [draw.ScaledFile(export, (1.0,))])
    with refused("adapter-not-exported", str(own), "data/export"):
        draw.require_readable(pipeline.unet, [draw.ScaledFile(export, (1.0,)), draw.ScaledFile(own, (1.0,))])
    with refused("adapter-not-loadable", str(own), " 0 of the 2,048 weights"):
        draw.load_adapters(pipeline, [draw.ScaledFile(own, (1.0,))])
    more = {"lora_te_nowhere.lora_A.weight": torch.ones(2, 3)}
    save_tensors(Path("more.safetensors"), load_tensors(export) | more)
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    with refused("adapter-not-loadable", "more.safetensors", " 2,048 of the 2,054 weights"):
        draw.load_adapters(pipeline, [draw.ScaledFile(Path("more.safetensors"), (1.0,))])
    pipeline.unload_lora_weights()
    assert draw.load_adapters(pipeline, [draw.ScaledFile(export, (1.0,))]) == ["adapter_0"]
