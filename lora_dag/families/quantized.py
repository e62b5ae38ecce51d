"""Frozen weights of the denoiser in 8 or 4 bits: ``model.quantization``.

In: the base's float weights, layer by layer while diffusers loads them.  Out: layers with codes and scales, which
compute in ``model.dtype``. A weight is a float only while its layer computes, forward or backward, so that memory holds
the codes. Codes and scales are computed on the CPU from the values in the base's files, so that they are bit-identical
for every device and ``model.dtype``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch.nn import functional
from torch.nn.grad import conv2d_input

if TYPE_CHECKING:
    from lora_dag.core.params import Quantization

IN_BLOCKS = re.compile(r"(?:\w+\.\d+|mid_block)\.")
"""Beginning of the name of a layer inside one of the denoiser's blocks."""
LEFT_ALONE = "emb"
"""Part of the names of embeddings and of projections of timestep, size and text, which are never quantized."""
BLOCK = 64
"""Weights with one scale in nf4. Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3."""
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""Values of the 16 codes of nf4. Source: arXiv:2305.14314, appendix E."""
NF4_PAIRS = torch.cartesian_prod(NF4, NF4)
"""Values of the two codes in each of the 256 bytes, [256, 2]."""

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Codes and float32 scales of a weight."""


def is_quantized(name: str, layer: torch.nn.Module) -> bool:
    """Return whether a layer of a denoiser is quantized: linear layers and convolutions inside the blocks.

    Norms, embeddings, the layers before and after the blocks, and the projections of timestep, size and text are left
    alone. Modulations, linear layers in the blocks that scale and shift tokens, are quantized.
    """
    plain = type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"
    return plain and bool(IN_BLOCKS.match(name)) and LEFT_ALONE not in name


def load_options(quantization: Quantization | None) -> dict[str, Any]:
    """Return arguments of diffusers' ``from_pretrained``, which then quantizes each weight as it is read."""
    if quantization is None:
        return {}
    AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer
    return {"quantization_config": QuantizerConfig(Method.LORA_DAG, quantization)}


# Formats


def row_scales(rows: torch.Tensor, largest_code: float) -> torch.Tensor:
    """Return the scale of each row, float32 [rows, 1]: the largest weight gets the largest code."""
    return rows.abs().amax(1, keepdim=True) / largest_code


