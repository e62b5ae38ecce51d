"""Functions that most families share; a family file reuses them, one line each, and defines its own for the rest.

Weights are loaded only from safetensors files in the base model's folder; no code in the folder is run. COMPONENTS of
the family specifies the class of each component.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core import quiet
from lora_dag.core.console import Problem, UserError, machine_fault, plural
from lora_dag.core.files import from_json, read_json
from lora_dag.core.progress import elapsed
from lora_dag.families.protocol import load_family

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

    from lora_dag.core.params import Dtype, ModelParams
    from lora_dag.families.protocol import Family

MAX_CAUSE = 200
"""Characters of a library's error in a message."""
Text = dict[str, tuple[Any, Any]]
"""Folder of a text encoder -> its tokenizer and the encoder."""
_weightless: ContextVar[list[torch.nn.Module] | None] = ContextVar("weightless", default=None)
SWAPPED = "halves swapped: "
"""Prefix in ORIGINAL_LAYERS for a modulation whose scale and shift, two halves of its rows, are in reverse order."""


def config(model: ModelParams, folder: str) -> dict[str, Any]:
    """Return a component's config.json."""
    return read_json(Path(model.pretrained) / folder / "config.json")


def declared_null(model: ModelParams, components: Iterable[str]) -> set[str]:
    """Return the components that model_index.json declares null; empty without such a file."""
    index = Path(model.pretrained) / "model_index.json"
    listed = from_json(index.read_text(encoding="utf-8")) if index.exists() else {}
    return {component for component in components if listed.get(component) == [None, None]}


# Loading


@contextlib.contextmanager
def refuse_damage(model: ModelParams, folder: str) -> Iterator[None]:
    """Turn an error of diffusers or transformers about a component's files into a UserError.

    Raises:
        UserError: the library cannot build the component from its files.
    """
    try:
        yield
    except Exception as error:  # configs and weights that do not fit each other raise errors of any class
        if isinstance(error, UserError) or machine_fault(error):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        cause = f"{type(error).__name__}: {first.partition('. ')[0].rstrip('.')}"[:MAX_CAUSE]
        text = f"{Path(model.pretrained) / folder}: its files cannot be loaded ({cause}). Fetch the model again."
        raise UserError(Problem("base-damaged", text)) from None


def load_denoiser(model: ModelParams, device: torch.device) -> Any:
    """Load the UNet or transformer, frozen, in ``model.dtype`` or as ``model.quantization`` requires."""
    from lora_dag.families import quantized

    options = quantized.load_options(model.quantization)
    denoiser = load_frozen(model, load_family(model.family).DENOISER, device, **options)
    if model.quantization and _weightless.get() is not None:
        quantized.quantize_layers(denoiser, model.quantization)
    return denoiser


def load_vae(model: ModelParams, device: torch.device, tiling: bool = False) -> Any:
    """Load the VAE, frozen, in ``model.dtype``, with tiling if required."""
    vae = load_frozen(model, "vae", device)
    if tiling:
        vae.enable_tiling()
    return vae


def load_frozen(model: ModelParams, folder: str, device: torch.device, **options: Any) -> Any:
    """Load a component in eval mode, without gradients, in ``model.dtype``.

    Raises:
        UserError: its files do not fit each other, or weights are missing.
    """
    quiet.disable_progress_bars()
    cls = component_class(model, folder)
    if (built := _weightless.get()) is not None:
        built.append(_empty(cls, model, folder))
        return built[-1]
    options |= _load_options(model) | {"output_loading_info": True}
    if is_text(folder):
        options["ignore_mismatched_sizes"] = True  # returns them, where the error names none
    # Without warnings of tensors that are checked below.
    with elapsed("load", folder), refuse_damage(model, folder), quiet.without_warnings():
        module, found = cls.from_pretrained(model.pretrained, subfolder=folder, variant=model.variant, **options)
    bad = sorted({*found["missing_keys"], *(names[0] for names in found["mismatched_keys"])})
    if bad:  # both libraries would make up the values
        count = plural(len(bad), "tensor of config.json is", "tensors of config.json are")
        text = f"{Path(model.pretrained) / folder}: {count} missing or of another size, such as {bad[0]}."
        raise UserError(Problem("base-damaged", f"{text} Fetch the model again."))
    return module.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def weightless() -> Iterator[list[torch.nn.Module]]:
    """Build components from their configs on the device ``meta`` inside the block, without reading weights.

    Yields:
        A list that gets each component that is built.
    """
    built: list[torch.nn.Module] = []
    token = _weightless.set(built)
    try:
        yield built
    finally:
        _weightless.reset(token)


