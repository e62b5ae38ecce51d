"""A denoiser that stays in its files' half precision gives the bits of one in float32, in every proof of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from lora_dag.adapters import compact
from lora_dag.core.params import FAMILIES, ModelParams
from lora_dag.families.protocol import load_family
from stages.export.source import Source
from tests.helpers.adapters import KINDS, adapt, adapt_family, algo
from tests.helpers.workspace import TINY, Workspace, write_params

CPU = torch.device("cpu")


def make_half_base(base: Path, family: str) -> None:
    """Write data/base with the float16 weights of a base, and settings for it."""
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float16)
    Path("data/base").unlink()
    pipeline.save_pretrained("data/base")
    write_params(Path("params.yaml"), TINY | {"model": {"dtype": "float32", "family": family}})


def run_twice(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, formats: str) -> None:
    """Export with a compact denoiser, then with a denoiser in float32, and compare all bytes."""
    converted: list[Any] = []
    convert = compact.convert
    monkeypatch.setattr(compact, "SMALL", 0)
    monkeypatch.setattr(compact, "convert", lambda module: converted.append(module) or convert(module))
    results = []
    for is_compact in (True, False):
        if not is_compact:
            monkeypatch.setattr(Source, "half_precision", None)
        workspace.run("export", "--set", f"export.formats=[{formats}]")
        results.append(workspace.tree("data/export") | workspace.tree("reports/export"))
    assert len(converted) == 1 and results[0] == results[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_of_every_family_have_the_bytes_of_float32(
    workspace: Workspace, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    make_half_base(bases[family], family)
    adapt_family(family)
    run_twice(workspace, monkeypatch, "comfyui, diffusers, peft, merged")


@pytest.mark.parametrize(
    ("changes", "formats"),
    [
        (KINDS["dora"] | {"bias": "all"}, "comfyui, merged"),
        ({"bias": "lora_only"}, "diffusers, peft, comfyui"),
        (algo("lokr"), "peft, comfyui, merged"),
    ],
    ids=["dora", "biases", "lokr"],
)
def test_exports_of_every_kind_have_the_bytes_of_float32(
    workspace: Workspace, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], formats: str
) -> None:
    make_half_base(tiny_base, "sd")
    adapt(workspace, **changes)
    run_twice(workspace, monkeypatch, formats)


def test_large_weights_take_two_bytes_each(workspace: Workspace, tiny_base: Path) -> None:
    make_half_base(tiny_base, "sd")
    family = load_family("sd")
    model = ModelParams(family="sd", pretrained="data/base", variant=None, dtype="float32", quantization=None)
    module = compact.load(model, "unet", CPU, "float16")
    sizes = [parameter.numel() for parameter in family.load_denoiser(model, CPU).parameters()]
    small = sum(size for size in sizes if size <= compact.SMALL)
    assert sum(parameter.nbytes for parameter in module.parameters()) <= 2 * sum(sizes) + 2 * small
    assert {module.get_submodule("conv_in").weight.dtype, module.conv_norm_out.weight.dtype} == {torch.float32}


def test_a_component_with_computed_buffers_is_loaded_in_float32(
    workspace: Workspace, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_half_base(tiny_base, "sd")
    model = ModelParams(family="sd", pretrained="data/base", variant=None, dtype="float32", quantization=None)
    load = compact.common.load_frozen

    def with_buffer(*args: Any) -> Any:
        module = load(*args)
        module.register_buffer("frequencies", torch.ones(2), persistent=False)
        return module

    monkeypatch.setattr(compact.common, "load_frozen", with_buffer)
    assert compact.load(model, "unet", CPU, "float16") is None
