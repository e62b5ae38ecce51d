"""Several adapter files drawn together by stock diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.core.console import UserError
from stages.core.files import load_metadata, load_tensors, save_tensors
from stages.core.sheets import cut
from tests.conftest import Workspace
from tests.test_formats import adapt

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
    lines = files.run("validate", "--adapters", "a.safetensors:0,1", "b.safetensors:0,0.5")
    drawn = ["a 0, b 0", "a 0, b 0.5", "a 1, b 0", "a 1, b 0.5"]
    assert [line.removeprefix("drawn       ") for line in lines if line.startswith("drawn")] == drawn
    base, neither, second, first, both = columns(5)
    assert base == neither
    assert len({tuple(column) for column in (base, first, second, both)}) == 4
    assert files.tree("reports") == reports


def test_one_file_at_full_strength_is_what_validate_draws(files: Workspace) -> None:
    files.run("validate", "--adapters", "b.safetensors")
    base, alone = columns(2)
    files.run("validate", "--set", "validate.scales=[1]")  # data/adapter is b
    with Image.open("reports/samples.png") as sheet:
        rows = cut(sheet.convert("RGB"), 2, 2, 128)
    expected = [np.asarray(row[1])[2:-2, 2:-2].astype(int) for row in rows]
    found = [np.frombuffer(cell, np.uint8).reshape(expected[0].shape).astype(int) for cell in alone]
    assert all(np.abs(one - other).max() <= 2 for one, other in zip(found, expected, strict=True))


def refusal(workspace: Workspace, *texts: str) -> str:
    with pytest.raises(UserError) as caught:
        workspace.run("validate", "--adapters", *texts)
    assert not SHEET.exists()
    (problem,) = caught.value.problems
    return problem


def test_what_cannot_be_drawn_is_named(files: Workspace) -> None:
    assert refusal(files, "a.safetensors:x") == (
        "--adapters a.safetensors:x: 'x' is no scale; expected FILE:SCALE, such as a.safetensors:0.8"
    )
    assert refusal(files, "none.safetensors:1") == "--adapters none.safetensors:1: no such file"
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
