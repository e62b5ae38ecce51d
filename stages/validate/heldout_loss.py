"""The evaluation set with its tensors, and the loss of every row under the present weights of the denoiser."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lora_dag.artifacts import store
from lora_dag.core import seeding
from lora_dag.core.console import Problem, UserError, log, plural
from lora_dag.core.device import autocast, log_device
from lora_dag.core.files import sha256_json
from lora_dag.diffusion.objectives import make_objective, masked_mean, prediction_type
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import EvalImage, Row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
    from lora_dag.core.params import ModelParams
    from lora_dag.diffusion.objectives import Objective
    from lora_dag.families.protocol import Family
    from stages.validate.params import ValidateParams


class LatentSource(Protocol):
    """Latents, masks and prompt embeddings: a LatentCache or GeneratedLatents. Tensors have no batch dimension."""

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]: ...
    def mask(self, key: str) -> torch.Tensor: ...
    def prompt(self, caption: str, view: str | None = None) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class EvalSet:
    """Rows to score, and everything that determines their losses except the weights."""

    rows: list[Row]
    cache: LatentSource
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
    def image_size(self) -> tuple[int, ...]:
        """Height and width of the latents; the most frequent shape if they differ."""
        shapes = Counter(map(self.latent_shape, self.rows))
        return max(shapes, key=lambda shape: (shapes[shape], shape))

    @property
    def heldout_views(self) -> list[str]:
        """Keys of the held-out images' latents."""
        return list(dict.fromkeys(row.image.view for row in self.rows if row.image.split == "heldout"))

    def latent_shape(self, row: Row) -> tuple[int, ...]:
        """Return height and width of a row's latents."""
        return tuple(self.cache.latents(row.image.view)[0].shape[-2:])

    def by_image(self, losses: list[float], split: str) -> np.ndarray:
        """Return the mean loss of each image of a split, float64 [images]."""
        pairs = zip(self.rows, losses, strict=True)
        return bootstrap.by_image((row.image.file_name, loss) for row, loss in pairs if row.image.split == split)

    def digest(self) -> str:
        """Return the digest of what determines the losses except the weights: rows, tensors and batch size."""
        tensors = {}
        for image in {row.image for row in self.rows}:
            tensors[f"latents {image.view}"] = self.cache.latents(image.view)[0]
            if image.mask:
                tensors[f"mask {image.mask}"] = self.cache.mask(image.mask)
            prompt = self.cache.prompt(image.caption, image.view)
            tensors |= {f"{name} {image.view} {image.caption}": tensor for name, tensor in prompt.items()}
        contents = [
            [row.image.content, row.image.caption, row.image.view, row.image.mask, row.stratum, row.timestep]
            for row in self.rows
        ]
        return sha256_json([contents, self.seed, self.batch_size, store.checksum(tensors, "", "")])

    def batches(self) -> Iterator[list[int]]:
        """Yield the positions of all rows, at most ``batch_size`` of one latent shape at a time."""
        by_shape = defaultdict(list)
        for index, row in enumerate(self.rows):
            by_shape[self.latent_shape(row)].append(index)
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]


def make_eval_set(
    settings: ValidateParams, model: ModelParams, family: Family, cache: LatentCache, device: torch.device
) -> EvalSet:
    """Choose the images and make the rows.

    Raises:
        UserError: there is no held-out or no training image, or there are more strata than timesteps.
    """
    candidates = [as_eval_image(item) for item in cache.items if not item.regularization]
    images = heldout_table.choose_images(candidates, settings.max_images)
    counts = Counter(image.split for image in images)
    if len(counts) < 2:
        raise UserError(
            Problem(
                "split-empty",
                f"{settings.setting('dataset.heldout_fraction')}: of {len(candidates)} images, {counts['heldout']} are "
                f"held out and {counts['train']} are for training, but validate needs both. Use more images or another "
                "fraction.",
            )
        )
    objective = make_objective(family.load_scheduler(model))
    num_train_timesteps = objective.noise_scheduler.config.num_train_timesteps
    if settings.num_timesteps > num_train_timesteps:
        raise UserError(
            Problem(
                "too-many-timesteps",
                f"{settings.setting('num_timesteps')}: got {settings.num_timesteps}, but the base model has only "
                f"{num_train_timesteps} training timesteps. Use {num_train_timesteps} or fewer.",
            )
        )
    rows = heldout_table.make_rows(images, settings.num_timesteps, num_train_timesteps, settings.seed)
    log_device(device, model)
    log.info("evaluation  %d held-out images, %d training images for comparison", counts["heldout"], counts["train"])
    log.info("rows        %s, %s per image", f"{len(rows):,}", plural(settings.num_timesteps, "timestep"))
    return EvalSet(rows, cache, objective, family, model, device, settings.seed, settings.batch_size)


def as_eval_image(item: CachedItem) -> EvalImage:
    """Return the image with its first caption, view and mask, since evaluation must not depend on random choices."""
    mask = item.masks[0] if item.masks else None
    return EvalImage(item.content, item.file_name, item.split, item.caption, item.views[0], mask)


