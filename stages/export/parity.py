"""The parity check: compares the denoiser's output with the trained adapter and with an exported file loaded back.

The base's modules are loaded once, in float32, after the text encoders ran once and were freed. Every adapter file is
loaded into them and removed again. The base's parameters stay where they are and their checksums must not change, so
neither the adapter in memory nor another file can hide a fault of a file. A whole pipeline is loaded from its own
files, after the base was freed.
The memory peak is the denoiser in the dtype of its files (float16: SD 1.5 1.7 GB, SDXL 5.1 GB, SD3 medium 4 GB,
FLUX.1 24 GB), or the text encoders in ``model.dtype`` if they are larger; for a whole pipeline, 4 bytes per parameter.
All is computed in float32. The inputs are small for every base.
If text encoders were trained, outputs are computed from the prompt, through CLIP's encoders in float32.
With ``model.quantization``, files that PEFT loads are also compared on the quantized base.
"""

from __future__ import annotations

import math
import sys
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_dag.adapters import adapter_tensors, base_modules, lora
from lora_dag.core import device as devices
from lora_dag.core import seeding
from lora_dag.core.console import log
from lora_dag.core.progress import elapsed
from lora_dag.diffusion.objectives import make_objective
from lora_dag.families import common
from lora_dag.formats import Export, load_format
from stages.export import header

if TYPE_CHECKING:
    from pathlib import Path

    from lora_dag.adapters.base_modules import BaseModules
    from lora_dag.core.params import Quantization
    from stages.export.params import Format
    from stages.export.source import Source

TOLERANCE = 1e-5  # of the largest output, float32; files loaded by diffusers or PEFT are usually bit-identical
LATENT_SIDE = 16  # minimum; more latent pixels would only use the same weights again


