"""Interface of a model family. A family is a file in this folder that defines PIPELINE, the name of a diffusers class.

To add a family, write two files. Every list of families is read from the folders, so nothing else needs a change:

1. ``lora_dag/families/NAME.py`` with all members of ``Family`` below. Copy the family whose pipeline is most similar.
   Most functions are one line that reuses a function of ``common.py``. Write ``encode_prompts`` (captions to tensors)
   and ``predict`` (tensors to the denoiser's output) after the pipeline's ``encode_prompt`` and ``__call__``.
2. ``tests/helpers/families/NAME.py`` with a tiny random pipeline and the same two calls by the unchanged pipeline.

Then run ``pytest tests/families/test_every_family.py -k NAME``: it compares prompts, latents, predictions and losses
with those of the unchanged pipeline, and runs the six stages. The first run prints the numbers to record in the second
file; ``python -m tests.golden --write`` records the results of the family's runs.

Stages call these functions and read these constants; no stage names a family. Where a pipeline needs something that
no function here provides, add a function here, and its usual form to ``common.py``. Two things are outside this folder:
an objective that is new (``lora_dag/diffusion/objectives.py``) and the table of docs/models.md.
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
    """Form of a family's checkpoints in one file. Source: diffusers/loaders/single_file_utils.py."""

    marker_tensors: tuple[str, ...] = ()
    """Tensors that identify such a file; of several families that fit, the one with the most markers is chosen."""
    component_prefixes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Components that the file may have besides the denoiser -> prefixes of their tensors' names."""
    configs_repo: str = "OWNER/NAME"
    """Repository of the Hub with the configs of most of these checkpoints."""


