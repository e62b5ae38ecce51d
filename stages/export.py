"""Adapter -> files that other programs load, each loaded back by its own library and compared by output.

In: data/adapter, the base.  Out: data/export/{diffusers,peft,README.md}, reports/export/metrics.json.
Run: ``python -m stages.export``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from stages.core.console import UserError, log, parser, run
from stages.core.files import replaced, write_text
from stages.core.params import ModelParams, Params, RuntimeParams, load

if TYPE_CHECKING:
    import torch

    from stages.artifacts.adapter import Adapter
    from stages.families.base import Family

TOLERANCE = 1e-4  # of float32 outputs of order 1; what is loaded back usually differs by nothing at all


class ExportParams(Params):
    """Section ``export``."""

    prompt: str
    """Prompt of the model card's example and of the comparison."""
    num_inference_steps: int = Field(ge=1, le=1000)
    """Sampling steps of the comparison."""
    guidance_scale: float = Field(ge=1)
    seed: int = Field(ge=0)


def main() -> None:
    args = parser(__doc__, ("adapter", "export", "export_reports")).parse_args()
    config = load(args.params, args.overrides)
    model, params = config.section(ModelParams), config.section(ExportParams)

    from stages.artifacts import metrics
    from stages.artifacts.adapter import Adapter
    from stages.core import device
    from stages.core.base_files import digests, require_base, require_same_base
    from stages.families.base import load_family

    family = load_family(model.family)
    require_base(model, family)
    adapter = Adapter.load(args.adapter)
    if adapter.biases:
        raise UserError(f"{args.adapter}: its trained biases cannot be exported yet; train with lora.bias none")
    require_same_base(adapter.base, digests(model, family.COMPONENTS), args.adapter)
    weights = adapter.weights(args.adapter)
    where = device.setup(config.section(RuntimeParams), model)

    proof = Proof(model, family, params, where)
    proof.draw_reference(adapter, weights)
    with replaced(args.export) as folder:
        write_diffusers(proof.pipeline_class, family, adapter, weights, folder / "diffusers")
        write_peft(adapter, weights, folder / "peft")
        write_text(folder / "README.md", model_card(model, family, params, adapter))
        errors = {"diffusers": proof.diffusers(folder / "diffusers"), "peft": proof.peft(folder / "peft")}
        require_equal(errors)
    metrics.save(
        args.export_reports / "metrics.json",
        {f"export.{name}.max_abs_error": error for name, error in errors.items()}
        | {"export.effect": proof.effect, "export.megabytes": sum(t.nbytes for t in weights.values()) / 1e6},
    )
    log.info("wrote       %s (diffusers, peft, README.md)", args.export)


def require_equal(errors: dict[str, float]) -> None:
    """Raises RuntimeError when a format draws another picture than the adapter in memory."""
    for name, error in errors.items():
        log.info("%-11s loaded back, largest difference of the picture's latents %.2g", name, error)
        if error > TOLERANCE:
            raise RuntimeError(f"the {name} export draws another picture than the adapter: {error:.3g} > {TOLERANCE}")


class Proof:
    """The picture that the trained adapter draws in float32, and how far a loaded export is from it.

    Every comparison starts from a fresh pipeline, so that nothing of the adapter in memory helps the file.
    """

    def __init__(self, model: ModelParams, family: Family, params: ExportParams, where: torch.device) -> None:
        self.model = model.model_copy(update={"dtype": "float32"})
        self.family, self.params, self.where = family, params, where

    def draw_reference(self, adapter: Adapter, weights: dict[str, torch.Tensor]) -> None:
        from stages.core import lora

        pipeline = self.fresh()
        self.pipeline_class = type(pipeline)
        plain = self.draw(pipeline)
        denoiser = getattr(pipeline, self.family.DENOISER)
        lora.inject(denoiser, adapter.lora_config)
        lora.load(denoiser, weights)
        self.reference = self.draw(pipeline)
        self.effect = float((self.reference - plain).abs().max())
        """Largest change that the adapter makes to the latents: 0 would make every comparison meaningless."""
        if self.effect == 0:
            raise RuntimeError("the adapter changes nothing: its weights were not loaded")

    def fresh(self) -> Any:
        return self.family.load_pipeline(self.model, self.where)

    def draw(self, pipeline: Any) -> torch.Tensor:
        """Final latents for the prompt, float32 [1, C, h, w]."""
        from stages.core.seeding import generator

        return pipeline(
            self.params.prompt,
            num_inference_steps=self.params.num_inference_steps,
            guidance_scale=self.params.guidance_scale,
            generator=generator(self.params.seed, "export"),
            output_type="latent",
        ).images.float()

    def diffusers(self, folder: Path) -> float:
        """Stock ``load_lora_weights``."""
        from stages.core import quiet

        pipeline = self.fresh()
        with quiet.no_warnings():  # of a text encoder that the file does not adapt
            pipeline.load_lora_weights(folder)
        return float((self.draw(pipeline) - self.reference).abs().max())

    def peft(self, folder: Path) -> float:
        """Stock ``PeftModel.from_pretrained``."""
        from peft import PeftModel

        pipeline = self.fresh()
        adapted = PeftModel.from_pretrained(getattr(pipeline, self.family.DENOISER), folder)
        setattr(pipeline, self.family.DENOISER, adapted.get_base_model())
        return float((self.draw(pipeline) - self.reference).abs().max())


