"""The frozen held-out table with its tensors, and the loss of every row under the denoiser's present weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lora_dag.artifacts import store
from lora_dag.core import seeding
from lora_dag.core.console import UserError, log, plural
from lora_dag.core.device import autocast, log_device
from lora_dag.core.files import sha256_json
from lora_dag.diffusion.objectives import make_objective, masked_mean, prediction_type
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import Picture, Row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
    from lora_dag.core.params import ModelParams
    from lora_dag.diffusion.objectives import Objective
    from lora_dag.families.protocol import Family
    from stages.validate.params import ValidateParams


class Latents(Protocol):
    """What the rows are about: LatentCache, or pictures that were drawn. Tensors are without a batch dimension."""

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]: ...
    def mask(self, key: str) -> torch.Tensor: ...
    def prompt(self, caption: str, view: str | None = None) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class EvalSet:
    """The rows of the frozen table, and all that their losses depend on but the weights."""

    rows: list[Row]
    cache: Latents
    objective: Objective
    family: Family
    model: ModelParams
    device: torch.device
    seed: int
    batch_size: int

    @property
    def num_train_timesteps(self) -> int:
        return self.objective.noise_scheduler.config.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        return prediction_type(self.objective.noise_scheduler)

    @property
    def picture_size(self) -> tuple[int, ...]:
        """Height and width of the table's latents; of most of them, where they differ."""
        shapes = Counter(map(self.shape, self.rows))
        return max(shapes, key=lambda shape: (shapes[shape], shape))

    @property
    def heldout_views(self) -> list[str]:
        """Keys of the held-out pictures' latents."""
        return list(dict.fromkeys(row.picture.view for row in self.rows if row.picture.split == "heldout"))

    def shape(self, row: Row) -> tuple[int, ...]:
        """Height and width of a row's latents."""
        return tuple(self.cache.latents(row.picture.view)[0].shape[-2:])

    def by_picture(self, losses: list[float], split: str) -> np.ndarray:
        """Mean loss of each picture of a split, float64 [pictures]."""
        answered = zip(self.rows, losses, strict=True)
        return bootstrap.by_picture(
            (row.picture.file_name, loss) for row, loss in answered if row.picture.split == split
        )

    def digest(self) -> str:
        """All that decides the losses beside the weights: what is asked, the tensors it is about, and batches."""
        tensors = {}
        for picture in {row.picture for row in self.rows}:
            tensors[f"latents {picture.view}"] = self.cache.latents(picture.view)[0]
            if picture.mask:
                tensors[f"mask {picture.mask}"] = self.cache.mask(picture.mask)
            prompt = self.cache.prompt(picture.caption, picture.view)
            tensors |= {f"{name} {picture.view} {picture.caption}": tensor for name, tensor in prompt.items()}
        asked = [
            [row.picture.content, row.picture.caption, row.picture.view, row.picture.mask, row.stratum, row.timestep]
            for row in self.rows
        ]
        return sha256_json([asked, self.seed, self.batch_size, store.checksum(tensors, "", "")])

    def batches(self) -> Iterator[list[int]]:
        """Positions of all rows, at most ``batch_size`` of one shape at a time."""
        by_shape = defaultdict(list)
        for index, row in enumerate(self.rows):
            by_shape[self.shape(row)].append(index)
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]


def make_eval_set(
    settings: ValidateParams, model: ModelParams, family: Family, cache: LatentCache, device: torch.device
) -> EvalSet:
    """Choose the pictures and lay out the rows.

    Raises:
        UserError: nothing is held out, or there are more strata than timesteps.
    """
    known = [as_picture(item) for item in cache.items if not item.regularization]
    pictures = heldout_table.choose(known, settings.max_pictures)
    counts = Counter(picture.split for picture in pictures)
    if len(counts) < 2:
        raise UserError(
            f"params.yaml dataset.heldout_fraction: of {len(known)} pictures {counts['heldout']} are held out "
            f"and {counts['train']} left to probe; validate needs both: use more pictures or another fraction"
        )
    objective = make_objective(family.load_scheduler(model))
    num_train_timesteps = objective.noise_scheduler.config.num_train_timesteps
    if settings.num_timesteps > num_train_timesteps:
        raise UserError(
            f"params.yaml validate.num_timesteps: got {settings.num_timesteps}, "
            f"but the base was trained with {num_train_timesteps} timesteps; use fewer"
        )
    rows = heldout_table.table(pictures, settings.num_timesteps, num_train_timesteps, settings.seed)
    log_device(device, model)
    log.info("pictures    %d held out, %d of the training set beside them", counts["heldout"], counts["train"])
    log.info("table       %s: %s per picture", plural(len(rows), "row"), plural(settings.num_timesteps, "timestep"))
    return EvalSet(rows, cache, objective, family, model, device, settings.seed, settings.batch_size)


