"""What a family file has, and how to add one. A family is a file in this folder that names a PIPELINE of diffusers.

To add a family, write two files; every list of families is read from the folders, so nothing else has to know it:

1. ``lora_dag/families/NAME.py`` with all that ``Family`` lists below. Copy the family whose pipeline is nearest to
   yours. Most functions are one line that takes over a function of ``common.py``. Write out what your pipeline does in
   its own way: ``encode_prompts`` (captions to tensors) and ``predict`` (tensors to the denoiser's output).
   Read both from the pipeline's ``encode_prompt`` and ``__call__``.
2. ``tests/helpers/families/NAME.py`` with a tiny random pipeline and the same two calls by the stock pipeline alone.

Then run ``pytest tests/families/test_every_family.py -k NAME``: it compares prompts, latents, predictions and losses
with the stock pipeline's, and runs the six stages. The first run prints the numbers to record in the second file;
``python -m tests.golden --write`` records the values that the family's runs give.

Stages call these functions and read these constants; no stage names a family. Where a pipeline needs something that
no function here provides, add a function here, and its usual form to ``common.py``. Two things are outside this folder:
an objective that is new (``lora_dag/diffusion/objectives.py``) and the table *Other models* of README.md.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_dag.core.params import FAMILIES

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import Dtype, ModelParams


@dataclass(frozen=True)
class SingleFile:
    """How the community ships a family's checkpoints in one file. Source: diffusers/loaders/single_file_utils.py."""

    marks: tuple[str, ...] = ()
    """Tensors by which such a file is known; of several families that fit, the one with the most marks is meant."""
    inside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Components that the file may hold beside the denoiser -> how the names of their tensors start."""
    configs: str = "OWNER/NAME"
    """Repository of the Hub that has the configs of most of these checkpoints."""


class Family(Protocol):
    """The contents of ``lora_dag/families/NAME.py``; the module itself is the object."""

    # The base

    PIPELINE: str
    """Class named in model_index.json."""
    COMPONENTS: dict[str, str]
    """Folder -> class of each component that is loaded; "" for any. A tokenizer's class is written without ``Fast``."""
    OPTIONAL: tuple[str, ...]
    """Components that model_index.json may declare null."""
    VAE: tuple[str, ...]
    """Components that decide image latents."""
    TEXT: tuple[str, ...]
    """Components that decide the conditioning by captions."""
    TEXT_ENCODERS: dict[str, int]
    """CLIP encoders that an adapter can be trained in -> how many of their last layers nothing reads. Empty for none;
    then ``load_trainable_text`` and ``text_encoders`` are never called.
    """
    DENOISER: str
    """``unet`` or ``transformer``: the folder, and the prefix of adapter keys in diffusers' files."""
    NO_GUIDANCE: float | None
    """guidance_scale up to which the pipeline reads no negative prompt; None where it is an input of the model."""

    # Names in other programs

    HUB_TAG: str
    """Tag of the model card on the Hugging Face Hub."""
    MODELSPEC: str
    """``modelspec.architecture`` without ``/lora``, which community tools show.

    Source: the registry of https://github.com/Stability-AI/ModelSpec.
    """
    COMFYUI: dict[str, str]
    """Component that can be adapted -> how its keys start in ComfyUI's files.

    A prefix that ends in ``_`` is kohya's: dots in names become ``_``, and tensors are lora_down, lora_up and alpha.
    One that ends in ``.`` keeps diffusers' names of layers and tensors.

    Sources: kohya's sd-scripts, networks/lora*.py; ComfyUI, comfy/lora.py.
    """
    ORIGINAL_LAYERS: dict[str, str]
    """Layer of the original checkpoint, which ComfyUI loads -> the denoiser's layers that are stacked there, in order.

    {i}, {j} and {k} are numbers of blocks, {last} is that of the last one; ``adapters/original_layout.py`` counts those
    of a UNet. ``common.SWAPPED`` marks a layer whose halves are in the other order. ``pytest -m peers`` compares this
    with ComfyUI's own key map.
    """
    PRESET_LAYERS: dict[str, str]
    """Of the presets of ``lora.target_modules``: ``attention`` or ``feed_forward`` -> regex of the denoiser's layers
    that have other names than those of diffusers' own Attention and FeedForward.
    """
    SINGLE_FILE: SingleFile

    # Sizes

    def left_out(self, model: ModelParams) -> tuple[str, ...]:
        """Components that a pipeline is loaded without: arguments of ``from_pretrained`` that are None."""

    def pixel_multiple(self, model: ModelParams) -> int:
        """Width and height must be multiples of this."""

    def max_side(self, model: ModelParams) -> int | None:
        """Pixels of the longest side that the denoiser has positions for; None where it accepts any."""

    def vae_scale_factor(self, model: ModelParams) -> int:
        """Pixels per latent pixel, in each direction."""

    # Pictures

    def vae_dtype(self, model: ModelParams) -> Dtype:
        """Dtype that the VAE is loaded and run in: the frozen dtype, or float32 where it would overflow."""

    def load_vae(self, model: ModelParams, device: torch.device, tiling: bool = False) -> Any:
        """Frozen, eval, in ``model.dtype``.

        Args:
            tiling: encode pictures larger than the VAE's sample size in overlapping tiles, for less memory.
        """

    def encode_images(self, vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> posterior mean and std in the denoiser's space, float32 [B, C, H/f, W/f]."""

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents of ``encode_images`` -> pixel values, float32 [B, 3, H, W], about -1 to 1."""

    def view_conditioning(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Conditioning by how a view is cut, in pixels: name -> float32 [...]; empty where the model has no such input.

        Args:
            original_size: height and width of the picture before it was scaled.
            crop_top_left: top and left of the view in the scaled (and mirrored) picture.
            target_size: height and width of the view.
        """

    # Captions

    def load_tokenizer(self, model: ModelParams, folder: str = "tokenizer") -> Any:
        """Raises UserError for one that lacks what the family reads."""

    def max_tokens(self, model: ModelParams) -> int:
        """Tokens of a caption that are read, special ones included."""

    def count_tokens(self, model: ModelParams, captions: list[str]) -> list[int]:
        """Tokens per caption, special ones included, without truncation."""

    def drops_to_zeros(self, model: ModelParams) -> bool:
        """Whether a dropped caption is zeros, not the empty caption's embeddings: what the pipeline guides away from
        where no negative prompt is given.
        """

    def load_text(self, model: ModelParams, device: torch.device) -> Any:
        """Tokenizers and frozen text encoders, as one object that only the family reads."""

    def load_trainable_text(self, model: ModelParams, device: torch.device) -> Any:
        """As ``load_text``, without the encoders that stay frozen: their output is in the cache."""

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

    # The denoiser

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
    """The module ``lora_dag.families.<name>``."""
    return importlib.import_module(f"lora_dag.families.{name}")  # type: ignore[return-value]


def all_families() -> dict[str, Family]:
    """By name; no library is imported for it."""
    return {name: load_family(name) for name in FAMILIES}


def family_of(denoiser: object) -> Family | None:
    """The family whose denoiser has this class: families that share a class share what is asked of it."""
    name = type(denoiser).__name__
    return next((family for family in all_families().values() if family.COMPONENTS[family.DENOISER] == name), None)
