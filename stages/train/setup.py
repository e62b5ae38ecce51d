"""What a run is made of, each from its settings: accelerator, optimizer, schedule; and the digest that names it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from stages.core import closure, device
from stages.core.console import UserError
from stages.core.files import sha256_json
from stages.core.params import ModelParams
from stages.train.params import LoraParams, TrainParams

if TYPE_CHECKING:
    from stages.artifacts.latent_cache import CachedItem, LatentCache
    from stages.core.params import Config, RuntimeParams

Parameters = dict[str, torch.nn.Parameter]
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def training_items(cache: LatentCache, batch_size: int) -> list[CachedItem]:
    """The pictures that are trained on, regularization pictures among them.

    Raises:
        UserError: an epoch of them, with repeats, does not fill a batch.
    """
    items = cache.split("train")
    num_entries = sum(item.repeats for item in items)
    if batch_size > num_entries:
        repeated = f" and their repeats ({num_entries})" if num_entries > len(items) else ""
        found = f"{batch_size} is more than the {len(items)} training pictures{repeated}"
        raise UserError(f"params.yaml train.batch_size: {found}")
    return items


def make_accelerator(runtime: RuntimeParams, model: ModelParams) -> Accelerator:
    """On the device that ``runtime`` asks for, in the frozen base's dtype.

    Raises:
        UserError: the tracker is not installed, the device is not here, or there are several processes.
    """
    if runtime.tracker != "none" and importlib.util.find_spec(runtime.tracker) is None:
        missing = f"params.yaml runtime.tracker: {runtime.tracker} is not installed"
        raise UserError(f"{missing}; pip install {runtime.tracker}, or use none")
    where = device.setup(runtime, model)
    accelerator = Accelerator(
        cpu=where.type == "cpu",
        mixed_precision=MIXED_PRECISION[model.dtype],
        log_with=None if runtime.tracker == "none" else runtime.tracker,
        project_dir="logs",
    )
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes: train runs in one; start it without `accelerate launch`"
        )
    return accelerator


def make_optimizer(
    params: TrainParams, denoiser: Parameters, text_encoders: Parameters | None = None
) -> torch.optim.Optimizer:
    """AdamW; DoRA's magnitudes do not decay: towards zero they would shrink the base's own weights."""
    groups: list[dict[str, Any]] = []
    rates = (params.learning_rate, params.text_encoder_lr or params.learning_rate)
    for trainable, rate in zip((denoiser, text_encoders or {}), rates, strict=True):
        if plain := [p for n, p in trainable.items() if "lora_magnitude_vector" not in n]:
            groups.append({"params": plain, "lr": rate})
        if magnitudes := [p for n, p in trainable.items() if "lora_magnitude_vector" in n]:
            groups.append({"params": magnitudes, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=params.learning_rate,
        betas=(params.adam_beta1, params.adam_beta2),
        weight_decay=params.adam_weight_decay,
        eps=params.adam_epsilon,
    )


def make_lr_scheduler(params: TrainParams, optimizer: torch.optim.Optimizer) -> Any:
    warm_constant = params.lr_scheduler == "constant" and params.lr_warmup_steps > 0
    return get_scheduler(
        "constant_with_warmup" if warm_constant else params.lr_scheduler,
        optimizer,
        num_warmup_steps=params.lr_warmup_steps,
        num_training_steps=params.num_steps,
    )


def run_digest(
    params: TrainParams,
    model: ModelParams,
    configs: dict[str, dict[str, Any]],
    cache: LatentCache,
    base: dict[str, str],
    where: torch.device,
    init_from: str | None,
) -> str:
    """Names everything that decides a run's bytes: a checkpoint is resumed by the run of the same digest alone.

    Args:
        configs: component -> LoRA's config; "" for the denoiser.
        init_from: digest of the adapter that the run starts from, if it does.
    """
    return sha256_json(
        ({"init_from": init_from} if init_from else {})
        | {
            "base": base,
            "cache": cache.digest,
            "code": closure.code_digest("train", model.family),
            "dtype": model.dtype,
            "environment": device.environment(where),
            "lora": configs[""] if len(configs) == 1 else configs,
            "train": params.model_dump(exclude={"checkpoint_every_n_steps"}),
        }
    )


def made_from(config: Config, cache: LatentCache, items: list[CachedItem]) -> dict[str, Any]:
    """Where an adapter comes from, for whoever meets its file: no path, host, time or git revision."""
    model = config.section(ModelParams)
    return {
        "captions": sha256_json(sorted(item.captions for item in items)),
        "latents": cache.digest,
        "lora": config.section(LoraParams).model_dump(),
        "model": {"dtype": model.dtype, "variant": model.variant},
        "num_pictures": len(items),
        "packages": {name: importlib.metadata.version(name) for name in device.RECORDED},
        "pictures": sha256_json(sorted(item.content for item in items)),
        "train": config.section(TrainParams).model_dump(exclude={"checkpoint_every_n_steps"}),
    }
