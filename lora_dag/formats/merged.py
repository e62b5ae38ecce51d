"""The whole pipeline in the diffusers layout, with the adapter merged into the weights, for ``from_pretrained``.

Adapted components are float32. Weights of the others have the base's bytes, and no name has the base's variant.
model_index.json lists null for components whose files the base does not have.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.formats import LoadedBack

if TYPE_CHECKING:
    from lora_dag.formats import AdapterKind, Card, Export

FILE = "model_index.json"
READER = "`DiffusionPipeline.from_pretrained`"
IS_ADAPTER = False
LOADED_BY_PEFT = False
CAVEAT = ""
MAX_SHARD = 5 * 10**9
"""Bytes of a weight file. diffusers and transformers load several by their index."""
NULL = [None, None]


def unsupported_reason(adapter: AdapterKind) -> str:
    """Return why the format cannot hold the adapter; empty if it can."""
    return ""  # merged weights hold every kind of adapter


def write(export: Export, folder: Path) -> None:
    """Write the files into ``folder``. The modules have the merged weights afterwards."""
    from lora_dag.adapters import lora

    copy_base(export, folder)
    modules = export.load_modules()
    export.inject(modules)
    for component, module in modules.adapted.items():
        lora.merge(module)
        save_weights(export, component, module, folder / component)


def copy_base(export: Export, folder: Path) -> None:
    """Write model_index.json, and copy the base's files except the weights of the adapted components."""
    from lora_dag.core.files import read_json

    base = Path(export.model.pretrained)
    listed = read_json(base / FILE)
    parts = {name: entry for name, entry in listed.items() if isinstance(entry, list) and entry != NULL}
    missing = [name for name in parts if not copied_files(base / name, export.model.variant)]
    if "feature_extractor" in missing:  # StableDiffusionPipeline refuses a safety checker without one
        missing += [name for name in ("safety_checker",) if name in parts]
    folder.mkdir(parents=True)
    if missing:
        text = json.dumps(listed | dict.fromkeys(missing, NULL), indent=2, ensure_ascii=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(base / FILE, folder / FILE)
    for component in parts.keys() - set(missing):
        (folder / component).mkdir()
        for name, path in copied_files(base / component, export.model.variant).items():
            if component not in export.tensors or path.suffix == ".json" and ".index." not in path.name:
                copy_file(path, folder / component / name, export.model.variant)


def copied_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """Return the files of a component by their names without the variant; empty if the component cannot be loaded."""
    from lora_dag.bases.component_files import loaded_files, weight_files

    if not folder.is_dir() or ((folder / "config.json").exists() and not weight_files(folder, variant)):
        return {}
    suffix = f".{variant}" if variant else ""
    files = [path for path in loaded_files(folder, variant) if ".index." not in path.name]
    files += folder.glob(f"*.index{suffix}.json")
    return {without_variant(path.name, variant): path for path in files}


def without_variant(name: str, variant: str | None) -> str:
    """Return ``model.safetensors`` for ``model.fp16.safetensors``, also of shards and of their index."""
    return name.replace(f".{variant}", "") if variant else name


def copy_file(path: Path, target: Path, variant: str | None) -> None:
    """Copy a file; in an index of shards, the names of the shards have no variant."""
    from lora_dag.core.files import read_json

    if variant and ".index." in path.name:
        index = read_json(path)
        index["weight_map"] = {key: without_variant(name, variant) for key, name in index["weight_map"].items()}
        target.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(path, target)


def save_weights(export: Export, component: str, module: Any, folder: Path) -> None:
    """Write a component's weights: one file, or shards with an index if they are larger than MAX_SHARD."""
    from huggingface_hub import split_torch_state_dict_into_shards

    from lora_dag.adapters.adapter_set import file_name
    from lora_dag.core.tensors import save_tensors

    stem = "diffusion_pytorch_model" if component == export.family.DENOISER else "model"
    tensors = {file_name(component, name): tensor for name, tensor in module.state_dict().items()}
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=MAX_SHARD)
    for name, keys in split.filename_to_tensors.items():
        save_tensors(folder / name, {key: tensors[key] for key in keys}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Load the whole pipeline as its user does, and check that all other components have the base's bytes.

    Only the adapted components are loaded in float32, and the others are freed.
    """
    import torch
    from diffusers import DiffusionPipeline

    from lora_dag.adapters.base_modules import BaseModules
    from lora_dag.core import quiet
    from lora_dag.families import common

    require_same_files(export, folder)
    encoders = export.family.TEXT_ENCODERS if export.adapter.text_lora else ()
    dtypes = dict.fromkeys([export.family.DENOISER, *encoders], torch.float32) | {"default": torch.bfloat16}
    absent = dict.fromkeys(common.declared_null(export.model, export.family.OPTIONAL))
    quiet.disable_progress_bars()
    with quiet.without_warnings():  # on the missing safety checker
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True, **absent)
    adapted = {name: getattr(pipeline, name).eval().requires_grad_(False).to(export.device) for name in export.tensors}
    text = export.family.text_of(pipeline) if encoders else None
    return LoadedBack(BaseModules(adapted[export.family.DENOISER], text, adapted), [], None)


def require_same_files(export: Export, folder: Path) -> None:
    """Raise RuntimeError if a weight or config file of a component that was not adapted differs from the base."""
    import filecmp

    base, variant = Path(export.model.pretrained), export.model.variant
    for component in {path.name for path in folder.iterdir() if path.is_dir()} - set(export.tensors):
        for name, path in copied_files(base / component, variant).items():
            is_rewritten = variant and ".index." in name
            if not is_rewritten and not filecmp.cmp(path, folder / component / name, shallow=False):
                raise RuntimeError(f"{component}/{name} of the merged export differs from the base")


def usage(card: Card) -> str:
    """Return Markdown on how to load the files."""
    source = json.dumps(card.source if card.is_repository else f"{card.source}/merged", ensure_ascii=False)
    folder = f'snapshot_download({source}) + "/merged"' if card.is_repository else source
    end = ", with `snapshot_download` of `huggingface_hub`." if card.is_repository else "."
    arguments = ", ".join([folder, *(f"{name}=None" for name in card.absent)])
    return f"Merged into the weights, in float32: `{card.pipeline}.from_pretrained({arguments})`{end}"
