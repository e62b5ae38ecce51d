"""Latents and prompt embeddings -> a LoRA adapter.

In: data/latents, the base's denoiser and scheduler.  Out: data/adapter, reports/train/{loss.csv,metrics.json}.
Run: ``python -m stages.train [--set lora.rank=16]``; killed, the same command goes on and gives the same bytes.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from stages.core.console import UserError, log, parser, run
from stages.core.params import ModelParams, Params, RuntimeParams, load

if TYPE_CHECKING:
    from stages.artifacts.latent_cache import LatentCache
    from stages.families.base import Family

MAX_LOSS_ROWS = 2000


class LoraParams(Params):
    """Section ``lora``: the adapter's shape."""

    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(ge=0, lt=1)
    """Share of the adapter's inputs dropped in training."""
    target_modules: list[str] = Field(min_length=1)
    """Endings of module names, such as to_q."""
    init_lora_weights: Literal["gaussian", "kaiming"]
    """How A starts; B starts at zero, so that step 0 equals the base."""


class TrainParams(Params):
    """Section ``train``. A step is an optimizer step everywhere."""

    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Pictures per forward pass."""
    gradient_accumulation_steps: int = Field(ge=1)
    """Forward passes per step."""
    learning_rate: float = Field(gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    lr_warmup_steps: int = Field(ge=0)
    adam_beta1: float = Field(ge=0, lt=1)
    adam_beta2: float = Field(ge=0, lt=1)
    adam_weight_decay: float = Field(ge=0)
    adam_epsilon: float = Field(gt=0)
    max_grad_norm: float = Field(gt=0)
    """Gradients are scaled down to this 2-norm over all adapter parameters."""
    snr_gamma: float | None = Field(gt=0)
    """min-SNR gamma, null for uniform weights."""
    prompt_dropout: float = Field(ge=0, le=1)
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    checkpoint_every_n_steps: int = Field(ge=1)
    snapshot_every_n_steps: int = Field(ge=1)
    """Adapters kept for validate's curve and progress sheet."""
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def warmup_ends(self) -> TrainParams:
        if self.lr_warmup_steps >= self.num_steps:
            raise ValueError(f"lr_warmup_steps ({self.lr_warmup_steps}) must be below num_steps ({self.num_steps})")
        return self


def main() -> None:
    args = parser(__doc__, ("latents", "adapter", "train_reports")).parse_args()
    config = load(args.params, args.overrides)
    model = config.section(ModelParams)

    from stages.artifacts.latent_cache import LatentCache
    from stages.core.base_files import digests, require_base, require_same_base
    from stages.core.files import lock, state_dir
    from stages.families.base import load_family

    family = load_family(model.family)
    require_base(model, family)
    base = digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    require_same_base(cache.base, base, args.latents)
    trainer = Trainer(
        config.section(LoraParams),
        config.section(TrainParams),
        config.section(RuntimeParams),
        model,
        family,
        cache,
        base,
    )
    with lock(state_dir() / "runs" / trainer.digest[:16]):
        trainer.train()
        trainer.save(args.adapter, args.train_reports)


