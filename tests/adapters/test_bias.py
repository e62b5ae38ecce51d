"""The three bias modes against the code of microsoft/LoRA, and the removal of deltas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch

from lora_dag.adapters import bias, lora
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, write_json
from lora_dag.core.tensors import load_metadata, load_tensors
from tests.helpers.adapters import fill, inject, load, predict
from tests.helpers.errors import assert_line
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import Workspace

MODES = ["none", "all", "lora_only"]


@pytest.fixture
def denoiser(tiny_base: Path) -> torch.nn.Module:
    return load(tiny_base)


# What loralib does


def in_loralib(denoiser: torch.nn.Module, targets: list[str], mode: str) -> torch.nn.Module:
    """Return the same base with loralib's layers of rank 2 and alpha 4, marked by loralib."""
    for name in targets:
        own = denoiser.get_submodule(name)
        layer = loralib.Linear(
            own.in_features, own.out_features, r=2, lora_alpha=4, bias=own.bias is not None, merge_weights=False
        )
        layer.weight.data = own.weight.data.clone()
        if own.bias is not None:
            layer.bias.data = own.bias.data.clone()
        denoiser.set_submodule(name, layer)
    loralib.mark_only_lora_as_trainable(denoiser, bias=mode)
    return denoiser


def theirs(name: str) -> str:
    """Return loralib's name of a parameter."""
    name = name.replace(".default.weight", "").replace(".base_layer.", ".")
    return name.replace("parametrizations.bias.0.delta", "bias")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target_modules", ["attention", "all-linear"])
def test_bias_modes_equal_loralib(tiny_base: Path, target_modules: str, mode: str) -> None:
    ours = load(tiny_base)
    trainable = inject(ours, target_modules=target_modules, bias=mode)
    oracle = in_loralib(load(tiny_base), lora.target_names(ours), mode)
    expected = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    assert {theirs(name) for name in trainable} == set(expected)

    fill(trainable)
    for name, parameter in trainable.items():
        other = expected[theirs(name)]
        other.data = other.data + parameter.data if name.endswith(".delta") else parameter.data.clone()
    torch.testing.assert_close(predict(ours), predict(oracle), atol=1e-5, rtol=1e-5)
    saved = {name.replace(bias.KEY, ".bias").removesuffix(".weight") for name in lora.state_dict(ours)}
    assert saved == set(loralib.lora_state_dict(oracle, bias=mode))


def test_number_of_trained_biases(tiny_base: Path) -> None:
    found = {}
    for mode in MODES:
        denoiser = load(tiny_base)
        inject(denoiser, bias=mode)
        found[mode] = set(bias.deltas(denoiser))
    base = load(tiny_base)
    every = {name.removesuffix(".bias") for name, _ in base.named_parameters() if name.endswith(".bias")}
    assert found["none"] == set()
    assert found["lora_only"] == {name for name in every if name.endswith("to_out.0")} and len(found["lora_only"]) == 8
    assert found["all"] == every and "conv_norm_out" in every and "conv_in" in every


class Traps(torch.nn.Module):
    """Module with names that only contain the word bias."""

    def __init__(self) -> None:
        super().__init__()
        self.rel_bias_table = torch.nn.Parameter(torch.ones(2))
        self.debias = torch.nn.Linear(2, 2)
        self.norm = torch.nn.LayerNorm(2, bias=False)
        self.masked = torch.nn.Module()
        self.masked.register_buffer("bias", torch.ones(2))
        self.bias_proj = torch.nn.Linear(2, 2, bias=False)


def test_only_parameters_named_bias_are_biases() -> None:
    assert bias.biased(Traps(), "all") == ["debias"]


