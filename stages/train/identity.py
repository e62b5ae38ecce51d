"""Identity of a run: all inputs that determine its result, and the provenance that its adapter records."""

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

    from lora_dag.adapters.adapter_set import AdapterSet
    from lora_dag.artifacts.latent_cache import CachedItem
    from lora_dag.core.params import Config
    from stages.train.batches import Batches


@dataclass(frozen=True)
class Identity:
    """Inputs and provenance of a run."""

    inputs: dict[str, Any]
    """All inputs that determine the result. Only a run with the same inputs resumes its checkpoints."""
    provenance: dict[str, Any]
    """Record of data, settings and packages in adapter.json."""

    @property
    def digest(self) -> str:
        return sha256_json(self.inputs)

    @property
    def folder(self) -> Path:
        """Folder of the run's checkpoints and snapshots in the state directory."""
        return state_dir() / "runs" / self.digest[:16]


def identify(config: Config, batches: Batches, adapter: AdapterSet, base_digests: dict[str, str]) -> Identity:
    """Return the identity of a run."""
    return Identity(run_inputs(config, batches, adapter, base_digests), provenance(config, batches))


def run_inputs(config: Config, batches: Batches, adapter: AdapterSet, base_digests: dict[str, str]) -> dict[str, Any]:
    """Return all inputs that determine a run's result.

    The code counts by RESULTS only, so that a run that stopped at an error in a message resumes after the fix.
    """
    params, model, init_from = batches.params, config.section(ModelParams), config.section(LoraParams).init_from
    without = {"checkpoint_every_n_steps"} | ({"num_steps"} if can_extend(params) else set())
    if not params.compile:
        without.add("gradient_checkpointing")  # bit-identical result
    dropped = {"dropped caption": "zeros"} if batches.zeroed else {}  # no component's files contain it
    return {
        "base": base_digests | dropped,
        "cache": batches.cache.digest,
        "checkpoint": checkpoints.FORMAT,
        "dtype": model.dtype,
        "environment": device.environment(batches.device),
        "init_from": init_from.sha256 if init_from else None,
        "lora": adapter.configs,
        "optimizer": optimizers.package_version(params.optimizer),
        "results": RESULTS,
        "train": params.recorded(without),
        **model.quantization_record,
    }


def can_extend(params: TrainParams) -> bool:
    """Return whether a shorter run is bit-identical to the beginning of a longer one: nothing depends on num_steps."""
    return params.lr_scheduler == "constant"


def provenance(config: Config, batches: Batches) -> dict[str, Any]:
    """Return the provenance record of an adapter file, without path, host, time or git revision."""
    model, params, items = config.section(ModelParams), config.section(TrainParams), batches.items
    packages = {name: importlib.metadata.version(name) for name in device.RECORDED}
    return {
        "caption": example_caption(batches.cache.items),
        "captions": sha256_json(sorted(item.captions for item in items)),
        "latents": batches.cache.digest,
        "lora": config.section(LoraParams).model_dump(),
        "model": {"dtype": model.dtype, "variant": model.variant, **model.quantization_record},
        "num_images": len(items),
        "packages": packages | optimizers.package_version(params.optimizer),
        "images": sha256_json(sorted(item.content for item in items)),
        "train": params.recorded({"checkpoint_every_n_steps"}),
    }


def example_caption(items: Sequence[CachedItem]) -> str:
    """Return the model card's default prompt: a caption that several images share, else a held-out image's."""
    concept = sorted((item for item in items if not item.regularization), key=lambda item: item.content)
    counts = Counter(item.caption for item in concept)
    caption, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    held_out = [item.caption for item in concept if item.split == "heldout"]
    return caption if count > 1 or not held_out else held_out[0]
