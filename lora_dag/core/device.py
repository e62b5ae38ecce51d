"""The device, thread count and determinism flags of a run, and the record of its environment."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
from typing import TYPE_CHECKING

from lora_dag.core import slow_dtype
from lora_dag.core.console import Problem, UserError, log, plural

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams, RuntimeParams

RECORDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def setup(runtime: RuntimeParams, model: ModelParams) -> torch.device:
    """Choose the device, set threads and deterministic kernels. Call before any tensor is made.

    Raises:
        UserError: the device is not available, or cannot compute in ``model.dtype``.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = runtime.device
    if name == "auto":
        name = next(candidate for candidate in ("cuda", "mps", "cpu") if available[candidate])
    if not available[name]:
        text = f"{runtime.setting('device')}: '{name}' is not available on this machine. Use auto or cpu."
        raise UserError(Problem("device-unavailable", text))
    if name == "cpu" and model.dtype == "float16":
        text = f"{model.setting('dtype')}: float16 needs a GPU. Use bfloat16 or float32 on a CPU."
        raise UserError(Problem("needs-gpu", text))
    if name == "mps" and model.quantization == "fp8":
        text = f"{model.setting('quantization')}: fp8 does not work on mps, which has no float8. Use int8 or nf4."
        raise UserError(Problem("fp8-on-mps", text))
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    torch.use_deterministic_algorithms(True)
    # Its default fills every new tensor with NaN, to show reads before writes: time and memory at each load of a model.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, for a training loop. The system would clear each page before its next use.

    It speeds up loops that need the same memory in each step: a float32 step of the embedded base (16 latents) took
    12,000 page faults, and 6 to 15 % more time. The peak of such a loop is the same, but memory of models that were
    loaded and freed would never be returned. No result depends on it.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Return freed memory to the system, also between memory in use, where glibc would keep it after a large free."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def autocast(device: torch.device, model: ModelParams) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context of the frozen dtype; a null context for float32."""
    import torch

    if model.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, model.dtype))


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what results depend on beside the inputs: versions, processor type, threads. No host name or time."""
    import torch

    versions: dict[str, str | int] = {name: importlib.metadata.version(name) for name in RECORDED}
    versions["torch"] = torch.__version__
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return versions | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": f"{device.type} {processor}",
        "num_threads": torch.get_num_threads(),
    }


def speed_conditions(device: torch.device, model: ModelParams, base: str) -> dict[str, str | int]:
    """Return what the speed of a stage depends on beside the amount of work.

    Args:
        base: digest of the component that computes.
    """
    record = environment(device)
    known = {"base": base, "device": record["device"], "dtype": model.dtype, "num_threads": record["num_threads"]}
    return known | model.quantization_record


def log_device(device: torch.device, model: ModelParams) -> None:
    """Log the device; warn if the dtype is slow on it."""
    import torch

    threads = f", {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    log.info("device      %s%s, frozen weights and autocast in %s, adapter in float32", device, threads, model.dtype)
    if log.isEnabledFor(logging.INFO):  # else this is one of several processes, and another one logs
        slow_dtype.warn_if_slow(device, model)
