"""Presets, endings, regexes and patterns on the tiny UNet, and what is said of those that match nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dag.adapters import lora
from lora_dag.adapters.targets import plan
from lora_dag.core.console import UserError
from lora_dag.core.params import load as load_params
from tests.conftest import REPOSITORY
from tests.helpers.adapters import inject, load, params


@pytest.fixture
def denoiser(tiny_base: Path) -> torch.nn.Module:
    return load(tiny_base)


def names(denoiser: torch.nn.Module, kind: type) -> set[str]:
    return {name for name, module in denoiser.named_modules() if isinstance(module, kind)}


def test_presets_are_what_their_names_say(tiny_base: Path) -> None:
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
        assert set(lora.targets(denoiser)) == found, preset


def test_attention_is_the_demos_list(denoiser: torch.nn.Module, tiny_base: Path) -> None:
    other = load(tiny_base)
    inject(denoiser, target_modules="attention")
    inject(other)
    expected = lora.state_dict(other)
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in lora.state_dict(denoiser).items())
    assert not expected


def test_a_regex_is_over_whole_names(denoiser: torch.nn.Module) -> None:
    inject(denoiser, target_modules=r"down_blocks\..*attn2\.to_[kv]")
    found = lora.targets(denoiser)
    assert found and all(name.startswith("down_blocks") and "attn2.to_" in name for name in found)


def test_excluded_endings_are_left_out(denoiser: torch.nn.Module) -> None:
    inject(denoiser, target_modules=["to_q", "to_v"], exclude_modules=["attn1.to_q"])
    found = lora.targets(denoiser)
    assert {".".join(name.split(".")[-2:]) for name in found} == {"attn2.to_q", "attn1.to_v", "attn2.to_v"}


def test_patterns_change_rank_and_alpha_of_their_layers_alone(denoiser: torch.nn.Module) -> None:
    inject(denoiser, rank_pattern={"attn2.to_k": 8}, alpha_pattern={"to_v": 1.0})
    for name in lora.targets(denoiser):
        layer = denoiser.get_submodule(name)
        rank, alpha = 8 if name.endswith("attn2.to_k") else 2, 1.0 if name.endswith("to_v") else 4.0
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
        assert len(layer.lora_A["default"].weight) == rank and layer.scaling["default"] == alpha / rank


def test_alpha_null_gives_each_layer_a_strength_of_one(denoiser: torch.nn.Module) -> None:
    inject(denoiser, alpha=None, rank_pattern={"attn2.to_k": 8}, alpha_pattern={"to_v": 1.0})
    for name in lora.targets(denoiser):
        expected = 0.5 if name.endswith("to_v") else 1.0
        assert denoiser.get_submodule(name).scaling["default"] == expected, name


def test_alpha_null_under_rslora_is_the_root_of_the_rank(denoiser: torch.nn.Module) -> None:
    inject(denoiser, alpha=None, rank_pattern={"to_k": 16}, use_rslora=True)
    for name in lora.targets(denoiser):
        strength = 4 if name.endswith("to_k") else 2**0.5
        assert denoiser.get_submodule(name).scaling["default"] == pytest.approx(strength), name


def test_an_alpha_that_a_layer_would_have_from_two_patterns_is_named(denoiser: torch.nn.Module) -> None:
    patterns = {"rank_pattern": {"to_k": 4}, "alpha_pattern": {"attn2.to_k": 2.0}}
    (problem,) = refusal(denoiser, alpha=None, **patterns)
    assert problem.startswith("params.yaml lora.alpha_pattern: 'to_k' and 'attn2.to_k' both match ")
    assert problem.endswith("; with lora.alpha null, 'to_k' of rank_pattern is an alpha too: name it in alpha_pattern")
    (problem,) = refusal(denoiser, alpha=None, rank_pattern={"to_k": 4, "attn2.to_k": 3})
    assert problem.startswith("params.yaml lora.rank_pattern: ") and problem.endswith("; make one narrower")
    (problem,) = refusal(denoiser, alpha=None, rank_pattern={"to_w": 4})
    assert problem.startswith("params.yaml lora.rank_pattern: 'to_w' matches none of the targets")


def test_settings_at_their_default_leave_no_trace(denoiser: torch.nn.Module) -> None:
    """An adapter.json of before the options equals one of now."""
    assert set(lora.make_config(params(), denoiser)) == {
        "r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "bias",
    }  # fmt: skip


def refusal(denoiser: torch.nn.Module, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        lora.make_config(params(**changes), denoiser)
    return caught.value.problems


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"target_modules": "atention"}, "target_modules: 'atention' matches no layer of UNet2DConditionModel (near"),
        ({"target_modules": "to_q"}, "target_modules: 'to_q' matches no layer of UNet2DConditionModel (near: to_q"),
        ({"exclude_modules": ["to_kk"]}, "exclude_modules: 'to_kk' matches none of the targets (near: to_k"),
        ({"exclude_modules": ["conv1"]}, "exclude_modules: 'conv1' matches none of the targets (near: "),
        ({"rank_pattern": {"to_w": 4}}, "rank_pattern: 'to_w' matches none of the targets (near: to_"),
        ({"alpha_pattern": {"conv1": 4.0}}, "alpha_pattern: 'conv1' matches none of the targets (near: "),
        ({"rank_pattern": {"attn2.to_k": 33}}, "rank_pattern.attn2.to_k: 33 is above 32, the size of a 'to_k' layer"),
        ({"rank_pattern": {"to_k": 3, "attn2.to_k": 4}}, "rank_pattern: 'to_k' and 'attn2.to_k' both match "),
        ({"target_modules": ["conv_out"], "rank": 5}, "rank: 5 is above 4, the size of a 'conv_out' layer"),
        ({"target_modules": ["to_q"], "exclude_modules": ["to_q"]}, "exclude_modules: nothing is left"),
    ],
    ids=str,
)  # fmt: skip
def test_what_matches_nothing_is_named(denoiser: torch.nn.Module, changes: dict[str, Any], start: str) -> None:
    (problem,) = refusal(denoiser, **changes)
    assert problem.startswith(f"params.yaml lora.{start}")


def test_a_name_that_is_anothers_ending_is_not_chosen_alone() -> None:
    model = torch.nn.Module()
    model.proj_out, model.block = torch.nn.Linear(8, 8), torch.nn.Module()
    model.block.proj_out = torch.nn.Linear(8, 8)
    assert refusal(model, target_modules="proj_out") == (
        "params.yaml lora.target_modules: proj_out cannot be chosen without block.proj_out; add it",
    )
    assert lora.make_config(params(target_modules=r"block\.proj_out"), model)["target_modules"] == ["block.proj_out"]


def test_a_text_that_is_an_ending_says_what_a_text_is(denoiser: torch.nn.Module) -> None:
    (problem,) = refusal(denoiser, target_modules="to_q")
    assert problem.endswith("; a text is a preset or a regex over whole names, a list holds endings")


def test_a_convolution_takes_ranks_up_to_its_kernels_inputs(denoiser: torch.nn.Module) -> None:
    assert lora.make_config(params(target_modules=["conv_in"], rank=32), denoiser)["r"] == 32  # 4 channels x 3 x 3 = 36
    assert refusal(denoiser, target_modules=["conv_in"], rank=33)


@pytest.mark.parametrize("change", ["lora.target_modules='to_(q'", "lora.rank_pattern={'to_(q': 4}"])
def test_a_broken_regex_is_named(change: str) -> None:
    with pytest.raises(UserError) as caught:
        load_params(REPOSITORY / "params.yaml", [change])
    (problem,) = caught.value.problems
    assert "got 'to_(q', no regular expression (missing ), unterminated subpattern at position 3)" in problem


@pytest.mark.parametrize("change", ["lora.target_modules=[]", "lora.target_modules=5", "lora.rank_pattern={to_q: 0}"])
def test_other_shapes_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=change.split("=")[0]):
        load_params(REPOSITORY / "params.yaml", [change])


def test_the_plan_counts_sixteen_bytes() -> None:
    targets, memory = plan(["a.to_q", "b.to_q", "b.to_out.0"], 1_000_000, 50_000_000)
    assert targets == "targets     1 to_out.0, 2 to_q"
    assert memory.startswith("memory      16.0 MB for adapter") and "full fine-tuning 800.0 MB;" in memory
