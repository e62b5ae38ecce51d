"""The optimizer and its learning rates, by libraries: torch.optim and what section ``train`` names."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from lora_dag.core.console import UserError, log
from stages.train.optimizer_table import OPTIMIZERS, row_of

if TYPE_CHECKING:
    from stages.train.params import TrainParams

Parameters = dict[str, torch.nn.Parameter]


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
    usual = row_of(params.optimizer).usual_rate
    if usual is not None and params.learning_rate < usual / 10:
        found = f"{params.optimizer} finds the rate itself, and learning_rate is a factor of it"
        log.warning("warning: params.yaml train.learning_rate: %s; %s is usual", found, usual)


def arguments(cls: type[torch.optim.Optimizer], params: TrainParams, device: torch.device) -> dict[str, Any]:
    """Of the class, beside the parameters."""
    found: dict[str, Any] = {"lr": scaled(params.learning_rate, params), **params.optimizer_args}
    if "weight_decay" in inspect.signature(cls).parameters:
        found["weight_decay"] = params.weight_decay
    defaults = row_of(params.optimizer).gpu_arguments if device.type == "cuda" else {}
    return {**defaults, **found}


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
    for rule in row_of(params.optimizer).rules:
        if any(getattr(params, name) != rule.value for name in rule.settings):
            settings = " and ".join(f"train.{name}" for name in rule.settings)
            found.append(f"{where} {rule.reason}; set {settings} to {'null' if rule.value is None else rule.value}")
    if found:
        raise UserError(*found)


def optimizer_class(name: str, device: torch.device) -> type[torch.optim.Optimizer]:
    """Raises UserError: not installed, no optimizer, or one that needs a GPU."""
    row = row_of(name)
    module_name, _, class_name = row.path.rpartition(".")
    where = f"params.yaml train.optimizer: {name}"
    if row.needs_gpu and device.type != "cuda":
        raise UserError(f"{where} needs a GPU; use adamw")
    try:
        cls = getattr(importlib.import_module(module_name), class_name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module does that is no optimizer's, sys.exit among it
        if not isinstance(error, ImportError):
            raise UserError(f"{where}: importing {module_name} fails ({error!r})") from None
        raise UserError(f"{where} is not installed; pip install {row.package}") from None
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(f"{where} is no optimizer; use {', '.join(OPTIMIZERS)}, or a subclass of torch.optim.Optimizer")
    return cls


def package(name: str) -> dict[str, str]:
    """Package and version that an optimizer comes from; nothing for torch, whose version is recorded anyway."""
    installed = row_of(name).package
    try:
        return {installed: importlib.metadata.version(installed)} if installed else {}
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
