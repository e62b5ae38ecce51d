"""The device, thread count and determinism flags of a run, and what of it is recorded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
from typing import TYPE_CHECKING

from lora_dag.core import slow_dtype
from lora_dag.core.console import UserError, log, plural

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams, RuntimeParams

RECORDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def setup(runtime: RuntimeParams, model: ModelParams) -> torch.device:
    """Choose the device, set threads, ask for deterministic kernels. Call before any tensor is made.

    Raises:
        UserError: the device is not here, or it cannot compute in ``model.dtype``.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = runtime.device
    if name == "auto":
        name = next(candidate for candidate in ("cuda", "mps", "cpu") if available[candidate])
    if not available[name]:
        raise UserError(f"params.yaml runtime.device: '{name}' is not available here; use auto or cpu")
    if name == "cpu" and model.dtype == "float16":
        raise UserError("params.yaml model.dtype: float16 needs a GPU; use bfloat16 or float32 on a CPU")
    if name == "cpu":
        keep_freed_memory()
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system, which clears each page at its next use.

    For loops whose every step needs the same memory again: a float32 step of the embedded base (16 latents) took
    12,000 page faults, and 6 to 15 % more time. Peak memory is the same; no result depends on it.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, -1)


def autocast(device: torch.device, model: ModelParams) -> contextlib.AbstractContextManager[object]:
    """Compute in the frozen dtype; nothing to do in float32."""
    import torch

    if model.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, model.dtype))


def environment(device: torch.device) -> dict[str, str | int]:
    """What bits depend on beside the inputs: versions, processor kind, threads. No host name, no path, no time."""
    import torch

    versions: dict[str, str | int] = {name: importlib.metadata.version(name) for name in RECORDED}
    versions["torch"] = torch.__version__
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return versions | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": f"{device.type} {where}",
        "num_threads": torch.get_num_threads(),
    }


def speed_conditions(device: torch.device, model: ModelParams, base: str) -> dict[str, str | int]:
    """What the speed of a stage depends on beside the amount of its work.

    Args:
        base: digest of the component that works.
    """
    found = environment(device)
    return {"base": base, "device": found["device"], "dtype": model.dtype, "num_threads": found["num_threads"]}


def log_device(device: torch.device, model: ModelParams) -> None:
    """What computes, and whether its dtype is slow there."""
    import torch

    threads = f", {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    log.info("device      %s%s, frozen weights and autocast in %s, adapter in float32", device, threads, model.dtype)
    if log.isEnabledFor(logging.INFO):  # else this is one of several processes, and not the one that speaks
        slow_dtype.warn(device, model)
