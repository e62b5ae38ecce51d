"""Quantized weights of the denoiser: values against other programs, gradients, and what is left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lora_dag.adapters import lora
from lora_dag.core.params import FAMILIES, ModelParams, Quantization
from lora_dag.families import common, quantized
from lora_dag.families.protocol import load_family
from lora_dag.families.quantized import QuantizedLayer
from tests.helpers.adapters import params

CPU = torch.device("cpu")
KINDS = get_args(Quantization)
LEFT_ALONE = {
    "sd": {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
    "sdxl": {
        *("add_embedding.linear_1", "add_embedding.linear_2", "conv_in", "conv_out"),
        *("time_embedding.linear_1", "time_embedding.linear_2"),
    },
    "sd3": {
        *("context_embedder", "norm_out.linear", "pos_embed.proj", "proj_out"),
        *(f"time_text_embed.{part}_embedder.linear_{i}" for part in ("text", "timestep") for i in (1, 2)),
    },
    "flux": {
        *("context_embedder", "norm_out.linear", "proj_out", "x_embedder"),
        *(f"time_text_embed.{part}_embedder.linear_{i}" for part in ("guidance", "text", "timestep") for i in (1, 2)),
    },
    "z_image": {
        *("all_final_layer.2-1.adaLN_modulation.1", "all_final_layer.2-1.linear", "all_x_embedder.2-1"),
        *("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
    },
}
"""Family -> linear layers and convolutions that stay as they are, besides ``time_emb_proj`` of UNets."""


def load(base: Path, name: str, quantization: Any, dtype: Any = "float32") -> Any:
    model = ModelParams(family=name, pretrained=str(base), variant=None, dtype=dtype, quantization=quantization)
    return common.load_denoiser(model, CPU)


def quantized_layers(denoiser: torch.nn.Module) -> dict[str, QuantizedLayer]:
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, QuantizedLayer)}


def weights_of(kind: Quantization, weight: torch.Tensor) -> torch.Tensor:
    layer = torch.nn.Linear(*reversed(weight.shape))
    quantized.quantize(layer, weight, kind, torch.float32)
    return layer.weight


# Values


def test_nf4_has_the_codes_and_scales_of_bitsandbytes() -> None:
    """Recorded from ``quantize_4bit(x, quant_type="nf4", compress_statistics=False)`` of bitsandbytes 0.50.2."""
    codes, scales = quantized.to_nf4(torch.linspace(-1, 2, 64).reshape(2, 32))
    expected = "223333344444555566667778888999aaaabbbbcccccdddddeeeeeeeeeeffffff"
    assert bytes(codes.tolist()).hex() == expected and scales.tolist() == [[2.0]]


def test_fp8_has_the_values_and_scales_of_torchao() -> None:
    """Recorded from ``Float8Tensor.from_hp(x, granularity=PerRow())`` of torchao 0.18.0."""
    codes, scales = quantized.to_fp8(torch.linspace(-1, 2, 24).reshape(2, 12))
    assert codes.float().tolist() == [
        [-448, -384, -320, -288, -208, -160, -96, -40, 20, 80, 144, 192],
        [128, 160, 192, 208, 240, 288, 288, 320, 352, 384, 416, 448],
    ]
    torch.testing.assert_close(scales, torch.tensor([[1 / 448], [2 / 448]]))


def test_int8_has_the_codes_of_bitsandbytes() -> None:
    """Recorded from ``int8_vectorwise_quant`` of bitsandbytes 0.50.2, which takes float16."""
    codes, scales = quantized.to_int8(torch.linspace(-1, 2, 24).reshape(2, 12).half().float())
    assert codes.tolist() == [
        [-127, -110, -94, -77, -61, -44, -28, -11, 6, 22, 39, 55],
        [36, 44, 52, 61, 69, 77, 86, 94, 102, 110, 119, 127],
    ]
    torch.testing.assert_close(scales, torch.tensor([[1 / 127], [2 / 127]]))


def test_int8_rounds_every_row_to_127_steps_of_its_largest_weight() -> None:
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None]
    codes, scales = quantized.to_int8(weight)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert codes.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127] * 5
    assert ((codes * scales - weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_a_last_block_that_is_not_full_is_kept(kind: Quantization) -> None:
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    found = weights_of(kind, weight)
    assert found.shape == weight.shape and torch.equal(found[1], weight[1])
    assert 0 < (found - weight).norm() / weight.norm() < 0.15


# Layers

LAYERS = {
    "linear": (lambda: torch.nn.Linear(12, 7), (2, 5, 12)),
    "linear without bias": (lambda: torch.nn.Linear(12, 7, bias=False), (3, 12)),
    "convolution": (lambda: torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "groups": (lambda: torch.nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False), (2, 4, 7, 7)),
    "1x1": (lambda: torch.nn.Conv2d(4, 6, 1), (1, 4, 3, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradient_are_those_of_a_layer_with_these_weights(
    kind: Quantization, case: str, autocast: bool
) -> None:
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer, plain = make(), make()
    quantized.quantize(layer, layer.weight.detach(), kind, torch.float32)
    plain.load_state_dict({"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias.detach()}))
    outputs, gradients = [], []
    for each in (layer, plain):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = each.requires_grad_(False)(x)
        output.float().sin().sum().backward()
        outputs.append(output.detach())
        gradients.append(x.grad)
    assert outputs[0].dtype == outputs[1].dtype == (torch.bfloat16 if autocast else torch.float32)
    close = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(*outputs, **close)
    torch.testing.assert_close(*gradients, **close)


def test_no_float_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.Size] = []
    layer = torch.nn.Conv2d(8, 8, 3)
    quantized.quantize(layer, layer.weight.detach(), "int8", torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        layer(torch.randn(1, 8, 9, 9).requires_grad_())
    assert kept == []


# Models


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_left_alone(name: str, bases: dict[str, Path]) -> None:
    """Norms, embeddings, first and last layers, and projections of timestep, size and text have the base's bytes."""
    plain, denoiser = load(bases[name], name, None), load(bases[name], name, "int8")
    layers, state = quantized_layers(denoiser), plain.state_dict()
    others = {
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name not in layers
    }
    assert {name for name in others if not name.endswith("time_emb_proj")} == LEFT_ALONE[name]
    found = {key: tensor for key, tensor in denoiser.state_dict().items() if not tensor.is_meta}
    assert all(torch.equal(state[key], tensor) for key, tensor in found.items() if key in state)
    assert set(found) - set(state) == {f"{name}.{part}" for name in layers for part in ("codes", "scales")}
    assert set(state) - set(found) == {f"{name}.weight" for name in layers}
    assert load_family(name).DENOISER  # the table above has every family


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantized_base_is_a_function_of_the_bytes_of_the_base(kind: Quantization, tiny_base: Path) -> None:
    """Also for another dtype: codes come from the values in the files."""
    first, again, half = (load(tiny_base, "sd", kind, dtype) for dtype in ("float32", "float32", "bfloat16"))
    assert lora.frozen_digest(first) == lora.frozen_digest(again)
    assert lora.frozen_digest(first) != lora.frozen_digest(load(tiny_base, "sd", None))
    others = quantized_layers(half)
    for name, layer in quantized_layers(first).items():
        assert torch.equal(layer.codes.view(torch.uint8), others[name].codes.view(torch.uint8))
        assert torch.equal(layer.scales, others[name].scales)
        assert (layer.weight.dtype, others[name].weight.dtype) == (torch.float32, torch.bfloat16)


