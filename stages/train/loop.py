"""Training loop: the step on one screen, checkpoints, snapshots, resume."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from lora_dag.adapters.adapter_set import DENOISER_KEY
from lora_dag.adapters.params import LoraParams
from lora_dag.artifacts.adapter import snapshot_name
from lora_dag.core import seeding
from lora_dag.core.console import log, plural, warn
from lora_dag.core.files import drop_leftovers, write_json
from lora_dag.core.locks import require_held
from lora_dag.core.progress import elapsed
from lora_dag.core.tensors import has_all_bytes
from stages.train import eva, self_checks
from stages.train.gradient_sum import require_same
from stages.train.plan import log_plan
from stages.train.progress import Progress
from stages.train.run_folder import INPUTS, begin_run, end_run, log_start_over

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stages.train.batches import Batch
    from stages.train.run import Run


def train(run: Run, code: str) -> dict[str, float]:
    """Start or resume a run, up to ``train.num_steps`` or an early stop.

    Args:
        code: digest of the running code.

    Returns:
        Speed and time, which differ between bit-identical runs.
    """
    params = run.params
    start = begin(run, code)
    progress = Progress(
        run.accelerator,
        start=start,
        num_steps=params.num_steps,
        images_per_step=run.images_per_step,
        every=run.runtime.log_every_n_steps,
    )
    progress.init_trackers(params.model_dump())
    with run.interrupt:
        for step in range(start, params.num_steps):
            if step > start and step % params.checkpoint_every_n_steps == 0:
                save_checkpoint(run, step)
            if step > 0 and step % params.snapshot_every_n_steps == 0:
                save_snapshot(run, step)
                if run.early_stop is not None and run.early_stop.should_stop(step, heldout_loss(run)):
                    break
            stop = training_step(run, step)
            progress.step(run.history.rows)
            if stop:
                save_checkpoint(run, step + 1)
                run.accelerator.wait_for_everyone()  # the exit of one process ends the others
                run.interrupt.exit(step + 1)
    speed = progress.end(len(run.history))
    num_new_steps = len(run.history) - start
    run.work.record(run.work.amount * num_new_steps / params.num_steps, speed["seconds"])
    run.monitor.check_end()
    if run.keep_checkpoints:
        save_checkpoint(run, len(run.history))
    if run.accelerator.is_main_process:
        end_run(run.identity.folder, len(run.history))
    return speed


def training_step(run: Run, step: int) -> bool:
    """Run one optimizer step. Its random numbers are a function of (seed, purpose, step, slot).

    Returns:
        Whether any process received a signal to stop.
    """
    accumulation, scaler = run.params.gradient_accumulation_steps, run.accelerator.scaler
    losses = torch.zeros(accumulation, device=run.device)
    for micro in range(run.accelerator.process_index, accumulation, run.accelerator.num_processes):
        batch = run.batches.batch(step, micro)
        torch.manual_seed(seeding.key(run.params.seed, "layers", step, micro))  # for dropout inside the layers
        loss = mean_loss(run, batch) / accumulation
        run.accelerator.backward(loss)
        losses[micro] = loss.detach()
        run.gradients.add()
    stop = run.gradients.reduce(losses, run.interrupt.received is not None)
    total_loss = math.fsum(losses.tolist())

    run.monitor.note_gradients()
    grad_norm = float(run.accelerator.clip_grad_norm_(list(run.adapter.trainable.values()), run.params.max_grad_norm))
    run.monitor.check_clipping(grad_norm)
    if run.monitor.can_update(total_loss, grad_norm, step, scaler is not None) or scaler is not None:
        run.optimizer.step()  # a GradScaler skips bad updates itself and lowers its scale
        if not run.optimizer.step_was_skipped:
            run.averaged.step()
    run.history.append(total_loss, run.lr_scheduler.get_last_lr()[0], grad_norm)
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return stop


def mean_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Return the loss of a micro-batch, float32 []."""
    model_pred = run.predict(batch)  # [B, C, h, w]
    return (run.loss(model_pred, batch) * batch.weights).mean()


# --- start ------------------------------------------------------------------------------------------------------------


