"""The parity gate: what the denoiser answers with the trained adapter, and what it answers with a file loaded back.

Every comparison starts from a fresh pipeline in float32, so that nothing of the adapter in memory helps the file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.warning import PeftWarning

from stages.core import lora, quiet, seeding
from stages.core.console import log
from stages.core.files import load_tensors
from stages.export import comfyui, header, trained, writers

if TYPE_CHECKING:
    from pathlib import Path

    from stages.artifacts.adapter import Adapter
    from stages.core.bases import Base
    from stages.export.params import ExportParams, Format
    from stages.families.base import Family

TOLERANCE = 1e-5  # of the largest output, float32; a file loaded by diffusers or PEFT usually differs by nothing at all

LATENT_SIDE = 32  # of the recorded picture where no config names a size: FLUX.1 and Z-Image would draw 1024 x 1024

Loaded = tuple[Any, list[str]]
"""A denoiser with the file loaded, and the file's keys that it did not take."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Loading without the libraries' warnings: the comparison that follows says more."""
    with warnings.catch_warnings(), quiet.no_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        yield


class Proof:
    """Two calls of the denoiser in a sampling, the first and the last, as the trained adapter answers them."""

    def __init__(
        self,
        base: Base,
        family: Family,
        params: ExportParams,
        where: torch.device,
        adapter: Adapter,
        weights: dict[str, torch.Tensor],
    ) -> None:
        self.model = base.model.model_copy(update={"dtype": "float32"})
        self.family, self.params, self.where = family, params, where
        pipeline = self.fresh()
        self.pipeline_class = type(pipeline)
        denoiser = getattr(pipeline, family.DENOISER)
        self.calls = self.record(pipeline, denoiser)
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
        return self.family.load_pipeline(self.model, self.where)

    def record(self, pipeline: Any, denoiser: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of the denoiser's first and last call while the prompt is drawn."""
        side = None if "sample_size" in denoiser.config else LATENT_SIDE * pipeline.vae_scale_factor
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad(), hook:
            pipeline(
                self.params.prompt,
                num_inference_steps=self.params.num_inference_steps,
                guidance_scale=self.params.guidance_scale,
                height=side,
                width=side,
                generator=seeding.generator(self.params.seed, "export"),
                output_type="latent",
            )
        return [calls[0], calls[-1]]

    @torch.no_grad()
    def answer(self, denoiser: Any) -> torch.Tensor:
        """The outputs of the recorded calls, flat."""
        outputs = [denoiser(*args, **kwargs)[0] for args, kwargs in self.calls]  # tensors, or lists of them
        return torch.cat([part.flatten() for output in outputs for part in output])

    def write(self, name: Format, folder: Path) -> None:
        if name == "diffusers":
            writers.write_diffusers(self.pipeline_class, self.family, self.trained, self.fields, folder)
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
        pipeline = self.fresh()
        denoiser = getattr(pipeline, self.family.DENOISER)
        with quietly():  # a text encoder that the file does not adapt; biases, which PEFT takes for broken shards
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

        base = getattr(self.fresh(), self.family.DENOISER)
        with quietly():
            model = PeftModel.from_pretrained(base, folder, adapter_name=lora.NAME)
            denoiser = model.get_base_model()
            unmapped = self.untaken(denoiser, load_tensors(folder / "adapter_model.safetensors"), "base_model.model.")
        yield denoiser, unmapped
        with model.disable_adapter():
            self.require_base(denoiser, "peft")

    @contextlib.contextmanager
    def comfyui(self, folder: Path) -> Iterator[Loaded]:
        """Our own reader of ComfyUI's keys."""
        denoiser = getattr(self.fresh(), self.family.DENOISER)
        with comfyui.patched(denoiser, self.comfyui_file(folder)) as unread:
            yield denoiser, unread
        self.require_base(denoiser, "comfyui")

    @contextlib.contextmanager
    def merged(self, folder: Path) -> Iterator[Loaded]:
        """The family's own loader; there is no adapter to take off."""
        model = self.model.model_copy(update={"pretrained": str(folder)})
        yield getattr(self.family.load_pipeline(model, self.where), self.family.DENOISER), []

    def untaken(self, denoiser: Any, tensors: dict[str, torch.Tensor], prefix: str) -> list[str]:
        """Keys of a file whose tensors are not in the model that loaded it."""
        taken = {f"{prefix}{name}": tensor for name, tensor in lora.state_dict(denoiser).items()}
        return sorted(n for n, t in tensors.items() if n not in taken or not torch.equal(taken[n].cpu(), t))

    def require_base(self, denoiser: Any, name: str) -> None:
        if not torch.equal(self.answer(denoiser), self.plain):
            raise RuntimeError(f"the {name} export, disabled, does not give the base back")
