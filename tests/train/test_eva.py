"""EVA against a full SVD of the layers' inputs: deterministic, with errors where it is impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dag.adapters import lora
from lora_dag.artifacts.adapter import Adapter
from lora_dag.core.console import UserError
from lora_dag.families import sd
from stages.train import eva
from stages.train.batches import Batch
from tests.helpers.adapters import inject, load, predict
from tests.helpers.errors import assert_problem, refused
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import Workspace


@pytest.fixture
def denoiser(tiny_base: Path) -> torch.nn.Module:
    return load(tiny_base)


def batch(seed: int, embeds: torch.Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    if embeds is None:
        embeds = torch.randn(2, 40, 32, generator=generator) * torch.linspace(2, 0.1, 32)
    timesteps = torch.randint(1000, (2,), generator=generator)
    return Batch(latents, latents, latents, timesteps, ["", ""], {"prompt_embeds": embeds}, torch.ones(2), None)


def start(denoiser: Any, *batches: Batch) -> int:
    return eva.initialize(denoiser, list(batches), lambda b: sd.predict(denoiser, b.latents, b.timesteps, b.prompt))


def inputs_of(denoiser: Any, names: list[str], batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Return each layer's inputs for all batches, [rows, in]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        denoiser.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen[name].append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for b in batches:
            sd.predict(denoiser, b.latents, b.timesteps, b.prompt)
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def test_eva_spans_the_directions_of_most_variance(denoiser: torch.nn.Module, tiny_base: Path) -> None:
    """Paischer et al. 2024 (arXiv:2410.07170), section 3: right singular vectors of the inputs, here all at once."""
    batches = [batch(seed) for seed in range(4)]
    targets = ["attn1.to_q", "attn1.to_k", "attn2.to_k", "to_out.0"]
    inject(denoiser, target_modules=targets, rank_pattern={"attn1.to_k": 4})
    base = predict(denoiser)
    assert start(denoiser, *batches) >= 4
    assert torch.equal(predict(denoiser), base)
    for name, rows in inputs_of(load(tiny_base), lora.target_names(denoiser), batches).items():
        layer = denoiser.get_submodule(name)
        a = layer.lora_A[lora.NAME].weight.detach().double()  # [rank, in]
        assert len(a) == (4 if name.endswith("attn1.to_k") else 2)
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)).double(), atol=1e-5, rtol=0)
        centered = rows - rows.mean(0)
        best = torch.linalg.svdvals(centered)[: len(a)].square().sum()
        kept = (centered @ a.T).square().sum()
        assert best * 0.97 < kept <= best * 1.0001, name
        assert not layer.lora_B[lora.NAME].weight.any()


def test_eva_is_deterministic(tiny_base: Path) -> None:
    found = []
    for seed in (1, 2):
        denoiser = load(tiny_base)
        inject(denoiser, target_modules=["to_q", "attn2.to_k"])
        torch.manual_seed(seed)
        start(denoiser, batch(0), batch(1))
        found.append(lora.state_dict(denoiser))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_eva_keeps_convolutions_and_dropout(tiny_base: Path) -> None:
    one, other = load(tiny_base), load(tiny_base)
    for denoiser in (one, other):
        inject(denoiser, target_modules=["to_q", "conv1"], dropout=0.5, init_lora_weights="eva")
    start(one, batch(0), batch(1))
    ours, kept = lora.state_dict(one), lora.state_dict(other)
    changed = {name.split(".")[-3] for name, tensor in ours.items() if not torch.equal(tensor, kept[name])}
    assert changed == {"to_q"}
    dropouts = [m for m in one.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.5]
    assert dropouts and all(module.training for module in dropouts) and not one.training


def test_layers_that_eva_cannot_use_are_refused(denoiser: torch.nn.Module, tiny_base: Path, monkeypatch: Any) -> None:
    inject(denoiser, target_modules=["to_q", "linear_1", "time_emb_proj"], rank_pattern={"to_q": 17}, bias="all")
    with pytest.raises(UserError) as caught:
        start(denoiser, batch(0))
    for layer, count in (("linear_1", "2 inputs"), ("time_emb_proj", "2 inputs"), ("to_q", "32 features")):
        place = f"params.yaml lora.init_lora_weights: '{layer}'"
        assert_problem(caught.value, "eva-too-few-inputs", place, count, "rank 17", "lora.exclude_modules")
    assert len(caught.value.problems) == 3

    convolutions, same = load(tiny_base), load(tiny_base)
    inject(convolutions, target_modules=["conv1"])
    with refused("eva-needs-linear-layers", "lora.init_lora_weights", "kaiming"):
        start(convolutions, batch(0))
    monkeypatch.setattr(eva, "MAX_PASSES", 3)
    inject(same, target_modules=["attn2.to_k"])
    with refused("eva-not-converged", "lora.init_lora_weights", "to_k", "lora.exclude_modules", "kaiming"):
        start(same, *(batch(seed) for seed in range(9)))


def test_a_killed_run_with_eva_is_bit_identical(workspace: Workspace) -> None:
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    argv = ("--set", "lora.init_lora_weights=eva", "--set", "train.gradient_accumulation_steps=2")
    with broken_off(1):  # before the first checkpoint: the next run starts anew
        workspace.run("train", *argv)
    assert any(line.startswith("eva         converged after ") for line in workspace.run("train", *argv))
    expected = workspace.tree("data/adapter")
    with broken_off(3):
        workspace.run("train", *argv)
    lines = workspace.run("train", *argv)
    assert "resumed from step 2" in lines and not any(line.startswith("eva") for line in lines)
    assert workspace.tree("data/adapter") == expected
    config = lora.peft_config(Adapter.load(Path("data/adapter")).lora_config)
    assert config.init_lora_weights is True and config.eva_config is None  # for those who load it