def write_diffusers(
    pipeline_class: Any, family: Family, adapter: Adapter, weights: dict[str, torch.Tensor], folder: Path
) -> None:
    """``pytorch_lora_weights.safetensors`` with the LoraConfig in its header: without it, alpha would be guessed."""
    from stages.core import lora
    from stages.core.files import atomic, sorted_header

    prefix = family.DENOISER
    config = {
        name: sorted(v) if isinstance(v, set) else v
        for name, v in lora.peft_config(adapter.lora_config).to_dict().items()
    }
    pipeline_class.save_lora_weights(
        folder, **{f"{prefix}_lora_layers": weights, f"{prefix}_lora_adapter_metadata": config}
    )
    path = folder / "pytorch_lora_weights.safetensors"
    blob = path.read_bytes()
    with atomic(path) as temporary:
        temporary.write_bytes(sorted_header(blob))


def write_peft(adapter: Adapter, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.save_pretrained`` names them."""
    from stages.core import lora
    from stages.core.files import save_tensors, write_json

    config = lora.peft_config(adapter.lora_config, inference_mode=True).to_dict()
    write_json(folder / "adapter_config.json", {n: sorted(v) if isinstance(v, set) else v for n, v in config.items()})
    save_tensors(
        folder / "adapter_model.safetensors", {f"base_model.model.{n}": t for n, t in weights.items()}, {"format": "pt"}
    )


def model_card(model: ModelParams, family: Family, params: ExportParams, adapter: Adapter) -> str:
    """README.md with the Hub's front matter: what it is, how to load it, what it was made from."""
    lora = adapter.lora_config
    targets = ", ".join(f"`{name}`" for name in lora["target_modules"])
    base = "\n".join(f"| {name} | `{digest[:16]}` |" for name, digest in sorted(adapter.base.items()))
    # JSON strings are YAML and Python ones too, whatever colons and quotes are in them.
    pretrained, prompt = (json.dumps(text, ensure_ascii=False) for text in (model.pretrained, params.prompt))
    variant = f", variant={json.dumps(model.variant)}" if model.variant else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{family.PIPELINE}, lora, diffusers, lora-dag]
base_model: {pretrained}
instance_prompt: {prompt}
---

# LoRA for {family.PIPELINE}

Rank {lora["r"]}, alpha {lora["lora_alpha"]:g}, on {targets}; {adapter.num_steps} steps.

```python
from diffusers import {family.PIPELINE}

pipe = {family.PIPELINE}.from_pretrained({pretrained}{variant}, safety_checker=None)
pipe.load_lora_weights("data/export/diffusers")
pipe({prompt}, guidance_scale={params.guidance_scale:g}).images[0].save("sample.png")
```

With PEFT: `PeftModel.from_pretrained(pipe.{family.DENOISER}, "data/export/peft")`.

The adapter fits one base alone, whose files have these digests (sha256 over names and bytes, first 16 digits):

| component | sha256 |
|---|---|
{base}

Adapter file: sha256 `{adapter.files["adapter.safetensors"][:16]}`.

The licence is the one that the base and the training pictures allow.
"""


if __name__ == "__main__":
    run(main)