# Deltas


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_deltas_are_float32_and_start_at_the_base(tiny_base: Path, mode: str, dtype: str) -> None:
    denoiser = load(tiny_base, dtype)
    base = predict(denoiser)
    trainable = inject(denoiser, bias=mode)
    lora.require_sound(denoiser, trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    assert {p.dtype for p in denoiser.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert torch.equal(predict(denoiser), base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_disabled_scaled_to_zero_and_deleted_are_bit_identical_to_the_base(
    tiny_base: Path, mode: str, dtype: str
) -> None:
    denoiser = load(tiny_base, dtype)
    base, names, digest = predict(denoiser), set(denoiser.state_dict()), lora.frozen_digest(denoiser)
    fill(inject(denoiser, bias=mode))
    adapted = predict(denoiser)
    assert not torch.equal(adapted, base) and lora.frozen_digest(denoiser) == digest
    with lora.disabled(denoiser):
        assert torch.equal(predict(denoiser), base)
    lora.set_scale(denoiser, 0)
    assert torch.equal(predict(denoiser), base)
    lora.set_scale(denoiser, 1)
    assert torch.equal(predict(denoiser), adapted)
    lora.delete(denoiser)
    assert torch.equal(predict(denoiser), base)
    assert set(denoiser.state_dict()) == names and lora.frozen_digest(denoiser) == digest


def test_the_scale_multiplies_the_delta(denoiser: torch.nn.Module) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    before = denoiser.get_submodule(name).bias.detach().clone()
    fill(inject(denoiser, bias="lora_only"))
    layer, delta = denoiser.get_submodule(name).base_layer, bias.deltas(denoiser)[name]
    lora.set_scale(denoiser, 0.25)
    torch.testing.assert_close(layer.bias, before + 0.25 * delta)


def test_small_deltas_are_not_lost_in_bfloat16(tiny_base: Path) -> None:
    """A step of 1e-4 on a bias of 1 vanishes when the bias itself is bfloat16."""
    denoiser = load(tiny_base, "bfloat16")
    denoiser.conv_in.bias.data.fill_(1)
    inject(denoiser, bias="all")
    delta = bias.deltas(denoiser)["conv_in"]
    for _ in range(100):
        delta.data += 1e-4
    assert denoiser.conv_in.bias.dtype == torch.bfloat16 and (denoiser.conv_in.bias > 1).all()


def test_biases_of_another_mode_do_not_load(tiny_base: Path) -> None:
    one, other = load(tiny_base), load(tiny_base)
    inject(one, bias="all")
    inject(other, bias="lora_only")
    with pytest.raises(ValueError, match=r"do not match the injected layers: \['conv_in.bias_delta'"):
        lora.load(other, lora.state_dict(one))


# Through the stages


def prepared(workspace: Workspace) -> None:
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_training_saves_deltas_mode_and_names(workspace: Workspace, tiny_base: Path, mode: str) -> None:
    prepared(workspace)
    lines = workspace.run("train", "--set", f"lora.bias={mode}", "--set", "train.num_steps=5")
    adapter = Adapter.load(Path("data/adapter"))
    denoiser = load(tiny_base)
    inject(denoiser, bias=mode)
    assert adapter.lora_config["bias"] == mode and adapter.biases == list(bias.deltas(denoiser))
    assert any(line.startswith(f"biases      {mode}: {len(adapter.biases)},") for line in lines)
    header = load_metadata(Path("data/adapter") / FINAL)
    assert header["bias"] == mode and json.loads(header["biases"]) == adapter.biases
    final = adapter.weights(Path("data/adapter"))
    assert all(final[name + bias.KEY].any() for name in adapter.biases)
    assert read_json(Path("reports/train/metrics.json"))["train.num_trainable_parameters"] == sum(
        tensor.numel() for tensor in final.values()
    )
    workspace.run("validate")


def test_a_killed_run_with_biases_is_bit_identical(workspace: Workspace, monkeypatch: Any) -> None:
    prepared(workspace)
    argv = ("--set", "lora.bias=all", "--set", "lora.use_dora=true")
    workspace.run("train", *argv)
    expected = workspace.tree("data/adapter")
    with broken_off(3):
        workspace.run("train", *argv)
    assert "resumed from step 2" in workspace.run("train", *argv)
    assert workspace.tree("data/adapter") == expected


def test_an_adapter_of_another_mode_is_refused(workspace: Workspace) -> None:
    prepared(workspace)
    workspace.run("train", "--set", "lora.bias=lora_only")
    path = Path("data/adapter/adapter.json")
    record = read_json(path)
    record["lora_config"]["bias"] = "none"
    write_json(path, record | {"biases": []})
    with pytest.raises(UserError) as caught:
        workspace.run("validate")
    (problem,) = caught.value.problems
    assert problem.startswith("data/adapter/snapshots/step-000002.safetensors: ") and "lora_only" in problem
    assert "data/adapter/adapter.json" in problem and "python -m stages.train" in problem


def test_a_bias_that_the_base_never_uses_is_a_warning(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    from stages.train.self_checks import GradientMonitor

    monitor = GradientMonitor({"unused.parametrizations.bias.0.delta": torch.nn.Parameter(torch.zeros(1))}, 1.0)
    for _ in range(4):
        monitor.note_gradients()
    monitor.check_end()
    assert_line("\n".join(caplog.messages), "no-gradient", "1 trained bias", "unused")


def test_without_biases_files_do_not_mention_them(workspace: Workspace) -> None:
    prepared(workspace)
    workspace.run("train")
    assert Adapter.load(Path("data/adapter")).biases == []
    assert load_metadata(Path("data/adapter") / FINAL) == {"format": "pt"}
    assert not any(name.endswith(bias.KEY) for name in load_tensors(Path("data/adapter") / FINAL))
