"""reports/model_card.md: what the adapter is, what it does, how it is loaded, what it was made from, what it is not.

Reads the same in a repository's file view and as README.md of the Hugging Face Hub, beside samples.png.
"""

from __future__ import annotations

import json
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
"""Endings of a pipeline's other files: configs, and the vocabularies of tokenizers."""


@dataclass(frozen=True)
class Place:
    """Where a reader of the card finds the files."""

    name: str
    """Folder of the exports, or user/name."""
    is_repository: bool
    """Of the Hub."""


def write_card(title: str, place: Place, inputs: Inputs, folder: Path) -> str:
    """Markdown with the Hub's front matter; pictures are linked relative to ``folder``."""
    sections = {
        "Use": usage(place, inputs),
        "What was measured": measured(inputs),
        "Training": training(inputs),
        "Dataset": facts("Pictures and captions", dataset_facts(inputs)),
        "Files": files(inputs),
        "Limits": "\n".join(f"- {line}" for line in limits(inputs)),
        "Licence": licence(inputs),
    }
    parts = [
        front_matter(inputs),
        f"# {title}",
        summary(inputs),
        f"**{page.headline(inputs)}**",
        image("Samples", inputs.pictures["samples"], folder),
        page.samples_note(inputs),
        page.prompts(inputs),
        *page.exported_snapshot(inputs),
        *(f"## {head}\n\n{body}" for head, body in sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(inputs: Inputs) -> str:
    """The Hub's fields, as JSON values, which are YAML ones whatever colons and quotes are in them."""
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


def usage(place: Place, inputs: Inputs) -> str:
    """How each of the written formats is loaded."""
    made, export, said = inputs.made, inputs.made["export"], []
    card = facts_of_use(place, inputs)
    for name in export["formats"]:
        said.append(load_format(name).usage(card))
        if card.load in said[-1]:
            card = replace(card, load="")
    if export["resized_ranks"]:
        ranks = ", ".join(f"`resized/rank-{rank}/`" for rank in export["resized_ranks"])
        said.append(f"The same files at smaller ranks, by their largest singular values: {ranks}.")
    if count := made.get("unfusable"):
        said.append(
            f"`pipe.fuse_lora()` and PEFT's `merge_and_unload()` raise an error for this adapter: {count} of its "
            f"layers {'has' if count == 1 else 'have'} no bias that a trained one could be added to. Use it unfused, "
            "or `merged`."
        )
    return "\n\n".join([*said, base_note(inputs)])


def facts_of_use(place: Place, inputs: Inputs) -> Card:
    made, pipeline, drawn = inputs.made, inputs.made["pipeline"], inputs.lineage["validate"]
    return Card(
        place=place.name,
        is_repository=place.is_repository,
        load=f"from diffusers import {pipeline['class']}\n\n{pipeline['load']}",
        pipeline=pipeline["class"],
        variant=pipeline["variant"],
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
        return f"The base is [{name}](https://huggingface.co/{name}) at commit `{commit}`; its digests stand below."
    if file := inputs.made.get("base_file"):
        return f"The base is the checkpoint `{file['name']}` (SHA-256 `{file['sha256']}`); its digests stand below."
    if name:
        return f"The base is [{name}](https://huggingface.co/{name}), as its files were whose digests stand below."
    pretrained = code(inputs.made["pipeline"]["pretrained"])
    return f"The base, {pretrained}, is a folder of the repository that this was trained in; its digests stand below."


# What was measured


def measured(inputs: Inputs) -> str:
    parts = [
        tables.results(inputs),
        tables.table_note(inputs),
        facts("Each file, loaded back into a fresh base", tables.export_facts(inputs)),
    ]
    return "\n\n".join(parts)


def training(inputs: Inputs) -> str:
    """The key facts, and every setting under its name in params.yaml."""
    made = inputs.made
    values = {
        f"`{section}.{name}`": value_text(value)
        for section in ("lora", "train")
        for name, value in made.get(section, {}).items()
    }
    every = facts("Section and key of params.yaml", values)
    return "\n\n".join(
        [
            facts("What decided the result", tables.settings_facts(inputs)),
            f"<details><summary>Every setting of the training</summary>\n\n{every}\n\n</details>",
        ]
    )


def value_text(value: Any) -> str:
    """As YAML has it in one line; long lists by their ends."""
    return code(json.dumps(value, ensure_ascii=False), 200)


def dataset_facts(inputs: Inputs) -> Mapping[str, object]:
    named = {"Pictures": "pictures", "Captions": "captions", "Latents and prompt embeddings": "latents"}
    digests = {f"{label}, SHA-256": sha(inputs.made[name]) for label, name in named.items() if name in inputs.made}
    return dataset.key_facts(inputs) | digests


def files(inputs: Inputs) -> str:
    """Weights and their digests; what they were made from."""
    made = inputs.made
    weights = {name: file for name, file in made["files"].items() if not name.endswith(WITHOUT_WEIGHTS)}
    rows = [(f"`{name}`", size(file["bytes"]), sha(file["sha256"])) for name, file in weights.items()]
    base = {f"Base: {name}": sha(digest) for name, digest in sorted(made["base"].items())}
    known = {"Adapter as trained": sha(made["adapter"])} | base
    if snapshot := made.get("snapshot"):
        known = {f"Snapshot of step {made['step']}": sha(snapshot)} | known
    known["Table of held-out rows"] = f"`{inputs.measured['val.table']}`"
    parts = [table(("File", "size", "SHA-256"), rows), facts("Made from", known, "SHA-256, first digits")]
    if packages := made.get("packages"):
        parts.append(f"With {', '.join(f'{name} {version}' for name, version in sorted(packages.items()))}.")
    return "\n\n".join(parts)


def sha(digest: str) -> str:
    return f"`{digest[:16]}`"


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.3g} GB"


# What it is not


def limits(inputs: Inputs) -> list[str]:
    """What the measurements do not say, in words that the numbers bear."""
    counts, scales = inputs.lineage["table"]["num_pictures"], inputs.lineage["validate"]["scales"]
    found = [
        "It fits the base of these digests alone; on a relative of it, nothing was measured.",
        f"Held-out loss was measured on {plural(counts['heldout'], 'picture')} of the same dataset and one training "
        "seed: it tells of pictures like these, and not how far another seed would have come.",
        f"It saw {dataset.sizes(inputs)} pixels; other sizes were not measured."
        if "x" in dataset.sizes(inputs)
        else f"It saw {dataset.sizes(inputs)} sizes; others were not measured.",
        f"Drawn at strength {', '.join(f'{scale:g}' for scale in scales)}; others, and other adapters beside it, were "
        "not measured.",
        repeats(inputs),
    ]
    return found + [limit for name in inputs.made["export"]["formats"] if (limit := load_format(name).LIMIT)]


def repeats(inputs: Inputs) -> str:
    """Whether it repeats training pictures, as far as anybody looked."""
    share, base = (number(inputs.measured, f"samples.copied_share{suffix}") for suffix in ("", "_base"))
    own = "what it takes over from the base's own data"
    if share != share:
        return f"Whether it repeats training pictures was not measured, nor {own}."
    return (
        f"Of its samples, a share of {share:.3g} is as near to a training picture as one in twenty held-out pictures "
        f"(the base's: {base:.3g}); whether it repeats them for other prompts, or in part, was not measured, nor {own}."
    )


def licence(inputs: Inputs) -> str:
    export = inputs.made["export"]
    stated = f"`{export['license']}`, as stated by who trained it." if export["license"] else "Not stated."
    name = inputs.made.get("base_model")
    where = f"[its model card](https://huggingface.co/{name})" if name else "its source"
    return f"{stated} The base comes with terms of its own, see {where}, and so do the training pictures."
