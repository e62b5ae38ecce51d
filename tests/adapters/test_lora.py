from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from lora_dag.adapters import lora
from tests.helpers.adapters import TARGETS, fill, inject, load, params, predict, refusal
from tests.helpers.errors import refused


@pytest.fixture
def denoiser(tiny_base: Path) -> torch.nn.Module:
    return load(tiny_base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_float32_in_a_base_of_its_own_dtype(tiny_base: Path, dtype: str) -> None:
    denoiser = load(tiny_base, dtype)
    trainable = inject(denoiser)
    lora.require_sound(denoiser, trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    frozen = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    fill(trainable)
    assert {tensor.dtype for tensor in lora.state_dict(denoiser).values()} == {torch.float32}
    assert predict(denoiser).isfinite().all()


@pytest.mark.parametrize("target_modules", [TARGETS, ["to_q"], ["attn2.to_k", "linear_1"]], ids=str)
def test_only_a_and_b_of_the_targets_are_trained(denoiser: torch.nn.Module, target_modules: list[str]) -> None:
    layers = [name for name, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    expected = [name for name in layers if any(name.endswith(f".{target}") for target in target_modules)]
    trainable = inject(denoiser, target_modules=target_modules)
    assert lora.target_names(denoiser) == expected
    assert set(trainable) == {f"{name}.lora_{which}.default.weight" for name in expected for which in "AB"}
    assert {id(p) for p in denoiser.parameters() if p.requires_grad} == {id(p) for p in trainable.values()}
    assert set(lora.state_dict(denoiser)) == {f"{name}.lora_{which}.weight" for name in expected for which in "AB"}


def test_b_starts_at_zero_and_a_does_not(denoiser: torch.nn.Module) -> None:
    for name, parameter in inject(denoiser).items():
        assert bool(parameter.any()) == (".lora_A." in name)


@pytest.mark.parametrize("init_lora_weights", ["gaussian", "kaiming"])
def test_other_targets_do_not_change_a_layers_start(tiny_base: Path, init_lora_weights: str) -> None:
    whole, few = load(tiny_base), load(tiny_base)
    inject(whole, init_lora_weights=init_lora_weights)
    torch.manual_seed(99)
    inject(few, target_modules=["to_v"], init_lora_weights=init_lora_weights)
    expected, found = lora.state_dict(whole), lora.state_dict(few)
    assert 0 < len(found) < len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_start_depends_on_the_seed_the_layer_and_the_kind(tiny_base: Path) -> None:
    starts = []
    for seed, kind in ((0, "gaussian"), (1, "gaussian"), (0, "kaiming")):
        denoiser = load(tiny_base)
        inject(denoiser, seed, init_lora_weights=kind)
        starts += [t for name, t in lora.state_dict(denoiser).items() if "attn1.to_q.lora_A" in name]
    digests = {hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in starts}
    assert len(digests) == len(starts)


def test_output_is_the_base_plus_alpha_over_rank_times_b_a(denoiser: torch.nn.Module) -> None:
    """Hu et al. 2021 (arXiv:2106.09685), section 4.1, on one layer in float64."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = denoiser.get_submodule(name).weight.double()
    fill(inject(denoiser, rank=2, alpha=6.0))
    layer = denoiser.get_submodule(name)
    a, b = (layer.get_parameter(f"lora_{which}.default.weight").double() for which in "AB")
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(3))
    expected = x.double() @ (weight + 3 * b @ a).T
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)
    lora.set_scale(denoiser, 0.5)
    torch.testing.assert_close(layer(x).double(), x.double() @ (weight + 1.5 * b @ a).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
def test_rslora_scales_by_the_root_of_the_rank(denoiser: torch.nn.Module, conv: bool) -> None:
    """Kalajdzievski 2023 (arXiv:2312.03732), with a rank and an alpha of the layer's own."""
    targets = ["conv1"] if conv else ["to_q"]
    inject(
        denoiser, target_modules=targets, use_rslora=True, rank_pattern={targets[0]: 4}, alpha_pattern={targets[0]: 6.0}
    )
    assert {denoiser.get_submodule(name).scaling["default"] for name in lora.target_names(denoiser)} == {3.0}


@pytest.mark.parametrize(
    ("target_modules", "dtype"), [("all-linear+conv", "float32"), ("attention", "float32"), ("all-linear", "bfloat16")]
)
def test_dora_starts_bit_identical_to_the_base(tiny_base: Path, target_modules: str, dtype: str) -> None:
    denoiser = load(tiny_base, dtype)
    base = predict(denoiser)
    trainable = inject(denoiser, target_modules=target_modules, use_dora=True)
    lora.require_sound(denoiser, trainable)
    assert torch.equal(predict(denoiser), base)
    assert sum("lora_magnitude_vector" in name for name in trainable) == len(lora.target_names(denoiser))
    fill(trainable)
    assert not torch.equal(predict(denoiser), base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_zero_and_disabled_are_bit_identical_to_the_base(tiny_base: Path, dtype: str) -> None:
    denoiser = load(tiny_base, dtype)
    base = predict(denoiser)
    fill(inject(denoiser))
    adapted = predict(denoiser)
    assert not torch.equal(adapted, base)
    lora.set_scale(denoiser, 0)
    assert torch.equal(predict(denoiser), base)
    lora.set_scale(denoiser, 1)
    assert torch.equal(predict(denoiser), adapted)
    with lora.disabled(denoiser):
        assert torch.equal(predict(denoiser), base)
    assert torch.equal(predict(denoiser), adapted)


def test_disabled_is_undone_after_an_error(denoiser: torch.nn.Module) -> None:
    trainable = inject(denoiser)
    fill(trainable)
    adapted = predict(denoiser)
    with pytest.raises(KeyError), lora.disabled(denoiser):
        raise KeyError
    assert torch.equal(predict(denoiser), adapted)
    assert all(parameter.requires_grad for parameter in trainable.values())


def test_frozen_digest_depends_on_the_base_only(denoiser: torch.nn.Module) -> None:
    before = lora.frozen_digest(denoiser)
    trainable = inject(denoiser)
    assert lora.frozen_digest(denoiser) == before
    fill(trainable)
    assert lora.frozen_digest(denoiser) == before
    weight = denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").base_layer.weight
    weight.data[0, 0] += 1e-3
    assert lora.frozen_digest(denoiser) != before


def test_load_fills_every_layer(tiny_base: Path) -> None:
    one, other = load(tiny_base), load(tiny_base)
    fill(inject(one))
    inject(other, seed=5)
    lora.load(other, lora.state_dict(one))
    assert torch.equal(predict(other), predict(one))


def test_load_rejects_missing_and_unexpected_keys(denoiser: torch.nn.Module) -> None:
    inject(denoiser)
    tensors = lora.state_dict(denoiser)
    name = sorted(tensors)[0]
    with pytest.raises(ValueError, match=rf"adapter keys do not match the injected layers: \['{name}'\]"):
        lora.load(denoiser, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"adapter keys do not match the injected layers: \['extra.lora_A.weight'\]"):
        lora.load(denoiser, tensors | {"extra.lora_A.weight": tensors[name]})


def test_unsound_parameters_are_named(denoiser: torch.nn.Module) -> None:
    trainable = inject(denoiser)
    name = sorted(trainable)[0]
    with pytest.raises(RuntimeError, match="conv_in.weight is trained but would not be saved"):
        lora.require_sound(denoiser, trainable | {"conv_in.weight": denoiser.conv_in.weight})
    trainable[name].data = trainable[name].data.bfloat16()
    with pytest.raises(RuntimeError, match=f"{name} is torch.bfloat16, not float32"):
        lora.require_sound(denoiser, trainable)


# Refused


@pytest.mark.parametrize(
    ("target", "near"),
    [("to_qq", "to_q, "), ("to_out", "to_out.0, "), ("attn1", ""), ("o_q", "to_q, ")],
)
def test_near_names_of_a_target_without_layers(denoiser: torch.nn.Module, target: str, near: str) -> None:
    place = f"params.yaml lora.target_modules: '{target}'"
    with refused("no-layer-matches", place, "UNet2DConditionModel", f": {near}"):
        lora.make_config(params(target_modules=["to_v", target]), denoiser)


def test_a_rank_above_the_layer_is_refused(denoiser: torch.nn.Module) -> None:
    assert lora.make_config(params(rank=32, target_modules=["to_q"]), denoiser)["r"] == 32
    with refused("rank-too-high", "params.yaml lora.rank: got 33", "'to_q'", "32"):
        lora.make_config(params(rank=33, target_modules=["to_q"]), denoiser)


def test_dora_on_convolutions_needs_float32(tiny_base: Path) -> None:
    with refused("dora-needs-float32", "params.yaml lora.use_dora: ", "model.dtype float32", "(conv1)"):
        lora.make_config(params(target_modules=["to_q", "conv1"], use_dora=True), load(tiny_base, "bfloat16"))


def test_all_problems_are_reported_at_once(denoiser: torch.nn.Module) -> None:
    problems = refusal(denoiser, rank=33, target_modules=["to_q", "nope", "to_v"])
    assert [problem.split(":")[0] for problem in problems] == [
        "params.yaml lora.rank",
        "params.yaml lora.target_modules",
        "params.yaml lora.rank",
    ]
