"""The parity gate: what the denoiser answers with the trained adapter, and what it answers with a file loaded back.

Every comparison starts from the base's own files in float32, so that nothing of the adapter in memory helps the file.
Nothing of the base is loaded but what was adapted, once at a time, after one pass of the text encoders, which are
freed: the peak is 4 bytes per parameter of the denoiser (SD 1.5 3.4 GB, SDXL 10 GB, SD3 medium 8 GB, FLUX.1 48 GB), or
the text encoders in ``model.dtype`` where they are larger. The questions are small whatever the base's own size is.
Where text encoders were trained, answers start from the prompt, through CLIP's encoders in float32.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.warning import PeftWarning

from lora_dag.adapters import lora
from lora_dag.adapters.adapted import Adapted
from lora_dag.bases import layout
from lora_dag.core import quiet, seeding
from lora_dag.core.console import log
from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_tensors
from lora_dag.diffusion import objectives
from lora_dag.families import common
from stages.export import comfyui, header, trained, writers

if TYPE_CHECKING:
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.bases.resolve import Base
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family
    from stages.export.params import ExportParams, Format

TOLERANCE = 1e-5  # of the largest output, float32; a file loaded by diffusers or PEFT usually differs by nothing at all
LATENT_SIDE = 16  # at least; more latent pixels would ask the same weights again


@dataclass(frozen=True)
class Modules:
    """What the adapter stands on, in float32."""

    denoiser: Any
    text: Any
    """The family's object of tokenizers and CLIP encoders; None where no encoder was trained."""
    adapted: dict[str, Any]
    """Component -> module: the denoiser first, then each trained text encoder."""


Loaded = tuple[Modules, list[str]]
"""Modules with the file loaded, and the file's keys that they did not take."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Loading without the libraries' warnings: the comparison that follows says more."""
    with warnings.catch_warnings(), quiet.no_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for names that PEFT looks at
        yield


@dataclass(frozen=True)
class Questions:
    """What every denoiser is asked: the prompt at the start of a sampling and near its end."""

    noisy_latents: torch.Tensor  # [2, C, h, w] float32, of unit variance as latents are at every timestep
    timesteps: torch.Tensor  # [2], as the model counts them
    prompt: dict[str, torch.Tensor]  # name -> [2, ...]


