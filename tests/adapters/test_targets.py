"""Presets, endings, regexes and patterns on the tiny UNet, and the problems of those that match nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dag.adapters import lora
from lora_dag.adapters.targets import plan_lines
from lora_dag.core.console import UserError
from lora_dag.core.params import load as load_params
from tests.helpers.adapters import inject, load, params, refusal
from tests.helpers.errors import refused
from tests.helpers.workspace import REPOSITORY


@pytest.fixture
def denoiser(tiny_base: Path) -> torch.nn.Module:
    return load(tiny_base)


def names(denoiser: torch.nn.Module, kind: type) -> set[str]:
    return {name for name, module in denoiser.named_modules() if isinstance(module, kind)}


def test_presets_choose_the_layers_of_their_names(tiny_base: Path) -> None:
    linear, conv = names(load(tiny_base), torch.nn.Linear), names(load(tiny_base), torch.nn.Conv2d)
    attention = {name for name in linear if ".attn" in name}
    expected = {
        "attention": attention,
        "attention+ff": attention | {name for name in linear if ".ff." in name},
        "all-linear": linear,
        "all-linear+conv": linear | conv - {"conv_in", "conv_out"},
    }
    assert len({len(found) for found in expected.values()}) == 4
    for preset, found in expected.items():
        denoiser = load(tiny_base)
        inject(denoiser, target_modules=preset)
        assert set(lora.target_names(denoiser)) == found, preset


def test_attention_equals_the_demos_list(denoiser: torch.nn.Module, tiny_base: Path) -> None:
    other = load(tiny_base)
    inject(denoiser, target_modules="attention")
    inject(other)
    expected = lora.state_dict(other)
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in lora.state_dict(denoiser).items())
    assert not expected


def test_a_regex_matches_whole_names(denoiser: torch.nn.Module) -> None:
    inject(denoiser, target_modules=r"down_blocks\..*attn2\.to_[kv]")
    found = lora.target_names(denoiser)
    assert found and all(name.startswith("down_blocks") and "attn2.to_" in name for name in found)


def test_excluded_endings_are_left_out(denoiser: torch.nn.Module) -> None:
    inject(denoiser, target_modules=["to_q", "to_v"], exclude_modules=["attn1.to_q"])
    found = lora.target_names(denoiser)
    assert {".".join(name.split(".")[-2:]) for name in found} == {"attn2.to_q", "attn1.to_v", "attn2.to_v"}


def test_patterns_change_rank_and_alpha_of_their_layers_only(denoiser: torch.nn.Module) -> None:
    inject(denoiser, rank_pattern={"attn2.to_k": 8}, alpha_pattern={"to_v": 1.0})
    for name in lora.target_names(denoiser):
        layer = denoiser.get_submodule(name)
        rank, alpha = 8 if name.endswith("attn2.to_k") else 2, 1.0 if name.endswith("to_v") else 4.0
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
        assert len(layer.lora_A["default"].weight) == rank and layer.scaling["default"] == alpha / rank


def test_alpha_null_gives_each_layer_a_strength_of_one(denoiser: torch.nn.Module) -> None:
    inject(denoiser, alpha=None, rank_pattern={"attn2.to_k": 8}, alpha_pattern={"to_v": 1.0})
    for name in lora.target_names(denoiser):
        expected = 0.5 if name.endswith("to_v") else 1.0
        assert denoiser.get_submodule(name).scaling["default"] == expected, name


def test_alpha_null_under_rslora_is_the_root_of_the_rank(denoiser: torch.nn.Module) -> None:
    inject(denoiser, alpha=None, rank_pattern={"to_k": 16}, use_rslora=True)
    for name in lora.target_names(denoiser):
        strength = 4 if name.endswith("to_k") else 2**0.5
        assert denoiser.get_submodule(name).scaling["default"] == pytest.approx(strength), name


def test_overlapping_patterns_are_refused(denoiser: torch.nn.Module) -> None:
    patterns = {"rank_pattern": {"to_k": 4}, "alpha_pattern": {"attn2.to_k": 2.0}}
    keys = ("'to_k'", "'attn2.to_k'")
    with refused("patterns-overlap", "params.yaml lora.alpha_pattern: ", *keys, "lora.alpha null", "rank_pattern"):
        lora.make_config(params(alpha=None, **patterns), denoiser)
    with refused("patterns-overlap", "params.yaml lora.rank_pattern: ", *keys):
        lora.make_config(params(alpha=None, rank_pattern={"to_k": 4, "attn2.to_k": 3}), denoiser)
    with refused("no-layer-matches", "params.yaml lora.rank_pattern: 'to_w'"):
        lora.make_config(params(alpha=None, rank_pattern={"to_w": 4}), denoiser)


def test_settings_at_their_default_are_not_recorded(denoiser: torch.nn.Module) -> None:
    """An adapter.json from before these options equals a current one."""
    assert set(lora.make_config(params(), denoiser)) == {
        "r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"target_modules": "atention"}, "no-layer-matches", ["target_modules: 'atention'", "UNet2D", "attention"]),
        ({"target_modules": "to_q"}, "no-layer-matches", ["target_modules: 'to_q'", "UNet2D", ": to_q", "list"]),
        ({"exclude_modules": ["to_kk"]}, "no-layer-matches", ["exclude_modules: 'to_kk'", "targets", ": to_k"]),
        ({"exclude_modules": ["conv1"]}, "no-layer-matches", ["exclude_modules: 'conv1'", "targets", "Near: "]),
        ({"rank_pattern": {"to_w": 4}}, "no-layer-matches", ["rank_pattern: 'to_w'", "targets", ": to_"]),
        ({"alpha_pattern": {"conv1": 4.0}}, "no-layer-matches", ["alpha_pattern: 'conv1'", "targets", "Near: "]),
        ({"rank_pattern": {"attn2.to_k": 33}}, "rank-too-high", ["rank_pattern.attn2.to_k: got 33", "'to_k'", "32"]),
        ({"rank_pattern": {"to_k": 3, "attn2.to_k": 4}}, "patterns-overlap", ["rank_pattern: 'to_k' and 'attn2.to_k'"]),
        ({"target_modules": ["conv_out"], "rank": 5}, "rank-too-high", ["rank: got 5", "'conv_out'", "4"]),
        ({"target_modules": ["to_q"], "exclude_modules": ["to_q"]}, "no-targets-left", ["exclude_modules: "]),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_layers_are_refused_by_name(
    denoiser: torch.nn.Module, changes: dict[str, Any], code: str, values: list[str]
) -> None:
    with refused(code, f"params.yaml lora.{values[0]}", *values):
        lora.make_config(params(**changes), denoiser)


def test_a_target_that_is_the_ending_of_another_layer_is_refused() -> None:
    model = torch.nn.Module()
    model.proj_out, model.block = torch.nn.Linear(8, 8), torch.nn.Module()
    model.block.proj_out = torch.nn.Linear(8, 8)
    with refused("targets-inseparable", "params.yaml lora.target_modules: ", " proj_out ", "Add block.proj_out"):
        lora.make_config(params(target_modules="proj_out"), model)
    assert lora.make_config(params(target_modules=r"block\.proj_out"), model)["target_modules"] == ["block.proj_out"]


def test_rank_of_a_convolution_is_limited_by_its_kernels_inputs(denoiser: torch.nn.Module) -> None:
    assert lora.make_config(params(target_modules=["conv_in"], rank=32), denoiser)["r"] == 32  # 4 channels x 3 x 3 = 36
    assert refusal(denoiser, target_modules=["conv_in"], rank=33)


@pytest.mark.parametrize("change", ["lora.target_modules='to_(q'", "lora.rank_pattern={'to_(q': 4}"])
def test_an_invalid_regex_is_refused(change: str) -> None:
    with refused("no-regex", f"--set {change.split('=')[0]}", "'to_(q'", "unterminated subpattern at position 3"):
        load_params(REPOSITORY / "params.yaml", [change])


@pytest.mark.parametrize("change", ["lora.target_modules=[]", "lora.target_modules=5", "lora.rank_pattern={to_q: 0}"])
def test_values_of_another_type_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=change.split("=")[0]):
        load_params(REPOSITORY / "params.yaml", [change])


def test_plan_lines_count_sixteen_bytes_per_parameter() -> None:
    targets, memory = plan_lines(["a.to_q", "b.to_q", "b.to_out.0"], 1_000_000, 50_000_000)
    assert targets == "targets     1 to_out.0, 2 to_q"
    assert memory.startswith("memory      16.0 MB for adapter") and "full fine-tuning: 800.0 MB" in memory