class Trainer:
    """One run: the frozen denoiser, the adapter in it, its optimizer, and what has been logged so far."""

    def __init__(
        self,
        lora_params: LoraParams,
        train: TrainParams,
        runtime: RuntimeParams,
        model: ModelParams,
        family: Family,
        cache: LatentCache,
        base: dict[str, str],
    ) -> None:
        import torch
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler

        from stages.core import device, lora
        from stages.core.batches import Batches
        from stages.core.checkpoint import Checkpoints
        from stages.core.closure import code_digest
        from stages.core.files import sha256_json, state_dir
        from stages.core.selfcheck import Watch

        self.lora_params, self.params, self.runtime = lora_params, train, runtime
        self.family, self.base = family, base
        self.items = cache.split("train")
        if train.batch_size > len(self.items):
            raise UserError(
                f"params.yaml train.batch_size: {train.batch_size} is more than the {len(self.items)} training pictures"
            )
        if runtime.tracker != "none" and importlib.util.find_spec(runtime.tracker) is None:
            missing = f"params.yaml runtime.tracker: {runtime.tracker} is not installed"
            raise UserError(f"{missing}; pip install {runtime.tracker}, or use none")
        where = device.setup(runtime, model)
        self.accelerator = Accelerator(
            cpu=where.type == "cpu",
            mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[model.dtype],
            log_with=None if runtime.tracker == "none" else runtime.tracker,
            project_dir="logs",
        )
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"{self.accelerator.num_processes} processes: train runs in one; start it without `accelerate launch`"
            )
        self.device = self.accelerator.device
        device.log_device(self.device, model)

        denoiser = family.load_denoiser(model, self.device)
        self.frozen_before = lora.frozen_digest(denoiser)
        self.lora_config = lora.make_config(lora_params, denoiser)
        self.trainable = lora.inject(denoiser, self.lora_config)
        lora.keyed_init(denoiser, self.lora_config, train.seed)
        optimizer = torch.optim.AdamW(
            list(self.trainable.values()),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.adam_weight_decay,
            eps=train.adam_epsilon,
        )
        warm_constant = train.lr_scheduler == "constant" and train.lr_warmup_steps > 0
        self.lr_scheduler = get_scheduler(
            "constant_with_warmup" if warm_constant else train.lr_scheduler,
            optimizer,
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=train.num_steps,
        )
        self.noise_scheduler = family.load_scheduler(model)
        self.denoiser, self.optimizer = self.accelerator.prepare(denoiser, optimizer)
        self.batches = Batches(
            cache,
            self.items,
            batch_size=train.batch_size,
            accumulation=train.gradient_accumulation_steps,
            prompt_dropout=train.prompt_dropout,
            num_train_timesteps=self.noise_scheduler.config.num_train_timesteps,
            seed=train.seed,
            device=self.device,
        )

        self.digest = sha256_json(
            {
                "base": base,
                "cache": cache.digest,
                "code": code_digest("train", model.family),
                "dtype": model.dtype,
                "environment": device.environment(self.device),
                "lora": self.lora_config,
                "train": train.model_dump(exclude={"checkpoint_every_n_steps"}),
            }
        )
        self.folder = state_dir() / "runs" / self.digest[:16]
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.history: list[tuple[float, float, float]] = []  # loss, learning rate, gradient norm of every step
        self.watch = Watch(self.trainable, train.max_grad_norm)
        self.images_per_step = train.batch_size * train.gradient_accumulation_steps

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run or go on to ``train.num_steps``; checkpoints and snapshots first, then the step."""
        from stages.core.progress import Progress

        start = self.resume()
        if start == 0:
            self.check_step_zero()
        self.log_plan(start)
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
        import torch

        from stages.core import objectives, seeding

        accumulation = self.params.gradient_accumulation_steps
        total_loss = 0.0
        for micro in range(accumulation):
            batch = self.batches.batch(step, micro)
            noisy_latents = self.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            target = objectives.target(self.noise_scheduler, batch.latents, batch.noise, batch.timesteps)
            weights = objectives.loss_weights(self.noise_scheduler, batch.timesteps, self.params.snr_gamma)

            torch.manual_seed(seeding.key(self.params.seed, "layers", step, micro))  # for dropout inside the layers
            with self.accelerator.autocast():
                model_pred = self.family.predict(self.denoiser, noisy_latents, batch.timesteps, batch.prompt)

            loss = (model_pred.float() - target).square().flatten(1).mean(1)  # [B]
            loss = (loss * weights).mean()
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

    def check_step_zero(self) -> None:
        """The fresh adapter is sound, and equals the base on two samples of the first batch."""
        from stages.core import lora, selfcheck

        batch = self.batches.batch(0, 0).first(2)
        noisy_latents = self.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        denoiser = self.accelerator.unwrap_model(self.denoiser)
        lora.require_sound(denoiser, self.trainable)
        with self.accelerator.autocast():
            selfcheck.step_zero(
                denoiser, lambda: self.family.predict(self.denoiser, noisy_latents, batch.timesteps, batch.prompt)
            )

    # --- state ----------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest good checkpoint of this very run; return the number of steps it has done."""
        from stages.core import lora

        state = self.checkpoints.load()
        if state is None:
            return 0
        lora.load(self.accelerator.unwrap_model(self.denoiser), state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = [tuple(row) for row in state["history"]]
        self.watch.silent = set(state["silent"])
        log.info("resumed from step %d", state["step"])
        return state["step"]

    def checkpoint(self, step: int) -> None:
        from stages.core import lora

        scaler = self.accelerator.scaler
        self.checkpoints.save(
            step,
            {
                "adapter": lora.state_dict(self.accelerator.unwrap_model(self.denoiser)),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "history": self.history,
                "silent": sorted(self.watch.silent),
            },
        )

    def snapshot(self, step: int) -> None:
        from stages.artifacts.adapter import snapshot_name

        self.save_weights(self.folder / snapshot_name(step))

    def save_weights(self, path: Path) -> None:
        from stages.core import lora
        from stages.core.files import save_tensors

        save_tensors(path, lora.state_dict(self.accelerator.unwrap_model(self.denoiser)), {"format": "pt"})

    # --- what is told and written ---------------------------------------------------------------------------------

    def log_plan(self, start: int) -> None:
        p = self.params
        num = sum(t.numel() for t in self.trainable.values())
        total = sum(t.numel() for t in self.denoiser.parameters())
        log.info("pictures    %d for training", len(self.items))
        log.info(
            "adapter     rank %d, %d layers, %s parameters (%.2f %% of the denoiser)",
            self.lora_params.rank,
            len(self.trainable) // 2,
            f"{num:,}",
            100 * num / total,
        )
        log.info("batch       %d x %d accumulated", p.batch_size, p.gradient_accumulation_steps)
        log.info(
            "steps       %d to %d, %.1f epochs",
            start,
            p.num_steps,
            p.num_steps * self.images_per_step / len(self.items),
        )

    def save(self, adapter_folder: Path, reports: Path) -> None:
        """Write the adapter and its reports, then drop the checkpoints, which nothing needs any more."""
        import shutil

        files = self.save_adapter(adapter_folder)
        self.save_reports(reports, files)
        for name in ("checkpoints", "snapshots"):  # the lock stays: another process may wait for it
            shutil.rmtree(self.folder / name, ignore_errors=True)
        log.info("wrote       %s, %d snapshots, %s", adapter_folder, len(files) - 1, reports / "metrics.json")
        log.info("next        python -m stages.validate")

    def save_adapter(self, adapter_folder: Path) -> dict[str, str]:
        """Final adapter, snapshots and, last, adapter.json; returns the digest of each weight file."""
        import shutil

        from stages.artifacts import adapter
        from stages.core import lora
        from stages.core.files import sha256_file

        frozen_after = lora.frozen_digest(self.accelerator.unwrap_model(self.denoiser))
        if frozen_after != self.frozen_before:
            raise RuntimeError("training changed the frozen base")
        shutil.rmtree(adapter_folder, ignore_errors=True)
        steps = [s for s in range(1, self.params.num_steps) if s % self.params.snapshot_every_n_steps == 0]
        files = {}
        for step in steps:
            name = adapter.snapshot_name(step)
            (adapter_folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, adapter_folder / name)
            files[name] = sha256_file(adapter_folder / name)
        self.save_weights(adapter_folder / adapter.FINAL)
        files[adapter.FINAL] = sha256_file(adapter_folder / adapter.FINAL)
        # Dropout is training's alone: diffusers leaves a loaded adapter in train mode and would drop while sampling.
        for_use = self.lora_config | {"lora_dropout": 0.0}
        adapter.Adapter(for_use, self.base, self.params.num_steps, steps, files).save(adapter_folder)
        return files

    def save_reports(self, reports: Path, files: dict[str, str]) -> None:
        """loss.csv and metrics.json for git; run.json, ignored by git and DVC, for what differs between equal runs."""
        from stages.artifacts import adapter, metrics
        from stages.core import device
        from stages.core.files import write_json, write_text
        from stages.core.progress import smoothed_loss

        stride = math.ceil(len(self.history) / MAX_LOSS_ROWS)
        rows = [
            f"{i + 1},{loss:.6g},{rate:.6g},{norm:.6g}"
            for i, (loss, rate, norm) in enumerate(self.history)
            if (i + 1) % stride == 0
        ]
        write_text(reports / "loss.csv", "\n".join(["step,loss,learning_rate,grad_norm", *rows]) + "\n")
        metrics.save(
            reports / "metrics.json",
            {
                "train.loss_final": smoothed_loss(self.history),
                "train.num_steps": self.params.num_steps,
                "train.images_seen": self.params.num_steps * self.images_per_step,
                "train.epochs": self.params.num_steps * self.images_per_step / len(self.items),
                "train.num_pictures": len(self.items),
                "train.num_trainable_parameters": sum(t.numel() for t in self.trainable.values()),
                "train.grad_norm_max": max((row[2] for row in self.history if math.isfinite(row[2])), default=0.0),
                "train.base_unchanged": True,
                "train.base_digest": self.frozen_before[:16],
                "train.adapter_digest": files[adapter.FINAL][:16],
            },
        )
        write_json(reports / "run.json", {"environment": device.environment(self.device), **self.measured})


if __name__ == "__main__":
    run(main)
