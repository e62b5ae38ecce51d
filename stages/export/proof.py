"""The parity gate: what the denoiser answers with the trained adapter, and what it answers with a file loaded back.

Every comparison starts from the base's own files in float32, so that nothing of the adapter in memory helps the file.
Nothing of the base is loaded but the denoiser, one at a time, after one pass of the text encoders, which are freed: the
peak is 4 bytes per parameter of the denoiser (SD 1.5 3.4 GB, SDXL 10 GB, SD3 medium 8 GB, FLUX.1 48 GB), or the text
encoders in ``model.dtype`` where they are larger. The questions are small whatever the base's own size is.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.warning import PeftWarning

from stages.core import base_files, components, lora, objectives, quiet, seeding
from stages.core.console import log
from stages.core.files import load_tensors, read_json
from stages.export import comfyui, header, trained, writers

if TYPE_CHECKING:
    from stages.artifacts.adapter import Adapter
    from stages.core.bases import Base
    from stages.core.params import ModelParams
    from stages.export.params import ExportParams, Format
    from stages.families.base import Family

TOLERANCE = 1e-5  # of the largest output, float32; a file loaded by diffusers or PEFT usually differs by nothing at all
LATENT_SIDE = 16  # at least; more latent pixels would ask the same weights again

LATENT_SIDE = 32  # of the recorded picture where no config names a size: FLUX.1 and Z-Image would draw 1024 x 1024

Loaded = tuple[Any, list[str]]
"""A denoiser with the file loaded, and the file's keys that it did not take."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Loading without the libraries' warnings: the comparison that follows says more."""
    with warnings.catch_warnings(), quiet.no_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        yield


@dataclass(frozen=True)
class Questions:
    """What every denoiser is asked: the prompt at the start of a sampling and near its end."""

    noisy_latents: torch.Tensor  # [2, C, h, w] float32, of unit variance as latents are at every timestep
    timesteps: torch.Tensor  # [2], as the model counts them
    prompt: dict[str, torch.Tensor]  # name -> [2, ...]


def ask(model: ModelParams, family: Family, params: ExportParams, device: torch.device) -> Questions:
    """Encode the prompt in the frozen dtype, and draw the rest; nothing but tensors is kept."""
    prompt = family.encode_prompts(family.load_text(model, device), [params.prompt])
    factor = family.vae_scale_factor(model)
    multiple = family.pixel_multiple(model) // factor
    side = multiple * math.ceil(LATENT_SIDE / multiple)
    pixels = (side * factor, side * factor)
    views = family.view_conditioning(pixels, (0, 0), pixels)
    shape = (2, components.config(model, "vae")["latent_channels"], side, side)
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
        denoiser = self.fresh()
        self.plain = self.answer(denoiser)
        lora.inject(denoiser, adapter.lora_config)
        lora.load(denoiser, weights)
        self.expected = self.answer(denoiser)
        self.effect = float((self.expected - self.plain).abs().max())
        """Largest change that the adapter makes to the output: 0 would make every comparison meaningless."""
        if self.effect == 0:
            raise RuntimeError("the adapter changes nothing: its weights were not loaded")
        self.trained = trained.read(adapter, denoiser)
        prediction_type = str(getattr(family.load_scheduler(self.model).config, "prediction_type", ""))
        self.fields = header.metadata(base, params, adapter, prediction_type)

    def fresh(self) -> Any:
        """The base's denoiser, read from its files; the one before it is gone by then."""
        return self.family.load_denoiser(self.model, self.where)

    @torch.no_grad()
    def answer(self, denoiser: Any) -> torch.Tensor:
        """float32 [2, C, h, w]."""
        asked = self.questions  # without TF32, convolutions on a GPU keep float32's bits too
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.family.predict(denoiser, asked.noisy_latents, asked.timesteps, asked.prompt)

    def write(self, name: Format, folder: Path) -> None:
        if name == "diffusers":
            writers.write_diffusers(self.family, self.trained, self.fields, folder)
        elif name == "peft":
            writers.write_peft(self.trained, self.fields, folder)
        elif name == "comfyui":
            writers.write_comfyui(self.family, self.trained, self.fields, self.comfyui_file(folder))
        else:
            writers.write_merged(self.model, self.family, self.trained, self.fresh(), folder)

    def comfyui_file(self, folder: Path) -> Path:
        return folder / f"{self.params.name}.safetensors"

    # --- loading back ---------------------------------------------------------------------------------------------

    def check(self, name: Format, folder: Path) -> dict[str, float]:
        """Compare what was written.

        Raises:
            RuntimeError: another output than the adapter's, a key not taken, or a base that does not come back.
        """
        load = {"diffusers": self.diffusers, "peft": self.peft, "comfyui": self.comfyui, "merged": self.merged}[name]
        with load(folder) as (denoiser, unmapped):
            error = float((self.answer(denoiser) - self.expected).abs().max())
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
        denoiser = self.fresh()
        with quietly():  # a text encoder that the file does not adapt; biases, which PEFT takes for broken shards
            pipeline = self.pipeline_around(denoiser)
            pipeline.load_lora_weights(folder, adapter_name=lora.NAME)
            tensors = load_tensors(folder / writers.DIFFUSERS_FILE)
            unmapped = self.untaken(denoiser, tensors, f"{self.family.DENOISER}.")
        yield denoiser, unmapped
        pipeline.disable_lora()
        self.require_base(denoiser, "diffusers")

    @contextlib.contextmanager
    def peft(self, folder: Path) -> Iterator[Loaded]:
        """Stock ``PeftModel.from_pretrained`` and ``disable_adapter``."""
        from peft import PeftModel

        with quietly():
            model = PeftModel.from_pretrained(self.fresh(), folder, adapter_name=lora.NAME)
            denoiser = model.get_base_model()
            unmapped = self.untaken(denoiser, load_tensors(folder / "adapter_model.safetensors"), "base_model.model.")
        yield denoiser, unmapped
        with model.disable_adapter():
            self.require_base(denoiser, "peft")

    @contextlib.contextmanager
    def comfyui(self, folder: Path) -> Iterator[Loaded]:
        """Our own reader of ComfyUI's keys."""
        denoiser = self.fresh()
        with comfyui.patched(denoiser, self.comfyui_file(folder)) as unread:
            yield denoiser, unread
        self.require_base(denoiser, "comfyui")

    @contextlib.contextmanager
    def merged(self, folder: Path) -> Iterator[Loaded]:
        """The family's own loader; there is no adapter to take off. All but the denoiser is the base's, to the byte."""
        model = self.model.model_copy(update={"pretrained": str(folder)})
        others = set(self.family.COMPONENTS) - {self.family.DENOISER}
        if base_files.digests(model, others) != base_files.digests(self.model, others):
            raise RuntimeError("the merged export holds another component than the base")
        yield self.family.load_denoiser(model, self.where), []

    def pipeline_around(self, denoiser: Any) -> Any:
        """The stock pipeline with a denoiser and a scheduler in it, and nothing else."""
        listed = read_json(Path(self.model.pretrained) / "model_index.json")
        parts = {name: None for name, entry in listed.items() if isinstance(entry, list) and name != "scheduler"}
        cls = writers.pipeline_class(self.family)
        return components.load_pipeline(cls, self.model, self.where, **parts | {self.family.DENOISER: denoiser})

    def untaken(self, denoiser: Any, tensors: dict[str, torch.Tensor], prefix: str) -> list[str]:
        """Keys of a file whose tensors are not in the model that loaded it."""
        taken = {f"{prefix}{name}": tensor for name, tensor in lora.state_dict(denoiser).items()}
        return sorted(n for n, t in tensors.items() if n not in taken or not torch.equal(taken[n].cpu(), t))

    def require_base(self, denoiser: Any, name: str) -> None:
        if not torch.equal(self.answer(denoiser), self.plain):
            raise RuntimeError(f"the {name} export, disabled, does not give the base back")
