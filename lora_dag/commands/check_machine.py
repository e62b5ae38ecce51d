"""Checks of the machine for `lora-dag check`: packages, disk, device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.core import slow_dtype
from lora_dag.core.console import Problem, log, plural
from lora_dag.core.files import state_dir
from lora_dag.core.params import Config, ModelParams, RuntimeParams

if TYPE_CHECKING:
    import torch

# Series that the project is tested with; requirements.lock has the exact versions.
PACKAGES = {
    "torch": "2.13",
    "diffusers": "0.42",
    "peft": "0.21",
    "transformers": "5",
    "accelerate": "1",
    "safetensors": "0",
    "dvc": "3",
    "snakemake": "9",
}
INSTALL = "Run `pip install -r requirements.lock`."
LEAST_DISK = 500 * 2**20
"""Bytes: twice the size of the demo's store, latents, adapter and exports."""


def package_problems() -> list[Problem]:
    """Return problems of missing packages, of another series, and of a torchvision that would break imports."""
    found = []
    for name, series in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Problem("package-missing", f"package {name}: it is not installed. {INSTALL}"))
            continue
        if not f"{version}.".startswith(f"{series}."):
            text = f"package {name}: got {version}, but the project is tested with {series}. {INSTALL}"
            found.append(Problem("package-version", text))
    torchvision = built_version("torchvision")
    return found + (torchvision_problems(built_version("torch"), torchvision) if torchvision else [])


def built_version(name: str) -> str:
    """Return the version with the build, such as 2.13.0+cu130, from version.py: metadata lacks it; "" if missing."""
    spec = importlib.util.find_spec(name)  # imports nothing
    if spec is None or spec.origin is None:
        return ""
    stated = re.search(r"__version__.*= *'(.+)'", Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))
    return stated[1] if stated else importlib.metadata.version(name)


def torchvision_problems(torch: str, torchvision: str) -> list[Problem]:
    """Return the problem of a torchvision that does not fit torch: ``import diffusers`` would fail.

    torchvision 0.(N+15) of the same build belongs to torch 2.N.
    """
    minor, _, build = (part for part in torch.partition("+"))
    vision_minor, _, vision_build = torchvision.partition("+")
    fits = minor.split(".")[1:2] and vision_minor.split(".")[1] == str(int(minor.split(".")[1]) + 15)
    if fits and (build == vision_build or not (build and vision_build)):
        return []
    text = f"package torchvision: {torchvision} with torch {torch} breaks `import diffusers`."
    return [Problem("torchvision-mismatch", f"{text} Run `pip uninstall torchvision`: the project does not need it.")]


def disk_problems() -> list[Problem]:
    """Return problems of the state directory: a file in its place, no permission, no space."""
    folder = existing(state_dir())
    if not folder.is_dir():
        text = f"{folder}: got a file, but a folder is expected for the state. Remove it, or set LORA_STATE_DIR."
        return [Problem("state-not-writable", text)]
    if not os.access(folder, os.W_OK):
        text = f"{state_dir()}: the folder is not writable. Set LORA_STATE_DIR to another folder."
        return [Problem("state-not-writable", text)]
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        need = f"at least {LEAST_DISK / 1e6:.0f} MB are needed"
        text = f"{state_dir()}: got {free / 1e6:.0f} MB of free space, but {need}. Set LORA_STATE_DIR to another disk."
        return [Problem("disk-full", text)]
    return []


def existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_device(config: Config, configs: ModelParams | None) -> torch.device:
    """Log the device; raises UserError if it is not available."""
    from lora_dag.core.device import setup

    model = config.section(ModelParams)
    device = setup(config.section(RuntimeParams), model)
    import torch

    log.info("device      %s, %s, %s", device, plural(torch.get_num_threads(), "thread"), model.dtype)
    if configs:
        slow_dtype.warn_if_slow(device, configs)
    sys.stdout.flush()
    return device
