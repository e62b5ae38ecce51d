"""LoKr and LoHa, the Kronecker and Hadamard products of LyCORIS, by PEFT.

A layer's weight is W + alpha / rank * D. LoKr: D = w1 (x) w2, [out, in] as [o1, i1] (x) [o2, i2]; each factor is a full
matrix or a low-rank product. LoHa: D = (w1_a w1_b) * (w2_a w2_b), element by element. Both start at D = 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lycoris_utils import LycorisLayer

from lora_dag.core.console import Problem

if TYPE_CHECKING:
    from lora_dag.adapters.params import LoraParams

CONFIGS = {"lokr": LoKrConfig, "loha": LoHaConfig}


def make_config(params: LoraParams) -> dict[str, Any]:
    """Return the entries that ``lora.algo`` adds to an adapter's config."""
    factor = {} if params.decompose_factor is None else {"decompose_factor": params.decompose_factor}
    return {"algo": params.algo} | factor


def peft_config(config: dict[str, Any]) -> LoKrConfig | LoHaConfig:
    """Return the PEFT config, which has another name for alpha and no biases."""
    arguments = {name: value for name, value in config.items() if name not in ("algo", "bias", "lora_alpha")}
    return CONFIGS[config["algo"]](**arguments, alpha=config["lora_alpha"])


def keep_base_dtype(denoiser: torch.nn.Module) -> None:
    """Keep the output of every layer in the dtype of the base's layer.

    PEFT casts the output to the dtype of the input. Under autocast the input is float32 after a norm, while the base's
    layer returns half precision: then even a disabled adapter would change the sums that use the output.
    """
    for module in denoiser.modules():
        if isinstance(module, LycorisLayer):
            module.register_forward_pre_hook(_in_autocast_dtype)


def _in_autocast_dtype(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Cast the input as the base's layer does under autocast."""
    x, *others = arguments
    kind = x.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on meta
    return (x.to(torch.get_autocast_dtype(kind)) if is_cast else x, *others)


# Factors of a layer


def is_tucker(params: LoraParams, weight: torch.Tensor) -> bool:
    """Return whether ``use_effective_conv2d`` applies to a layer."""
    return params.use_effective_conv2d and weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1)


def settings_without_effect(
    params: LoraParams, weights: dict[str, torch.Tensor], ranks: dict[str, int]
) -> list[Problem]:
    """Return a problem per setting that changes no target.

    Args:
        weights: target -> weight, [out, in, ...].
        ranks: target -> rank.
    """
    problems: list[Problem] = []
    if not weights:
        return problems
    sides = {name: factor_sides(params, weight) for name, weight in weights.items()}
    if params.decompose_both and not any(ranks[name] < small / 2 for name, (small, _) in sides.items()):
        largest = max(small for small, _ in sides.values())
        text = (
            f"{params.setting('decompose_both')}: changes nothing, since no rank is below half of {largest}, the "
            "largest side of a first factor. Lower lora.rank, raise lora.decompose_factor, or set it to false."
        )
        problems.append(Problem("setting-ignored", text))
    tucker = {name: sides[name] for name, weight in weights.items() if is_tucker(params, weight)}
    if params.algo == "lokr":
        tucker = {name: pair for name, pair in tucker.items() if ranks[name] < pair[1] / 2}
    if params.use_effective_conv2d and not tucker:
        text = (
            f"{params.setting('use_effective_conv2d')}: changes nothing, since no target is a convolution above 1 x 1 "
            "with low-rank factors. Set lora.target_modules to all-linear+conv, or this setting to false."
        )
        problems.append(Problem("setting-ignored", text))
    return problems


def factor_sides(params: LoraParams, weight: torch.Tensor) -> tuple[int, int]:
    """Return the larger side of LoKr's first and of its second factor.

    A factor is a full matrix where the rank is at least half of its larger side.
    """
    factor = params.decompose_factor or -1
    firsts, seconds = zip(*(factorization(size, factor) for size in weight.shape[:2]), strict=True)
    return max(firsts), max(seconds)


def plan_lines(denoiser: torch.nn.Module, name: str) -> list[str]:
    """Return a line for the log: in how many layers LoKr's second factor is low-rank, and in how many a full matrix."""
    layers = [module for module in denoiser.modules() if isinstance(module, LoKrLayer)]
    num_full = sum(name in layer.lokr_w2 for layer in layers)
    if not layers:
        return []
    return [f"lokr        second factor is low-rank in {len(layers) - num_full} layers, a full matrix in {num_full}"]
