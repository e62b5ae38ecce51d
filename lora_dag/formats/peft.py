"""``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.save_pretrained`` names them.

The denoiser's adapter is the folder itself, a text encoder's is below it. A LoRA's strength is in B, for programs that
read the tensors without the config.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_dag.formats import LoadedBack

if TYPE_CHECKING:
    from pathlib import Path

    from lora_dag.formats import AdapterKind, Card, Export

FILE = "adapter_model.safetensors"
READER = "PEFT's `from_pretrained`"
IS_ADAPTER = True
LOADED_BY_PEFT = True
LIMIT = ""


def refuse(adapter: AdapterKind) -> str:
    if adapter.bias == "all":
        return "biases of layers that carry no adapter have no place in it (lora.bias all)"
    if adapter.bias == "lora_only" and adapter.use_dora:
        return "PEFT has no bias beside DoRA (lora.bias lora_only with lora.use_dora)"
    if adapter.bias == "lora_only" and adapter.algo != "lora":
        return f"PEFT has no bias beside it (lora.bias lora_only with lora.algo {adapter.algo})"
    return ""


def write(export: Export, folder: Path) -> None:
    from lora_dag.adapters.adapter_tensors import kohya_network
    from lora_dag.core.files import write_json

    for component, part in export.tensors.items():
        folded, place = part.folded(), component_folder(export, folder, component)
        write_json(place / "adapter_config.json", folded.peft_config(inference_mode=True))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in folded.with_peft_biases().items()}
        export.save(place / FILE, tensors, kohya_network([folded], tensors))


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Stock ``PeftModel.from_pretrained``, and what its ``disable_adapter`` calls."""
    from peft import PeftModel

    from lora_dag.adapters import lora
    from lora_dag.adapters.adapter_tensors import untaken
    from lora_dag.core.quiet import while_loading
    from lora_dag.core.tensors import load_tensors

    modules, models, unread = export.load_base(), [], []
    for component, module in modules.adapted.items():
        place = component_folder(export, folder, component)
        with while_loading():
            model = PeftModel.from_pretrained(module, place, adapter_name=lora.NAME)  # puts its layers into module
            state = lora.state_dict(model.get_base_model())
        taken = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        unread += untaken(load_tensors(place / FILE), taken)
        models.append(model)
    return LoadedBack(modules, unread, lambda: [model.base_model.disable_adapter_layers() for model in models])


def component_folder(export: Export, folder: Path, component: str) -> Path:
    return folder if component == export.family.DENOISER else folder / component


def usage(card: Card) -> str:
    place = json.dumps(card.place, ensure_ascii=False)
    folders = {card.denoiser: "peft"} | {name: f"peft/{name}" for name in card.text_encoders}
    lines = [
        "With PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        *([card.load] if card.load else []),
        *(f'PeftModel.from_pretrained(pipe.{name}, {place}, subfolder="{path}")' for name, path in folders.items()),
        "```",
    ]
    return "\n".join(lines)
