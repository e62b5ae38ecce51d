"""Write reports/model_card.md: the adapter, how to load it, its metrics, provenance and limits.

The card is for a repository's file view, and for the Hugging Face Hub as README.md beside samples.png.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_dag.artifacts.adapter import algorithm
from lora_dag.core.console import plural
from lora_dag.families.protocol import load_family
from lora_dag.formats import Card, load_format
from lora_dag.pages.findings import number
from lora_dag.pages.markdown import code, facts, image, table
from stages.report import dataset, page, tables
from stages.report.inputs import Inputs

# Source: https://huggingface.co/docs/hub/repositories-licenses; another id goes up as "other" with its name.
HUB_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
WITHOUT_WEIGHTS = (".json", ".txt", ".model")
"""Endings of a pipeline's files without weights: configs and vocabularies of tokenizers."""


@dataclass(frozen=True)
class Location:
    """Location of the exported files for readers of the card."""

    name: str
    """Folder of the exports, or user/name of the Hub."""
    is_repository: bool
    """Whether ``name`` is a repository of the Hub."""


def write_card(title: str, location: Location, inputs: Inputs, folder: Path) -> str:
    """Return Markdown with the Hub's front matter; images are linked relative to ``folder``."""
    sections = {
        "Use": usage(location, inputs),
        "Evaluation": evaluation(inputs),
        "Training": training(inputs),
        "Dataset": facts("Images and captions", dataset_facts(inputs)),
        "Files": files(inputs),
        "Limits": "\n".join(f"- {line}" for line in limits(inputs)),
        "License": license(inputs),
    }
    parts = [
        front_matter(inputs),
        f"# {title}",
        summary(inputs),
        f"**{page.headline(inputs)}**",
        image("Samples", inputs.images["samples"], folder),
        page.samples_note(inputs),
        page.prompts(inputs),
        *page.exported_snapshot(inputs),
        *(f"## {head}\n\n{body}" for head, body in sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(inputs: Inputs) -> str:
    """Return the Hub's fields. Values are JSON, which is valid YAML even with colons and quotes."""
    made, export = inputs.made, inputs.made["export"]
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if name := made.get("base_model"):
        is_adapter = any(load_format(format_name).IS_ADAPTER for format_name in export["formats"])
        fields |= {"base_model": name, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if export["license"]:
        fields |= hub_license(export["license"])
    algo, base = algorithm(made["lora_config"]).lower(), load_family(made["family"]).HUB_TAG
    tags = [algo, "diffusers", "template:sd-lora", base, "lora-dag"]
    fields |= {"tags": tags, "instance_prompt": export["prompt"]}
    fields["widget"] = [{"text": export["prompt"], "output": {"url": "samples.png"}}]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def hub_license(name: str) -> dict[str, str]:
    known = name.lower() in HUB_LICENSES.split()
    return {"license": name.lower()} if known else {"license": "other", "license_name": name.lower()}


def summary(inputs: Inputs) -> str:
    made, lora = inputs.made, inputs.made["lora_config"]
    kind = "".join(f", {word}" for flag, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if lora.get(flag))
    kind += f", biases {lora['bias']}" if made["biases"] else ""
    start = made.get("lora", {}).get("init_from")
    kind += f", started from the adapter `{start['sha256'][:16]}`" if start else ""
    targets = ", ".join(f"`{name}`" for name in tables.target_modules(lora["target_modules"]))
    targets += "".join(f", attention of `{component}`" for component in made.get("text_lora", {}))
    return (
        f"A {algorithm(lora)} for {made['pipeline']['class']}: "
        f"rank {lora['r']}, alpha {lora['lora_alpha']:g}{kind}, on {targets}; "
        f"{int(number(inputs.train, 'train.num_trainable_parameters')):,} parameters, "
        f"{number(inputs.export, 'export.megabytes'):.3g} MB in float32, "
        f"trained for {plural(made['num_steps'], 'step')} on {dataset.to_train_on(inputs)}."
    )


# Use


def usage(location: Location, inputs: Inputs) -> str:
    """Return how to load each written format."""
    made, export = inputs.made, inputs.made["export"]
    paragraphs: list[str] = []
    card = facts_of_use(location, inputs)
    for name in export["formats"]:
        paragraphs.append(load_format(name).usage(card))
        if card.load in paragraphs[-1]:
            card = replace(card, load="")
    if export["resized_ranks"]:
        ranks = ", ".join(f"`resized/rank-{rank}/`" for rank in export["resized_ranks"])
        paragraphs.append(f"Copies at smaller ranks, with the largest singular values: {ranks}.")
    if count := made.get("unfusable"):
        layers = plural(count, "layer", "layers")
        paragraphs.append(
            f"`pipe.fuse_lora()` and PEFT's `merge_and_unload()` raise an error for this adapter, because the base has "
            f"no bias in {layers} with a trained bias. Use it unfused, or use `merged`."
        )
    return "\n\n".join([*paragraphs, base_note(inputs)])


def facts_of_use(location: Location, inputs: Inputs) -> Card:
    made, pipeline, drawn = inputs.made, inputs.made["pipeline"], inputs.lineage["validate"]
    return Card(
        source=location.name,
        is_repository=location.is_repository,
        load=f"from diffusers import {pipeline['class']}\n\n{pipeline['load']}",
        pipeline=pipeline["class"],
        absent=[name for name in re.findall(r"(\w+)=None", pipeline["load"]) if name != "safety_checker"],
        denoiser=pipeline["denoiser"],
        text_encoders=list(made.get("text_lora", {})),
        name=made["export"]["name"],
        prompt=made["export"]["prompt"],
        num_inference_steps=drawn["num_inference_steps"],
        guidance_scale=drawn["guidance_scale"],
        use_dora=bool(made["lora_config"].get("use_dora")),
    )


def base_note(inputs: Inputs) -> str:
    name = inputs.made.get("base_model")
    if name and (commit := inputs.made.get("base_revision")):
        return f"The base is [{name}](https://huggingface.co/{name}) at commit `{commit}`. Its digests are below."
    if file := inputs.made.get("base_file"):
        return f"The base is the checkpoint `{file['name']}` (SHA-256 `{file['sha256']}`). Its digests are below."
    if name:
        return f"The base is [{name}](https://huggingface.co/{name}), with the digests below."
    pretrained = code(inputs.made["pipeline"]["pretrained"])
    return f"The base, {pretrained}, is a folder of the training repository. Its digests are below."


# Evaluation


def evaluation(inputs: Inputs) -> str:
    parts = [
        tables.results(inputs),
        tables.notes(inputs),
        facts("Each exported file, loaded back into a fresh base", tables.export_facts(inputs)),
    ]
    return "\n\n".join(parts)


def training(inputs: Inputs) -> str:
    """Return the main settings, and all settings by their names in params.yaml."""
    made = inputs.made
    values = {
        f"`{section}.{name}`": value_text(value)
        for section in ("lora", "train")
        for name, value in made.get(section, {}).items()
    }
    every = facts("Setting of params.yaml", values)
    return "\n\n".join(
        [
            facts("Setting", tables.settings_facts(inputs)),
            f"<details><summary>All settings of the training</summary>\n\n{every}\n\n</details>",
        ]
    )


def value_text(value: Any) -> str:
    """Return a value as YAML in one line; a long list is shortened."""
    return code(json.dumps(value, ensure_ascii=False), 200)


def dataset_facts(inputs: Inputs) -> Mapping[str, object]:
    named = {"Images": "images", "Captions": "captions", "Latents and prompt embeddings": "latents"}
    digests = {f"{label}, SHA-256": sha(inputs.made[name]) for label, name in named.items() if name in inputs.made}
    return dataset.key_facts(inputs) | digests


def files(inputs: Inputs) -> str:
    """Return tables of weight files and of the inputs they were made from."""
    made = inputs.made
    weights = {name: file for name, file in made["files"].items() if not name.endswith(WITHOUT_WEIGHTS)}
    rows = [(f"`{name}`", size(file["bytes"]), sha(file["sha256"])) for name, file in weights.items()]
    base = {f"Base: {name}": sha(digest) for name, digest in sorted(made["base"].items())}
    known = {"Adapter as trained": sha(made["adapter"])} | base
    if snapshot := made.get("snapshot"):
        known = {f"Snapshot of step {made['step']}": sha(snapshot)} | known
    known["Held-out table"] = f"`{inputs.measured['val.table']}`"
    parts = [table(("File", "size", "SHA-256"), rows), facts("Input", known, "SHA-256, first digits")]
    if packages := made.get("packages"):
        parts.append(f"Packages: {', '.join(f'{name} {version}' for name, version in sorted(packages.items()))}.")
    return "\n\n".join(parts)


def sha(digest: str) -> str:
    return f"`{digest[:16]}`"


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.3g} GB"


# Limits


def limits(inputs: Inputs) -> list[str]:
    """Return limits of the evaluation, as sentences."""
    counts, scales = inputs.lineage["table"]["num_images"], inputs.lineage["validate"]["scales"]
    sizes, strengths = dataset.sizes(inputs), ", ".join(f"{scale:g}" for scale in scales)
    found = [
        "The adapter was evaluated only with the base of these digests, not with related models.",
        f"Held-out loss was measured on {plural(counts['heldout'], 'image')} of the same dataset, with one training "
        "seed. Other kinds of images and other seeds were not evaluated.",
        f"Training images had {sizes} {'pixels' if 'x' in sizes else 'sizes'}. Other sizes were not evaluated.",
        f"Samples were drawn at strength {strengths}. Other strengths and combinations of adapters were not evaluated.",
        copies(inputs),
    ]
    return found + [limit for name in inputs.made["export"]["formats"] if (limit := load_format(name).CAVEAT)]


def copies(inputs: Inputs) -> str:
    """Return what is known about copies of training images."""
    share, base = (number(inputs.measured, f"samples.copied_share{suffix}") for suffix in ("", "_base"))
    own = "Copies from the base's own training data were not measured."
    if share != share:
        return f"Copies of training images were not measured. {own}"
    return (
        f"A share of {share:.3g} of the samples (base: {base:.3g}) is as near to a training image as one in twenty "
        f"held-out images is. Other prompts and partial copies were not measured. {own}"
    )


def license(inputs: Inputs) -> str:
    export = inputs.made["export"]
    stated = f"`{export['license']}`, as stated by the author." if export["license"] else "Not stated."
    name = inputs.made.get("base_model")
    source = f"[its model card](https://huggingface.co/{name})" if name else "its source"
    return f"{stated} The base has its own license (see {source}), and so have the training images."
