"""Parts of a training run. stages/train/build.py makes them; stages/train/loop.py runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_dag.adapters import bias
from lora_dag.adapters.adapter_set import DENOISER_KEY
from lora_dag.artifacts.adapter import bias_metadata
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.core.tensors import save_tensors
from stages.train import parent_processes
from stages.train.checkpoints import Checkpoints
from stages.train.identity import can_extend
from stages.train.interrupt import Interrupt
from stages.train.params import TrainParams
from stages.train.progress import History

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from accelerate import Accelerator

    from lora_dag.adapters.adapter_set import AdapterSet
    from lora_dag.core.params import Config
    from lora_dag.core.time_estimate import Work
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
    """Part with a state of tensors and plain values that a checkpoint contains."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class FrozenBase:
    """Frozen modules of the base model."""

    family: Family
    denoiser: Any
    """Denoiser on the device; contains the adapter."""
    text: Any
    """The family's text object if text encoders are adapted, else None."""
    digests: dict[str, str]
    """Component -> digest of its files."""
    frozen_digest: str
    """sha256 over the weights in memory, before the adapter was added."""

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Component -> adapted text encoder."""
        return {} if self.text is None else self.family.text_encoders(self.text)


@dataclass(frozen=True)
class Run:
    """One training run."""

    config: Config
    accelerator: Accelerator
    base: FrozenBase
    adapter: AdapterSet
    init_from_summary: str
    """Summary of the file that the adapter starts from; empty for a new adapter."""
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
    """Amount of work, for an estimate of the time."""
    parents_at_start: list[int]
    """Process ids of the parent processes at the start."""
    history: History = field(default_factory=History)
    interrupt: Interrupt = field(default_factory=Interrupt)

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Parts that change from step to step, by their names in a checkpoint."""
        parts: dict[str, Stateful | None] = {
            "adapter": self.adapter,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "averaged": self.averaged,
            "scaler": self.accelerator.scaler,  # float16 only
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
        """Whether a longer run could resume from here, or the parent process died and will not collect the output."""
        return can_extend(self.params) or parent_processes.parent_pids() != self.parents_at_start

    @property
    def biases(self) -> list[str]:
        """Modules of the denoiser whose bias is trained."""
        return list(bias.deltas(self.adapter.modules[DENOISER_KEY]))

    @property
    def images_per_step(self) -> int:
        return self.params.batch_size * self.params.gradient_accumulation_steps

    def num_epochs(self, num_steps: int) -> float:
        """Return the number of epochs; each image counts as often as its ``repeats``."""
        return num_steps * self.images_per_step / self.batches.order.num_entries

    def predict(self, batch: Batch) -> torch.Tensor:
        """Return the denoiser's prediction for a batch, [B, C, h, w]."""
        noisy_latents = self.objective.add_noise(batch.latents, batch.added_noise, batch.timesteps)  # [B, C, h, w]
        timesteps = self.objective.model_timesteps(batch.timesteps)  # [B]
        with self.accelerator.autocast():
            return self.base.family.predict(self.base.denoiser, noisy_latents, timesteps, self.prompt(batch))

    def prompt(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the conditioning of a batch: cached, except that trained text encoders encode here."""
        if self.base.text is None:
            return batch.prompt
        encoded = self.base.family.encode_prompts(self.base.text, batch.captions, batch.prompt)
        for name in self.batches.zeroed:  # zeros for a dropped caption stay zeros
            is_kept = batch.prompt[name].flatten(1).any(1).reshape(-1, *[1] * (encoded[name].dim() - 1))  # [B, 1, ...]
            encoded[name] = encoded[name] * is_kept
        return batch.prompt | encoded

    def save_weights(self, path: Path) -> None:
        """Write the adapter, with averaged weights if section ``train`` enables them."""
        metadata = {"format": "pt"} | bias_metadata(self.adapter.configs[DENOISER_KEY]["bias"], self.biases)
        with self.averaged.swapped_in():
            save_tensors(path, self.adapter.state_dict(), metadata)
