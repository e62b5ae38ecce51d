"""``adapter_config.json`` and ``adapter_model.safetensors``, the files of ``PeftModel.save_pretrained``.

The folder holds the denoiser's adapter, its subfolders hold those of text encoders. The strength of a LoRA is
multiplied into B, for programs that read the tensors without the config.
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
CAVEAT = ""


def unsupported_reason(adapter: AdapterKind) -> str:
    """Return why the format cannot hold the adapter; empty if it can."""
    if adapter.bias == "all":
        return "it cannot store biases of layers without LoRA weights (lora.bias all)"
    if adapter.bias == "lora_only" and adapter.use_dora:
        return "PEFT supports no bias with DoRA (lora.bias lora_only, lora.use_dora)"
    if adapter.bias == "lora_only" and adapter.algo != "lora":
        return f"PEFT supports no bias with lora.algo {adapter.algo} (lora.bias lora_only)"
    return ""


def write(export: Export, folder: Path) -> None:
    """Write the files into ``folder``."""
    from lora_dag.adapters.adapter_tensors import kohya_network
    from lora_dag.core.files import write_json

    for component, part in export.tensors.items():
        folded, subfolder = part.folded(), component_folder(export, folder, component)
        write_json(subfolder / "adapter_config.json", folded.peft_config(inference_mode=True))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in folded.with_peft_biases().items()}
        export.save(subfolder / FILE, tensors, kohya_network([folded], tensors))


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Load the files by stock ``PeftModel.from_pretrained``."""
    from peft import PeftModel

    from lora_dag.adapters import lora
    from lora_dag.adapters.adapter_tensors import unloaded_keys
    from lora_dag.core.quiet import without_loading_warnings
    from lora_dag.core.tensors import load_tensors

    modules, models, unread = export.load_modules(), [], []
    for component, module in modules.adapted.items():
        subfolder = component_folder(export, folder, component)
        with without_loading_warnings():
            model = PeftModel.from_pretrained(module, subfolder, adapter_name=lora.NAME)  # puts its layers into module
            state = lora.state_dict(model.get_base_model())
        taken = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        unread += unloaded_keys(load_tensors(subfolder / FILE), taken)
        models.append(model)
    return LoadedBack(modules, unread, lambda: [model.base_model.disable_adapter_layers() for model in models])


def component_folder(export: Export, folder: Path, component: str) -> Path:
    """Return the folder of a component's adapter: the format's folder for the denoiser, else a subfolder."""
    return folder if component == export.family.DENOISER else folder / component


def usage(card: Card) -> str:
    """Return Markdown on how to load the files."""
    source = json.dumps(card.source, ensure_ascii=False)
    folders = {card.denoiser: "peft"} | {name: f"peft/{name}" for name in card.text_encoders}
    lines = [
        "With PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        *([card.load] if card.load else []),
        *(f'PeftModel.from_pretrained(pipe.{name}, {source}, subfolder="{path}")' for name, path in folders.items()),
        "```",
    ]
    return "\n".join(lines)
