"""README.md beside the exports: the Hub's model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artifacts.adapter import algorithm

if TYPE_CHECKING:
    from stages.artifacts.adapter import Adapter
    from stages.core.bases import Base
    from stages.export.params import ExportParams
    from stages.families.base import Family

MANY_TARGETS = 12


def model_card(base: Base, family: Family, params: ExportParams, adapter: Adapter) -> str:
    """README.md with the Hub's front matter: what it is, how to load it, what it was made from."""
    lora = adapter.lora_config
    targets = ", ".join(f"`{name}`" for name in short_names(lora["target_modules"]))
    what = algorithm(lora)
    kind = "".join(f", {word}" for flag, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if lora.get(flag))
    kind += f", biases {lora['bias']}" if adapter.biases else ""
    which = f"one base alone{known_as(base)}"
    digests = "\n".join(f"| {name} | `{digest[:16]}` |" for name, digest in sorted(adapter.base.items()))
    start = adapter.made_from.get("lora", {}).get("init_from")
    kind += f", started from the adapter `{start['sha256'][:16]}`" if start else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{family.PIPELINE}, {what.lower()}, diffusers, lora-dag]
base_model: {quoted(base.name if base.revision else base.pretrained)}
instance_prompt: {quoted(params.prompt)}
---

# {what} for {family.PIPELINE}

Rank {lora["r"]}, alpha {lora["lora_alpha"]:g}{kind}, on {targets}; {adapter.num_steps} steps.

{usage(base, family, params)}

The adapter fits {which}, whose files have these digests (sha256 over names and bytes, first 16 digits):

| component | sha256 |
|---|---|
{digests}

Adapter file: sha256 `{adapter.files["adapter.safetensors"][:16]}`.

The licence is the one that the base and the training pictures allow.
"""


def quoted(text: str) -> str:
    """A JSON string, which is a YAML and a Python one too, whatever colons and quotes are in it."""
    return json.dumps(text, ensure_ascii=False)


def known_as(base: Base) -> str:
    """Commit of a pin, file and digest of a checkpoint, by which the community finds them."""
    if base.revision:
        return f", [{base.name}](https://huggingface.co/{base.name}) at commit `{base.revision}`"
    return f", `{base.file.name}` (sha256 `{base.file_sha256}`)" if base.file else ""


def usage(base: Base, family: Family, params: ExportParams) -> str:
    """How each of the written formats is loaded."""
    pipeline, variant = f"{family.PIPELINE}.from_pretrained", base.model.variant
    options = f", variant={quoted(variant)}" if variant else ""
    lines = {
        "diffusers": f"""```python
from diffusers import {family.PIPELINE}

{load_base(base, family)}
pipe.load_lora_weights("data/export/diffusers")
pipe({quoted(params.prompt)}, guidance_scale={params.guidance_scale:g}).images[0].save("sample.png")
```""",
        "peft": f'With PEFT: `PeftModel.from_pretrained(pipe.{family.DENOISER}, "data/export/peft")`.',
        "comfyui": f"With ComfyUI: put `comfyui/{params.name}.safetensors` below `models/loras`.",
        "merged": f'With the adapter in its weights: `{pipeline}("data/export/merged"{options})`.',
    }
    if params.resized_ranks:
        ranks = ", ".join(f"`resized/rank-{rank}/`" for rank in params.resized_ranks)
        lines["resized"] = f"The same files at smaller ranks, by their largest singular values: {ranks}."
    return "\n\n".join(text for name, text in lines.items() if name in (*params.formats, "resized"))


def load_base(base: Base, family: Family) -> str:
    """The lines that load the pipeline of the base."""
    left_out = "".join(f", {name}=None" for name in family.left_out(base.model))
    variant = f", variant={quoted(base.model.variant)}" if base.model.variant else ""
    if base.file:
        return load_single_file(base, base.file, family, left_out, variant)
    pinned = f", revision={quoted(base.revision)}" if base.revision else ""
    pretrained = base.name if base.revision else base.pretrained
    return f"pipe = {family.PIPELINE}.from_pretrained({quoted(pretrained)}{pinned}{variant}{left_out})"


def load_single_file(base: Base, file: Path, family: Family, left_out: str, variant: str) -> str:
    """Components that the file goes without are passed: ``from_single_file`` does not look for them."""
    folder, lines = quoted(base.pretrained), []
    for name, cls in family.COMPONENTS.items():
        if name not in base.inside and (Path(base.model.pretrained) / name / "config.json").exists():
            library = "diffusers" if name == "vae" else "transformers"
            lines.append(f"from {library} import {cls}")
            lines.append(f"{name} = {cls}.from_pretrained({folder}, subfolder={quoted(name)}{variant})")
            left_out += f", {name}={name}"
    return "\n".join(
        [*lines, f"pipe = {family.PIPELINE}.from_single_file({quoted(str(file))}, config={folder}{left_out})"]
    )


def short_names(target_modules: list[str]) -> list[str]:
    """The endings, once each, where every layer is listed by its full name."""
    if len(target_modules) <= MANY_TARGETS:
        return target_modules
    words = [name.split(".") for name in target_modules]
    return sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in words})
