"""Optimizer, parameter groups and learning-rate schedule of section ``train``."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from lora_dag.core.console import Problem, UserError, warn
from stages.train.optimizer_table import OPTIMIZERS, find_row

if TYPE_CHECKING:
    from stages.train.params import TrainParams

Parameters = dict[str, torch.nn.Parameter]


def make_optimizer(
    params: TrainParams, denoiser: Parameters, text_encoders: Parameters, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer over the trained parameters. ``try_out`` must have checked the settings.

    A schedule-free optimizer has separate weights for training and for use; it is put into training mode.
    """
    cls = optimizer_class(params, device)
    optimizer = cls(parameter_groups(params, denoiser, text_encoders), **optimizer_arguments(cls, params, device))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def try_out(params: TrainParams, device: torch.device) -> None:
    """Run one step with two small parameters, before anything large is loaded.

    Raises:
        UserError: the class is not installed, or it does not support an argument or a setting.
    """
    cls = optimizer_class(params, device)
    require_supported_settings(cls, params)
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
    except Exception as error:  # a class may raise any error for arguments that it does not accept
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        place = f"{params.setting('optimizer')}: {params.optimizer}"
        text = f"{place} fails in a trial step ({reason}). Change train.optimizer_args, learning_rate or lr_scheduler."
        raise UserError(Problem("optimizer-fails", text)) from None
    usual = find_row(params.optimizer).usual_rate
    if usual is not None and params.learning_rate < usual / 10:
        reason = f"{params.optimizer} adapts the rate itself, and learning_rate is a factor, usually {usual}."
        warn("rate-unusual", f"{params.setting('learning_rate')}: got {params.learning_rate:g}, but {reason}")


def optimizer_arguments(cls: type[torch.optim.Optimizer], params: TrainParams, device: torch.device) -> dict[str, Any]:
    """Return the arguments of the optimizer class, except the parameters."""
    given: dict[str, Any] = {"lr": scaled_rate(params.learning_rate, params), **params.optimizer_args}
    if "weight_decay" in inspect.signature(cls).parameters:
        given["weight_decay"] = params.weight_decay
    defaults = find_row(params.optimizer).gpu_arguments if device.type == "cuda" else {}
    return {**defaults, **given}


def require_supported_settings(cls: type[torch.optim.Optimizer], params: TrainParams) -> None:
    """Raise UserError for settings that the optimizer class does not support."""
    accepted = set(inspect.signature(cls).parameters)
    optional = accepted - {"params", "lr", "weight_decay"}
    problems = []
    if unknown := sorted(set(params.optimizer_args) - optional):
        text = f"got {unknown[0]}, but {cls.__name__} accepts only {', '.join(sorted(optional))} here."
        problems.append(
            Problem("unknown-optimizer-argument", f"{params.setting('optimizer_args')}: {text} Correct it.")
        )
    if params.weight_decay and "weight_decay" not in accepted:
        text = f"got {params.weight_decay:g}, but {cls.__name__} has no weight decay. Set it to 0."
        problems.append(Problem("unsupported-by-optimizer", f"{params.setting('weight_decay')}: {text}"))
    for rule in find_row(params.optimizer).rules:
        if any(getattr(params, name) != rule.value for name in rule.settings):
            settings = " and ".join(f"train.{name}" for name in rule.settings)
            fix = f"Set {settings} to {'null' if rule.value is None else rule.value}."
            text = f"{params.setting('optimizer')}: {params.optimizer} {rule.reason}. {fix}"
            problems.append(Problem("unsupported-by-optimizer", text))
    if problems:
        raise UserError(*problems)


def optimizer_class(params: TrainParams, device: torch.device) -> type[torch.optim.Optimizer]:
    """Return the class of ``train.optimizer``.

    Raises:
        UserError: it is not installed, is no optimizer, or needs a GPU.
    """
    row = find_row(params.optimizer)
    module_name, _, class_name = row.path.rpartition(".")
    place = f"{params.setting('optimizer')}: {params.optimizer}"
    if row.needs_gpu and device.type != "cuda":
        raise UserError(Problem("needs-gpu", f"{place} needs a GPU. Use adamw."))
    try:
        cls = getattr(importlib.import_module(module_name), class_name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module of something else may do anything, such as call sys.exit
        if not isinstance(error, ImportError):
            text = f"{place}: importing {module_name} fails ({error!r}). Use another optimizer."
            raise UserError(Problem("import-fails", text)) from None
        text = f"{place} is not installed. Run pip install {row.package}."
        raise UserError(Problem("package-missing", text)) from None
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        text = f"{place} is no optimizer. Use {', '.join(OPTIMIZERS)}, or a subclass of torch.optim.Optimizer."
        raise UserError(Problem("unknown-optimizer", text))
    return cls


def package_version(name: str) -> dict[str, str]:
    """Return package and version of an optimizer; empty for torch, whose version is recorded elsewhere."""
    installed = find_row(name).package
    try:
        return {installed: importlib.metadata.version(installed)} if installed else {}
    except importlib.metadata.PackageNotFoundError:
        return {installed: "of unknown version"}


def scaled_rate(rate: float, params: TrainParams) -> float:
    """Return the learning rate, multiplied by the images per step if ``scale_lr`` is set."""
    images_per_step = params.batch_size * params.gradient_accumulation_steps
    return rate * images_per_step if params.scale_lr else rate


def parameter_groups(params: TrainParams, denoiser: Parameters, text_encoders: Parameters) -> list[dict[str, Any]]:
    """Return the parameter groups. DoRA's magnitudes have no weight decay, which would shrink the base's weights."""
    groups = []
    rates = (params.learning_rate, params.text_encoder_lr or params.learning_rate)
    for trainable, rate in zip((denoiser, text_encoders), rates, strict=True):
        kinds: dict[str, list[torch.nn.Parameter]] = {"default": [], "fast": [], "magnitude": []}
        for name, parameter in trainable.items():
            is_fast = params.lora_plus_ratio is not None and ".lora_B." in name
            kind = "magnitude" if "lora_magnitude_vector" in name else "fast" if is_fast else "default"
            kinds[kind].append(parameter)
        base_rate = scaled_rate(rate, params)
        settings: dict[str, dict[str, Any]] = {
            "default": {"lr": base_rate},
            "fast": {"lr": base_rate * (params.lora_plus_ratio or 1)},
            "magnitude": {"lr": base_rate, "weight_decay": 0.0},
        }
        groups += [{"params": kinds[kind], **settings[kind]} for kind in kinds if kinds[kind]]
    return groups


def make_lr_scheduler(params: TrainParams, optimizer: torch.optim.Optimizer) -> Any:
    """Return the schedule of the learning rate, counted in optimizer steps; ``constant`` may start with a warmup."""
    warm_constant = params.lr_scheduler == "constant" and params.lr_warmup_steps > 0
    return get_scheduler(
        "constant_with_warmup" if warm_constant else params.lr_scheduler,
        optimizer,
        num_warmup_steps=params.lr_warmup_steps,
        num_training_steps=params.num_steps,
        num_cycles=params.lr_num_cycles,
        power=params.lr_power,
    )
