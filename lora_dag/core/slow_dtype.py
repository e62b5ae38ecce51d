"""Measures in less than a second whether the frozen dtype is slow on this CPU: processor flags do not show it.

Where bfloat16 has no units (AVX2, one thread) a convolution took 24 times its float32 time, and a linear layer 7.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import warn
from lora_dag.core.files import read_json

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams

TOO_SLOW = 1.5  # times float32
SECONDS = 0.15  # for one operation in one dtype; one that takes longer runs once
REPEATS = 5
MOST_CHANNELS, MOST_FEATURES = 256, 640  # wider layers give the same ratio, but take longer

Times = dict[str, dict[str, float]]
"""Dtype -> operation -> seconds."""


def warn_if_slow(
    device: torch.device, model: ModelParams, measure: Callable[[ModelParams], Times] | None = None
) -> None:
    """Warn if the frozen dtype takes more than TOO_SLOW times as long as float32 on a CPU.

    Args:
        measure: replaces ``times`` in tests.
    """
    if device.type != "cpu" or model.dtype == "float32":
        return
    found = (measure or times)(model)
    own, reference = found[model.dtype], found["float32"]
    if sum(own.values()) > TOO_SLOW * sum(reference.values()):
        ratios = " and ".join(f"a {name} {format_ratio(own[name] / reference[name])} times" for name in own)
        text = f"{model.setting('dtype')}: {model.dtype} is slow on this processor. Against float32, {ratios} as slow."
        warn("slow-dtype", f"{text} Set model.dtype=float32.")


def format_ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def times(model: ModelParams) -> Times:
    """Measure a convolution as wide as the VAE's and a linear layer as wide as the denoiser's."""
    import torch
    from torch.nn.functional import conv2d, linear

    channels, features = widths(model)
    found: Times = {}
    for dtype in ("float32", model.dtype):
        with torch.inference_mode():
            images, kernels = ones(dtype, 1, channels, 12, 12), ones(dtype, channels, channels, 3, 3)
            tokens, weights = ones(dtype, 64, features), ones(dtype, features, features)
            found[dtype] = {
                "convolution": shortest(partial(conv2d, images, kernels, padding=1)),
                "matrix product": shortest(partial(linear, tokens, weights)),
            }
    return found


def ones(dtype: str, *shape: int) -> torch.Tensor:
    import torch

    return torch.ones(shape, dtype=getattr(torch, dtype))


def widths(model: ModelParams) -> tuple[int, int]:
    """Return channels of the VAE's widest convolution and features of the denoiser's layers, limited for the probe."""
    folder = Path(model.pretrained)
    channels = max(read_json(folder / "vae" / "config.json")["block_out_channels"])
    paths = (folder / name / "config.json" for name in ("unet", "transformer"))
    denoiser = read_json(next(path for path in paths if path.exists()))
    features = max(denoiser.get("block_out_channels") or [0])
    features = features or denoiser.get("dim") or denoiser["num_attention_heads"] * denoiser["attention_head_dim"]
    return min(channels, MOST_CHANNELS), min(features, MOST_FEATURES)


def shortest(work: Callable[[], Any]) -> float:
    """Return seconds of the fastest of a few runs: the first one prepares kernels.

    The clock is the thread's own, which stops while another program has the processor.
    """
    end, taken = time.perf_counter() + SECONDS, list[float]()
    while len(taken) < REPEATS and (not taken or time.perf_counter() < end):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return min(taken)