def _empty(cls: Any, model: ModelParams, folder: str) -> Any:
    import torch

    dtype = getattr(torch, model.dtype)
    with refuse_damage(model, folder), torch.device("meta"), quiet.without_warnings():  # of casts of no weights
        if is_text(folder):
            own = cls.config_class.from_pretrained(model.pretrained, subfolder=folder, local_files_only=True)
            module = cls._from_config(own, dtype=dtype)
        else:
            module = cls.from_config(config(model, folder)).to(dtype)
    return module.eval().requires_grad_(False)


def load_tokenizer(model: ModelParams, folder: str = "tokenizer") -> Any:
    with refuse_damage(model, folder):
        return component_class(model, folder).from_pretrained(model.pretrained, subfolder=folder, local_files_only=True)


def load_scheduler(model: ModelParams) -> Any:
    """Load the scheduler; for a family that accepts any scheduler, DDPM's, which reads the config of each."""
    cls = component_class(model, "scheduler", "DDPMScheduler")
    with refuse_damage(model, "scheduler"):
        return cls.from_pretrained(model.pretrained, subfolder="scheduler", local_files_only=True)


def load_pipeline(model: ModelParams, device: torch.device, **components: Any) -> Any:
    """Load the diffusers pipeline, without progress bars.

    Args:
        components: components to use instead of those in the folder; None leaves a component out.
    """
    family = load_family(model.family)
    quiet.disable_progress_bars()
    passed = dict.fromkeys(family.left_out(model)) | components
    if model.quantization and family.DENOISER not in passed:
        passed[family.DENOISER] = load_denoiser(model, device)
    with elapsed("load", "pipeline"):
        pipeline = pipeline_class(family).from_pretrained(
            model.pretrained, variant=model.variant, **_load_options(model), **passed
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)


def pipeline_class(family: Family) -> Any:
    """Return the pipeline's class in diffusers."""
    with quiet.without_warnings():  # on torchvision, which nothing here uses
        return getattr(importlib.import_module("diffusers"), family.PIPELINE)


def component_class(model: ModelParams, folder: str, default: str = "") -> Any:
    """Return the class in COMPONENTS: of transformers for text, of diffusers for other components."""
    library = "transformers" if is_text(folder) else "diffusers"
    return getattr(importlib.import_module(library), load_family(model.family).COMPONENTS[folder] or default)


def is_text(folder: str) -> bool:
    return folder.startswith(("tokenizer", "text_encoder"))


