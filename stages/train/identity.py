"""What a run is known by: everything that decides its bytes, and what its adapter records of its making."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.adapters.params import LoraParams
from lora_dag.core import device
from lora_dag.core.files import sha256_json, state_dir
from lora_dag.core.params import ModelParams
from stages.train import RESULTS, checkpoints, optimizers
from stages.train.params import TrainParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_dag.adapters.adapted import Adapted
    from lora_dag.artifacts.latent_cache import CachedItem
    from lora_dag.core.params import Config
    from stages.train.batches import Batches


@dataclass(frozen=True)
class Identity:
    """What a run is known by."""

    inputs: dict[str, Any]
    """Everything that decides its bytes: a checkpoint is resumed by the run of the same inputs alone."""
    provenance: dict[str, Any]
    """What adapter.json says of its data, settings and packages."""

    @property
    def digest(self) -> str:
        return sha256_json(self.inputs)

    @property
    def folder(self) -> Path:
        """Where its checkpoints and snapshots are, in the state directory."""
        return state_dir() / "runs" / self.digest[:16]


def identify(config: Config, batches: Batches, adapter: Adapted, base_digests: dict[str, str]) -> Identity:
    """The identity of a run of these parts."""
    return Identity(run_inputs(config, batches, adapter, base_digests), provenance(config, batches))


def run_inputs(config: Config, batches: Batches, adapter: Adapted, base_digests: dict[str, str]) -> dict[str, Any]:
    """Everything that decides a run's bytes.

    Of the code, the number of its results: a run that an error in a message broke off continues when that is mended.
    """
    params, model, init_from = batches.params, config.section(ModelParams), config.section(LoraParams).init_from
    without = {"checkpoint_every_n_steps"} | ({"num_steps"} if may_go_on(params) else set())
    if not params.compile:
        without.add("gradient_checkpointing")  # the same bytes
    dropped = {"dropped caption": "zeros"} if batches.zeroed else {}  # in no component's files
    return {
        "base": base_digests | dropped,
        "cache": batches.cache.digest,
        "checkpoint": checkpoints.FORMAT,
        "dtype": model.dtype,
        "environment": device.environment(batches.device),
        "init_from": init_from.sha256 if init_from else None,
        "lora": adapter.configs,
        "optimizer": optimizers.package(params.optimizer),
        "results": RESULTS,
        "train": params.recorded(without),
    }


def may_go_on(params: TrainParams) -> bool:
    """Whether a run of fewer steps is the beginning of this one, to the bit: nothing in it looks at ``num_steps``."""
    return params.lr_scheduler == "constant"


def provenance(config: Config, batches: Batches) -> dict[str, Any]:
    """Where an adapter comes from, for whoever meets its file: no path, host, time or git revision."""
    model, params, items = config.section(ModelParams), config.section(TrainParams), batches.items
    packages = {name: importlib.metadata.version(name) for name in device.RECORDED}
    return {
        "caption": example_caption(batches.cache.items),
        "captions": sha256_json(sorted(item.captions for item in items)),
        "latents": batches.cache.digest,
        "lora": config.section(LoraParams).model_dump(),
        "model": {"dtype": model.dtype, "variant": model.variant},
        "num_pictures": len(items),
        "packages": packages | optimizers.package(params.optimizer),
        "pictures": sha256_json(sorted(item.content for item in items)),
        "train": params.recorded({"checkpoint_every_n_steps"}),
    }


def example_caption(items: Sequence[CachedItem]) -> str:
    """What a card draws where no prompt is set: the caption that several pictures share, else a held-out one."""
    own = sorted((item for item in items if not item.regularization), key=lambda item: item.content)
    counts = Counter(item.caption for item in own)
    caption, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    held_out = [item.caption for item in own if item.split == "heldout"]
    return caption if count > 1 or not held_out else held_out[0]
