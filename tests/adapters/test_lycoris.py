"""LoKr and LoHa against the papers' formulas in float64, a bit-identical base, and refused settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lora_dag.adapters import bias, lora
from tests.helpers.adapters import ALGOS, ATTENTION, CONV, algo, fill, inject, load, params, predict, refusal
from tests.helpers.errors import refused

SHAPES = {
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    "lokr-both": {"lokr_w1_a": (16, 2), "lokr_w1_b": (2, 16), "lokr_w2": (2, 2)},
    "lokr-whole": {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
    "lokr-tucker": {"lokr_w1": (4, 8), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 8), "lokr_t2": (2, 2, 3, 3)},
    "loha": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)},
    "loha-tucker": {
        **{"hada_w1_a": (2, 32), "hada_w1_b": (2, 64), "hada_t1": (2, 2, 3, 3)},
        **{"hada_w2_a": (2, 32), "hada_w2_b": (2, 64), "hada_t2": (2, 2, 3, 3)},
    },
}


@pytest.fixture
def denoiser(tiny_base: Path) -> torch.nn.Module:
    return load(tiny_base)


# The formulas, in NumPy


def expected_change(found: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """D of Yeh et al. 2023 (arXiv:2309.14859), sections 3.1 and 3.2, and FedPara's proposition 3 for convolutions."""
    if "hada_w1_a" in found:
        one, other = (whole(found, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        return (one * other).reshape(shape)
    one, other = whole(found, "lokr_w1", ""), whole(found, "lokr_w2", "lokr_t2")
    kernel = shape[2:]
    other = other.reshape(other.shape[0], -1, *kernel)
    change = np.zeros(shape)
    for (i, j), factor in np.ndenumerate(one):  # block (i, j) of the weight
        rows, columns = other.shape[:2]
        change[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = factor * other
    return change


def whole(found: dict[str, np.ndarray], name: str, core: str) -> np.ndarray:
    if name in found:
        return found[name]
    a, b = found[f"{name}_a"], found[f"{name}_b"]
    if core not in found:
        return a @ b
    out = np.zeros((a.shape[1], b.shape[1], *found[core].shape[2:]))
    for r in range(len(a)):
        for s in range(len(b)):
            out += np.einsum("o,i,kl->oikl", a[r], b[s], found[core][r, s])
    return out


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, CONV) for name in ALGOS), *((name, ATTENTION) for name in ALGOS if not name.endswith("tucker"))],
)
def test_output_is_the_base_plus_alpha_over_rank_times_the_product(
    denoiser: torch.nn.Module, name: str, target: str
) -> None:
    weight = denoiser.get_submodule(target).weight.detach().double()
    fill(inject(denoiser, **algo(name, alpha=6.0)))
    layer, tensors = denoiser.get_submodule(target), lora.state_dict(denoiser)
    found = {key.removeprefix(f"{target}."): t for key, t in tensors.items() if key.startswith(f"{target}.")}
    if (target == CONV) == name.endswith("tucker"):
        assert {key: tuple(tensor.shape) for key, tensor in found.items()} == SHAPES[name]
    values = {key: tensor.detach().double().numpy() for key, tensor in found.items()}
    change = torch.from_numpy(expected_change(values, tuple(weight.shape)))

    channels = weight.shape[1]
    x = torch.randn(3, channels, *[6] * (weight.dim() - 2), generator=torch.Generator().manual_seed(3))
    for scale in (1.0, 0.5):
        lora.set_scale(denoiser, scale)
        new = weight + scale * 6 / layer.r[lora.NAME] * change
        own = layer.base_layer.bias
        added = None if own is None else own.detach().double()
        expected = (
            torch.nn.functional.conv2d(x.double(), new, added, padding=1)
            if new.dim() == 4
            else torch.nn.functional.linear(x.double(), new, added)
        )
        torch.testing.assert_close(layer(x).double(), expected, atol=2e-4, rtol=1e-4)