def _load_options(model: ModelParams) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` that all models share."""
    import torch

    return {"dtype": getattr(torch, model.dtype), "use_safetensors": True, "local_files_only": True}


def nothing_left_out(model: ModelParams) -> tuple[str, ...]:
    """Return no component, for a pipeline that needs all of them."""
    return ()


# Sizes


def vae_scale_factor(model: ModelParams) -> int:
    """Return the pixels per latent pixel, in each direction."""
    return 2 ** (len(config(model, "vae")["block_out_channels"]) - 1)


def pixels_of_2x2_latents(model: ModelParams) -> int:
    """Return the pixel multiple of a denoiser with latent patches of 2x2."""
    return 2 * vae_scale_factor(model)


def no_max_side(model: ModelParams) -> None:
    """Return None, for a denoiser that accepts every size."""


# The VAE


def upcast_vae_dtype(model: ModelParams) -> Dtype:
    """Return float32 for a VAE whose config has ``force_upcast`` true or missing, otherwise ``model.dtype``."""
    return "float32" if config(model, "vae").get("force_upcast", True) else model.dtype


def encode_images(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return posterior mean and std, shifted and scaled by the VAE's config."""
    import torch

    with torch.inference_mode():
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return pixel values, float32 [B, 3, H, W]; the inverse of ``encode_images``."""
    import torch

    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    with torch.inference_mode():
        return vae.decode((latents / scale + shift).to(vae.device, vae.dtype)).sample.float()


def decode_in_own_dtype(vae: AutoencoderKL) -> AutoencoderKL:
    """Keep a float32 VAE's decoder in float32 in a pipeline that runs in half precision with autocast."""
    import torch

    decode = vae.decode

    def outside_autocast(latents: torch.Tensor, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), **options)

    vae.decode = outside_autocast
    return vae


def no_view_conditioning(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return no tensors, for a denoiser without input for size and crop."""
    return {}


# Captions


def load_text(model: ModelParams, device: torch.device) -> Text:
    """Load all text encoders of the base model."""
    family = load_family(model.family)
    encoders = [name for name in family.COMPONENTS if name.startswith("text_encoder")]
    return load_encoders(
        model, [name for name in encoders if name not in declared_null(model, family.OPTIONAL)], device
    )


def load_trainable_text(model: ModelParams, device: torch.device) -> Text:
    """Load the text encoders that an adapter can be trained in."""
    return load_encoders(model, load_family(model.family).TEXT_ENCODERS, device)


def load_encoders(model: ModelParams, encoders: Iterable[str], device: torch.device) -> Text:
    """Load text encoders and their tokenizers."""
    family = load_family(model.family)
    return {
        name: (family.load_tokenizer(model, tokenizer_of(name)), load_frozen(model, name, device)) for name in encoders
    }


def tokenizer_of(encoder: str) -> str:
    """Return the tokenizer's folder: ``text_encoder_2`` -> ``tokenizer_2``."""
    return encoder.replace("text_encoder", "tokenizer")


def text_of(pipeline: Any) -> Text:
    """Return the text encoders of a loaded pipeline."""
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    pairs = {name: (getattr(pipeline, tokenizer_of(name)), getattr(pipeline, name)) for name in encoders}
    return {name: pair for name, pair in pairs.items() if pair[1] is not None}


def max_tokens(model: ModelParams) -> int:
    """Return the tokens of a caption that are used, special ones included."""
    return load_family(model.family).load_tokenizer(model).model_max_length


def count_tokens(model: ModelParams, captions: list[str], tokenizer: str = "tokenizer") -> list[int]:
    """Return the tokens per caption, special ones included, without truncation."""
    return num_tokens(load_tokenizer(model, tokenizer), captions)


def num_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Return the tokens per caption, special ones included, without truncation."""
    with quiet.without_warnings():  # on "indexing errors": encoded captions are truncated
        return [len(ids) for ids in tokenizer(captions, truncation=False).input_ids]


def drops_to_empty(model: ModelParams) -> bool:
    """Return False, for a pipeline that encodes the empty caption without a negative prompt."""
    return False


def input_ids(tokenizer: Any, captions: list[str], max_length: int, device: torch.device) -> torch.Tensor:
    """Return token ids, padded and truncated to ``max_length``, int64 [B, L]."""
    tokens = tokenizer(captions, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


def clip_states(tokenizer: Any, encoder: Any, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second-to-last layer's states [B, L, D] and the first output, pooled [B, P] if it projects."""
    ids = input_ids(tokenizer, captions, tokenizer.model_max_length, encoder.device)  # [B, L]
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def t5_states(tokenizer: Any, encoder: Any, captions: list[str], max_length: int) -> torch.Tensor:
    """Return the last layer's states [B, L, D]; attention includes padding, as in the model's own training."""
    return encoder(input_ids(tokenizer, captions, max_length, encoder.device))[0]
