"""Results of a training: data/adapter and reports/train."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any

from lora_dag.adapters.adapter_set import DENOISER_KEY
from lora_dag.artifacts import adapter, metrics
from lora_dag.core import device
from lora_dag.core.console import Problem, UserError, log, plural
from lora_dag.core.files import sha256_file, write_json, write_text
from lora_dag.core.locks import require_held
from lora_dag.core.time_estimate import duration
from stages.train.plan import num_parameters
from stages.train.progress import SMOOTHING, smoothed_loss
from stages.train.run_folder import code_digests

if TYPE_CHECKING:
    from pathlib import Path

    from stages.train.run import Run

MAX_LOSS_ROWS = 2000


def save(run: Run, speed: dict[str, float], adapter_folder: Path, reports: Path) -> None:
    """Write the adapter and its reports, then delete the checkpoints unless a longer run could resume from them.

    Args:
        speed: speed and time, for run.json.

    Raises:
        UserError: another process uses or has finished the run, on a disk without locks.
    """
    folder = run.identity.folder
    require_held(folder)
    files = save_adapter(run, adapter_folder)
    save_reports(run, speed, reports, files)
    if not run.keep_checkpoints:
        for name in ("checkpoints", "snapshots"):  # keep the lock: another process may wait for it
            shutil.rmtree(folder / name, ignore_errors=True)
    steps = f"{plural(len(run.history), 'step')} in {duration(speed['seconds'])}"
    if speed["resumed_from_step"]:
        steps = f"steps {speed['resumed_from_step']} to {len(run.history)} in {duration(speed['seconds'])}"
    mean = f"mean of the last {min(SMOOTHING, len(run.history))} steps"
    log.info("trained     %s (%.1f images/s)", steps, speed["images_per_second"])
    log.info("loss        %.4f (%s)", smoothed_loss(run.history.rows), mean)
    log.info("wrote       %s, %s, %s", adapter_folder, plural(len(files) - 1, "snapshot"), reports / "metrics.json")
    log.info("next        python -m stages.validate")


def save_adapter(run: Run, adapter_folder: Path) -> dict[str, str]:
    """Write the final adapter, the snapshots and, last, adapter.json; return the digest of each weight file."""
    if run.adapter.frozen_digest() != run.base.frozen_digest:
        raise RuntimeError("training changed the frozen base")
    folder, num_steps = run.identity.folder, len(run.history)
    steps = [step for step in run.params.snapshot_steps if step < num_steps]
    if missing := [step for step in steps if not (folder / adapter.snapshot_name(step)).exists()]:
        text = f"{folder}: the snapshot of step {missing[0]} is missing. Run the same command again."
        raise UserError(Problem("snapshot-missing", text))
    shutil.rmtree(adapter_folder, ignore_errors=True)
    files = {}
    for name in map(adapter.snapshot_name, steps):
        (adapter_folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, adapter_folder / name)
        files[name] = sha256_file(adapter_folder / name)
    run.save_weights(adapter_folder / adapter.FINAL)
    files[adapter.FINAL] = sha256_file(adapter_folder / adapter.FINAL)
    # Without dropout, because diffusers leaves a loaded adapter in train mode and would apply it while sampling.
    configs = {component: without_dropout(config) for component, config in run.adapter.configs.items()}
    lora_config = configs.pop(DENOISER_KEY)
    provenance = run.identity.provenance
    adapter.Adapter(lora_config, run.base.digests, num_steps, steps, files, run.biases, provenance, configs).save(
        adapter_folder
    )
    return files


def without_dropout(config: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter's config with a dropout of 0."""
    return {name: 0.0 if name == "lora_dropout" else value for name, value in config.items()}


def save_reports(run: Run, speed: dict[str, float], reports: Path, files: dict[str, str]) -> None:
    """Write loss.csv and metrics.json for git, and run.json, ignored by git and DVC, with values that vary by run."""
    history = run.history.rows
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
            "train.num_steps": len(history),
            "train.images_seen": len(history) * run.images_per_step,
            "train.epochs": run.num_epochs(len(history)),
            "train.num_images": len(run.batches.items),
            "train.num_trainable_parameters": num_parameters(run.adapter.trainable),
            "train.grad_norm_max": max((row[2] for row in history if math.isfinite(row[2])), default=0.0),
            "train.base_unchanged": True,
            "train.base_digest": run.base.frozen_digest[:16],
            "train.adapter_digest": files[adapter.FINAL][:16],
        },
    )
    record = {"environment": device.environment(run.device), "of": sha256_file(reports / "metrics.json")}
    write_json(reports / "run.json", record | {"code": code_digests(run.identity.folder)} | speed)
