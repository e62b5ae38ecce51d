"""Copies of smaller ranks: the nearest of their rank, as strong as the adapter, and in files that others load."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_dag.adapters import adapter_tensors, lora
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.formats.comfyui import reader
from stages.export import resize
from stages.export.params import rank_problems
from stages.export.source import Source
from tests.helpers.adapters import adapt, kind, predict, unet
from tests.helpers.errors import refused
from tests.helpers.workspace import Workspace

COPY = Path("data/export/resized/rank-2")
RESIZED = ("--set", "export.resized_ranks=[2]", "--set", "export.formats=[diffusers, comfyui]")
RSLORA: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"to_k": 3, "to_v": 1}, "alpha_pattern": {"to_v": 5.0}}


def layer_changes(denoiser: Any) -> dict[str, np.ndarray]:
    """What an adapter adds to the weights, float64 [out, in * kernel], by PEFT."""
    layers = {name: denoiser.get_submodule(name) for name in lora.target_names(denoiser)}
    return {name: layer.get_delta_weight(lora.NAME).double().flatten(1).numpy() for name, layer in layers.items()}


@torch.no_grad()
def copied(denoiser: Any, rank: int) -> Any:
    """A fresh denoiser with data/adapter's copy of this rank."""
    adapter = Adapter.load(Path("data/adapter"))
    svd = resize.factors(adapter_tensors.read(adapter, denoiser))
    nothing: Any = None
    source = Source(nothing, nothing, nothing, adapter, adapter.weights(Path("data/adapter")))
    copy = resize.resized(source, svd, rank)
    fresh = unet()
    lora.inject(fresh, copy.adapter.lora_config)
    lora.load(fresh, copy.weights)
    return fresh


@torch.no_grad()
@pytest.mark.parametrize("changes", [RSLORA | {"rank": 4}, {"rank": 4, "target_modules": ["to_q", "conv1"]}], ids=str)
def test_resized_layers_are_the_best_approximation_of_their_rank(workspace: Workspace, changes: dict[str, Any]) -> None:
    """Against numpy's SVD of the whole matrix, with the strength in it."""
    denoiser = adapt(workspace, **changes)
    fresh = copied(denoiser, 2)
    found = layer_changes(fresh)
    energies = {row["layer"]: row for row in energy_rows(denoiser, [2]) if row["rank"] == "2"}
    for name, whole in layer_changes(denoiser).items():
        kept = min(2, denoiser.get_submodule(name).r[lora.NAME])
        u, s, v = np.linalg.svd(whole)
        np.testing.assert_allclose(found[name], (u[:, :kept] * s[:kept]) @ v[:kept], atol=2e-6)
        layer = fresh.get_submodule(name)
        assert (layer.r[lora.NAME], layer.scaling[lora.NAME]) == (kept, 1.0)
        if kept < denoiser.get_submodule(name).r[lora.NAME]:
            assert float(energies[name]["energy"]) == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-5)
        else:
            assert name not in energies


def energy_rows(denoiser: Any, ranks: list[int]) -> list[dict[str, str]]:
    svd = resize.factors(adapter_tensors.read(Adapter.load(Path("data/adapter")), denoiser))
    return list(csv.DictReader(resize.energy_csv(svd, ranks).splitlines()))


@torch.no_grad()
def test_dora_keeps_the_length_of_every_row(workspace: Workspace) -> None:
    """Magnitudes stay; what is cut is the direction."""
    denoiser = adapt(workspace, rank=4, use_dora=True)
    fresh = copied(denoiser, 2)
    before, after = lora.state_dict(denoiser), lora.state_dict(fresh)
    for name in lora.target_names(denoiser):
        key = f"{name}.lora_magnitude_vector"
        assert torch.equal(after[key], before[key])
    assert 0 < (predict(fresh) - predict(denoiser)).abs().max() < (predict(unet()) - predict(denoiser)).abs().max()


