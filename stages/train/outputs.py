"""What a training leaves: its plan in the log, data/adapter, and reports/train."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any

from lora_dag.adapters import lora, lycoris, targets
from lora_dag.artifacts import adapter, metrics
from lora_dag.core import device
from lora_dag.core.console import UserError, log, plural
from lora_dag.core.files import sha256_file, write_json, write_text
from lora_dag.core.locks import require_held
from lora_dag.core.progress import smoothed_loss
from stages.train import optimizers

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from stages.train.trainer import Trainer

MAX_LOSS_ROWS = 2000


def log_plan(trainer: Trainer, start: int) -> None:
    """What is about to be trained; warns of buckets that are smaller than a batch."""
    params, order = trainer.params, trainer.batches.order
    repeated = f", {order.num_entries} per epoch" if order.num_entries > len(trainer.items) else ""
    log.info("pictures    %d for training%s", len(trainer.items), repeated)
    if len(order.buckets) > 1:
        sizes = ", ".join(f"{bucket.name} ({len(bucket.items)})" for bucket in order.buckets)
        log.info("buckets     latents of %s", sizes)
    for bucket in order.buckets:
        if len(bucket.items) < params.batch_size:
            few = f"bucket {bucket.name}: {plural(len(bucket.items), 'picture')} for batches of {params.batch_size}"
            log.warning("warning: %s; some come up twice in a batch", few)
    log_adapter(trainer)
    num_processes = trainer.accelerator.num_processes
    shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
    log.info("batch       %d x %d accumulated%s", params.batch_size, params.gradient_accumulation_steps, shared)
    log.info("steps       %d to %d, %.1f epochs", start, params.num_steps, trainer.num_epochs(params.num_steps))


def log_adapter(trainer: Trainer) -> None:
    """How much is trained, on what, and in how much memory."""
    denoiser = trainer.adapted.modules[""]
    names = lora.targets(denoiser)
    num = num_parameters(trainer.adapted.of("", trainer.trainable))
    num_base = num_parameters(dict(denoiser.named_parameters())) - num
    ranks = sorted({denoiser.get_submodule(name).r[lora.NAME] for name in names})
    log.info(
        "adapter     rank %s, %d layers, %s parameters (%.2f %% of the denoiser's %s)",
        " and ".join(map(str, ranks)),
        len(names),
        f"{num:,}",
        100 * num / num_base,
        f"{num_base:,}",
    )
    if trainer.started_from:
        log.info("start       %s", trainer.started_from)
    if trainer.biases:
        log.info(
            "biases      %s: %d, as deltas that decay towards zero", trainer.lora_config["bias"], len(trainer.biases)
        )
    num_trainable = num_parameters(trainer.trainable)
    for component in trainer.text_lora:
        num_base += log_text_encoder(trainer, component)
        names += lora.targets(trainer.adapted.modules[component])
    if trainer.text_lora:
        log.info("text        encoders are trained: what the cache holds of them is not used")
    for line in lycoris.plan(denoiser, lora.NAME) + targets.plan(names, num_trainable, num_base):
        log.info(line)


def log_text_encoder(trainer: Trainer, component: str) -> int:
    """The same of a text encoder; the number of its frozen parameters."""
    encoder = trainer.adapted.modules[component]
    num = num_parameters(trainer.adapted.of(component, trainer.trainable))
    num_base = num_parameters(dict(encoder.named_parameters())) - num
    rate = optimizers.scaled(trainer.params.text_encoder_lr or trainer.params.learning_rate, trainer.params)
    layers = len(lora.targets(encoder))
    share = f"{num:,} parameters ({100 * num / num_base:.2f} % of {num_base:,}), learning rate {rate:g}"
    log.info("text        %s: rank %d, %d layers, %s", component, trainer.text_lora[component]["r"], layers, share)
    return num_base


def num_parameters(named: dict[str, torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in named.values())


def save(trainer: Trainer, adapter_folder: Path, reports: Path) -> None:
    """Write the adapter and its reports, then drop the checkpoints, unless another run could go on from them.

    Raises:
        UserError: another process is at work on the run, or has ended it, on a disk without locks.
    """
    require_held(trainer.folder)
    files = save_adapter(trainer, adapter_folder)
    save_reports(trainer, reports, files)
    if not trainer.may_be_asked_again:
        for name in ("checkpoints", "snapshots"):  # the lock stays: another process may wait for it
            shutil.rmtree(trainer.folder / name, ignore_errors=True)
    log.info("wrote       %s, %s, %s", adapter_folder, plural(len(files) - 1, "snapshot"), reports / "metrics.json")
    log.info("next        python -m stages.validate")


def save_adapter(trainer: Trainer, adapter_folder: Path) -> dict[str, str]:
    """Final adapter, snapshots and, last, adapter.json; returns the digest of each weight file."""
    if trainer.adapted.frozen_digest() != trainer.frozen_before:
        raise RuntimeError("training changed the frozen base")
    num_steps = len(trainer.history)
    steps = [step for step in trainer.params.snapshot_steps if step < num_steps]
    if gone := [step for step in steps if not (trainer.folder / adapter.snapshot_name(step)).exists()]:
        raise UserError(f"{trainer.folder}: the snapshot of step {gone[0]} is gone; run the same command again")
    shutil.rmtree(adapter_folder, ignore_errors=True)
    files = {}
    for step in steps:
        name = adapter.snapshot_name(step)
        (adapter_folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trainer.folder / name, adapter_folder / name)
        files[name] = sha256_file(adapter_folder / name)
    trainer.save_weights(adapter_folder / adapter.FINAL)
    files[adapter.FINAL] = sha256_file(adapter_folder / adapter.FINAL)
    # Dropout is training's alone: diffusers leaves a loaded adapter in train mode and would drop while sampling.
    for_use = {component: without_dropout(config) for component, config in trainer.adapted.configs.items()}
    lora_config = for_use.pop("")
    adapter.Adapter(
        lora_config, trainer.base, num_steps, steps, files, trainer.biases, trainer.made_from, for_use
    ).save(adapter_folder)
    return files


def without_dropout(config: dict[str, Any]) -> dict[str, Any]:
    return {name: 0.0 if name == "lora_dropout" else value for name, value in config.items()}


def save_reports(trainer: Trainer, reports: Path, files: dict[str, str]) -> None:
    """loss.csv and metrics.json for git; run.json, ignored by git and DVC, for what differs between equal runs."""
    history, num_steps = trainer.history, len(trainer.history)
    stride = math.ceil(len(history) / MAX_LOSS_ROWS)
    rows = [
        f"{i + 1},{loss:.6g},{rate:.6g},{norm:.6g}"
        for i, (loss, rate, norm) in enumerate(history)
        if (i + 1) % stride == 0
    ]
    write_text(reports / "loss.csv", "\n".join(["step,loss,learning_rate,grad_norm", *rows]) + "\n")
    metrics.save(
        reports / "metrics.json",
        {
            "train.loss_final": smoothed_loss(history),
            "train.num_steps": num_steps,
            "train.images_seen": num_steps * trainer.images_per_step,
            "train.epochs": trainer.num_epochs(num_steps),
            "train.num_pictures": len(trainer.items),
            "train.num_trainable_parameters": num_parameters(trainer.trainable),
            "train.grad_norm_max": max((row[2] for row in history if math.isfinite(row[2])), default=0.0),
            "train.base_unchanged": True,
            "train.base_digest": trainer.frozen_before[:16],
            "train.adapter_digest": files[adapter.FINAL][:16],
        },
    )
    own = {"environment": device.environment(trainer.device), "of": sha256_file(reports / "metrics.json")}
    write_json(reports / "run.json", own | trainer.measured)
