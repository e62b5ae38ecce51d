"""Several adapter files drawn together by stock diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_dag.commands import draw
from lora_dag.core.console import UserError
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.pages.sheets import cut
from tests.conftest import Workspace
from tests.helpers.adapters import adapt

SHEET = Path("compare/adapters.png")


@pytest.fixture
def files(workspace: Workspace) -> Workspace:
    """a.safetensors, b.safetensors with biases, and data/latents."""
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    for name, mode in (("a", "none"), ("b", "lora_only")):
        adapt(workspace, bias=mode)
        workspace.run("export", "--set", "export.formats=[diffusers]")
        shutil.copy("data/export/diffusers/pytorch_lora_weights.safetensors", f"{name}.safetensors")
    return workspace


def columns(count: int) -> list[list[bytes]]:
    """Pictures of each column."""
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


def test_one_file_at_full_strength_is_what_validate_draws(files: Workspace) -> None:
    files.run("draw", "b.safetensors")
    base, alone = columns(2)
    files.run("validate", "--set", "validate.scales=[1]")  # data/adapter is b
    with Image.open("reports/samples.png") as sheet:
        rows = cut(sheet.convert("RGB"), 2, 2, 128)
    expected = [np.asarray(row[1])[2:-2, 2:-2].astype(int) for row in rows]
    found = [np.frombuffer(cell, np.uint8).reshape(expected[0].shape).astype(int) for cell in alone]
    assert all(np.abs(one - other).max() <= 2 for one, other in zip(found, expected, strict=True))


def refusal(workspace: Workspace, *texts: str) -> str:
    with pytest.raises(UserError) as caught:
        workspace.run("draw", *texts)
    assert not SHEET.exists()
    (problem,) = caught.value.problems
    return problem


def test_what_cannot_be_drawn_is_named(files: Workspace) -> None:
    assert refusal(files, "a.safetensors:x") == (
        "a.safetensors:x: 'x' is no scale; expected FILE:SCALE, such as a.safetensors:0.8"
    )
    assert refusal(files, "none.safetensors:1") == "none.safetensors:1: no such file"
    Path("broken.safetensors").write_bytes(b"\0" * 100)
    assert "damaged, or no safetensors file" in refusal(files, "broken.safetensors:1")
    tensors, header = load_tensors(Path("a.safetensors")), load_metadata(Path("a.safetensors"))
    save_tensors(Path("c.safetensors"), tensors, header | {"lora_dag": '{"base": {"unet": "0"}}'})
    assert refusal(files, "c.safetensors") == (
        "c.safetensors: made with another unet than model.pretrained holds now; run `dvc repro`"
    )
    save_tensors(Path("d.safetensors"), tensors, header | {"lora_dag": '{"lora_config": {"algo": "loha"}}'})
    assert refusal(files, "d.safetensors") == (
        "d.safetensors: made with lora.algo loha, which diffusers does not load; use validate.scales"
    )
    save_tensors(Path("e.safetensors"), {"weight": next(iter(tensors.values()))}, {"format": "pt"})
    assert "diffusers does not load it" in refusal(files, "e.safetensors")


@pytest.mark.parametrize("scale", ["nan", "inf", "1e300", "-1001"])
def test_a_scale_that_draws_nothing(scale: str) -> None:
    with pytest.raises(UserError, match="is no scale; expected -1000 to 1000"):
        draw.read_entry(f"a.safetensors:{scale}")


def test_all_of_a_file_is_drawn_or_it_is_refused(workspace: Workspace) -> None:
    """diffusers drops what it has no names for, and says nothing."""
    adapt(workspace)
    workspace.run("export", "--set", "export.formats=[diffusers]")
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    own, export = (
        Path("data/adapter/adapter.safetensors"),
        Path("data/export/diffusers/pytorch_lora_weights.safetensors"),
    )
    draw.require_readable(pipeline.unet, [draw.Entry(export, (1.0,))])
    with pytest.raises(UserError, match=r"adapter.safetensors: the run's own file, which diffusers does not read; use"):
        draw.require_readable(pipeline.unet, [draw.Entry(export, (1.0,)), draw.Entry(own, (1.0,))])
    with pytest.raises(UserError, match=r"takes only 0 of 2,048 weights of its lora_A"):
        draw.load(pipeline, [draw.Entry(own, (1.0,))])
    more = {"lora_te_nowhere.lora_A.weight": torch.ones(2, 3)}
    save_tensors(Path("more.safetensors"), load_tensors(export) | more)
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    with pytest.raises(UserError, match=r"takes only 2,048 of 2,054 weights of its lora_A"):
        draw.load(pipeline, [draw.Entry(Path("more.safetensors"), (1.0,))])
    pipeline.unload_lora_weights()
    assert draw.load(pipeline, [draw.Entry(export, (1.0,))]) == ["adapter_0"]
