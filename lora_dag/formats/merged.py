"""The whole pipeline in the diffusers layout, with the adapter in the base's weights, in float32.

What was not adapted is the base's own files, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.formats import LoadedBack

if TYPE_CHECKING:
    from lora_dag.formats import AdapterKind, Card, Export

FILE = "model_index.json"
READER = "the merged pipeline"
IS_ADAPTER = False
LOADED_BY_PEFT = False
LIMIT = ""


def refuse(adapter: AdapterKind) -> str:
    return ""  # a weight with the adapter in it holds every kind


def write(export: Export, folder: Path) -> None:
    from lora_dag.adapters import lora
    from lora_dag.adapters.adapted import file_name
    from lora_dag.core.tensors import save_tensors

    copy_base(export, folder)
    modules = export.load_base()
    export.inject(modules)
    suffix = f".{export.model.variant}" if export.model.variant else ""
    for component, module in modules.adapted.items():
        lora.merge(module)
        stem = "diffusion_pytorch_model" if component == export.family.DENOISER else "model"
        tensors = {file_name(component, name): tensor for name, tensor in module.state_dict().items()}
        save_tensors(folder / component / f"{stem}{suffix}.safetensors", tensors, {"format": "pt"})


def copy_base(export: Export, folder: Path) -> None:
    """The base's files but for the weights of what was adapted."""
    from lora_dag.bases.layout import component_files
    from lora_dag.families.common import absent

    base, family = Path(export.model.pretrained), export.family
    folder.mkdir(parents=True)
    shutil.copyfile(base / FILE, folder / FILE)
    for component in set(family.COMPONENTS) - absent(export.model, family.COMPONENTS):
        (folder / component).mkdir()
        for path in component_files(base / component, export.model.variant):
            if component not in export.tensors or path.suffix == ".json" and ".index." not in path.name:
                shutil.copyfile(path, folder / component / path.name)


def load_back(export: Export, folder: Path) -> LoadedBack:
    """The family's own loader; what was not adapted must be the base's, to the byte."""
    from lora_dag.bases.layout import digests

    model = export.model.model_copy(update={"pretrained": str(folder)})
    others = set(export.family.COMPONENTS) - set(export.tensors)
    if digests(model, others) != digests(export.model, others):
        raise RuntimeError("the merged export holds another component than the base")
    return LoadedBack(export.load_base(folder), [], None)


def usage(card: Card) -> str:
    place = json.dumps(card.place if card.is_repository else f"{card.place}/merged", ensure_ascii=False)
    folder = f'snapshot_download({place}) + "/merged"' if card.is_repository else place
    variant = f", variant={json.dumps(card.variant)}" if card.variant else ""
    end = ", with `snapshot_download` of `huggingface_hub`." if card.is_repository else "."
    return f"With the adapter in its weights: `{card.pipeline}.from_pretrained({folder}{variant})`{end}"
