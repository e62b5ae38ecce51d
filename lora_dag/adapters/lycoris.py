"""LoKr and LoHa, LyCORIS's Kronecker and Hadamard products, by PEFT: config, dtype, product, settings without effect.

A layer's weight is W + alpha / rank * D. LoKr: D = w1 (x) w2, [out, in] as [o1, i1] (x) [o2, i2], each factor whole or
a product of the rank. LoHa: D = (w1_a w1_b) * (w2_a w2_b), element by element. Both start at D = 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lycoris_utils import LycorisLayer

if TYPE_CHECKING:
    from lora_dag.adapters.params import LoraParams

CONFIGS = {"lokr": LoKrConfig, "loha": LoHaConfig}


def make_config(params: LoraParams) -> dict[str, Any]:
    """What ``lora.algo`` adds to an adapter's config."""
    factor = {} if params.decompose_factor is None else {"decompose_factor": params.decompose_factor}
    return {"algo": params.algo} | factor


def peft_config(config: dict[str, Any]) -> LoKrConfig | LoHaConfig:
    """PEFT's config, which calls alpha by another name and knows of no biases."""
    arguments = {name: value for name, value in config.items() if name not in ("algo", "bias", "lora_alpha")}
    return CONFIGS[config["algo"]](**arguments, alpha=config["lora_alpha"])


def answer_as_the_base(denoiser: torch.nn.Module) -> None:
    """Keep a layer's output in the dtype of the base's.

    PEFT casts it to the dtype of the input. Under autocast that is float32 after a norm, where the base's layer answers
    in half precision: even a disabled adapter would change what is added to it.
    """
    for module in denoiser.modules():
        if isinstance(module, LycorisLayer):
            module.register_forward_pre_hook(_in_autocast_dtype)


def _in_autocast_dtype(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What the base's layer would do with its input itself."""
    x, *others = arguments
    kind = x.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta has none
    return (x.to(torch.get_autocast_dtype(kind)) if is_cast else x, *others)


# What is made of a layer


def is_tucker(params: LoraParams, weight: torch.Tensor) -> bool:
    """Whether ``use_effective_conv2d`` holds for a layer."""
    return params.use_effective_conv2d and weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1)


def idle_settings(params: LoraParams, weights: dict[str, torch.Tensor], ranks: dict[str, int]) -> list[str]:
    """A line per setting that no target would feel.

    Args:
        weights: target's name -> its weight, [out, in, ...].
        ranks: target's name -> its rank.
    """
    found: list[str] = []
    if not weights:
        return found
    sides = {name: factor_sides(params, weight) for name, weight in weights.items()}
    if params.decompose_both and not any(ranks[name] < small / 2 for name, (small, _) in sides.items()):
        largest = max(small for small, _ in sides.values())
        found.append(
            f"params.yaml lora.decompose_both: changes nothing: no rank is below half of {largest}, the largest side "
            "of a first factor; lower lora.rank, raise lora.decompose_factor, or use false"
        )
    tucker = {name: sides[name] for name, weight in weights.items() if is_tucker(params, weight)}
    if params.algo == "lokr":
        tucker = {name: pair for name, pair in tucker.items() if ranks[name] < pair[1] / 2}
    if params.use_effective_conv2d and not tucker:
        found.append(
            "params.yaml lora.use_effective_conv2d: changes nothing: no target is a convolution above 1 x 1 whose "
            "factors are of the rank; use target_modules all-linear+conv, or false"
        )
    return found


def factor_sides(params: LoraParams, weight: torch.Tensor) -> tuple[int, int]:
    """Larger side of LoKr's first and of its second factor; a factor is whole where the rank is at least half of it."""
    factor = params.decompose_factor or -1
    firsts, seconds = zip(*(factorization(size, factor) for size in weight.shape[:2]), strict=True)
    return max(firsts), max(seconds)


def plan(denoiser: torch.nn.Module, name: str) -> list[str]:
    """A line for the log: in how many layers LoKr's second factor is of the rank, and in how many whole."""
    layers = [module for module in denoiser.modules() if isinstance(module, LoKrLayer)]
    whole = sum(name in layer.lokr_w2 for layer in layers)
    if not layers:
        return []
    return [f"lokr        second factor of the rank in {len(layers) - whole} layers, whole in {whole}"]
