"""Checks of `lora-dag check` that import torch: objective, tokenizer, optimizer, adapter, feature model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_dag.adapters.params import LoraParams
from lora_dag.core.console import log, plural
from lora_dag.core.params import Config, ModelParams, RuntimeParams
from lora_dag.families.protocol import load_family
from stages.train.params import TrainParams
from stages.validate import feature_files
from stages.validate.params import ValidateParams

if TYPE_CHECKING:
    import torch


def check_objective(config: Config, configs: ModelParams) -> None:
    from lora_dag.diffusion import objectives
    from stages.train import noising
    from stages.train.loss import require_snr

    noise_scheduler = load_family(configs.family).load_scheduler(configs)
    require_snr(objectives.make_objective(noise_scheduler), config.section(TrainParams))
    noising.make_timesteps(config.section(TrainParams), noise_scheduler)
    log.info("objective   %s", objectives.prediction_type(noise_scheduler))


def check_captions(configs: ModelParams) -> None:
    """Open the tokenizer, whose files may be incomplete."""
    family = load_family(configs.family)
    (own,) = family.count_tokens(configs, [""])
    log.info("captions    up to %d tokens, %d of them the model's own", family.max_tokens(configs), own)


def check_training(config: Config, configs: ModelParams, device: torch.device) -> None:
    """Check optimizer and processes, and inject the adapter into the denoiser without its weights."""
    import diffusers
    import torch

    from lora_dag.adapters import lora
    from lora_dag.core import quiet
    from lora_dag.families import common
    from stages.train import init_from, launch, optimizers
    from stages.train.build import require_tracker

    lora_params, train, runtime = config.section(LoraParams), config.section(TrainParams), config.section(RuntimeParams)
    require_tracker(runtime)
    launch.require_even_split(train, runtime.num_processes)
    optimizers.try_out(train, device)
    family = load_family(configs.family)
    cls = getattr(diffusers, family.COMPONENTS[family.DENOISER])
    with torch.device("meta"), quiet.without_warnings():  # of weights that are cast, and there are none
        with common.refuse_damage(configs, family.DENOISER):
            denoiser = cls.from_config(common.config(configs, family.DENOISER)).to(getattr(torch, configs.dtype))
        lora.inject(denoiser, lora.make_config(lora_params, denoiser))
    log.info("adapter     %s", plural(len(lora.target_names(denoiser)), "layer"))
    if lora_params.init_from is not None:
        init_from.read(lora_params, denoiser)
        log.info("start       %s", lora_params.init_from.path)


def check_features(settings: ValidateParams, device: torch.device) -> None:
    """Load the image-text model, if it is set and downloaded."""
    from stages.validate import features

    model_pin = settings.feature_model
    if model_pin and not feature_files.is_fetched(model_pin):
        log.info("features    %s, downloaded when validate starts", model_pin.path)
    elif model := features.load(settings, device):
        log.info("features    %s", model.name)