def test_signs_are_fixed_and_untrained_layers_keep_all_energy() -> None:
    a, b = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.eye(12, 4)
    weights = {"x.lora_A.weight": a, "x.lora_B.weight": b, "y.lora_A.weight": a, "y.lora_B.weight": 0 * b}
    read: Any = type("Read", (), {"scalings": {"x": 0.5, "y": 1.0}, "weights": weights})
    found = resize.factors(read)
    again = resize.factors(type("Read", (), {"scalings": {"x": 0.5}, "weights": {n: -t for n, t in weights.items()}}))
    assert torch.equal(found["x"].u, again["x"].u)
    largest = found["x"].u.gather(0, found["x"].u.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(found["x"].u * found["x"].s @ found["x"].v, 0.5 * (b @ a).double(), atol=1e-12, rtol=0)
    assert found["y"].energy(1) == 1.0 and found["x"].energy(4) == pytest.approx(1.0)


def test_stage_writes_loadable_copies_and_logs_their_loss(workspace: Workspace) -> None:
    denoiser = adapt(workspace, rank=4, alpha=12.0, bias="lora_only")
    expected = predict(denoiser)
    lines = workspace.run("export", *RESIZED)
    first = workspace.tree("data/export") | workspace.tree("reports/export")
    assert {name for name in first if name.startswith("resized")} == {
        "resized/rank-2/comfyui/ink-icons.safetensors",
        "resized/rank-2/diffusers/pytorch_lora_weights.safetensors",
    }
    copy = predict(copied(denoiser, 2))
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipeline.load_lora_weights(COPY / "diffusers")
    torch.testing.assert_close(predict(pipeline.unet), copy, atol=1e-5, rtol=1e-5)
    fresh = unet()
    with reader.patched(fresh, COPY / "comfyui/ink-icons.safetensors") as unread:
        assert unread == []
        torch.testing.assert_close(predict(fresh), copy, atol=1e-5, rtol=1e-5)
    whole, small = (load_tensors(Path(folder) / "comfyui/ink-icons.safetensors") for folder in ("data/export", COPY))
    assert all(torch.equal(small[name], whole[name]) for name in whole if name.endswith("diff_b"))

    metrics = read_json(Path("reports/export/metrics.json"))
    rows = list(csv.DictReader(Path("reports/export/energy.csv").read_text().splitlines()))
    energies = [float(row["energy"]) for row in rows if row["rank"] == "2"]
    assert len(energies) == len(lora.target_names(denoiser)) == len(rows) / 2
    assert metrics["export.rank_2.energy_min"] == pytest.approx(min(energies), rel=1e-5)
    assert metrics["export.rank_2.energy_mean"] == pytest.approx(sum(energies) / len(energies), rel=1e-5)
    assert 0 < metrics["export.rank_2.relative_error"] < 1
    error = metrics["export.rank_2.max_abs_error"] / metrics["export.effect"]
    assert metrics["export.rank_2.relative_error"] == pytest.approx(error, rel=1e-4)
    assert (copy - expected).abs().max() > 1e-3
    assert any(line.startswith("rank 2      keeps 0.") for line in lines)
    assert load_metadata(COPY / "comfyui/ink-icons.safetensors")["ss_network_dim"] == "2"
    workspace.run("export", *RESIZED)
    assert workspace.tree("data/export") | workspace.tree("reports/export") == first


def test_rank_that_is_not_smaller_is_refused_before_and_after_training(workspace: Workspace) -> None:
    assert rank_problems([1, 7], kind(rank=8)) == []
    place = "--set export.resized_ranks"
    with refused("rank-too-high", f"{place}: 2 ", "rank 2"):
        workspace.run("check", *RESIZED)
    adapt(workspace)
    with refused("rank-too-high", f"{place}: 2 ", "rank 2"):
        workspace.run("export", *RESIZED)
    assert not Path("data/export").exists()
    with refused("value-twice", place, "2"):
        workspace.run("export", "--set", "export.resized_ranks=[2, 2]")
    with refused("wrong-value", place, "0", "greater than or equal to 1"):
        workspace.run("export", "--set", "export.resized_ranks=[0]")
    with refused("no-format-for-rank", "export.resized_ranks: merged", "comfyui, diffusers or peft"):
        workspace.run("export", "--set", "export.resized_ranks=[1]", "--set", "export.formats=[merged]")
    assert FINAL in workspace.tree("data/adapter")