def divided(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return rows / scales, and zeros for a row of zeros."""
    return rows / scales.where(scales != 0, 1)


def to_int8(weight: torch.Tensor) -> Quantized:
    """Return integers from -127 to 127 [out, in] and a scale per row [out, 1]; the inputs of a row are flattened."""
    scales = row_scales(weight.flatten(1), 127)
    return divided(weight.flatten(1), scales).round().to(torch.int8), scales


def to_fp8(weight: torch.Tensor) -> Quantized:
    """Return float8_e4m3fn values up to its largest, 448, [out, in] and a scale per row [out, 1]."""
    scales = row_scales(weight.flatten(1), torch.finfo(torch.float8_e4m3fn).max)
    return divided(weight.flatten(1), scales).to(torch.float8_e4m3fn), scales


def to_nf4(weight: torch.Tensor) -> Quantized:
    """Return numbers of the nearest NF4 values, two in a byte [ceil(n / 64) * 32], and a scale per 64 weights."""
    blocks = functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    scales = row_scales(blocks, 1)
    between = (NF4[1:] + NF4[:-1]).to(weight.device) / 2
    codes = torch.bucketize(divided(blocks, scales), between, out_int32=True)
    codes = codes.flatten().to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], scales


def from_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weights of int8 and fp8, float32 [out, in]."""
    return codes.float() * scales


def from_nf4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weights of nf4 with those that were added to fill the last block, float32 [blocks, 64]."""
    return NF4_PAIRS.to(codes.device)[codes.int()].reshape(-1, BLOCK) * scales


FORMATS: dict[Quantization, tuple[Callable[[torch.Tensor], Quantized], Callable[..., torch.Tensor]]] = {
    "int8": (to_int8, from_rows),
    "fp8": (to_fp8, from_rows),
    "nf4": (to_nf4, from_nf4),
}


# Layers


class FrozenProduct(torch.autograd.Function):
    """Product of an input with a frozen weight; only codes and scales are kept for the backward pass.

    Autograd alone would keep the float weight of every layer until its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLayer) -> torch.Tensor:
        ctx.layer, ctx.input_shape = layer, x.shape
        return layer.product(x, layer.weight_as(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        weight = ctx.layer.weight_as(gradient.dtype)
        return ctx.layer.input_gradient(ctx.input_shape, weight, gradient), None


class QuantizedLayer(torch.nn.Module):
    """A layer without a float weight. Attribute ``weight`` computes it, for DoRA and PEFT. Made by ``quantize``."""

    quantization: Quantization
    dtype: torch.dtype
    shape: torch.Size
    codes: torch.Tensor
    scales: torch.Tensor
    bias_shape: tuple[int, ...]

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """Return a layer of floats: PEFT calls the class of the base's convolution to make its own layers."""
        if not arguments:  # a copy
            return super().__new__(cls)
        return next(plain for plain, own in LAYERS.items() if issubclass(cls, own))(*arguments, **options)

    def weight_as(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in a dtype, in the shape of the base's weight."""
        weight = FORMATS[self.quantization][1](self.codes, self.scales).flatten()
        return weight[: self.shape.numel()].reshape(self.shape).to(dtype)

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_as(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        output = FrozenProduct.apply(x, self)
        # Outside of the product, for a bias that is trained.
        bias: Any = self.bias
        return output if bias is None else output + bias.to(output.dtype).reshape(self.bias_shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the shape of the weight, which ``load_lora_weights`` of FLUX.1 reads, as a tensor without values."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.empty(self.shape, dtype=self.dtype, device="meta")

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def input_gradient(self, shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the input from the gradient of the output."""
        raise NotImplementedError


class QuantizedLinear(QuantizedLayer, torch.nn.Linear):  # type: ignore[override]
    bias_shape = (-1,)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight)

    def input_gradient(self, shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ weight


class QuantizedConv2d(QuantizedLayer, torch.nn.Conv2d):  # type: ignore[override]
    bias_shape = (-1, 1, 1)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)


LAYERS: dict[type[torch.nn.Module], type[QuantizedLayer]] = {
    torch.nn.Linear: QuantizedLinear,
    torch.nn.Conv2d: QuantizedConv2d,
}


def quantize(layer: Any, weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replace the weight of a layer, in place, by its codes and scales.

    Args:
        weight: weight of the base's file, of any float dtype, on the CPU.
        dtype: dtype of attribute ``weight``.
    """
    codes, scales = FORMATS[quantization][0](weight.float())
    layer.__class__ = LAYERS[type(layer)]
    del layer.weight
    layer.quantization, layer.dtype, layer.shape = quantization, dtype, weight.shape
    layer.register_buffer("codes", codes)
    layer.register_buffer("scales", scales)


def quantize_layers(denoiser: torch.nn.Module, quantization: Quantization) -> None:
    """Quantize a denoiser that diffusers does not load, such as one on the device ``meta``."""
    for name, layer in denoiser.named_modules():
        if is_quantized(name, layer):
            quantize(layer, layer.weight.detach(), quantization, layer.weight.dtype)


def summary(denoiser: torch.nn.Module) -> str:
    """Return how many layers are quantized, and the denoiser's size in memory without an adapter."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, QuantizedLayer)]
    size = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    whole = size + sum(layer.weight.nbytes - layer.codes.nbytes - layer.scales.nbytes for layer in layers)
    return f"{layers[0].quantization} in {len(layers)} layers, {size / 1e6:,.0f} MB instead of {whole / 1e6:,.0f}"


# Loading by diffusers

METHOD = "lora_dag"


class Method(StrEnum):
    """Name of the quantizer below in diffusers' registry."""

    LORA_DAG = METHOD


@dataclass
class QuantizerConfig(QuantizationConfigMixin):
    """Argument ``quantization_config`` of ``from_pretrained``."""

    quantization: Quantization = "int8"


class Quantizer(DiffusersQuantizer):
    """Quantizes every weight as diffusers reads it, so that at most one layer is in memory as floats."""

    is_serializable, is_trainable = False, True

    def check_if_quantized_param(self, model: Any, param_value: Any, param_name: str, *_: Any, **__: Any) -> bool:
        name = param_name.removesuffix(".weight")
        return name != param_name and is_quantized(name, model.get_submodule(name))

    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, device: Any, state_dict: Any, *_: Any, **__: Any
    ) -> None:
        layer = model.get_submodule(param_name.rpartition(".")[0])
        quantize(layer, state_dict[param_name], self.quantization_config.quantization, param_value.dtype)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None: ...

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None: ...
