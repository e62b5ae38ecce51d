"""What a run is known by: everything that decides its bytes, and what its adapter records of its making."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from lora_dag.adapters.params import LoraParams
from lora_dag.core import device
from lora_dag.core.code import code_digest
from lora_dag.core.console import UserError, log
from lora_dag.core.files import read_json, sha256_json, write_json
from lora_dag.core.params import ModelParams
from stages.train import RESULTS, checkpoints, optimizers
from stages.train.params import TrainParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
    from lora_dag.core.params import Config

INPUTS = "inputs.json"  # in a run's folder of the state directory
PROGRESS = "progress.json"  # beside it: what code was at work there, and whether the run has ended


def may_go_on(params: TrainParams) -> bool:
    """Whether a run of fewer steps is the beginning of this one, to the bit: nothing in it looks at ``num_steps``."""
    return params.lr_scheduler == "constant"


def run_inputs(
    params: TrainParams,
    model: ModelParams,
    configs: dict[str, dict[str, Any]],
    cache: LatentCache,
    base: dict[str, str],
    where: torch.device,
    init_from: str | None,
) -> dict[str, Any]:
    """Everything that decides a run's bytes: a checkpoint is resumed by the run of the same digest alone.

    Of the code, the number of its results: a run that an error in a message broke off continues when that is mended.

    Args:
        configs: component -> LoRA's config; "" for the denoiser.
        init_from: digest of the adapter that the run starts from, if it does.
    """
    without = {"checkpoint_every_n_steps"} | ({"num_steps"} if may_go_on(params) else set())
    if not params.compile:
        without.add("gradient_checkpointing")  # the same bytes
    return {
        "base": base,
        "cache": cache.digest,
        "checkpoint": checkpoints.FORMAT,
        "dtype": model.dtype,
        "environment": device.environment(where),
        "init_from": init_from,
        "lora": configs,
        "optimizer": optimizers.package(params.optimizer),
        "results": RESULTS,
        "train": params.recorded(without),
    }


def begin_run(folder: Path) -> None:
    """Drop the checkpoints of a run that other code has ended: only what was broken off is worth to go on from.

    So an edited loss trains from the start, and a run that an error in a message broke off continues when it is mended.
    """
    path, code = folder / PROGRESS, code_digest("train")
    before = read_json(path) if path.exists() else {"code": code, "ended": False}
    if before["code"] != code and before["ended"]:
        log.info("starts over: the code of train has changed since this run ended")
        for name in ("checkpoints", "snapshots"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif before["code"] != code:
        log.warning(
            "warning: other code of train began this run, of the same RESULTS; if an edit changes what training gives, "
            "stop, and raise RESULTS in stages/train/__init__.py"
        )
    write_json(path, {"code": code, "ended": False})


def end_run(folder: Path) -> None:
    """After the last step, for ``begin_run``."""
    write_json(folder / PROGRESS, {"code": code_digest("train"), "ended": True})


def log_start_over(folder: Path, inputs: dict[str, Any]) -> None:
    """Say why a run of fewer or more steps, which is there, is no beginning of this one."""

    def but_steps(run: dict[str, Any]) -> dict[str, Any]:
        return run | {"train": {name: value for name, value in run["train"].items() if name != "num_steps"}}

    for path in sorted(folder.parent.glob(f"*/{INPUTS}")):
        with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):  # damaged, or of another version
            other = read_json(path)
            if path.parent != folder and "num_steps" in inputs["train"] and but_steps(other) == but_steps(inputs):
                schedule, steps = inputs["train"]["lr_scheduler"], other["train"]["num_steps"]
                line = "starts over: the %s schedule of %d steps has other rates; lr_scheduler constant would go on"
                log.info(line, schedule, steps)


def example_caption(items: Sequence[CachedItem]) -> str:
    """What a card draws where no prompt is set: the caption that several pictures share, else a held-out one."""
    own = sorted((item for item in items if not item.regularization), key=lambda item: item.content)
    counts = Counter(item.caption for item in own)
    caption, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    held_out = [item.caption for item in own if item.split == "heldout"]
    return caption if count > 1 or not held_out else held_out[0]


def provenance(config: Config, cache: LatentCache, items: list[CachedItem]) -> dict[str, Any]:
    """Where an adapter comes from, for whoever meets its file: no path, host, time or git revision."""
    model, params = config.section(ModelParams), config.section(TrainParams)
    packages = {name: importlib.metadata.version(name) for name in device.RECORDED}
    return {
        "caption": example_caption(cache.items),
        "captions": sha256_json(sorted(item.captions for item in items)),
        "latents": cache.digest,
        "lora": config.section(LoraParams).model_dump(),
        "model": {"dtype": model.dtype, "variant": model.variant},
        "num_pictures": len(items),
        "packages": packages | optimizers.package(params.optimizer),
        "pictures": sha256_json(sorted(item.content for item in items)),
        "train": params.recorded({"checkpoint_every_n_steps"}),
    }
