"""The training loop: one step on one screen, checkpoints, and the way on from where a run was stopped."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from lora_dag.artifacts.adapter import snapshot_name
from lora_dag.core import seeding
from lora_dag.core.console import log, plural
from lora_dag.core.files import drop_leftovers, write_json
from lora_dag.core.locks import require_held
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
    """Run or resume to ``train.num_steps`` or an early stop: checkpoints and snapshots first, then the step.

    Args:
        code: digest of the code that runs.

    Returns:
        Speed and time, which differ between runs of the same bytes.
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
                if run.early_stop is not None and run.early_stop.is_over(step, heldout_loss(run)):
                    break
            stop = training_step(run, step)
            progress.step(run.history.rows)
            if stop:
                save_checkpoint(run, step + 1)
                run.accelerator.wait_for_everyone()  # the end of one process ends the others
                run.interrupt.leave(step + 1)
    measured = progress.end(len(run.history))
    done = len(run.history) - start
    run.work.record(run.work.amount * done / params.num_steps, measured["seconds"])
    run.monitor.check_end()
    if run.keep_checkpoints:
        save_checkpoint(run, len(run.history))
    if run.accelerator.is_main_process:
        end_run(run.identity.folder, len(run.history))
    return measured


def training_step(run: Run, step: int) -> bool:
    """One optimizer step. Everything random in it is a function of (seed, purpose, step, slot).

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
    if run.monitor.is_finite(total_loss, grad_norm, step, scaler is not None) or scaler is not None:
        run.optimizer.step()  # a GradScaler skips bad updates itself and lowers its scale
        if not run.optimizer.step_was_skipped:
            run.averaged.step()
    run.history.append(total_loss, run.lr_scheduler.get_last_lr()[0], grad_norm)
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return stop


def mean_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Loss of a micro-batch, float32 []."""
    model_pred = run.predict(batch)  # [B, C, h, w]
    return (run.loss(model_pred, batch) * batch.weights).mean()


# --- the beginning ----------------------------------------------------------------------------------------------------


def begin(run: Run, code: str) -> int:
    """Resume, or check and start a fresh run; return the number of steps that are done."""
    folder = run.identity.folder
    if run.accelerator.is_main_process:
        drop_leftovers(folder)
        begin_run(folder, code, run.params.num_steps)
    start = resume(run)
    if start == 0:
        check_step_zero(run)
        log_start_over(folder, run.identity.inputs)
        if run.adapter.configs[""].get("init_lora_weights") == "eva":
            start_from_data(run)
            check_step_zero(run)
    if run.accelerator.is_main_process:
        write_json(folder / INPUTS, run.identity.inputs)
    if run.params.compile:
        run.base.denoiser.compile_repeated_blocks()
    log_plan(run, start)
    return start


def check_step_zero(run: Run) -> None:
    """The adapter is sound; a fresh one equals the base on two samples of the first batch."""
    batch = run.batches.batch(0, 0).first(2)
    run.adapter.require_sound()
    with torch.no_grad(), run.accelerator.autocast():
        self_checks.step_zero(run.adapter, lambda: run.predict(batch), fresh=not run.init_from)
        if run.base.text is not None:
            self_checks.same_prompts(run.prompt(batch), batch.prompt, run.model.dtype)


def start_from_data(run: Run) -> None:
    """Fill the adapter's A from the first batches."""
    log.info("eva         from the first %d batches, until the directions settle", eva.NUM_BATCHES)
    first = [divmod(i, run.params.gradient_accumulation_steps) for i in range(eva.NUM_BATCHES)]
    batches = [run.batches.batch(step, micro) for step, micro in first]
    passes = eva.initialize(run.accelerator.unwrap_model(run.base.denoiser), batches, run.predict)
    log.info("eva         settled after %s", plural(passes, "pass", "passes"))


# --- held-out loss ----------------------------------------------------------------------------------------------------


def heldout_loss(run: Run) -> float:
    """Mean loss of the early stop's rows under the weights that would be saved, without dropout."""
    assert run.early_stop is not None
    rows = run.early_stop.rows
    with torch.no_grad(), run.averaged.swapped_in(), evaluating(run.adapter.modules.values()):
        total = math.fsum(float(mean_loss(run, batch)) * len(batch.captions) for batch in rows.batches())
    loss = [total / len(rows)]
    if run.accelerator.num_processes > 1:
        broadcast_object_list(loss)  # all end at the same step whatever their devices' last bits
    return loss[0]


@contextlib.contextmanager
def evaluating(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# --- state ------------------------------------------------------------------------------------------------------------


def resume(run: Run) -> int:
    """Load the newest good checkpoint of this very run; return the number of steps it has done."""
    run.accelerator.wait_for_everyone()  # until process 0 holds the run's lock
    state = run.checkpoints.load(run.params.num_steps)
    require_same([run.identity.digest, state and state["step"]])
    if state is None or not can_resume(run, state):
        return 0
    for name, part in run.stateful.items():
        part.load_state_dict(state[name])
    log.info("resumed from step %d", state["step"])
    return state["step"]


def can_resume(run: Run, state: dict[str, Any]) -> bool:
    """Whether a checkpoint has this run's parts, and its folder every snapshot of the steps before; warns if not."""
    folder, every = run.identity.folder, run.params.snapshot_every_n_steps
    if state.keys() != {"step", *run.stateful}:
        log.warning("warning: starts over: the checkpoint of step %d in %s has other parts", state["step"], folder)
        return False
    missing = [step for step in range(every, state["step"], every) if not has_all_bytes(folder / snapshot_name(step))]
    if missing:
        log.warning("warning: starts over: %s has no whole snapshot of step %d", folder, missing[0])
    return not missing


def save_checkpoint(run: Run, step: int) -> None:
    if run.accelerator.is_main_process:
        require_held(run.identity.folder)
        run.checkpoints.save(step, {name: part.state_dict() for name, part in run.stateful.items()})


def save_snapshot(run: Run, step: int) -> None:
    if run.accelerator.is_main_process:
        run.save_weights(run.identity.folder / snapshot_name(step))