class ProofBase:
    """The base's modules in float32, loaded once for the checks of all formats, with their inputs and output."""

    def __init__(
        self,
        source: Source,
        device: torch.device,
        quantization: Quantization | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.source, self.device = source, device
        self.model = source.base.model.model_copy(update={"dtype": "float32", "quantization": quantization})
        self.inputs = inputs or make_inputs(source, device)
        devices.return_freed_memory()  # of the text encoders
        self.loaded: BaseModules | None = None
        self.parameters, self.checksums = self.list_parameters(), self.weight_checksums()
        self.base_output = self.output(self.modules)

    @property
    def modules(self) -> BaseModules:
        """The base's modules; loaded if they are not in memory."""
        return self.loaded or self.load()

    def load(self, is_compact: bool = True) -> BaseModules:
        """Load the base's modules from its files. Merged weights need modules that are not compact."""
        source = self.source
        dtype = source.half_precision if is_compact and not self.model.quantization else None
        self.loaded = base_modules.load(self.model, source.family, source.adapter.text_lora, self.device, dtype)
        return self.loaded

    @torch.no_grad()
    def output(self, modules: BaseModules) -> torch.Tensor:
        """Return the denoiser's output, float32 [2, C, h, w]."""
        inputs, family, params = self.inputs, self.source.family, self.source.params
        denoiser = f"two passes of the {family.DENOISER}"
        # TF32 convolutions on a GPU would lose bits of float32.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False), elapsed("check", denoiser):
            prompt = inputs.prompt
            if modules.text is not None:
                prompt = prompt | family.encode_prompts(modules.text, [str(params.prompt)] * 2, prompt)
            return family.predict(modules.denoiser, inputs.noisy_latents, inputs.timesteps, prompt)

    def list_parameters(self) -> list[tuple[str, str, int]]:
        """Return component, name and address of every parameter, sorted."""
        modules = self.modules.adapted.items()
        return sorted((name, path, p.data_ptr()) for name, module in modules for path, p in module.named_parameters())

    def weight_checksums(self) -> dict[tuple[str, str], int]:
        """Return component and name -> CRC-32 of every parameter, which takes a quarter of the time of a SHA-256."""
        modules = self.modules.adapted.items()
        with elapsed("check", "checksums of the base's weights"):
            return {
                (name, path): zlib.crc32(parameter.cpu().contiguous().view(-1).view(torch.uint8).numpy())
                for name, module in modules
                for path, parameter in module.named_parameters()
            }

    def remove_adapter(self) -> None:
        """Remove the layers of an adapter, so that the next file is loaded into the base alone.

        Raises:
            RuntimeError: other parameters than the base's are left.
        """
        for module in self.modules.adapted.values():
            if hasattr(module, "peft_config"):
                lora.delete(module)
            module.eval()
        if self.list_parameters() != self.parameters:
            raise RuntimeError("a part of an export was left in the base after its check")

    def require_unchanged(self) -> None:
        """Raise RuntimeError if a check has changed the base's weights, so that later checks would prove nothing."""
        if self.weight_checksums() != self.checksums:
            raise RuntimeError("the weights of the base changed while exports were checked")

    def release(self) -> None:
        """Free the modules."""
        self.loaded = None
        devices.return_freed_memory()


class ParityCheck:
    """Output of the trained adapter, to compare with every exported file."""

    def __init__(self, source: Source, base: ProofBase) -> None:
        self.source, self.base = source, base
        adapter, modules = source.adapter, base.modules
        modules.inject(adapter, source.weights)
        self.adapter_output = base.output(modules)
        self.effect = float((self.adapter_output - base.base_output).abs().max())
        """Largest change of the output by the adapter. With 0 every comparison would be meaningless."""
        if self.effect == 0:
            raise RuntimeError("the adapter changes nothing: its weights were not loaded")
        configs = {source.family.DENOISER: adapter.lora_config} | adapter.text_lora
        self.tensors = {name: adapter_tensors.read(config, modules.adapted[name]) for name, config in configs.items()}
        self.header = header.header_fields(source)
        base.remove_adapter()

    def on_quantized_base(self) -> ParityCheck:
        """Free the base's modules, and return the same check on the base as ``model.quantization`` has it."""
        self.base.release()
        quantization = self.source.base.model.quantization
        return ParityCheck(self.source, ProofBase(self.source, self.base.device, quantization, self.base.inputs))

    @property
    def export(self) -> Export:
        """The adapter to write."""
        return Export(
            name=str(self.source.params.name),
            model=self.base.model,
            family=self.source.family,
            device=self.base.device,
            adapter=self.source.adapter,
            weights=self.source.weights,
            tensors=self.tensors,
            header=self.header,
            load_modules=lambda: self.base.modules,
        )

    def write(self, name: Format, folder: Path) -> None:
        """Write the adapter in a format. A whole pipeline is merged into float32 modules, which are freed then."""
        adapter_format = load_format(name)
        if not adapter_format.IS_ADAPTER and self.source.half_precision:  # nothing can be merged into compact weights
            self.base.release()
            self.base.load(is_compact=False)
        with elapsed("write", name):
            adapter_format.write(self.export, folder)
        if not adapter_format.IS_ADAPTER:
            self.base.release()

    def check(self, name: Format, folder: Path) -> dict[str, float]:
        """Load the written files and compare the output; return the metrics of the format.

        Raises:
            RuntimeError: the output differs, a key is not read, or disabling the adapter does not restore the base.
        """
        base, adapter_format = self.base, load_format(name)
        with elapsed("check", f"{name} is loaded back"):
            loaded = adapter_format.load_back(self.export, folder)
        error = float((base.output(loaded.modules) - self.adapter_output).abs().max())
        count = len(loaded.unread)
        log.info("%-11s loaded back, largest difference of the output %.2g, unmapped keys %d", name, error, count)
        if loaded.unread:
            raise RuntimeError(f"the {name} export has keys that its reader ignores: {loaded.unread[:4]}")
        limit = TOLERANCE * max(1.0, float(self.adapter_output.abs().max()))
        if not error <= limit:
            raise RuntimeError(f"output of the {name} export differs from the adapter's: {error:.3g} > {limit:.3g}")
        if loaded.disable:
            loaded.disable()
            if not torch.equal(base.output(loaded.modules), base.base_output):
                raise RuntimeError(f"the {name} export does not restore the base when it is disabled")
            base.remove_adapter()
        return {f"export.{name}.max_abs_error": error, f"export.{name}.unmapped_keys": count}

    def num_unfusable(self, formats: list[Format]) -> int:
        """Return the number of layers that diffusers and PEFT cannot fuse after loading one of the formats."""
        is_loaded = any(load_format(name).LOADED_BY_PEFT for name in formats)
        return len(self.tensors[self.source.family.DENOISER].unfusable) if is_loaded else 0


@dataclass(frozen=True)
class Inputs:
    """Inputs of the denoiser: the prompt at the first and at a late sampling step."""

    noisy_latents: torch.Tensor  # [2, C, h, w] float32, of unit variance as latents are at every timestep
    timesteps: torch.Tensor  # [2], as the model counts them
    prompt: dict[str, torch.Tensor]  # name -> [2, ...]


def make_inputs(source: Source, device: torch.device) -> Inputs:
    """Encode the prompt in the frozen dtype and draw the noise; return only tensors."""
    model, family, params = source.base.model, source.family, source.params
    with torch.no_grad(), elapsed("encode", "the prompt"):
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