def as_picture(item: CachedItem) -> Picture:
    """With its first caption, view and mask: evidence draws nothing that training draws."""
    mask = item.masks[0] if item.masks else None
    return Picture(item.content, item.file_name, item.split, item.caption, item.views[0], mask)


def row_losses(eval_set: EvalSet, denoiser: Any, text: Any = None) -> list[float]:
    """Loss of every row under the present weights: mean squared error, six significant digits.

    Args:
        text: the family's text object, where an adapter is in its encoders: they are asked in place of the cache.

    Every batch is full (one that would not be repeats its last row), so that kernels do not depend on the table's
    length.
    """
    import torch

    prompts = {} if text is None else encode(eval_set, text)
    losses = [0.0] * len(eval_set.rows)
    for indices in eval_set.batches():
        rows = [eval_set.rows[index] for index in indices]
        batch = make_batch(eval_set, rows + rows[-1:] * (eval_set.batch_size - len(rows)), prompts)
        with torch.inference_mode(), autocast(eval_set.device, eval_set.model):
            model_pred = eval_set.family.predict(denoiser, batch.noisy_latents, batch.timesteps, batch.prompt)
        errors = (model_pred.float() - batch.target).square()
        found = masked_mean(errors, batch.masks)  # [B]
        for index, loss in zip(indices, found.tolist(), strict=False):  # without the repeated rows
            losses[index] = float(f"{loss:.6g}")
    return losses


@dataclass(frozen=True)
class EvalBatch:
    """Some rows of one latent shape as tensors on the device."""

    noisy_latents: torch.Tensor  # [B, C, h, w] float32
    timesteps: torch.Tensor  # [B], as the model counts them
    prompt: dict[str, torch.Tensor]  # name -> [B, ...]
    target: torch.Tensor  # [B, C, h, w] float32
    masks: torch.Tensor | None  # [B, 1, h, w] float32; None where none of these pictures has one


Prompts = dict[str, dict[str, "torch.Tensor"]]
"""Caption -> what text encoders say of it, in place of the cache: name -> float32 [...]."""


def encode(eval_set: EvalSet, text: Any) -> Prompts:
    """Every caption of the table, the frozen encoders' part from the cache."""
    captions = sorted({row.picture.caption for row in eval_set.rows})
    return encode_captions(eval_set, captions, text, eval_set.cache)


def encode_captions(eval_set: EvalSet, captions: list[str], text: Any, cache: Latents | None = None) -> Prompts:
    """By the text encoders as they are; every batch is full, as in ``row_losses``.

    Args:
        cache: where the frozen encoders' part is; None for all encoders being asked.
    """
    import torch

    found: Prompts = {}
    for start in range(0, len(captions), eval_set.batch_size):
        batch = captions[start : start + eval_set.batch_size]
        filled = batch + batch[-1:] * (eval_set.batch_size - len(batch))
        cached = stack([cache.prompt(caption) for caption in filled], eval_set.device) if cache else None
        with torch.inference_mode(), autocast(eval_set.device, eval_set.model):
            encoded = eval_set.family.encode_prompts(text, filled, cached)
        for index, caption in enumerate(batch):
            found[caption] = {name: tensor[index].cpu() for name, tensor in encoded.items()}
    return found


def stack(prompts: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """As a batch on the device, name -> float32 [B, ...]."""
    import torch

    return {name: torch.stack([prompt[name].float() for prompt in prompts]).to(device) for name in prompts[0]}


def make_batch(eval_set: EvalSet, rows: list[Row], prompts: Prompts) -> EvalBatch:
    """Latents are the posterior's mean: the VAE's sampling noise would only widen the intervals."""
    import torch

    latents = torch.stack([eval_set.cache.latents(row.picture.view)[0] for row in rows])
    noise = torch.stack([row_noise(eval_set.seed, row, latents[0].shape) for row in rows])
    timesteps = torch.tensor([row.timestep for row in rows])
    cached = [eval_set.cache.prompt(row.picture.caption, row.picture.view) for row in rows]
    asked = [prompt | prompts.get(row.picture.caption, {}) for row, prompt in zip(rows, cached, strict=True)]
    masks = None
    if any(row.picture.mask for row in rows):
        everything = torch.ones_like(latents[0, :1])  # [1, h, w]
        masks = torch.stack([eval_set.cache.mask(row.picture.mask) if row.picture.mask else everything for row in rows])
    return EvalBatch(
        eval_set.objective.add_noise(latents, noise, timesteps).to(eval_set.device),
        eval_set.objective.model_timesteps(timesteps).to(eval_set.device),
        stack(asked, eval_set.device),
        eval_set.objective.target(latents, noise, timesteps).to(eval_set.device),
        None if masks is None else masks.to(eval_set.device),
    )


def row_noise(seed: int, row: Row, shape: torch.Size) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=seeding.generator(seed, "validate-noise", row.picture.content, row.stratum))
