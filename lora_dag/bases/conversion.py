"""Converts a checkpoint in one file to the diffusers layout, once, with diffusers' ``from_single_file``.

In: the file, beside model_index.json, configs and tokenizers of its base model (``single_file.py``).
Out: <state>/bases/<digest>, the same folder with the file's weights; the digest covers all inputs of the conversion.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.bases.component_files import loaded_files, weight_files
from lora_dag.bases.hub import changed_files, file_states
from lora_dag.bases.single_file import FLOATS, components_in_file, tensor_names
from lora_dag.core import quiet
from lora_dag.core.console import Problem, UserError, log
from lora_dag.core.files import from_json, replaced, sha256_json, state_dir, write_json
from lora_dag.core.kept_digests import sha256_files
from lora_dag.core.locks import lock
from lora_dag.core.tensors import read_header
from lora_dag.families.common import pipeline_class

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

TRAINING_ONLY = r"^first_stage_model\.(loss|model_ema)\."
"""Tensors of a VAE that only its own training uses."""
OWN_CONFIGS = "Use the configs of its own base model."
PACKAGES = ("diffusers", "transformers", "safetensors")
VERSION = 1
"""Raise it when the same inputs are converted to other bytes."""
MAX_SHOWN = 160
"""Characters of a quoted library message."""


def convert(file: Path, model: ModelParams, family: Family, make: bool = True) -> tuple[Path, str]:
    """Return the folder in the diffusers layout and the file's sha256; convert the file unless that was done.

    Waits for another process that converts the same file.

    Raises:
        UserError: diffusers cannot convert the file, the disk is full, or ``make`` is False and nothing was converted.
    """
    inputs = conversion_inputs(file, model, family)
    target = state_dir() / "bases" / sha256_json(inputs)[:16]
    if not is_complete(target):
        if not make:
            text = f"{file}: not converted to the diffusers layout yet. Run `python -m stages.cache_latents`."
            raise UserError(Problem("checkpoint-not-converted", text))
        with lock(state_dir() / "writing" / target.name, shown_as=file, wait=True):
            if not is_complete(target):
                log.info("convert     %s to the diffusers layout, once", file)
                require_space(file)
                with replaced(target) as folder:
                    write_folder(folder, file, model, family)
                    record = file_states(folder, [path.relative_to(folder).as_posix() for path in files_in(folder)])
                    write_json(folder / "conversion.json", {"made_from": inputs, "files": record})
    return target, inputs["checkpoint"]


def conversion_inputs(file: Path, model: ModelParams, family: Family) -> dict[str, Any]:
    """Return all inputs that determine the bytes of the converted folder; paths are no part of them."""
    copied = files_to_copy(file, model, family)
    digests = sha256_files([file, *copied])
    return {
        "checkpoint": digests[file],
        "family": model.family,
        "files": {path.relative_to(file.parent).as_posix(): digests[path] for path in copied},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "variant": model.variant,
        "version": VERSION,
    }


def files_to_copy(file: Path, model: ModelParams, family: Family) -> list[Path]:
    """Return the files to copy: configs, vocabularies, and weights of components that are not in the file."""
    root, inside = file.parent, components_in_file(file, model, family)
    copied = [root / "model_index.json"]
    for name in family.COMPONENTS:
        if (root / name).is_dir():
            weights = {*weight_files(root / name, model.variant)} if name in inside else set()
            files = [path for path in loaded_files(root / name, model.variant) if path not in weights]
            copied += [path for path in files if name not in inside or ".index." not in path.name]
    return copied


def is_complete(folder: Path) -> bool:
    """Return whether the folder has all files that were written, with the same bytes."""
    try:
        record = from_json((folder / "conversion.json").read_text(encoding="utf-8"))["files"]
        return not changed_files(folder, record, verify=True)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def require_space(file: Path) -> None:
    """Raise UserError if the state directory has no space for the weights."""
    folder = state_dir()
    folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(folder).free, file.stat().st_size
    if free < need:
        text = f"{folder}: {free / 1e9:.1f} GB free, but the converted {file.name} needs {need / 1e9:.1f} GB."
        raise UserError(Problem("disk-full", f"{text} Set LORA_STATE_DIR to another disk."))


def write_folder(folder: Path, file: Path, model: ModelParams, family: Family) -> None:
    """Write the weights as diffusers converts them, one component in memory at a time, and copy all other files."""
    with quiet.without_warnings():  # on torchvision, which nothing here needs
        quiet.disable_progress_bars()
        require_all_weights(family.DENOISER, file, model, family)
        for name in components_in_file(file, model, family):
            load_component(name, file, model, family).save_pretrained(folder / name, variant=model.variant)
            if name == "vae":
                require_all_weights(name, file, model, family)
            elif name != family.DENOISER:
                require_depth(name, file, model, family)
    for path in files_to_copy(file, model, family):
        target = folder / path.relative_to(file.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a config that the library wrote, with its own version in it
        if path.suffix == ".safetensors":
            link_or_copy(path, target)
        else:
            shutil.copyfile(path, target)


def link_or_copy(path: Path, target: Path) -> None:
    """Link the file, or copy it to another disk."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def load_component(name: str, file: Path, model: ModelParams, family: Family) -> Any:
    """Return a component with the file's weights, in their own dtype, by diffusers' ``from_single_file``.

    Raises:
        UserError: the file's tensors differ from those that the configs beside it describe.
    """
    listed = from_json((file.parent / "model_index.json").read_text(encoding="utf-8"))
    others = [other for other, entry in listed.items() if isinstance(entry, list) and other != name]
    try:
        pipeline = pipeline_class(family).from_single_file(
            str(file),
            config=str(file.parent),
            dtype=own_dtype(name, file, model, family),
            local_files_only=True,
            **dict.fromkeys(others),
        )
        module = getattr(pipeline, name)
        if hasattr(module, "tie_weights"):  # T5's embeddings, which a file may have once
            module.tie_weights()
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            raise NotImplementedError  # most components raise it themselves
    except NotImplementedError:
        text = f"{file}: it lacks tensors that {name}/config.json describes. {OWN_CONFIGS}"
        raise UserError(Problem("checkpoint-mismatch", text)) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # many types, for a tensor of another shape or a missing block
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        cause = f"{type(error).__name__}: {first}"[:MAX_SHOWN]
        text = f"{file}: it does not fit {name}/config.json beside it ({cause}). {OWN_CONFIGS}"
        raise UserError(Problem("checkpoint-mismatch", text)) from None
    return module