def test_one_changed_weight_of_the_base_changes_the_digest(tiny_base: Path) -> None:
    denoiser = load(tiny_base, "sd", "nf4")
    before, layer = lora.frozen_digest(denoiser), next(iter(quantized_layers(denoiser).values()))
    layer.codes[0] ^= 1
    assert lora.frozen_digest(denoiser) != before


@pytest.mark.parametrize(("kind", "size"), [("int8", 206_080), ("fp8", 206_080), ("nf4", 115_200)])
def test_bytes_of_a_layer(kind: Quantization, size: int) -> None:
    """640 x 320 weights of one byte with 320 scales, or of half a byte with 3,200 scales."""
    layer: Any = torch.nn.Linear(640, 320, bias=False)
    quantized.quantize(layer, layer.weight.detach(), kind, torch.bfloat16)
    assert not [*layer.parameters()] and sum(tensor.nbytes for tensor in layer.buffers()) == size


def test_a_quantized_layer_is_copied_and_its_class_makes_layers_of_floats() -> None:
    """PEFT makes the two convolutions of an adapter by the class of the base's layer."""
    layer: Any = torch.nn.Conv2d(4, 6, 3)
    quantized.quantize(layer, layer.weight.detach(), "int8", torch.float32)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    assert type(type(layer)(4, 2, kernel_size=3)) is torch.nn.Conv2d


def test_settings_of_an_adapter_are_checked_without_floats(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights of a large base as floats at once would not fit into memory."""
    denoiser = load(tiny_base, "sd", "nf4")
    monkeypatch.setattr(QuantizedLayer, "weight_as", None)
    config = lora.make_config(params(target_modules="all-linear+conv", rank=2), denoiser)
    assert len(config["target_modules"]) > 50
