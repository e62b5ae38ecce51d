"""The whole pipeline in the diffusers layout, in float32, with the adapter merged into the weights.

Files of components that were not adapted are bit-identical copies of the base's files.
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
CAVEAT = ""


def unsupported_reason(adapter: AdapterKind) -> str:
    """Return why the format cannot hold the adapter; empty if it can."""
    return ""  # merged weights hold every kind of adapter


def write(export: Export, folder: Path) -> None:
    """Write the files into ``folder``."""
    from lora_dag.adapters import lora
    from lora_dag.adapters.adapter_set import file_name
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
    """Copy the base's files, except the weights of the adapted components."""
    from lora_dag.bases.component_files import loaded_files
    from lora_dag.families.common import declared_null

    base, family = Path(export.model.pretrained), export.family
    folder.mkdir(parents=True)
    shutil.copyfile(base / FILE, folder / FILE)
    for component in set(family.COMPONENTS) - declared_null(export.model, family.COMPONENTS):
        (folder / component).mkdir()
        for path in loaded_files(base / component, export.model.variant):
            if component not in export.tensors or path.suffix == ".json" and ".index." not in path.name:
                shutil.copyfile(path, folder / component / path.name)


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Load the pipeline by the family's loader, and check that all other components are bit-identical to the base."""
    from lora_dag.bases.component_files import digests

    model = export.model.model_copy(update={"pretrained": str(folder)})
    others = set(export.family.COMPONENTS) - set(export.tensors)
    if digests(model, others) != digests(export.model, others):
        raise RuntimeError("a component of the merged export that was not adapted differs from the base")
    return LoadedBack(export.load_base(folder), [], None)


def usage(card: Card) -> str:
    """Return Markdown on how to load the files."""
    source = json.dumps(card.source if card.is_repository else f"{card.source}/merged", ensure_ascii=False)
    folder = f'snapshot_download({source}) + "/merged"' if card.is_repository else source
    variant = f", variant={json.dumps(card.variant)}" if card.variant else ""
    end = ", with `snapshot_download` of `huggingface_hub`." if card.is_repository else "."
    return f"Merged into the weights: `{card.pipeline}.from_pretrained({folder}{variant})`{end}"
