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

from stages.core import adapted, lora, quiet, seeding
from stages.core.console import log
from stages.core.files import load_tensors
from stages.export import comfyui, header, trained, writers

if TYPE_CHECKING:
    from pathlib import Path

    from stages.artifacts.adapter import Adapter
    from stages.core.params import ModelParams
    from stages.export.params import ExportParams, Format
    from stages.families.base import Family

TOLERANCE = 1e-5  # of the largest output, float32; a file loaded by diffusers or PEFT usually differs by nothing at all

OF_THE_STEP = ("hidden_states", "timestep")
"""Arguments by name of a transformer's call that are not the prompt's; a UNet's stand by place."""

Loaded = tuple[Any, list[str]]
"""A pipeline with the file loaded, and the file's keys that it did not take."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Enough(Exception):
    """Ends a drawing after the denoiser's first call."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Loading without the libraries' warnings: the comparison that follows says more."""
    with warnings.catch_warnings(), quiet.no_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for names that PEFT looks at
        yield


class Proof:
    """Two calls of the denoiser in a sampling, the first and the last, as the trained adapter answers them."""

    def __init__(
        self,
        model: ModelParams,
        family: Family,
        params: ExportParams,
        where: torch.device,
        adapter: Adapter,
        weights: dict[str, torch.Tensor],
    ) -> None:
        self.model = model.model_copy(update={"dtype": "float32"})
        self.family, self.params, self.where = family, params, where
        self.components = (family.DENOISER, *adapter.text_lora)
        pipeline = self.fresh()
        self.pipeline_class = type(pipeline)
        self.calls = self.record(pipeline)
        self.plain = self.answer(pipeline)
        adapted.in_pipeline(pipeline, family.DENOISER, adapter).load(weights)
        self.expected = self.answer(pipeline)
        self.effect = float((self.expected - self.plain).abs().max())
        """Largest change that the adapter makes to the output: 0 would make every comparison meaningless."""
        if self.effect == 0:
            raise RuntimeError("the adapter changes nothing: its weights were not loaded")
        configs = {family.DENOISER: adapter.lora_config} | adapter.text_lora
        self.parts = {name: trained.read(config, getattr(pipeline, name)) for name, config in configs.items()}
        prediction_type = str(getattr(family.load_scheduler(self.model).config, "prediction_type", ""))
        self.fields = header.metadata(model, params, adapter, prediction_type)

    def fresh(self) -> Any:
        return self.family.load_pipeline(self.model, self.where)

    def record(self, pipeline: Any, first_alone: bool = False) -> list[Call]:
        """Arguments of the denoiser's first and last call while the prompt is drawn."""
        calls: list[Call] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            if first_alone:
                raise Enough

        hook = getattr(pipeline, self.family.DENOISER).register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad(), hook, contextlib.suppress(Enough):
            pipeline(
                self.params.prompt,
                num_inference_steps=self.params.num_inference_steps,
                guidance_scale=self.params.guidance_scale,
                generator=seeding.generator(self.params.seed, "export"),
                output_type="latent",
            )
        return [calls[0], calls[-1]]

    @torch.no_grad()
    def answer(self, pipeline: Any) -> torch.Tensor:
        """The outputs of the recorded calls, flat; where text encoders were trained, from the prompt through them."""
        denoiser = getattr(pipeline, self.family.DENOISER)
        prompted: dict[str, Any] = {}
        if len(self.components) > 1:
            (_, prompted), *_ = self.record(pipeline, first_alone=True)
        prompted = {name: value for name, value in prompted.items() if name not in OF_THE_STEP}
        return torch.cat([denoiser(*args, **kwargs | prompted)[0].flatten() for args, kwargs in self.calls])

    def write(self, name: Format, folder: Path) -> None:
        if name == "diffusers":
            writers.write_diffusers(self.pipeline_class, self.parts, self.fields, folder)
        elif name == "peft":
            writers.write_peft(self.family, self.parts, self.fields, folder)
        elif name == "comfyui":
            writers.write_comfyui(self.family, self.parts, self.fields, self.comfyui_file(folder))
        else:
            writers.write_merged(self.model, self.family, self.parts, self.fresh(), folder)

    def comfyui_file(self, folder: Path) -> Path:
        return folder / f"{self.params.name}.safetensors"

    # --- loading back ---------------------------------------------------------------------------------------------

    def check(self, name: Format, folder: Path) -> dict[str, float]:
        """Compare what was written.

        Raises:
            RuntimeError: another output than the adapter's, a key not taken, or a base that does not come back.
        """
        load = {"diffusers": self.diffusers, "peft": self.peft, "comfyui": self.comfyui, "merged": self.merged}[name]
        with load(folder) as (pipeline, unmapped):
            error = float((self.answer(pipeline) - self.expected).abs().max())
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
        with quietly():  # a text encoder that the file does not adapt; biases, which PEFT takes for broken shards
            pipeline.load_lora_weights(folder, adapter_name=lora.NAME)
            taken = {
                f"{component}.{writers.file_name(component, name)}": tensor
                for component in self.components
                for name, tensor in lora.state_dict(getattr(pipeline, component)).items()
            }
        yield pipeline, untaken(load_tensors(folder / writers.DIFFUSERS_FILE), taken)
        pipeline.disable_lora()
        self.require_base(pipeline, "diffusers")

    @contextlib.contextmanager
    def peft(self, folder: Path) -> Iterator[Loaded]:
        """Stock ``PeftModel.from_pretrained`` and ``disable_adapter``."""
        from peft import PeftModel

        pipeline, models, unmapped = self.fresh(), [], []
        with contextlib.ExitStack() as disabled:
            for component in self.components:
                place = writers.peft_folder(self.family, folder, component)
                with quietly():
                    model = PeftModel.from_pretrained(getattr(pipeline, component), place, adapter_name=lora.NAME)
                    state = lora.state_dict(model.get_base_model())
                taken = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
                unmapped += untaken(load_tensors(place / "adapter_model.safetensors"), taken)
                models.append(model)
            yield pipeline, unmapped
            for model in models:
                disabled.enter_context(model.disable_adapter())
            self.require_base(pipeline, "peft")

    @contextlib.contextmanager
    def comfyui(self, folder: Path) -> Iterator[Loaded]:
        """Our own reader of ComfyUI's keys."""
        pipeline = self.fresh()
        denoiser, *encoders = (getattr(pipeline, component) for component in self.components)
        with comfyui.patched(denoiser, self.comfyui_file(folder), text_encoders=encoders) as unread:
            yield pipeline, unread
        self.require_base(pipeline, "comfyui")

    @contextlib.contextmanager
    def merged(self, folder: Path) -> Iterator[Loaded]:
        """The family's own loader; there is no adapter to take off."""
        model = self.model.model_copy(update={"pretrained": str(folder)})
        yield self.family.load_pipeline(model, self.where), []

    def require_base(self, pipeline: Any, name: str) -> None:
        if not torch.equal(self.answer(pipeline), self.plain):
            raise RuntimeError(f"the {name} export, disabled, does not give the base back")


def untaken(tensors: dict[str, torch.Tensor], taken: dict[str, torch.Tensor]) -> list[str]:
    """Keys of a file whose tensors are not in the models that loaded it."""
    return sorted(n for n, t in tensors.items() if n not in taken or not torch.equal(taken[n].cpu(), t))
