"""What a family file offers. Stages see only these verbs; which classes stand behind them is the family's matter.

Tensors go in and come out; no stage, artifact or params section is known here beyond ModelParams.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import Dtype, ModelParams


class Family(Protocol):
    """The verbs of ``lora_dag/families/<name>.py``; the module itself is the object."""

    PIPELINE: str
    """Class named in model_index.json."""
    COMPONENTS: dict[str, str]
    """Folder -> class, of all that is loaded; "" for any. A tokenizer's class goes without ``Fast``."""
    NO_GUIDANCE: float | None
    """guidance_scale up to which the pipeline reads no negative prompt; None where it is an input of the model."""
    OPTIONAL: tuple[str, ...]
    """Components that model_index.json may declare null."""
    VAE: tuple[str, ...]
    """Components that decide image latents."""
    TEXT: tuple[str, ...]
    """Components that decide conditioning."""
    TEXT_ENCODERS: dict[str, int]
    """CLIP encoders that an adapter can be trained in -> how many of their last layers nothing reads. Empty for none;
    then ``load_trainable_text`` and ``text_encoders`` are never called.
    """
    DENOISER: str
    """``unet`` or ``transformer``: the folder, and the prefix of adapter keys in diffusers' files."""

    def left_out(self, model: ModelParams) -> tuple[str, ...]:
        """What a pipeline is loaded without: arguments of ``from_pretrained`` that are None."""

    def pixel_multiple(self, model: ModelParams) -> int:
        """Width and height must be multiples of this."""

    def max_side(self, model: ModelParams) -> int | None:
        """Pixels of the longest side that the denoiser has positions for; None where it takes any."""

    def vae_scale_factor(self, model: ModelParams) -> int:
        """Pixels per latent pixel, in each direction."""

    def vae_dtype(self, model: ModelParams) -> Dtype:
        """What the VAE is loaded and run in: the frozen dtype, or float32 where it would overflow."""

    def load_vae(self, model: ModelParams, device: torch.device, tiling: bool = False) -> Any:
        """Frozen, eval, in ``model.dtype``.

        Args:
            tiling: encode pictures larger than the VAE's sample size in overlapping tiles, for less memory.
        """

    def encode_images(self, vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> posterior mean and std in the denoiser's space, float32 [B, C, H/f, W/f]."""

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents of ``encode_images`` -> pixel values, float32 [B, 3, H, W], about -1 to 1."""

    def drops_to_zeros(self, model: ModelParams) -> bool:
        """Whether a dropped caption is zeros, not the empty caption's embeddings: what the pipeline guides away from
        where no negative prompt is given.
        """

    def view_conditioning(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Conditioning by how a view is cut, in pixels: name -> float32 [...]; empty where the model asks for none.

        Args:
            original_size: height and width of the picture before it was scaled.
            crop_top_left: top and left of the view in the scaled (and mirrored) picture.
            target_size: height and width of the view.
        """

    def max_tokens(self, model: ModelParams) -> int: ...
    def count_tokens(self, model: ModelParams, captions: list[str]) -> list[int]:
        """Tokens per caption, special ones included, without truncation."""

    def load_text(self, model: ModelParams, device: torch.device) -> Any:
        """Tokenizers and frozen text encoders, as one opaque object."""

    def load_trainable_text(self, model: ModelParams, device: torch.device) -> Any:
        """As ``load_text``, without the encoders that stay frozen: what they say is in the cache."""

    def text_of(self, pipeline: Any) -> Any:
        """The same object of a loaded pipeline's own components."""

    def text_encoders(self, text: Any) -> dict[str, Any]:
        """The encoders of TEXT_ENCODERS, by component."""

    def encode_prompts(
        self, text: Any, captions: list[str], cached: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Conditioning, batched: name -> float32 [B, ...]. Gradients are the caller's matter.

        Args:
            cached: what was encoded for these captions before, batched: the frozen encoders' part is taken from it.
        """

    def load_denoiser(self, model: ModelParams, device: torch.device) -> Any:
        """Frozen, eval, in the frozen dtype."""

    def load_scheduler(self, model: ModelParams) -> Any:
        """The scheduler that the base was trained with."""

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The denoiser's output, [B, C, h, w].

        Args:
            prompt: what ``encode_prompts`` and ``view_conditioning`` return, batched.
        """

    def load_pipeline(self, model: ModelParams, device: torch.device) -> Any:
        """The whole diffusers pipeline, for sampling and for proving exports."""


def load_family(name: str) -> Family:
    """The module ``lora_dag.families.<name>``. Imported by name, so that dvc.yaml can depend on that one file."""
    return importlib.import_module(f"lora_dag.families.{name}")  # type: ignore[return-value]