def require_all_weights(name: str, file: Path, model: ModelParams, family: Family) -> None:
    """Raise UserError if file and config differ in their number of weights: diffusers ignores additional ones."""
    import diffusers
    import torch

    header = read_header(file)
    cls = getattr(diffusers, family.COMPONENTS[name])
    with torch.device("meta"):
        module = cls.from_config(cls.load_config(str(file.parent), subfolder=name, local_files_only=True))
    described = sum(tensor.numel() for tensor in module.state_dict().values())
    names = [key for key in tensor_names(name, header, family) if not re.search(TRAINING_ONLY, key)]
    present = sum(math.prod(header[key]["shape"]) for key in names)
    if present != described:
        text = f"{file}: it has {present:,} weights of {name}, but {name}/config.json describes {described:,}."
        raise UserError(Problem("checkpoint-mismatch", f"{text} {OWN_CONFIGS}"))


def require_depth(name: str, file: Path, model: ModelParams, family: Family) -> None:
    """Raise UserError if a text encoder has more layers than its config describes.

    OpenCLIP's ``resblocks`` are not counted: Stable Diffusion 2 leaves its last layer out.
    """
    matches = [re.search(r"\.(?:layers|block)\.(\d+)\.", key) for key in tensor_names(name, read_header(file), family)]
    present = max((int(match[1]) + 1 for match in matches if match), default=0)
    config = from_json((file.parent / name / "config.json").read_text(encoding="utf-8"))
    described = config.get("num_hidden_layers", config.get("num_layers", present))
    if present > described:
        text = f"{file}: it has {present} layers of {name}, but {name}/config.json describes {described}."
        raise UserError(Problem("checkpoint-mismatch", f"{text} {OWN_CONFIGS}"))


def own_dtype(name: str, file: Path, model: ModelParams, family: Family) -> torch.dtype:
    """Return the dtype of a component's weights; of several, the one that holds all without loss."""
    import torch

    header = read_header(file)
    names = tensor_names(name, header, family)
    dtypes = {getattr(torch, FLOATS[header[key]["dtype"]]) for key in names if header[key]["dtype"] in FLOATS}
    return functools.reduce(torch.promote_types, dtypes)
