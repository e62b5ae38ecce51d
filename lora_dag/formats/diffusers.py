"""``pytorch_lora_weights.safetensors`` for ``load_lora_weights`` of diffusers pipelines.

The strength is multiplied into B, so that readers with and without the header agree. The header holds each LoraConfig,
with alpha = rank.
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
CAVEAT = ""


def unsupported_reason(adapter: AdapterKind) -> str:
    """Return why the format cannot hold the adapter; empty if it can."""
    if adapter.algo != "lora":
        return f"load_lora_weights reads only LoRA, but lora.algo is {adapter.algo}"
    if adapter.bias == "all":
        return "it cannot store biases of layers without LoRA weights (lora.bias all)"
    if adapter.bias == "lora_only" and adapter.use_dora:
        return "PEFT supports no bias with DoRA (lora.bias lora_only, lora.use_dora)"
    if adapter.trains_text and adapter.use_dora:
        return "load_lora_weights loses the magnitudes of text encoders (lora.train_text_encoder, lora.use_dora)"
    return ""


def write(export: Export, folder: Path) -> None:
    """Write the files into ``folder``."""
    from lora_dag.adapters.adapter_set import file_name
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
    """Load the files by stock ``load_lora_weights`` into a pipeline that has only the adapted components."""
    from lora_dag.adapters import lora
    from lora_dag.adapters.adapter_set import file_name
    from lora_dag.adapters.adapter_tensors import unloaded_keys
    from lora_dag.core.quiet import without_loading_warnings
    from lora_dag.core.tensors import load_tensors

    modules = export.load_modules()
    with without_loading_warnings():
        pipeline = pipeline_around(export, modules)
        pipeline.load_lora_weights(folder, adapter_name=lora.NAME)
        taken = {
            f"{component}.{file_name(component, name)}": tensor
            for component, module in modules.adapted.items()
            for name, tensor in lora.state_dict(module).items()
        }
    return LoadedBack(modules, unloaded_keys(load_tensors(folder / FILE), taken), pipeline.disable_lora)


def pipeline_around(export: Export, modules: BaseModules) -> Any:
    """Return a stock pipeline that has only the adapted components and a scheduler."""
    from lora_dag.core.files import read_json
    from lora_dag.families import common

    listed = read_json(Path(export.model.pretrained) / "model_index.json")
    parts = {name: None for name, entry in listed.items() if isinstance(entry, list) and name != "scheduler"}
    return common.load_pipeline(export.model, export.device, **parts | modules.adapted)


def usage(card: Card) -> str:
    """Return Markdown on how to load the files."""
    source, prompt = (json.dumps(text, ensure_ascii=False) for text in (card.source, card.prompt))
    call = f"{prompt}, num_inference_steps={card.num_inference_steps}, guidance_scale={card.guidance_scale:g}"
    lines = [
        "```python",
        *([card.load] if card.load else []),
        f'pipe.load_lora_weights({source}, subfolder="diffusers", weight_name="{FILE}")',
        f"result = pipe({call})",
        'result.images[0].save("sample.png")',
        "```",
        "",
        '`pipe.set_adapters("default_0", 0.7)` sets the strength: 1 as trained, 0 the base model.',
    ]
    return "\n".join(lines)
