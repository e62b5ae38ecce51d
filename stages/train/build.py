"""Construction of a run from its settings; most errors are raised before the base model is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from lora_dag.adapters import lora
from lora_dag.adapters.adapter_set import DENOISER_KEY, AdapterSet, frozen_digest, text_configs
from lora_dag.adapters.params import LoraParams
from lora_dag.core import device
from lora_dag.core.console import Problem, UserError, log, plural
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.core.time_estimate import Work
from lora_dag.diffusion.objectives import make_objective
from lora_dag.families import quantized
from stages.train import init_from, noising, optimizers, parent_processes
from stages.train.averaging import AveragedWeights
from stages.train.batches import Batches
from stages.train.early_stop import EarlyStop, HeldoutRows
from stages.train.gradient_sum import GradientSum
from stages.train.identity import identify
from stages.train.launch import require_even_split
from stages.train.loss import Loss
from stages.train.params import TrainParams
from stages.train.run import FrozenBase, Run
from stages.train.self_checks import GradientMonitor

if TYPE_CHECKING:
    from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
    from lora_dag.core.params import Config
    from lora_dag.families.protocol import Family

MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def build(config: Config, family: Family, cache: LatentCache, base_digests: dict[str, str]) -> Run:
    """Build a run before its first step.

    Args:
        base_digests: component -> digest of the base's files.

    Raises:
        UserError: a setting does not fit the cache, the base model or this machine.
    """
    parents_at_start = parent_processes.parent_pids()
    params, model = config.section(TrainParams), config.section(ModelParams)
    loss = Loss(make_objective(family.load_scheduler(model)), params)
    items = training_items(cache, params)
    accelerator = make_accelerator(config.section(RuntimeParams), model, params)
    optimizers.try_out(params, accelerator.device)
    timesteps = noising.make_timesteps(params, loss.objective.noise_scheduler)
    batches = Batches(cache, items, params, timesteps, accelerator.device, family.drops_to_zeros(model))
    early_stop = make_early_stop(batches)
    work = expected_work(batches, accelerator, model, base_digests[family.DENOISER])
    work.announce(what=f" for {plural(params.num_steps, 'step')}")
    device.log_device(accelerator.device, model)

    base = load_base(config, family, base_digests, accelerator.device)
    adapter, init_from_summary = inject_adapter(config, base)
    denoiser_part = adapter.part(DENOISER_KEY, adapter.trainable)
    optimizer = optimizers.make_optimizer(params, denoiser_part, adapter.text_trainable, accelerator.device)
    return Run(
        config=config,
        accelerator=accelerator,
        # Not wrapped for several processes: GradientSum adds the gradients, independent of their order.
        base=replace(base, denoiser=accelerator.prepare_model(base.denoiser, evaluation_mode=True)),
        adapter=adapter,
        init_from_summary=init_from_summary,
        loss=loss,
        batches=batches,
        early_stop=early_stop,
        lr_scheduler=optimizers.make_lr_scheduler(params, optimizer),
        averaged=AveragedWeights(params, list(adapter.trainable.values()), optimizer),
        optimizer=accelerator.prepare_optimizer(optimizer),
        gradients=GradientSum(adapter.trainable.values(), params.gradient_accumulation_steps),
        monitor=GradientMonitor(adapter.trainable, params.max_grad_norm),
        identity=identify(config, batches, adapter, base_digests),
        parents_at_start=parents_at_start,
        work=work,
    )


def training_items(cache: LatentCache, params: TrainParams) -> list[CachedItem]:
    """Return the training images, including regularization images.

    Raises:
        UserError: the batch size is above the number of images with their repeats.
    """
    items = cache.split("train")
    num_entries = sum(item.repeats for item in items)
    if params.batch_size > num_entries:
        repeated = f" ({num_entries} with repeats)" if num_entries > len(items) else ""
        images = f"{plural(len(items), 'training image')}{repeated}"
        text = f"{params.setting('batch_size')}: got {params.batch_size}, but there are only {images}. Lower it."
        raise UserError(Problem("batch-too-large", text))
    return items


def make_accelerator(runtime: RuntimeParams, model: ModelParams, params: TrainParams) -> Accelerator:
    """Return accelerate's object for the device of section ``runtime`` and the dtype of the base model.

    Raises:
        UserError: the tracker is not installed, the device is missing, or the processes cannot share a step.
    """
    require_tracker(runtime)
    own_device = device.setup(runtime, model)
    if own_device.type == "cpu":
        device.keep_freed_memory()
    num_threads = torch.get_num_threads()
    accelerator = Accelerator(
        cpu=own_device.type == "cpu",
        mixed_precision=MIXED_PRECISION[model.dtype],
        log_with=None if runtime.tracker == "none" else runtime.tracker,
        project_dir="logs",
        # Otherwise environment variables of `accelerate launch` would decide, which no digest contains.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    torch.set_num_threads(num_threads)  # accelerate changes it for several processes on a CPU
    require_even_split(params, accelerator.num_processes)
    return accelerator


def require_tracker(runtime: RuntimeParams) -> None:
    """Raise UserError if the tracker is not installed."""
    if runtime.tracker != "none" and importlib.util.find_spec(runtime.tracker) is None:
        text = f"{runtime.setting('tracker')}: {runtime.tracker} is not installed."
        raise UserError(Problem("package-missing", f"{text} Run pip install {runtime.tracker}, or set it to none."))


def make_early_stop(batches: Batches) -> EarlyStop | None:
    """Return the early stop of section ``train``, or None."""
    patience = batches.params.early_stop_patience
    return EarlyStop(HeldoutRows(batches), patience) if patience else None


def expected_work(batches: Batches, accelerator: Accelerator, model: ModelParams, denoiser_digest: str) -> Work:
    """Return the amount of work, in latent pixels, for an estimate of the time."""
    area = sum(bucket.height * bucket.width * len(bucket.items) for bucket in batches.order.buckets)
    speed = device.speed_conditions(accelerator.device, model, denoiser_digest)
    return training_work(batches.params, area / len(batches.items), speed, accelerator.num_processes)


def training_work(params: TrainParams, area: float, speed: dict[str, str | int], num_processes: int) -> Work:
    """Return the amount of work of a training.

    Args:
        area: latent pixels of an image, on average.
        speed: conditions of ``device.speed_conditions``.
    """
    images = params.num_steps * params.batch_size * params.gradient_accumulation_steps
    return Work("train", speed | {"num_processes": num_processes}, images * area)


def load_base(config: Config, family: Family, digests: dict[str, str], device: torch.device) -> FrozenBase:
    """Load the denoiser and, if they are trained, the text encoders."""
    model = config.section(ModelParams)
    denoiser = family.load_denoiser(model, device)
    if model.quantization:
        log.info("quantized   %s", quantized.summary(denoiser))
    text = family.load_trainable_text(model, device) if config.section(LoraParams).train_text_encoder else None
    base = FrozenBase(family, denoiser, text, digests, "")
    return replace(base, frozen_digest=frozen_digest({DENOISER_KEY: denoiser, **base.text_encoders}))


def inject_adapter(config: Config, base: FrozenBase) -> tuple[AdapterSet, str]:
    """Add an adapter to the base, initialized by the seed or from ``lora.init_from``.

    Returns:
        The adapter, and a summary of the file that it starts from; empty without a file.

    Raises:
        UserError: a target or pattern matches no layer, a rank is above a layer's size, or the file does not fit.
    """
    settings, params = config.section(LoraParams), config.section(TrainParams)
    encoders = base.text_encoders
    text = text_configs(settings, base.family, encoders)
    adapter = AdapterSet(base.denoiser, lora.make_config(settings, base.denoiser), text, encoders)
    adapter.keyed_init(params.seed)
    summary = init_from.fill(settings, base.denoiser, base.digests)
    if params.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    return adapter, summary
