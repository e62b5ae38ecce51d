"""A checkpoint in one file brought into the diffusers layout, once, by diffusers' own ``from_single_file``.

In: the file, beside model_index.json, configs and tokenizers of its base (``single_file.py``).
Out: <state>/bases/<digest>, the same folder with the file's weights in it; the digest is of all that decides them.
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

from lora_dag.bases.hub import is_whole, state_of
from lora_dag.bases.layout import component_files, weight_files
from lora_dag.bases.single_file import FLOATS, components_in_file, names_of
from lora_dag.core import quiet
from lora_dag.core.console import UserError, log
from lora_dag.core.files import from_json, replaced, sha256_file, sha256_json, state_dir, write_json
from lora_dag.core.locks import lock
from lora_dag.core.tensors import read_header
from lora_dag.families.common import pipeline_class

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

TRAINING = r"^first_stage_model\.(loss|model_ema)\."
"""Names in a VAE's part that only its own training read."""
OWN_CONFIGS = "use the configs of its own base"
PACKAGES = ("diffusers", "transformers", "safetensors")
VERSION = 1
"""Raise it when the same inputs are converted to other bytes."""
MAX_SHOWN = 160
"""Characters of a library's own message."""


def convert(file: Path, model: ModelParams, family: Family, make: bool = True) -> tuple[Path, str]:
    """The folder in the diffusers layout, made unless it is complete already, and the file's sha256.

    A process that finds another at work on the same one waits for it.

    Raises:
        UserError: diffusers cannot convert the file, there is no space, or it was not done and ``make`` is False.
    """
    made_from = inputs(file, model, family)
    target = state_dir() / "bases" / sha256_json(made_from)[:16]
    if not is_complete(target):
        if not make:
            raise UserError(f"{file}: not converted to the diffusers layout yet; run `python -m stages.cache_latents`")
        with lock(state_dir() / "writing" / target.name, shown=file, wait=True):
            if not is_complete(target):
                log.info("convert     %s to the diffusers layout, once", file)
                require_space(file)
                with replaced(target) as folder:
                    write(folder, file, model, family)
                    record = {path.relative_to(folder).as_posix(): state_of(path) for path in files_in(folder)}
                    write_json(folder / "conversion.json", {"made_from": made_from, "files": record})
    return target, made_from["checkpoint"]


def inputs(file: Path, model: ModelParams, family: Family) -> dict[str, Any]:
    """All that decides the bytes of the converted folder; no path."""
    kept = kept_files(file, model, family)
    return {
        "checkpoint": sha256_file(file),
        "family": model.family,
        "files": {path.relative_to(file.parent).as_posix(): sha256_file(path) for path in kept},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "variant": model.variant,
        "version": VERSION,
    }


def kept_files(file: Path, model: ModelParams, family: Family) -> list[Path]:
    """What is copied as it is: texts, and the weights of components that are not in the file."""
    root, inside = file.parent, components_in_file(file, model, family)
    found = [root / "model_index.json"]
    for name in family.COMPONENTS:
        if (root / name).is_dir():
            weights = {*weight_files(root / name, model.variant)} if name in inside else set()
            there = [path for path in component_files(root / name, model.variant) if path not in weights]
            found += [path for path in there if name not in inside or ".index." not in path.name]
    return found


def is_complete(folder: Path) -> bool:
    """Whether it is whole, to the byte."""
    try:
        record = from_json((folder / "conversion.json").read_text(encoding="utf-8"))["files"]
        return all(is_whole(folder / name, state, verify=True) for name, state in record.items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def require_space(file: Path) -> None:
    """Raises UserError where the state directory has no room for the weights."""
    folder = state_dir()
    folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(folder).free, file.stat().st_size
    if free < need:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, {file.name} takes {need / 1e9:.1f} GB once more in the diffusers"
            " layout; set LORA_STATE_DIR to another disk"
        )


def write(folder: Path, file: Path, model: ModelParams, family: Family) -> None:
    """The file's weights as diffusers converts them, a component in memory at a time; then all else as it stands."""
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        quiet.disable_progress_bars()
        require_all_of(family.DENOISER, file, model, family)
        for name in components_in_file(file, model, family):
            load(name, file, model, family).save_pretrained(folder / name, variant=model.variant)
            if name == "vae":
                require_all_of(name, file, model, family)
            elif name != family.DENOISER:
                require_depth(name, file, model, family)
    for path in kept_files(file, model, family):
        place = folder / path.relative_to(file.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # a config as the library wrote it, with its own version in it
        if path.suffix == ".safetensors":
            link(path, place)
        else:
            shutil.copyfile(path, place)


def link(path: Path, place: Path) -> None:
    """The same bytes on the disk, not twice; another disk gets a copy."""
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copyfile(path, place)


def load(name: str, file: Path, model: ModelParams, family: Family) -> Any:
    """A component with the file's weights, in their own dtype, by diffusers' ``from_single_file``.

    Raises:
        UserError: the file lacks tensors, or has others than the configs beside it describe.
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
        if hasattr(module, "tie_weights"):  # T5's embeddings, which a file may hold once
            module.tie_weights()
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            raise NotImplementedError  # as most components do by themselves
    except NotImplementedError:
        raise UserError(f"{file}: lacks tensors that {name}/config.json describes; {OWN_CONFIGS}") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds, where a tensor has another shape or a block is not there
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"{type(error).__name__}: {said}"[:MAX_SHOWN]
        raise UserError(f"{file}: does not fit {name}/config.json beside it ({what}); {OWN_CONFIGS}") from None
    return module


def require_all_of(name: str, file: Path, model: ModelParams, family: Family) -> None:
    """Raises UserError where the file has more or less of it than its config describes: diffusers leaves the rest."""
    import diffusers
    import torch

    header = read_header(file)
    cls = getattr(diffusers, family.COMPONENTS[name])
    with torch.device("meta"):
        module = cls.from_config(cls.load_config(str(file.parent), subfolder=name, local_files_only=True))
    described = sum(tensor.numel() for tensor in module.state_dict().values())
    names = [key for key in names_of(name, header, family) if not re.search(TRAINING, key)]
    there = sum(math.prod(header[key]["shape"]) for key in names)
    if there != described:
        what = f"has {there:,} weights of {name}, {name}/config.json describes {described:,}"
        raise UserError(f"{file}: {what}; {OWN_CONFIGS}")


def require_depth(name: str, file: Path, model: ModelParams, family: Family) -> None:
    """Raises UserError where a text encoder has more layers than its config describes.

    OpenCLIP's (``resblocks``) may have one: Stable Diffusion 2 leaves its last layer out.
    """
    found = [re.search(r"\.(?:layers|block)\.(\d+)\.", key) for key in names_of(name, read_header(file), family)]
    there = max((int(match[1]) + 1 for match in found if match), default=0)
    config = from_json((file.parent / name / "config.json").read_text(encoding="utf-8"))
    described = config.get("num_hidden_layers", config.get("num_layers", there))
    if there > described:
        what = f"has {there} layers of {name}, {name}/config.json describes {described}"
        raise UserError(f"{file}: {what}; {OWN_CONFIGS}")


def own_dtype(name: str, file: Path, model: ModelParams, family: Family) -> torch.dtype:
    """The dtype of a component's weights; of several, the one that holds all without loss."""
    import torch

    header = read_header(file)
    names = names_of(name, header, family)
    dtypes = {getattr(torch, FLOATS[header[key]["dtype"]]) for key in names if header[key]["dtype"] in FLOATS}
    return functools.reduce(torch.promote_types, dtypes)