class Family(Protocol):
    """Contents of ``lora_dag/families/NAME.py``; the module itself is the object."""

    # The base

    PIPELINE: str
    """Class named in model_index.json."""
    COMPONENTS: dict[str, str]
    """Folder of each component that is loaded -> its class without ``Fast``; "" for any class."""
    OPTIONAL: tuple[str, ...]
    """Components that model_index.json may declare null."""
    VAE: tuple[str, ...]
    """Components that determine image latents."""
    TEXT: tuple[str, ...]
    """Components that determine the embeddings of captions."""
    TEXT_ENCODERS: dict[str, int]
    """CLIP encoders that an adapter can be trained in -> number of their last layers that are not used.

    Empty for none; then ``load_trainable_text`` and ``text_encoders`` are never called.
    """
    DENOISER: str
    """``unet`` or ``transformer``: the folder and the prefix of adapter keys in diffusers' files."""
    NO_GUIDANCE: float | None
    """guidance_scale up to which the pipeline ignores negative prompts; None if the scale is an input of the model."""

    # Names in other programs

    HUB_TAG: str
    """Tag of the model card on the Hugging Face Hub."""
    MODELSPEC: str
    """``modelspec.architecture`` without ``/lora``, which community tools show.

    Source: the registry of https://github.com/Stability-AI/ModelSpec.
    """
    COMFYUI: dict[str, str]
    """Component that an adapter can be trained in -> prefix of its keys in ComfyUI's files.

    A prefix that ends in ``_`` is kohya's: dots in names become ``_``, and tensors are lora_down, lora_up and alpha.
    A prefix that ends in ``.`` keeps diffusers' names of layers and tensors.

    Sources: kohya's sd-scripts, networks/lora*.py; ComfyUI, comfy/lora.py.
    """
    ORIGINAL_LAYERS: dict[str, str]
    """Layer of the original checkpoint, which ComfyUI loads -> the denoiser's layers that it stacks, in order.

    {i}, {j} and {k} are numbers of blocks, {last} is the last number; ``adapters/original_layout.py`` counts the blocks
    of a UNet. ``common.SWAPPED`` marks a layer whose halves are in reverse order. ``pytest -m peers`` compares this
    with ComfyUI's own key map.
    """
    PRESET_LAYERS: dict[str, str]
    """Preset of ``lora.target_modules`` -> regex of further layers of the denoiser.

    The presets ``attention`` and ``feed_forward`` find layers of diffusers' Attention and FeedForward by themselves.
    """
    SINGLE_FILE: SingleFile

    # Sizes

    def left_out(self, model: ModelParams) -> tuple[str, ...]:
        """Return the components that a pipeline is loaded without: None in the arguments of ``from_pretrained``."""

    def pixel_multiple(self, model: ModelParams) -> int:
        """Return the number of pixels that divides every width and height."""

    def max_side(self, model: ModelParams) -> int | None:
        """Return the longest side in pixels that the denoiser has positions for; None if it accepts any."""

    def vae_scale_factor(self, model: ModelParams) -> int:
        """Return the pixels per latent pixel, in each direction."""

    # Images

    def vae_dtype(self, model: ModelParams) -> Dtype:
        """Return the VAE's dtype: ``model.dtype``, or float32 if the VAE would overflow."""

    def load_vae(self, model: ModelParams, device: torch.device, tiling: bool = False) -> Any:
        """Load the VAE, frozen, in eval mode, in ``model.dtype``.

        Args:
            tiling: encode images larger than the VAE's sample size in overlapping tiles, for less memory.
        """

    def encode_images(self, vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return posterior mean and std in the denoiser's space, float32 [B, C, H/f, W/f].

        Args:
            pixel_values: float [B, 3, H, W] in [-1, 1].
        """

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Return the pixel values of latents, float32 [B, 3, H, W], about -1 to 1."""

    def view_conditioning(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Return the conditioning on size and crop in pixels: name -> float32 [...]; empty without such an input.

        Args:
            original_size: height and width of the image before it was scaled.
            crop_top_left: top and left of the view in the scaled (and mirrored) image.
            target_size: height and width of the view.
        """

    # Captions

    def load_tokenizer(self, model: ModelParams, folder: str = "tokenizer") -> Any:
        """Load the tokenizer; raise UserError if it lacks something that the family uses."""

    def max_tokens(self, model: ModelParams) -> int:
        """Return the tokens of a caption that are used, special ones included."""

    def count_tokens(self, model: ModelParams, captions: list[str]) -> list[int]:
        """Return the tokens per caption, special ones included, without truncation."""

    def drops_to_zeros(self, model: ModelParams) -> bool:
        """Return whether a dropped caption is zeros instead of the empty caption's embeddings.

        It is what the pipeline uses without a negative prompt.
        """

    def load_text(self, model: ModelParams, device: torch.device) -> Any:
        """Load tokenizers and frozen text encoders, as one object that only the family uses."""

    def load_trainable_text(self, model: ModelParams, device: torch.device) -> Any:
        """Load the object of ``load_text`` without the encoders that stay frozen: their output is in the cache."""

    def text_of(self, pipeline: Any) -> Any:
        """Return the object of ``load_text`` for the components of a loaded pipeline."""

    def text_encoders(self, text: Any) -> dict[str, Any]:
        """Return component -> encoder, for the encoders in TEXT_ENCODERS."""

    def encode_prompts(
        self, text: Any, captions: list[str], cached: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the embeddings of captions, batched: name -> float32 [B, ...]. The caller disables gradients.

        Args:
            cached: earlier output for these captions, batched, which has the frozen encoders' part.
        """

    # The denoiser

    def load_denoiser(self, model: ModelParams, device: torch.device) -> Any:
        """Load the denoiser, frozen, in eval mode, in ``model.dtype``."""

    def load_scheduler(self, model: ModelParams) -> Any:
        """Load the scheduler that the base model was trained with."""

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the denoiser's output, [B, C, h, w].

        Args:
            prompt: output of ``encode_prompts`` and ``view_conditioning``, batched.
        """

    def load_pipeline(self, model: ModelParams, device: torch.device, **components: Any) -> Any:
        """Load the diffusers pipeline, to draw samples and to check exports.

        Args:
            components: components to use instead of those in the folder; None leaves a component out.
        """


def load_family(name: str) -> Family:
    """Return the module ``lora_dag.families.<name>``."""
    return importlib.import_module(f"lora_dag.families.{name}")  # type: ignore[return-value]


def all_families() -> dict[str, Family]:
    """Return name -> family; imports no library."""
    return {name: load_family(name) for name in FAMILIES}


def family_of(denoiser: object) -> Family | None:
    """Return a family whose denoiser has this class; families with the same class are equal for callers."""
    name = type(denoiser).__name__
    return next((family for family in all_families().values() if family.COMPONENTS[family.DENOISER] == name), None)