# The adapter


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("lokr-both", "float32"), ("lokr-tucker", "bfloat16"), ("loha", "bfloat16"), ("loha-tucker", "float32")],
)
def test_start_and_removal_are_bit_identical_to_the_base(tiny_base: Path, name: str, dtype: str) -> None:
    denoiser = load(tiny_base, dtype)
    base, digest = predict(denoiser), lora.frozen_digest(denoiser)
    names = set(denoiser.state_dict())
    trainable = inject(denoiser, **algo(name), bias="all")
    lora.require_sound(denoiser, trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    assert torch.equal(predict(denoiser), base)
    fill(trainable)
    adapted = predict(denoiser)
    assert not torch.equal(adapted, base) and adapted.isfinite().all()
    with lora.disabled(denoiser):
        assert torch.equal(predict(denoiser), base)
    lora.set_scale(denoiser, 0)
    assert torch.equal(predict(denoiser), base)
    lora.set_scale(denoiser, 1)
    assert torch.equal(predict(denoiser), adapted)
    lora.delete(denoiser)
    assert torch.equal(predict(denoiser), base)
    assert set(denoiser.state_dict()) == names and lora.frozen_digest(denoiser) == digest


@pytest.mark.parametrize("name", ["lokr", "loha"])
def test_autocast_output_has_the_dtype_of_the_bases_layer(tiny_base: Path, name: str) -> None:
    """PEFT alone returns float32 for a float32 input, as after a norm on a GPU."""
    denoiser = load(tiny_base, "bfloat16")
    x = torch.randn(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = denoiser.get_submodule(ATTENTION)(x)
        inject(denoiser, **algo(name))
        found = denoiser.get_submodule(ATTENTION)(x)
    assert found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["lokr-both", "lokr-tucker", "loha-tucker"])
def test_every_tensor_has_a_gradient_by_the_second_step(denoiser: torch.nn.Module, name: str) -> None:
    trainable = inject(denoiser, **algo(name))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    latents, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    for _ in range(2):
        optimizer.zero_grad()
        denoiser(latents, torch.tensor([10, 500]), prompt).sample.square().mean().backward()
        optimizer.step()
    assert [key for key, parameter in trainable.items() if not parameter.grad.any()] == []


@pytest.mark.parametrize("name", ["lokr-both", "loha-tucker"])
def test_start_depends_on_seed_and_layer_only(tiny_base: Path, name: str) -> None:
    starts = []
    for seed, targets in ((0, "all-linear+conv"), (0, "to_q|conv1"), (1, "to_q|conv1")):
        denoiser = load(tiny_base)
        torch.manual_seed(99)
        inject(denoiser, seed, **algo(name, target_modules=f".*({targets})" if "|" in targets else targets))
        starts.append(lora.state_dict(denoiser))
    every, few, other = starts
    assert 0 < len(few) < len(every) and all(torch.equal(tensor, every[key]) for key, tensor in few.items())
    drawn = [key for key, tensor in few.items() if tensor.any()]
    assert drawn and not any(torch.equal(few[key], other[key]) for key in drawn)


def test_patterns_give_a_layer_its_own_rank_and_alpha(denoiser: torch.nn.Module) -> None:
    inject(denoiser, **algo("loha", rank_pattern={"to_k": 3}, alpha_pattern={"attn2.to_k": 9.0}))
    found = {name: denoiser.get_submodule(name).scaling[lora.NAME] for name in lora.target_names(denoiser)}
    assert {scale for name, scale in found.items() if name.endswith("attn2.to_k")} == {3.0}
    assert {scale for name, scale in found.items() if name.endswith("attn1.to_k")} == {4 / 3}
    assert found[CONV] == 2.0


def test_a_loaded_adapter_equals_the_saved_one(tiny_base: Path) -> None:
    one, other = load(tiny_base), load(tiny_base)
    fill(inject(one, **algo("lokr-both"), bias="lora_only"))
    inject(other, seed=5, **algo("lokr-both"), bias="lora_only")
    lora.load(other, lora.state_dict(one))
    assert torch.equal(predict(other), predict(one)) and len(bias.deltas(other)) > 8


# Refused


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"algo": "lokr"}, ("init_lora_weights", "gaussian", "lokr", "kaiming")),
        (algo("loha", dropout=0.5), ("dropout", "0.5", "loha", "0")),
        (algo("lokr", use_rslora=True), ("use_rslora", "true", "lokr", "false")),
        (algo("loha", use_dora=True), ("use_dora", "true", "loha", "false")),
        (algo("loha", decompose_both=True), ("decompose_both", "true", "loha", "false")),
        ({"decompose_factor": 4}, ("decompose_factor", "4", "lora", "null")),
        ({"use_effective_conv2d": True}, ("use_effective_conv2d", "true", "lora", "false")),
    ],
)
def test_a_setting_of_another_algorithm_is_refused(changes: dict[str, Any], values: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        params(**changes)
    (error,) = caught.value.errors()
    key, given, algorithm, expected = values
    assert error["loc"] == (key,) and error["ctx"]["code"] == "setting-of-other-algo"
    assert f"got {given}," in error["msg"] and f"lora.algo {algorithm} " in error["msg"]
    assert error["msg"].endswith(f" {expected}.")


def test_a_setting_without_effect_is_refused(denoiser: torch.nn.Module) -> None:
    with refused("setting-ignored", "params.yaml lora.decompose_both: ", " half of 4,", "false"):
        lora.make_config(params(**algo("lokr", target_modules=["to_q"], decompose_both=True)), denoiser)
    for name in ("lokr-tucker", "loha-tucker"):
        with refused("setting-ignored", "params.yaml lora.use_effective_conv2d: ", "all-linear+conv", "false"):
            lora.make_config(params(**algo(name, target_modules=["to_q", "conv_shortcut"])), denoiser)
    assert len(refusal(denoiser, **algo("lokr-tucker", rank=8))) == 1  # factors of 8 x 8 are whole
    lora.make_config(params(**algo("loha-tucker", rank=4, exclude_modules=["to_k"])), denoiser)


def test_the_rank_of_a_tucker_core_is_bounded_by_the_channels(denoiser: torch.nn.Module) -> None:
    settings = algo("loha", target_modules=["conv1"], rank=33)
    lora.make_config(params(**settings | {"target_modules": ["up_blocks.0.resnets.0.conv2"], "rank": 32}), denoiser)
    with refused("rank-too-high", "params.yaml lora.rank: got 33", "'conv1'", "32"):
        lora.make_config(params(**settings | {"use_effective_conv2d": True}), denoiser)
    assert refusal(denoiser, **settings | {"use_effective_conv2d": True, "target_modules": ["nope"]})
