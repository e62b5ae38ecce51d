"""The optimizer and its learning rates, by libraries: torch.optim and what section ``train`` names."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from lora_dag.core.console import UserError, log

if TYPE_CHECKING:
    from stages.train.params import TrainParams

Parameters = dict[str, torch.nn.Parameter]

NAMED = {
    "adamw": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "torch.optim.Adafactor",
    "lion": "lion_pytorch.Lion",
    "prodigy": "prodigyopt.Prodigy",
    "schedule_free": "schedulefree.AdamWScheduleFree",
}
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
}
"""Module -> what pip calls it."""


def make_optimizer(
    params: TrainParams, denoiser: Parameters, text_encoders: Parameters, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of ``params`` over what is trained of either; try_out has found nothing wrong with it.

    schedule-free tells weights of training from those of use: it starts with the former.
    """
    cls = optimizer_class(params.optimizer, device)
    optimizer = cls(groups(params, denoiser, text_encoders), **arguments(cls, params, device))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def try_out(params: TrainParams, device: torch.device) -> None:
    """One step of two small parameters, before anything large is loaded.

    Raises:
        UserError: a class that is not installed, arguments that it does not take, or a setting it would not read.
    """
    cls = optimizer_class(params.optimizer, device)
    require_read(cls, params)
    where = f"params.yaml train.optimizer: {params.optimizer}"
    names = ("try.lora_A.default.weight", "try.lora_B.default.weight")
    small = {name: torch.nn.Parameter(torch.ones(2, 3, device=device)) for name in names}
    try:
        optimizer = make_optimizer(params, small, {}, device)
        schedule = make_lr_scheduler(params, optimizer)
        for parameter in small.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    except UserError:
        raise
    except Exception as error:  # whatever a class raises that does not take its arguments, or a plain step
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: {what}; change train.optimizer_args, learning_rate or lr_scheduler") from None
    if library(cls) == "prodigyopt" and params.learning_rate < 0.1:
        found = "prodigy finds the rate itself, and learning_rate is a factor of it"
        log.warning("warning: params.yaml train.learning_rate: %s; 1.0 is usual", found)


def arguments(cls: type[torch.optim.Optimizer], params: TrainParams, device: torch.device) -> dict[str, Any]:
    """Of the class, beside the parameters."""
    found: dict[str, Any] = {"lr": scaled(params.learning_rate, params), **params.optimizer_args}
    if "weight_decay" in inspect.signature(cls).parameters:
        found["weight_decay"] = params.weight_decay
    if params.optimizer == "adamw" and device.type == "cuda":
        found.setdefault("fused", True)
    return found


def require_read(cls: type[torch.optim.Optimizer], params: TrainParams) -> None:
    """Raises UserError for a setting that the class does not take or would not read."""
    own = set(inspect.signature(cls).parameters)
    known = own - {"params", "lr", "weight_decay"}
    where, found = f"params.yaml train.optimizer: {params.optimizer}", []
    if unknown := sorted(set(params.optimizer_args) - known):
        what = f"{cls.__name__} takes no {unknown[0]} here; it takes {', '.join(sorted(known))}"
        found.append(f"params.yaml train.optimizer_args: {what}")
    if params.weight_decay and "weight_decay" not in own:
        found.append(f"params.yaml train.weight_decay: {cls.__name__} has none; set it to 0")
    if library(cls) == "schedulefree" and params.lr_scheduler != "constant":
        found.append(f"{where} needs no schedule; set train.lr_scheduler to constant")
    if library(cls) == "schedulefree" and params.ema_decay is not None:
        found.append(f"{where} averages by itself; set train.ema_decay to null")
    if library(cls) == "prodigyopt" and (params.lora_plus_ratio or params.text_encoder_lr):
        found.append(f"{where} has one rate for all; set train.lora_plus_ratio and train.text_encoder_lr to null")
    if found:
        raise UserError(*found)


def library(cls: type[torch.optim.Optimizer]) -> str:
    return cls.__module__.partition(".")[0]


def optimizer_class(name: str, device: torch.device) -> type[torch.optim.Optimizer]:
    """Raises UserError: not installed, no optimizer, or one that needs a GPU."""
    module_name, _, class_name = NAMED.get(name, name).rpartition(".")
    where = f"params.yaml train.optimizer: {name}"
    if name == "adamw_8bit" and device.type != "cuda":
        raise UserError(f"{where} needs a GPU; use adamw")
    try:
        cls = getattr(importlib.import_module(module_name), class_name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module does that is no optimizer's, sys.exit among it
        if not isinstance(error, ImportError):
            raise UserError(f"{where}: importing {module_name} fails ({error!r})") from None
        package = PACKAGES.get(module_name.partition(".")[0], module_name.partition(".")[0])
        raise UserError(f"{where} is not installed; pip install {package}") from None
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(f"{where} is no optimizer; use {', '.join(NAMED)}, or a subclass of torch.optim.Optimizer")
    return cls


def package(name: str) -> dict[str, str]:
    """Package and version that an optimizer comes from; nothing for torch, whose version is recorded anyway."""
    module = NAMED.get(name, name).partition(".")[0]
    installed = PACKAGES.get(module, module)
    try:
        return {} if module == "torch" else {installed: importlib.metadata.version(installed)}
    except importlib.metadata.PackageNotFoundError:
        return {installed: "of unknown version"}


def scaled(rate: float, params: TrainParams) -> float:
    images_per_step = params.batch_size * params.gradient_accumulation_steps
    return rate * images_per_step if params.scale_lr else rate


def groups(params: TrainParams, denoiser: Parameters, text_encoders: Parameters) -> list[dict[str, Any]]:
    """Parameter groups; DoRA's magnitudes do not decay: towards zero they would shrink the base's own weights."""
    found = []
    rates = (params.learning_rate, params.text_encoder_lr or params.learning_rate)
    for trainable, rate in zip((denoiser, text_encoders), rates, strict=True):
        kinds: dict[str, list[torch.nn.Parameter]] = {"plain": [], "fast": [], "magnitude": []}
        for name, parameter in trainable.items():
            is_fast = params.lora_plus_ratio is not None and ".lora_B." in name
            kind = "magnitude" if "lora_magnitude_vector" in name else "fast" if is_fast else "plain"
            kinds[kind].append(parameter)
        own_rate = scaled(rate, params)
        settings: dict[str, dict[str, Any]] = {
            "plain": {"lr": own_rate},
            "fast": {"lr": own_rate * (params.lora_plus_ratio or 1)},
            "magnitude": {"lr": own_rate, "weight_decay": 0.0},
        }
        found += [{"params": kinds[kind], **settings[kind]} for kind in kinds if kinds[kind]]
    return found


def make_lr_scheduler(params: TrainParams, optimizer: torch.optim.Optimizer) -> Any:
    """All in optimizer steps; ``constant`` rises first where there is a warmup."""
    warm_constant = params.lr_scheduler == "constant" and params.lr_warmup_steps > 0
    return get_scheduler(
        "constant_with_warmup" if warm_constant else params.lr_scheduler,
        optimizer,
        num_warmup_steps=params.lr_warmup_steps,
        num_training_steps=params.num_steps,
        num_cycles=params.lr_num_cycles,
        power=params.lr_power,
    )
