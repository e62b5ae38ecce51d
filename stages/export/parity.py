"""The parity check: compares the denoiser's output with the trained adapter and with an exported file loaded back.

Every comparison loads the base's own files in float32, so that the adapter in memory cannot hide a fault of the file.
Only the adapted components are loaded, one at a time, after the text encoders ran once and were freed. The memory peak
is 4 bytes per parameter of the denoiser (SD 1.5 3.4 GB, SDXL 10 GB, SD3 medium 8 GB, FLUX.1 48 GB), or the text
encoders in ``model.dtype`` if they are larger. The inputs are small for every base.
If text encoders were trained, outputs are computed from the prompt, through CLIP's encoders in float32.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_dag.adapters import adapter_tensors, base_modules
from lora_dag.core import seeding
from lora_dag.core.console import log
from lora_dag.diffusion.objectives import make_objective
from lora_dag.families import common
from lora_dag.formats import Export, load_format
from stages.export import header

if TYPE_CHECKING:
    from pathlib import Path

    from lora_dag.adapters.base_modules import BaseModules
    from stages.export.params import Format
    from stages.export.source import Source

TOLERANCE = 1e-5  # of the largest output, float32; files loaded by diffusers or PEFT are usually bit-identical
LATENT_SIDE = 16  # minimum; more latent pixels would only use the same weights again


class ParityCheck:
    """Outputs of the base and of the trained adapter, to compare with every exported file."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self.inputs = make_inputs(source, device)
        adapter, family = source.adapter, source.family
        model = source.base.model.model_copy(update={"dtype": "float32"})
        modules = base_modules.load(model, family, adapter.text_lora, device)
        self.base_output = self.output(modules)
        modules.inject(adapter, source.weights)
        self.adapter_output = self.output(modules)
        self.effect = float((self.adapter_output - self.base_output).abs().max())
        """Largest change of the output by the adapter. With 0 every comparison would be meaningless."""
        if self.effect == 0:
            raise RuntimeError("the adapter changes nothing: its weights were not loaded")
        configs = {family.DENOISER: adapter.lora_config} | adapter.text_lora
        self.export = Export(
            name=str(source.params.name),
            model=model,
            family=family,
            device=device,
            adapter=adapter,
            weights=source.weights,
            tensors={name: adapter_tensors.read(config, modules.adapted[name]) for name, config in configs.items()},
            header=header.header_fields(source),
        )

    @torch.no_grad()
    def output(self, modules: BaseModules) -> torch.Tensor:
        """Return the denoiser's output, float32 [2, C, h, w]."""
        inputs, family, params = self.inputs, self.source.family, self.source.params
        # TF32 convolutions on a GPU would lose bits of float32.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            prompt = inputs.prompt
            if modules.text is not None:
                prompt = prompt | family.encode_prompts(modules.text, [str(params.prompt)] * 2, prompt)
            return family.predict(modules.denoiser, inputs.noisy_latents, inputs.timesteps, prompt)

    def write(self, name: Format, folder: Path) -> None:
        """Write the adapter in a format."""
        load_format(name).write(self.export, folder)

    def check(self, name: Format, folder: Path) -> dict[str, float]:
        """Load the written files into a fresh base and compare the output; return the metrics of the format.

        Raises:
            RuntimeError: the output differs, a key is not read, or disabling the adapter does not restore the base.
        """
        loaded = load_format(name).load_back(self.export, folder)
        error = float((self.output(loaded.modules) - self.adapter_output).abs().max())
        count = len(loaded.unread)
        log.info("%-11s loaded back, largest difference of the output %.2g, unmapped keys %d", name, error, count)
        if loaded.unread:
            raise RuntimeError(f"the {name} export has keys that its reader ignores: {loaded.unread[:4]}")
        limit = TOLERANCE * max(1.0, float(self.adapter_output.abs().max()))
        if not error <= limit:
            raise RuntimeError(f"output of the {name} export differs from the adapter's: {error:.3g} > {limit:.3g}")
        if loaded.disable:
            loaded.disable()
            if not torch.equal(self.output(loaded.modules), self.base_output):
                raise RuntimeError(f"the {name} export does not restore the base when it is disabled")
        return {f"export.{name}.max_abs_error": error, f"export.{name}.unmapped_keys": count}

    def num_unfusable(self, formats: list[Format]) -> int:
        """Return the number of layers that diffusers and PEFT cannot fuse after loading one of the formats."""
        is_loaded = any(load_format(name).LOADED_BY_PEFT for name in formats)
        return len(self.export.tensors[self.source.family.DENOISER].unfusable) if is_loaded else 0


@dataclass(frozen=True)
class Inputs:
    """Inputs of the denoiser: the prompt at the first and at a late sampling step."""

    noisy_latents: torch.Tensor  # [2, C, h, w] float32, of unit variance as latents are at every timestep
    timesteps: torch.Tensor  # [2], as the model counts them
    prompt: dict[str, torch.Tensor]  # name -> [2, ...]


def make_inputs(source: Source, device: torch.device) -> Inputs:
    """Encode the prompt in the frozen dtype and draw the noise; return only tensors."""
    model, family, params = source.base.model, source.family, source.params
    with torch.no_grad():
        prompt = family.encode_prompts(family.load_text(model, device), [str(params.prompt)])
    factor = family.vae_scale_factor(model)
    multiple = family.pixel_multiple(model) // factor
    side = min(multiple * math.ceil(LATENT_SIDE / multiple), (family.max_side(model) or sys.maxsize) // factor)
    pixels = (side * factor, side * factor)
    views = family.view_conditioning(pixels, (0, 0), pixels)
    shape = (2, common.config(model, "vae")["latent_channels"], side, side)
    objective = make_objective(family.load_scheduler(model))
    count = objective.noise_scheduler.config.num_train_timesteps
    return Inputs(
        torch.randn(shape, generator=seeding.generator(params.seed, "export")).to(device),
        objective.model_timesteps(torch.tensor([count - 1, count // 10])).to(device),
        {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in prompt.items()}
        | {name: tensor.expand(2, *tensor.shape).to(device) for name, tensor in views.items()},
    )
