"""A training as its named parts: stages/train/build.py makes them, stages/train/loop.py moves them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_dag.adapters import bias
from lora_dag.artifacts.adapter import bias_metadata
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.core.tensors import save_tensors
from stages.train import parent_processes
from stages.train.checkpoints import Checkpoints
from stages.train.identity import may_go_on
from stages.train.interrupt import Interrupt
from stages.train.params import TrainParams
from stages.train.progress import History

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from accelerate import Accelerator

    from lora_dag.adapters.adapted import Adapted
    from lora_dag.core.params import Config
    from lora_dag.core.took import Work
    from lora_dag.diffusion.objectives import Objective
    from lora_dag.families.protocol import Family
    from stages.train.averaging import AveragedWeights
    from stages.train.batches import Batch, Batches
    from stages.train.early_stop import EarlyStop
    from stages.train.gradient_sum import GradientSum
    from stages.train.identity import Identity
    from stages.train.loss import Loss
    from stages.train.self_checks import GradientMonitor


class Stateful(Protocol):
    """A part whose state a checkpoint holds: tensors and plain values."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class FrozenBase:
    """What is not trained."""

    family: Family
    denoiser: Any
    """On the device, with the adapter in it."""
    text: Any
    """The family's text object where text encoders carry an adapter, else None."""
    digests: dict[str, str]
    """Component -> digest of its files."""
    frozen_digest: str
    """sha256 over its weights in memory, before an adapter was in it."""

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Component -> text encoder that carries an adapter."""
        return {} if self.text is None else self.family.text_encoders(self.text)


@dataclass(frozen=True)
class Run:
    """One training."""

    config: Config
    accelerator: Accelerator
    base: FrozenBase
    adapter: Adapted
    init_from: str
    """The line of the file that the adapter starts from; empty for a fresh one."""
    loss: Loss
    batches: Batches
    early_stop: EarlyStop | None
    optimizer: Any
    lr_scheduler: Any
    averaged: AveragedWeights
    gradients: GradientSum
    monitor: GradientMonitor
    identity: Identity
    work: Work
    """How much there is to do, for a word on the time."""
    parents: list[int]
    """Process ids of what started this run, as they were at the start."""
    history: History = field(default_factory=History)
    interrupt: Interrupt = field(default_factory=Interrupt)

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Everything that changes from step to step: checkpoints hold these parts, by these names."""
        parts: dict[str, Stateful | None] = {
            "adapter": self.adapter,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "averaged": self.averaged,
            "scaler": self.accelerator.scaler,  # of float16
            "early_stop": self.early_stop,
            "history": self.history,
            "monitor": self.monitor,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def objective(self) -> Objective:
        return self.loss.objective

    @property
    def params(self) -> TrainParams:
        return self.config.section(TrainParams)

    @property
    def runtime(self) -> RuntimeParams:
        return self.config.section(RuntimeParams)

    @property
    def model(self) -> ModelParams:
        return self.config.section(ModelParams)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.identity.folder / "checkpoints")

    @property
    def keep_checkpoints(self) -> bool:
        """A longer run could go on from here; or what started this one is gone and will not take what it wrote."""
        return may_go_on(self.params) or parent_processes.parent_pids() != self.parents

    @property
    def biases(self) -> list[str]:
        """The denoiser's modules whose bias is trained."""
        return list(bias.deltas(self.adapter.modules[""]))

    @property
    def images_per_step(self) -> int:
        return self.params.batch_size * self.params.gradient_accumulation_steps

    def num_epochs(self, num_steps: int) -> float:
        """Each picture comes up in one epoch as often as it repeats."""
        return num_steps * self.images_per_step / self.batches.order.num_entries

    def predict(self, batch: Batch) -> torch.Tensor:
        """The denoiser's prediction for a batch, [B, C, h, w]."""
        noisy_latents = self.objective.add_noise(batch.latents, batch.added_noise, batch.timesteps)  # [B, C, h, w]
        timesteps = self.objective.model_timesteps(batch.timesteps)  # [B]
        with self.accelerator.autocast():
            return self.base.family.predict(self.base.denoiser, noisy_latents, timesteps, self.prompt(batch))

    def prompt(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The cached conditioning, but for the part of text encoders that are trained: they encode now."""
        if self.base.text is None:
            return batch.prompt
        encoded = self.base.family.encode_prompts(self.base.text, batch.captions, batch.prompt)
        for name in self.batches.zeroed:  # a dropped caption that is zeros in the cache stays zeros
            is_kept = batch.prompt[name].flatten(1).any(1).reshape(-1, *[1] * (encoded[name].dim() - 1))  # [B, 1, ...]
            encoded[name] = encoded[name] * is_kept
        return batch.prompt | encoded

    def save_weights(self, path: Path) -> None:
        """The adapter as it is delivered: averaged, where section ``train`` says so."""
        metadata = {"format": "pt"} | bias_metadata(self.adapter.configs[""]["bias"], self.biases)
        with self.averaged.swapped_in():
            save_tensors(path, self.adapter.state_dict(), metadata)
