"""``pytorch_lora_weights.safetensors``, which the ``load_lora_weights`` of any diffusers pipeline reads.

The strength is in B, so that it is the same with and without the header. Each LoraConfig is in the header, with
alpha = rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.formats import LoadedBack

if TYPE_CHECKING:
    from lora_dag.adapters.base_modules import BaseModules
    from lora_dag.formats import AdapterKind, Card, Export

FILE = "pytorch_lora_weights.safetensors"
READER = "diffusers' `load_lora_weights`"
IS_ADAPTER = True
LOADED_BY_PEFT = True
LIMIT = ""


def refuse(adapter: AdapterKind) -> str:
    if adapter.algo != "lora":
        return f"the pipeline's load_lora_weights reads LoRA alone (lora.algo {adapter.algo})"
    if adapter.bias == "all":
        return "biases of layers that carry no adapter have no place in it (lora.bias all)"
    if adapter.bias == "lora_only" and adapter.use_dora:
        return "PEFT has no bias beside DoRA (lora.bias lora_only with lora.use_dora)"
    if adapter.trains_text and adapter.use_dora:
        return "it loses text encoders' magnitudes while loading (lora.train_text_encoder with lora.use_dora)"
    return ""


def write(export: Export, folder: Path) -> None:
    from lora_dag.adapters.adapted import file_name
    from lora_dag.adapters.adapter_tensors import kohya_network
    from lora_dag.core.tensors import load_metadata, load_tensors
    from lora_dag.families.common import pipeline_class

    layers, configs = {}, {}
    parts = {component: part.folded() for component, part in export.tensors.items()}
    for component, part in parts.items():
        tensors = part.with_peft_biases().items()
        layers[f"{component}_lora_layers"] = {file_name(component, name): tensor for name, tensor in tensors}
        configs[f"{component}_lora_adapter_metadata"] = part.peft_config()
    pipeline_class(export.family).save_lora_weights(folder, **layers, **configs)
    path = folder / FILE
    saved = load_tensors(path)
    export.save(path, saved, load_metadata(path) | kohya_network(parts.values(), saved))


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Stock ``load_lora_weights`` and ``disable_lora``, in a pipeline of nothing but what was adapted."""
    from lora_dag.adapters import lora
    from lora_dag.adapters.adapted import file_name
    from lora_dag.adapters.adapter_tensors import untaken
    from lora_dag.core.quiet import while_loading
    from lora_dag.core.tensors import load_tensors

    modules = export.load_base()
    with while_loading():  # of a text encoder that the file does not adapt; biases, which PEFT takes for broken shards
        pipeline = pipeline_around(export, modules)
        pipeline.load_lora_weights(folder, adapter_name=lora.NAME)
        taken = {
            f"{component}.{file_name(component, name)}": tensor
            for component, module in modules.adapted.items()
            for name, tensor in lora.state_dict(module).items()
        }
    return LoadedBack(modules, untaken(load_tensors(folder / FILE), taken), pipeline.disable_lora)


def pipeline_around(export: Export, modules: BaseModules) -> Any:
    """The stock pipeline with what was adapted and a scheduler in it, and nothing else."""
    from lora_dag.core.files import read_json
    from lora_dag.families import common

    listed = read_json(Path(export.model.pretrained) / "model_index.json")
    parts = {name: None for name, entry in listed.items() if isinstance(entry, list) and name != "scheduler"}
    return common.load_pipeline(export.model, export.device, **parts | modules.adapted)


def usage(card: Card) -> str:
    place, prompt = (json.dumps(text, ensure_ascii=False) for text in (card.place, card.prompt))
    call = f"{prompt}, num_inference_steps={card.num_inference_steps}, guidance_scale={card.guidance_scale:g}"
    lines = [
        "```python",
        *([card.load] if card.load else []),
        f'pipe.load_lora_weights({place}, subfolder="diffusers", weight_name="{FILE}")',
        f"image = pipe({call})",
        'image.images[0].save("sample.png")',
        "```",
        "",
        '`pipe.set_adapters("default_0", 0.7)` makes it weaker: 1 is as trained, 0 the base.',
    ]
    return "\n".join(lines)