def row_losses(eval_set: EvalSet, denoiser: Any, text: Any = None) -> list[float]:
    """Return the loss of every row under the present weights: mean squared error, six significant digits.

    Args:
        text: the family's text object if the adapter is in its encoders, which then replace the cached embeddings.

    Every batch is full (the last one repeats its last row), so that kernels do not depend on the number of rows.
    """
    import torch

    prompts = {} if text is None else encode_table_captions(eval_set, text)
    losses = [0.0] * len(eval_set.rows)
    for indices in eval_set.batches():
        rows = [eval_set.rows[index] for index in indices]
        batch = make_batch(eval_set, rows + rows[-1:] * (eval_set.batch_size - len(rows)), prompts)
        with torch.inference_mode(), autocast(eval_set.device, eval_set.model):
            model_pred = eval_set.family.predict(denoiser, batch.noisy_latents, batch.timesteps, batch.prompt)
        errors = (model_pred.float() - batch.target).square()
        batch_losses = masked_mean(errors, batch.masks)  # [B]
        for index, loss in zip(indices, batch_losses.tolist(), strict=False):  # without the repeated rows
            losses[index] = float(f"{loss:.6g}")
    return losses


@dataclass(frozen=True)
class EvalBatch:
    """Rows of one latent shape as tensors on the device."""

    noisy_latents: torch.Tensor  # [B, C, h, w] float32
    timesteps: torch.Tensor  # [B], as the model counts them
    prompt: dict[str, torch.Tensor]  # name -> [B, ...]
    target: torch.Tensor  # [B, C, h, w] float32
    masks: torch.Tensor | None  # [B, 1, h, w] float32; None if no image of the batch has one


Prompts = dict[str, dict[str, "torch.Tensor"]]
"""Caption -> prompt embeddings that replace the cached ones: name -> float32 [...]."""


def encode_table_captions(eval_set: EvalSet, text: Any) -> Prompts:
    """Encode every caption of the evaluation set. Embeddings of frozen encoders come from the cache."""
    captions = sorted({row.image.caption for row in eval_set.rows})
    return encode_captions(eval_set, captions, text, eval_set.cache)


def encode_captions(eval_set: EvalSet, captions: list[str], text: Any, cache: LatentSource | None = None) -> Prompts:
    """Encode captions by the text encoders with their present weights. Every batch is full, as in ``row_losses``.

    Args:
        cache: source of the frozen encoders' embeddings; None to run all encoders.
    """
    import torch

    prompts: Prompts = {}
    for start in range(0, len(captions), eval_set.batch_size):
        batch = captions[start : start + eval_set.batch_size]
        filled = batch + batch[-1:] * (eval_set.batch_size - len(batch))
        cached = stack_prompts([cache.prompt(caption) for caption in filled], eval_set.device) if cache else None
        with torch.inference_mode(), autocast(eval_set.device, eval_set.model):
            encoded = eval_set.family.encode_prompts(text, filled, cached)
        for index, caption in enumerate(batch):
            prompts[caption] = {name: tensor[index].cpu() for name, tensor in encoded.items()}
    return prompts


def stack_prompts(prompts: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the prompts as a batch on the device, name -> float32 [B, ...]."""
    import torch

    return {name: torch.stack([prompt[name].float() for prompt in prompts]).to(device) for name in prompts[0]}


def make_batch(eval_set: EvalSet, rows: list[Row], prompts: Prompts) -> EvalBatch:
    """Make the tensors of some rows.

    Latents are the posterior's mean, since sampling noise of the VAE would only widen the intervals.
    """
    import torch

    latents = torch.stack([eval_set.cache.latents(row.image.view)[0] for row in rows])
    noise = torch.stack([row_noise(eval_set.seed, row, latents[0].shape) for row in rows])
    timesteps = torch.tensor([row.timestep for row in rows])
    cached = [eval_set.cache.prompt(row.image.caption, row.image.view) for row in rows]
    embeddings = [prompt | prompts.get(row.image.caption, {}) for row, prompt in zip(rows, cached, strict=True)]
    masks = None
    if any(row.image.mask for row in rows):
        everything = torch.ones_like(latents[0, :1])  # [1, h, w]
        masks = torch.stack([eval_set.cache.mask(row.image.mask) if row.image.mask else everything for row in rows])
    return EvalBatch(
        eval_set.objective.add_noise(latents, noise, timesteps).to(eval_set.device),
        eval_set.objective.model_timesteps(timesteps).to(eval_set.device),
        stack_prompts(embeddings, eval_set.device),
        eval_set.objective.target(latents, noise, timesteps).to(eval_set.device),
        None if masks is None else masks.to(eval_set.device),
    )


def row_noise(seed: int, row: Row, shape: torch.Size) -> torch.Tensor:
    """Return the noise of a row, which depends on the seed, the image's content and the stratum."""
    import torch

    return torch.randn(shape, generator=seeding.generator(seed, "validate-noise", row.image.content, row.stratum))
