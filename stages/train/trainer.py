"""The training loop: one step on one screen, checkpoints, and going on where a killed run stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_dag.adapters import bias, lora
from lora_dag.adapters.adapted import Adapted, frozen_digest, text_configs
from lora_dag.adapters.params import LoraParams
from lora_dag.artifacts.adapter import bias_metadata, snapshot_name
from lora_dag.core import device, seeding
from lora_dag.core.console import log, plural
from lora_dag.core.files import drop_leftovers, sha256_json, state_dir, write_json
from lora_dag.core.locks import require_held
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.core.progress import Progress
from lora_dag.core.tensors import has_all_bytes, save_tensors
from lora_dag.core.took import Work
from lora_dag.diffusion import objectives
from stages.train import eva, init_from, noising, optimizers, outputs, processes, selfcheck, weighting
from stages.train.ancestors import ancestors
from stages.train.averaging import Kept
from stages.train.batches import Batch, Batches
from stages.train.checkpoint import Checkpoints
from stages.train.early_stop import EarlyStop
from stages.train.interrupt import Interrupt
from stages.train.params import TrainParams
from stages.train.processes import GradientSum
from stages.train.setup import (
    INPUTS,
    begin_run,
    end_run,
    log_start_over,
    made_from,
    make_accelerator,
    may_go_on,
    run_inputs,
    training_items,
)

if TYPE_CHECKING:
    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.core.params import Config
    from lora_dag.families.protocol import Family


class Trainer:
    """One run: what is frozen, the adapter in it, its optimizer, and what has been logged so far."""

    def __init__(self, config: Config, family: Family, cache: LatentCache, base: dict[str, str]) -> None:
        self.started_by = ancestors()
        self.model = model = config.section(ModelParams)
        self.params, self.runtime = config.section(TrainParams), config.section(RuntimeParams)
        self.family, self.base = family, base
        self.items = training_items(cache, self.params.batch_size)
        self.noise_scheduler = family.load_scheduler(model)
        weighting.require_snr(self.noise_scheduler, self.params)
        self.accelerator = make_accelerator(self.runtime, model, self.params)
        self.device = self.accelerator.device
        optimizers.try_out(self.params, self.device)
        self.images_per_step = self.params.batch_size * self.params.gradient_accumulation_steps
        self.work = self.work_of(cache, self.params.num_steps)
        self.work.announce(what=f" for {plural(self.params.num_steps, 'step')}")
        device.log_device(self.device, model)

        denoiser = family.load_denoiser(model, self.device)
        settings = config.section(LoraParams)
        self.text = family.load_trainable_text(model, self.device) if settings.train_text_encoder else None
        encoders = {} if self.text is None else family.text_encoders(self.text)
        self.frozen_before = frozen_digest({"": denoiser, **encoders})
        self.lora_config = lora.make_config(settings, denoiser)
        self.text_lora = text_configs(settings, family, encoders)
        self.adapted = Adapted(denoiser, self.lora_config, self.text_lora, encoders)
        self.adapted.keyed_init(self.params.seed)
        self.trainable = self.adapted.trainable
        self.biases = list(bias.deltas(denoiser))
        self.started_from = init_from.fill(settings, denoiser, base)
        if self.params.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        optimizer = optimizers.make_optimizer(
            self.params, self.adapted.of("", self.trainable), self.adapted.text_trainable, self.device
        )
        self.lr_scheduler = optimizers.make_lr_scheduler(self.params, optimizer)
        self.kept = Kept(self.params, list(self.trainable.values()), optimizer)
        # Not wrapped for several processes: gradients are summed by GradientSum, whose sum has no order.
        self.denoiser = self.accelerator.prepare_model(denoiser, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.gradients = GradientSum(self.trainable.values(), self.params.gradient_accumulation_steps)
        timesteps = noising.make_timesteps(self.params, self.noise_scheduler)
        zeros = family.drops_to_zeros(model)
        self.batches = Batches(cache, self.items, self.params, timesteps, self.device, zeros)
        patience = self.params.early_stop_patience
        self.early_stop = EarlyStop(patience, cache, self.params, timesteps, self.device, zeros) if patience else None

        dropped = {"dropped caption": "zeros"} if zeros else {}  # in no component's files
        start = settings.init_from.sha256 if settings.init_from else None
        self.inputs = run_inputs(self.params, model, self.adapted.configs, cache, base | dropped, self.device, start)
        self.made_from = made_from(config, cache, self.items)
        self.digest = sha256_json(self.inputs)
        self.folder = state_dir() / "runs" / self.digest[:16]
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.history: list[tuple[float, float, float]] = []  # loss, learning rate, gradient norm of every step
        self.interrupt = Interrupt()
        self.watch = selfcheck.Watch(self.trainable, self.params.max_grad_norm)

    def work_of(self, cache: LatentCache, num_steps: int) -> Work:
        """In latent pixels, of which pictures have as many as their mean."""
        areas = [math.prod(cache.latents(item.views[0])[0].shape[-2:]) for item in self.items]
        speed = device.speed_conditions(self.device, self.model, self.base[self.family.DENOISER])
        speed["num_processes"] = self.accelerator.num_processes
        return Work("train", speed, num_steps * self.images_per_step * sum(areas) / len(areas))

    def num_epochs(self, num_steps: int) -> float:
        """In one epoch each picture comes up as often as it repeats."""
        return num_steps * self.images_per_step / self.batches.order.num_entries

    @property
    def may_be_asked_again(self) -> bool:
        """A longer run could go on from here; or what started this one is gone and will not take what it wrote."""
        return may_go_on(self.params) or ancestors() != self.started_by

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run or go on to ``train.num_steps`` or an early stop; checkpoints and snapshots first, then the step."""
        if self.accelerator.is_main_process:
            drop_leftovers(self.folder)
            begin_run(self.folder)
        start = self.resume()
        if start == 0:
            self.check_step_zero()
            log_start_over(self.folder, self.inputs)
            if self.lora_config.get("init_lora_weights") == "eva":
                self.start_from_data()
                self.check_step_zero()
        if self.accelerator.is_main_process:
            write_json(self.folder / INPUTS, self.inputs)
        if self.params.compile:
            self.denoiser.compile_repeated_blocks()
        outputs.log_plan(self, start)
        progress = Progress(
            self.accelerator,
            start=start,
            num_steps=self.params.num_steps,
            images_per_step=self.images_per_step,
            every=self.runtime.log_every_n_steps,
        )
        progress.init_trackers(self.params.model_dump())
        with self.interrupt:
            for step in range(start, self.params.num_steps):
                if step > start and step % self.params.checkpoint_every_n_steps == 0:
                    self.checkpoint(step)
                if step > 0 and step % self.params.snapshot_every_n_steps == 0:
                    self.snapshot(step)
                    if self.early_stop is not None and self.early_stop.is_over(self, step):
                        break
                stop = self.step(step)
                progress.step(self.history)
                if stop:
                    self.checkpoint(step + 1)
                    self.accelerator.wait_for_everyone()  # the end of one process ends the others
                    self.interrupt.leave(step + 1)
        self.measured = progress.end(len(self.history))
        done = len(self.history) - start
        self.work.record(self.work.amount * done / self.params.num_steps, self.measured["seconds"])
        self.watch.end()
        if self.may_be_asked_again:
            self.checkpoint(len(self.history))
        if self.accelerator.is_main_process:
            end_run(self.folder)

    def step(self, step: int) -> bool:
        """One optimizer step; everything random in it is a function of (seed, purpose, step, slot).

        Returns:
            Whether any process was asked to stop.
        """
        accumulation = self.params.gradient_accumulation_steps
        losses = torch.zeros(accumulation, device=self.device)
        for micro in range(self.accelerator.process_index, accumulation, self.accelerator.num_processes):
            loss = self.loss(self.batches.batch(step, micro), step, micro) / accumulation
            self.accelerator.backward(loss)
            losses[micro] = loss.detach()
            if accumulation > 1:
                self.gradients.add()
        stop = self.interrupt.received is not None
        if accumulation > 1:
            stop = self.gradients.put(losses, stop)
        total_loss = math.fsum(losses.tolist())

        self.watch.gradients()
        grad_norm = float(self.accelerator.clip_grad_norm_(list(self.trainable.values()), self.params.max_grad_norm))
        self.watch.clipping(grad_norm)
        scaled = self.accelerator.scaler is not None
        if self.watch.finite(total_loss, grad_norm, step, scaled) or scaled:
            self.optimizer.step()  # a GradScaler skips bad updates itself and lowers its scale
            if not self.optimizer.step_was_skipped:
                self.kept.step()
        self.history.append((total_loss, self.lr_scheduler.get_last_lr()[0], grad_norm))
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return stop

    def loss(self, batch: Batch, step: int, micro: int) -> torch.Tensor:
        """Mean loss of one micro-batch, float32 []."""
        params, scheduler = self.params, self.noise_scheduler
        target = objectives.target(scheduler, batch.latents, batch.noise, batch.timesteps)
        weights = weighting.loss_weights(scheduler, batch.timesteps, params.loss_weighting, params.snr_gamma)  # [B]
        huber_c = weighting.huber_c(scheduler, batch.timesteps, params.huber_c, params.huber_schedule)  # [B]

        torch.manual_seed(seeding.key(params.seed, "layers", step, micro))  # for dropout inside the layers
        errors = weighting.errors(self.predict(batch).float(), target, huber_c)  # [B, C, h, w]
        losses = objectives.masked_mean(errors, batch.masks)  # [B]
        return (losses * weights * batch.weights).mean()

    def predict(self, batch: Batch) -> torch.Tensor:
        """The denoiser's answer to a batch, [B, C, h, w]."""
        noisy_latents = objectives.add_noise(self.noise_scheduler, batch.latents, batch.added_noise, batch.timesteps)
        timesteps = objectives.model_timesteps(self.noise_scheduler, batch.timesteps)
        with self.accelerator.autocast():
            return self.family.predict(self.denoiser, noisy_latents, timesteps, self.prompt(batch))

    def start_from_data(self) -> None:
        """Fill the adapter's A from the first batches."""
        log.info("eva         from the first %d batches, until the directions settle", eva.NUM_BATCHES)
        first = [divmod(i, self.params.gradient_accumulation_steps) for i in range(eva.NUM_BATCHES)]
        batches = [self.batches.batch(step, micro) for step, micro in first]
        passes = eva.initialize(self.accelerator.unwrap_model(self.denoiser), batches, self.predict)
        log.info("eva         settled after %s", plural(passes, "pass", "passes"))

    def prompt(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the cache says, but for the part of text encoders that are trained: they are asked now."""
        if self.text is None:
            return batch.prompt
        encoded = self.family.encode_prompts(self.text, batch.captions, batch.prompt)
        for name in self.batches.zeroed:  # a dropped caption that stands for zeros stays it
            shown = batch.prompt[name].flatten(1).any(1).reshape(-1, *[1] * (encoded[name].dim() - 1))  # [B, 1, ...]
            encoded[name] = encoded[name] * shown
        return batch.prompt | encoded

    def check_step_zero(self) -> None:
        """The adapter is sound; a fresh one equals the base on two samples of the first batch."""
        batch = self.batches.batch(0, 0).first(2)
        self.adapted.require_sound()
        with torch.no_grad(), self.accelerator.autocast():
            selfcheck.step_zero(self.adapted, lambda: self.predict(batch), fresh=not self.started_from)
            if self.text is not None:
                selfcheck.same_prompts(self.prompt(batch), batch.prompt, self.model.dtype)

    # --- state ----------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest good checkpoint of this very run; return the number of steps it has done."""
        self.accelerator.wait_for_everyone()  # until process 0 holds the run's lock
        state = self.checkpoints.load(self.params.num_steps)
        processes.require_same([self.digest, state and state["step"]])
        if state is None:
            return 0
        every = self.params.snapshot_every_n_steps
        kept = {n: self.folder / snapshot_name(n) for n in range(every, state["step"], every)}
        missing = [n for n, path in kept.items() if not has_all_bytes(path)]
        if missing:
            log.warning("warning: starts over: %s has no whole snapshot of step %d", self.folder, missing[0])
            return 0
        self.adapted.load(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.kept.load_state_dict(state["ema"])
        self.history = [tuple(row) for row in state["history"]]
        if self.early_stop is not None:
            self.early_stop.losses = state["heldout"]
        self.watch.silent = set(state["silent"])
        log.info("resumed from step %d", state["step"])
        return state["step"]

    def checkpoint(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        require_held(self.folder)
        scaler = self.accelerator.scaler
        self.checkpoints.save(
            step,
            {
                "adapter": self.adapted.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "ema": self.kept.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "heldout": None if self.early_stop is None else self.early_stop.losses,
                "history": self.history,
                "silent": sorted(self.watch.silent),
            },
        )

    def snapshot(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.save_weights(self.folder / snapshot_name(step))

    def save_weights(self, path: Path) -> None:
        metadata = {"format": "pt"} | bias_metadata(self.lora_config["bias"], self.biases)
        with self.kept.weights():
            save_tensors(path, self.adapted.state_dict(), metadata)
