"""README.md beside the exports: the Hub's model card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.artifacts.adapter import Adapter
    from stages.core.params import ModelParams
    from stages.export.params import ExportParams
    from stages.families.base import Family

MANY_TARGETS = 12


def model_card(model: ModelParams, family: Family, params: ExportParams, adapter: Adapter) -> str:
    """README.md with the Hub's front matter: what it is, how to load it, what it was made from."""
    lora = adapter.lora_config
    targets = ", ".join(f"`{name}`" for name in short_names(lora["target_modules"]))
    kind = "".join(f", {word}" for flag, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if lora.get(flag))
    kind += f", biases {lora['bias']}" if adapter.biases else ""
    if adapter.text_lora:
        targets += f" and the attention of {' and '.join(f'`{name}`' for name in adapter.text_lora)}"
    base = "\n".join(f"| {name} | `{digest[:16]}` |" for name, digest in sorted(adapter.base.items()))
    # JSON strings are YAML and Python ones too, whatever colons and quotes are in them.
    pretrained, prompt = (json.dumps(text, ensure_ascii=False) for text in (model.pretrained, params.prompt))
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{family.PIPELINE}, lora, diffusers, lora-dag]
base_model: {pretrained}
instance_prompt: {prompt}
---

# LoRA for {family.PIPELINE}

Rank {lora["r"]}, alpha {lora["lora_alpha"]:g}{kind}, on {targets}; {adapter.num_steps} steps.

{usage(family, params, model, adapter)}

The adapter fits one base alone, whose files have these digests (sha256 over names and bytes, first 16 digits):

| component | sha256 |
|---|---|
{base}

Adapter file: sha256 `{adapter.files["adapter.safetensors"][:16]}`.

The licence is the one that the base and the training pictures allow.
"""


def usage(family: Family, params: ExportParams, model: ModelParams, adapter: Adapter) -> str:
    """How each of the written formats is loaded."""
    pipeline = f"{family.PIPELINE}.from_pretrained"
    pretrained, prompt = (json.dumps(text, ensure_ascii=False) for text in (model.pretrained, params.prompt))
    variant = f", variant={json.dumps(model.variant)}" if model.variant else ""
    options = variant + "".join(f", {name}=None" for name in family.left_out(model))
    with_peft = {family.DENOISER: ""} | {name: f"/{name}" for name in adapter.text_lora}
    calls = (f'`PeftModel.from_pretrained(pipe.{name}, "data/export/peft{at}")`' for name, at in with_peft.items())
    lines = {
        "diffusers": f"""```python
from diffusers import {family.PIPELINE}

pipe = {pipeline}({pretrained}{options})
pipe.load_lora_weights("data/export/diffusers")
pipe({prompt}, guidance_scale={params.guidance_scale:g}).images[0].save("sample.png")
```""",
        "peft": f"With PEFT: {', '.join(calls)}.",
        "comfyui": f"With ComfyUI: put `comfyui/{params.name}.safetensors` below `models/loras`.",
        "merged": f'With the adapter in its weights: `{pipeline}("data/export/merged"{variant})`.',
    }
    return "\n\n".join(text for name, text in lines.items() if name in params.formats)


def short_names(target_modules: list[str]) -> list[str]:
    """The endings, once each, where every layer is listed by its full name."""
    if len(target_modules) <= MANY_TARGETS:
        return target_modules
    words = [name.split(".") for name in target_modules]
    return sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in words})