def begin(run: Run, code: str) -> int:
    """Resume the run, or check and start a new one; return the number of finished steps."""
    folder = run.identity.folder
    if run.accelerator.is_main_process:
        drop_leftovers(folder)
        begin_run(folder, code, run.params.num_steps)
    start = resume(run)
    if start == 0:
        check_step_zero(run)
        log_start_over(folder, run.identity.inputs)
        if run.adapter.configs[DENOISER_KEY].get("init_lora_weights") == "eva":
            initialize_with_eva(run)
            check_step_zero(run)
    if run.accelerator.is_main_process:
        write_json(folder / INPUTS, run.identity.inputs)
    if run.params.compile:
        run.base.denoiser.compile_repeated_blocks()
    log_plan(run, start)
    return start


def check_step_zero(run: Run) -> None:
    """Check the adapter; a new one must equal the base on two samples of the first batch."""
    batch = run.batches.batch(0, 0).first(2)
    run.adapter.require_sound()
    is_new, dtype = not run.init_from_summary, run.model.dtype
    with torch.no_grad(), run.accelerator.autocast(), elapsed("check", "step 0 against the base model"):
        self_checks.check_step_zero(run.adapter, lambda: run.predict(batch), is_new, dtype)
        if run.base.text is not None:
            self_checks.check_prompt_embeddings(run.prompt(batch), batch.prompt, run.model.dtype)


def initialize_with_eva(run: Run) -> None:
    """Initialize the adapter's A from the first batches."""
    log.info("eva         initializes A from the inputs of the first %d batches", eva.NUM_BATCHES)
    first = [divmod(i, run.params.gradient_accumulation_steps) for i in range(eva.NUM_BATCHES)]
    batches = [run.batches.batch(step, micro) for step, micro in first]
    denoiser = run.accelerator.unwrap_model(run.base.denoiser)
    setting = run.config.section(LoraParams).setting("init_lora_weights")
    passes = eva.initialize(denoiser, batches, run.predict, setting)
    log.info("eva         converged after %s", plural(passes, "forward pass", "forward passes"))


# --- held-out loss ----------------------------------------------------------------------------------------------------


def heldout_loss(run: Run) -> float:
    """Return the mean loss of the early stop's rows with the weights that would be saved, without dropout."""
    assert run.early_stop is not None
    rows = run.early_stop.rows
    with torch.no_grad(), run.averaged.swapped_in(), evaluating(run.adapter.modules.values()):
        total = math.fsum(float(mean_loss(run, batch)) * len(batch.captions) for batch in rows.batches())
    loss = [total / len(rows)]
    if run.accelerator.num_processes > 1:
        broadcast_object_list(loss)  # all must stop at the same step, even if their losses differ in the last bits
    return loss[0]


@contextlib.contextmanager
def evaluating(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Set eval mode inside the block; restore every module's mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# --- resume -----------------------------------------------------------------------------------------------------------


def resume(run: Run) -> int:
    """Load the newest undamaged checkpoint of this run and return its step; 0 if there is none."""
    run.accelerator.wait_for_everyone()  # until process 0 has the run's lock
    state = run.checkpoints.load(run.params.num_steps)
    require_same([run.identity.digest, state and state["step"]])
    if state is None or not can_resume(run, state):
        return 0
    for name, part in run.stateful.items():
        part.load_state_dict(state[name])
    log.info("resumed from step %d", state["step"])
    return state["step"]


def can_resume(run: Run, state: dict[str, Any]) -> bool:
    """Return whether a checkpoint has this run's parts and all earlier snapshots exist; warn if not."""
    folder, every = run.identity.folder, run.params.snapshot_every_n_steps
    if state.keys() != {"step", *run.stateful}:
        text = f"{folder}: the checkpoint of step {state['step']} has other parts. The run restarts from step 0."
        warn("checkpoint-of-other-version", text)
        return False
    missing = [step for step in range(every, state["step"], every) if not has_all_bytes(folder / snapshot_name(step))]
    if missing:
        text = f"{folder}: the snapshot of step {missing[0]} is missing or incomplete. The run restarts from step 0."
        warn("snapshot-missing", text)
    return not missing


def save_checkpoint(run: Run, step: int) -> None:
    """Write a checkpoint after ``step`` steps, in the first process."""
    if run.accelerator.is_main_process:
        require_held(run.identity.folder)
        run.checkpoints.save(step, {name: part.state_dict() for name, part in run.stateful.items()})


def save_snapshot(run: Run, step: int) -> None:
    """Write the adapter after ``step`` steps, in the first process."""
    if run.accelerator.is_main_process:
        run.save_weights(run.identity.folder / snapshot_name(step))