def ask(model: ModelParams, family: Family, params: ExportParams, device: torch.device) -> Questions:
    """Encode the prompt in the frozen dtype, and draw the rest; nothing but tensors is kept."""
    with torch.no_grad():
        prompt = family.encode_prompts(family.load_text(model, device), [str(params.prompt)])
    factor = family.vae_scale_factor(model)
    multiple = family.pixel_multiple(model) // factor
    side = min(multiple * math.ceil(LATENT_SIDE / multiple), (family.max_side(model) or sys.maxsize) // factor)
    pixels = (side * factor, side * factor)
    views = family.view_conditioning(pixels, (0, 0), pixels)
    shape = (2, common.config(model, "vae")["latent_channels"], side, side)
    scheduler = family.load_scheduler(model)
    count = scheduler.config.num_train_timesteps
    return Questions(
        torch.randn(shape, generator=seeding.generator(params.seed, "export")).to(device),
        objectives.model_timesteps(scheduler, torch.tensor([count - 1, count // 10])).to(device),
        {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in prompt.items()}
        | {name: tensor.expand(2, *tensor.shape).to(device) for name, tensor in views.items()},
    )


class Proof:
    """The trained adapter's answers, its files, and what they answer when they are loaded back."""

    def __init__(
        self,
        base: Base,
        family: Family,
        params: ExportParams,
        where: torch.device,
        adapter: Adapter,
        weights: dict[str, torch.Tensor],
    ) -> None:
        self.questions = ask(base.model, family, params, where)
        self.model = base.model.model_copy(update={"dtype": "float32"})
        self.family, self.params, self.where = family, params, where
        self.text_lora = adapter.text_lora
        modules = self.fresh()
        self.plain = self.answer(modules)
        encoders = {name: module for name, module in modules.adapted.items() if name != family.DENOISER}
        Adapted(modules.denoiser, adapter.lora_config, adapter.text_lora, encoders).load(weights)
        self.expected = self.answer(modules)
        self.effect = float((self.expected - self.plain).abs().max())
        """Largest change that the adapter makes to the output: 0 would make every comparison meaningless."""
        if self.effect == 0:
            raise RuntimeError("the adapter changes nothing: its weights were not loaded")
        configs = {family.DENOISER: adapter.lora_config} | adapter.text_lora
        self.parts = {name: trained.read(config, modules.adapted[name]) for name, config in configs.items()}
        prediction_type = str(getattr(family.load_scheduler(self.model).config, "prediction_type", ""))
        self.fields = header.metadata(base, params, adapter, prediction_type)

    def fresh(self, pretrained: Path | None = None) -> Modules:
        """The base's, or another folder's, read from its files; what was loaded before is gone by then."""
        model = self.model.model_copy(update={"pretrained": str(pretrained)}) if pretrained else self.model
        denoiser = self.family.load_denoiser(model, self.where)
        text = self.family.load_trainable_text(model, self.where) if self.text_lora else None
        encoders = self.family.text_encoders(text) if self.text_lora else {}
        adapted = {self.family.DENOISER: denoiser} | {name: encoders[name] for name in self.text_lora}
        return Modules(denoiser, text, adapted)

    @torch.no_grad()
    def answer(self, modules: Modules) -> torch.Tensor:
        """float32 [2, C, h, w]."""
        asked = self.questions  # without TF32, convolutions on a GPU keep float32's bits too
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            prompt = asked.prompt
            if modules.text is not None:
                prompt = prompt | self.family.encode_prompts(modules.text, [str(self.params.prompt)] * 2, prompt)
            return self.family.predict(modules.denoiser, asked.noisy_latents, asked.timesteps, prompt)

    def write(self, name: Format, folder: Path) -> None:
        if name == "diffusers":
            writers.write_diffusers(self.family, self.parts, self.fields, folder)
        elif name == "peft":
            writers.write_peft(self.family, self.parts, self.fields, folder)
        elif name == "comfyui":
            writers.write_comfyui(self.family, self.parts, self.fields, self.comfyui_file(folder))
        else:
            writers.write_merged(self.model, self.family, self.parts, self.fresh().adapted, folder)

    def comfyui_file(self, folder: Path) -> Path:
        return folder / f"{self.params.name}.safetensors"

    # --- loading back ---------------------------------------------------------------------------------------------

    def check(self, name: Format, folder: Path) -> dict[str, float]:
        """Compare what was written.

        Raises:
            RuntimeError: another output than the adapter's, a key not taken, or a base that does not come back.
        """
        load = {"diffusers": self.diffusers, "peft": self.peft, "comfyui": self.comfyui, "merged": self.merged}[name]
        with load(folder) as (modules, unmapped):
            error = float((self.answer(modules) - self.expected).abs().max())
        log.info(
            "%-11s loaded back, largest difference of the output %.2g, unmapped keys %d", name, error, len(unmapped)
        )
        if unmapped:
            raise RuntimeError(f"the {name} export has keys that its reader does not take: {unmapped[:4]}")
        limit = TOLERANCE * max(1.0, float(self.expected.abs().max()))
        if not error <= limit:
            raise RuntimeError(f"the {name} export answers otherwise than the adapter: {error:.3g} > {limit:.3g}")
        return {f"export.{name}.max_abs_error": error, f"export.{name}.unmapped_keys": len(unmapped)}

    @contextlib.contextmanager
    def diffusers(self, folder: Path) -> Iterator[Loaded]:
        """Stock ``load_lora_weights`` and ``disable_lora``."""
        modules = self.fresh()
        with quietly():  # a text encoder that the file does not adapt; biases, which PEFT takes for broken shards
            pipeline = self.pipeline_around(modules)
            pipeline.load_lora_weights(folder, adapter_name=lora.NAME)
            taken = {
                f"{component}.{writers.file_name(component, name)}": tensor
                for component, module in modules.adapted.items()
                for name, tensor in lora.state_dict(module).items()
            }
        yield modules, untaken(load_tensors(folder / writers.DIFFUSERS_FILE), taken)
        pipeline.disable_lora()
        self.require_base(modules, "diffusers")

    @contextlib.contextmanager
    def peft(self, folder: Path) -> Iterator[Loaded]:
        """Stock ``PeftModel.from_pretrained`` and ``disable_adapter``."""
        from peft import PeftModel

        modules, models, unmapped = self.fresh(), [], []
        for component, module in modules.adapted.items():
            place = writers.peft_folder(self.family, folder, component)
            with quietly():
                model = PeftModel.from_pretrained(module, place, adapter_name=lora.NAME)  # puts its layers into module
                state = lora.state_dict(model.get_base_model())
            taken = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
            unmapped += untaken(load_tensors(place / "adapter_model.safetensors"), taken)
            models.append(model)
        yield modules, unmapped
        with contextlib.ExitStack() as disabled:
            for model in models:
                disabled.enter_context(model.disable_adapter())
            self.require_base(modules, "peft")

    @contextlib.contextmanager
    def comfyui(self, folder: Path) -> Iterator[Loaded]:
        """Our own reader of ComfyUI's keys, on the layers of the original checkpoint."""
        modules = self.fresh()
        denoiser, *encoders = modules.adapted.values()
        found = comfyui.read(denoiser, self.comfyui_file(folder), text_encoders=encoders)
        if not found.unread:
            self.require_weights(found.weights, modules)
        with comfyui.in_place(comfyui.parameters(denoiser, encoders), found.weights):
            yield modules, found.unread
        self.require_base(modules, "comfyui")

    @torch.no_grad()
    def require_weights(self, weights: dict[str, torch.Tensor], modules: Modules) -> None:
        """Raises RuntimeError for a layer that the file does not make what training made: outputs show few layers."""
        worst = 0.0
        for number, (component, trained_part) in enumerate(self.parts.items()):
            prefix = f"te{number}." if number else ""
            for name in trained_part.scalings:
                base = modules.adapted[component].get_submodule(name).weight
                expected = trained.merged(trained_part, name, base)
                own = weights.get(f"{prefix}{name}.weight", base)
                error = float((own - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
                worst = max(worst, error)
                if not error <= TOLERANCE:
                    raise RuntimeError(f"the comfyui export makes {prefix}{name} other than training did: {error:.3g}")
        log.info("comfyui     in the original checkpoint's layers, largest relative difference of a weight %.2g", worst)

    @contextlib.contextmanager
    def merged(self, folder: Path) -> Iterator[Loaded]:
        """The family's own loader; no adapter to take off. What was not adapted is the base's, to the byte."""
        model = self.model.model_copy(update={"pretrained": str(folder)})
        others = set(self.family.COMPONENTS) - set(self.parts)
        if layout.digests(model, others) != layout.digests(self.model, others):
            raise RuntimeError("the merged export holds another component than the base")
        yield self.fresh(folder), []

    def pipeline_around(self, modules: Modules) -> Any:
        """The stock pipeline with what was adapted and a scheduler in it, and nothing else."""
        listed = read_json(Path(self.model.pretrained) / "model_index.json")
        parts = {name: None for name, entry in listed.items() if isinstance(entry, list) and name != "scheduler"}
        return common.load_pipeline(self.model, self.where, **parts | modules.adapted)

    def require_base(self, modules: Modules, name: str) -> None:
        if not torch.equal(self.answer(modules), self.plain):
            raise RuntimeError(f"the {name} export, disabled, does not give the base back")


def untaken(tensors: dict[str, torch.Tensor], taken: dict[str, torch.Tensor]) -> list[str]:
    """Keys of a file whose tensors are not in the models that loaded it."""
    return sorted(n for n, t in tensors.items() if n not in taken or not torch.equal(taken[n].cpu(), t))
