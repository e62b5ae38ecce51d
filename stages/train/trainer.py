"""The training loop: one step on one screen, checkpoints, and going on where a killed run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.artifacts.adapter import bias_metadata, snapshot_name
from stages.core import bias, device, lora, objectives, seeding, selfcheck
from stages.core.adapted import Adapted, frozen_digest, text_configs
from stages.core.batches import Batch, Batches
from stages.core.checkpoint import Checkpoints
from stages.core.console import log
from stages.core.files import save_tensors, state_dir
from stages.core.params import ModelParams, RuntimeParams
from stages.core.progress import Progress
from stages.train import eva, init_from, outputs
from stages.train.params import LoraParams, TrainParams
from stages.train.setup import (
    made_from,
    make_accelerator,
    make_lr_scheduler,
    make_optimizer,
    run_digest,
    training_items,
)

if TYPE_CHECKING:
    from stages.artifacts.latent_cache import LatentCache
    from stages.core.params import Config
    from stages.families.base import Family


class Trainer:
    """One run: what is frozen, the adapter in it, its optimizer, and what has been logged so far."""

    def __init__(self, config: Config, family: Family, cache: LatentCache, base: dict[str, str]) -> None:
        self.model = model = config.section(ModelParams)
        self.params, self.runtime = config.section(TrainParams), config.section(RuntimeParams)
        self.family, self.base = family, base
        self.items = training_items(cache, self.params.batch_size)
        self.noise_scheduler = family.load_scheduler(model)
        objectives.require_weights(self.noise_scheduler, self.params.snr_gamma)
        self.accelerator = make_accelerator(self.runtime, model)
        self.device = self.accelerator.device
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
        self.started_from = init_from.fill(settings, denoiser, family, base)
        optimizer = make_optimizer(self.params, self.adapted.of("", self.trainable), self.adapted.text_trainable)
        self.lr_scheduler = make_lr_scheduler(self.params, optimizer)
        self.denoiser, self.optimizer = self.accelerator.prepare(denoiser, optimizer)
        self.batches = Batches(
            cache,
            self.items,
            batch_size=self.params.batch_size,
            accumulation=self.params.gradient_accumulation_steps,
            prompt_dropout=self.params.prompt_dropout,
            num_train_timesteps=self.noise_scheduler.config.num_train_timesteps,
            seed=self.params.seed,
            device=self.device,
            drops_to_zeros=family.drops_to_zeros(model),
        )

        dropped = {"dropped caption": "zeros"} if family.drops_to_zeros(model) else {}  # in no component's files
        start = settings.init_from.sha256 if settings.init_from else None
        self.digest = run_digest(self.params, model, self.adapted.configs, cache, base | dropped, self.device, start)
        self.made_from = made_from(config, cache, self.items)
        self.folder = state_dir() / "runs" / self.digest[:16]
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.history: list[tuple[float, float, float]] = []  # loss, learning rate, gradient norm of every step
        self.watch = selfcheck.Watch(self.trainable, self.params.max_grad_norm)
        self.images_per_step = self.params.batch_size * self.params.gradient_accumulation_steps

    @property
    def num_epochs(self) -> float:
        """In one epoch each picture comes up as often as it repeats."""
        return self.params.num_steps * self.images_per_step / self.batches.order.num_entries

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run or go on to ``train.num_steps``; checkpoints and snapshots first, then the step."""
        start = self.resume()
        if start == 0:
            self.check_step_zero()
            if self.lora_config.get("init_lora_weights") == "eva":
                self.start_from_data()
                self.check_step_zero()
        outputs.log_plan(self, start)
        progress = Progress(
            self.accelerator,
            start=start,
            num_steps=self.params.num_steps,
            images_per_step=self.images_per_step,
            every=self.runtime.log_every_n_steps,
        )
        progress.init_trackers(self.params.model_dump())
        for step in range(start, self.params.num_steps):
            if step > start and step % self.params.checkpoint_every_n_steps == 0:
                self.checkpoint(step)
            if step > 0 and step % self.params.snapshot_every_n_steps == 0:
                self.snapshot(step)
            self.step(step)
            progress.step(self.history)
        self.measured = progress.end()
        self.watch.end()

    def step(self, step: int) -> None:
        """One optimizer step. Everything random in it is a function of (seed, purpose, step, slot)."""
        accumulation = self.params.gradient_accumulation_steps
        total_loss = 0.0
        for micro in range(accumulation):
            batch = self.batches.batch(step, micro)
            noisy_latents = objectives.add_noise(self.noise_scheduler, batch.latents, batch.noise, batch.timesteps)
            timesteps = objectives.model_timesteps(self.noise_scheduler, batch.timesteps)
            target = objectives.target(self.noise_scheduler, batch.latents, batch.noise, batch.timesteps)
            weights = objectives.loss_weights(self.noise_scheduler, batch.timesteps, self.params.snr_gamma)  # [B]

            torch.manual_seed(seeding.key(self.params.seed, "layers", step, micro))  # for dropout inside the layers
            with self.accelerator.autocast():
                model_pred = self.family.predict(self.denoiser, noisy_latents, timesteps, self.prompt(batch))

            loss = objectives.masked_mean((model_pred.float() - target).square(), batch.masks)  # [B]
            loss = (loss * weights * batch.weights).mean()
            self.accelerator.backward(loss / accumulation)
            total_loss += loss.item() / accumulation

        self.watch.gradients()
        grad_norm = float(self.accelerator.clip_grad_norm_(list(self.trainable.values()), self.params.max_grad_norm))
        self.watch.clipping(grad_norm)
        scaled = self.accelerator.scaler is not None
        if self.watch.finite(total_loss, grad_norm, step, scaled) or scaled:
            self.optimizer.step()  # a GradScaler skips bad updates itself and lowers its scale
        self.history.append((float(total_loss), self.lr_scheduler.get_last_lr()[0], grad_norm))
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def start_from_data(self) -> None:
        """Fill the adapter's A from the first batches."""
        log.info("eva         from the first %d batches, until the directions settle", eva.NUM_BATCHES)
        first = [divmod(i, self.params.gradient_accumulation_steps) for i in range(eva.NUM_BATCHES)]
        batches = [self.batches.batch(step, micro) for step, micro in first]
        passes = eva.initialize(self.accelerator.unwrap_model(self.denoiser), batches, self.predict)
        log.info("eva         settled after %d passes", passes)

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

    def predict(self, batch: Batch) -> torch.Tensor:
        """The denoiser's answer to a batch, [B, C, h, w]."""
        noisy_latents = objectives.add_noise(self.noise_scheduler, batch.latents, batch.noise, batch.timesteps)
        timesteps = objectives.model_timesteps(self.noise_scheduler, batch.timesteps)
        with self.accelerator.autocast():
            return self.family.predict(self.denoiser, noisy_latents, timesteps, self.prompt(batch))

    # --- state ----------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest good checkpoint of this very run; return the number of steps it has done."""
        state = self.checkpoints.load()
        if state is None:
            return 0
        self.adapted.load(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = [tuple(row) for row in state["history"]]
        self.watch.silent = set(state["silent"])
        log.info("resumed from step %d", state["step"])
        return state["step"]

    def checkpoint(self, step: int) -> None:
        scaler = self.accelerator.scaler
        self.checkpoints.save(
            step,
            {
                "adapter": self.adapted.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "history": self.history,
                "silent": sorted(self.watch.silent),
            },
        )

    def snapshot(self, step: int) -> None:
        self.save_weights(self.folder / snapshot_name(step))

    def save_weights(self, path: Path) -> None:
        metadata = {"format": "pt"} | bias_metadata(self.lora_config["bias"], self.biases)
        save_tensors(path, self.adapted.state_dict(), metadata)
