"""A checkpoint in one .safetensors file, as the community ships them, brought into the diffusers layout once.

In: a folder with the file at its top, beside model_index.json, configs and tokenizers of its base.
Out: <state>/bases/<digest>, the same folder with the file's weights in it; the digest is of all that decides them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.bases.hub import is_whole, state_of
from lora_dag.bases.layout import component_files, weight_files
from lora_dag.core import quiet
from lora_dag.core.console import UserError, log
from lora_dag.core.files import from_json, replaced, sha256_file, sha256_json, state_dir, write_json
from lora_dag.core.locks import lock
from lora_dag.core.tensors import read_header
from lora_dag.families.common import absent
from lora_dag.families.protocol import all_families, load_family

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family, SingleFile

DENOISER = "model.diffusion_model."
"""Before the names of the denoiser's tensors; files of SD3 and FLUX.1 may have the names alone."""
FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "bfloat16",  # which holds every float8
    "F8_E5M2": "bfloat16",
}
"""safetensors' dtypes -> torch's, to keep them in without loss."""
SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")
LORA = ("lora_", ".lora", "hada_w1", "lokr_w1")
TRAINING = r"^first_stage_model\.(loss|model_ema)\."
"""Names in a VAE's part that only its own training read."""
OWN_CONFIGS = "use the configs of its own base"
PACKAGES = ("diffusers", "transformers", "safetensors")
VERSION = 1
"""Raise it when the same inputs are converted to other bytes."""
MAX_SHOWN = 160
"""Characters of a library's own message."""


def find(root: Path, family: Family) -> Path | None:
    """The checkpoint at the top of a folder; None where the folder has the denoiser's weights in its own layout.

    Raises:
        UserError: several files, or a pickle alone.
    """
    files = sorted(root.glob("*.safetensors"))
    if any((root / family.DENOISER).glob("*.safetensors")):
        if files:
            log.warning(
                "warning: %s is not read, since %s has weights of its own; to train on the file, remove those",
                *(files[0], root / family.DENOISER),
            )
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{root}: {len(files)} checkpoints ({names}); leave one there")
    pickles = sorted(path for path in root.glob("*.*") if path.suffix in {".ckpt", ".pt", ".pth"})
    if pickles and not files:
        raise UserError(f"{pickles[0]}: a pickle, which can run code when loaded; get the .safetensors file instead")
    return files[0] if files else None


def held(file: Path, model: ModelParams, family: Family) -> list[str]:
    """Components whose weights are taken from the file: all that it has and model_index.json does not declare null."""
    names, inside = read_header(file), family.SINGLE_FILE.inside
    there = {name for name in inside if any(key.startswith(inside[name]) for key in names)} | {family.DENOISER}
    return [name for name in family.COMPONENTS if name in there - absent(model, family.OPTIONAL)]


def nowhere(file: Path, model: ModelParams, family: Family) -> list[str]:
    """Components whose weights are neither in the file nor in their folder beside it."""
    known = {*held(file, model, family), *absent(model, family.OPTIONAL)}
    return [
        name
        for name in family.COMPONENTS
        if name not in known
        and (file.parent / name / "config.json").exists()  # schedulers and tokenizers have none
        and not weight_files(file.parent / name, model.variant)
    ]


def problems(file: Path, model: ModelParams, family: Family) -> list[str]:
    """What is wrong with the file itself, one line each, from its header and the scheduler's config."""
    header = read_header(file)
    if not header or not opens(file):
        return [f"{file}: truncated or no safetensors file; fetch it again"]
    lora = next((name for name in header if any(mark in name for mark in LORA)), None)
    if lora:
        return [f"{file}: a LoRA ({lora}) and no checkpoint; model.pretrained takes the base that it was made on"]
    found = family_in(header)
    if found != model.family and (found or family.SINGLE_FILE.marks):
        return [f"{file}: {other_family(header, found, model, family, file.parent)}"]
    held_names = [name for part in held(file, model, family) for name in names_of(part, header, family)]
    bad = [name for name in held_names if name.endswith(SCALES) or is_quantised(name, header[name])]
    if bad:
        what = f"quantised ({bad[0]} is {header[bad[0]]['dtype']})"
        return [f"{file}: {what}; get the checkpoint in float16, bfloat16 or float32"]
    return scheduler_problems(file, header)


def opens(file: Path) -> bool:
    """Whether safetensors itself accepts the header: every shape, dtype and offset."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def is_quantised(name: str, entry: dict[str, Any]) -> bool:
    """No float; of integers, positions and counters are none of the weights."""
    return entry["dtype"] not in FLOATS and not name.endswith(".position_ids") and math.prod(entry["shape"]) != 1


def family_in(names: Iterable[str]) -> str | None:
    """The family whose marks are all there; the one with the most of them, since SDXL's files have SD's mark too."""
    known = set(names)
    marks = {name: family.SINGLE_FILE.marks for name, family in all_families().items()}
    fit = [name for name in marks if marks[name] and all({m, m.removeprefix(DENOISER)} & known for m in marks[name])]
    return max(fit, key=lambda name: len(marks[name]), default=None)


def other_family(names: Iterable[str], found: str | None, model: ModelParams, family: Family, root: Path) -> str:
    if found:
        return (
            f"a checkpoint of family '{found}', and model.family is '{model.family}'; use model.family: {found} and the"
            f" configs of its own base: {how_to_get(load_family(found).SINGLE_FILE, root)}"
        )
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in names):
        place = root / family.DENOISER / "diffusion_pytorch_model.safetensors"
        return f"a denoiser with diffusers' own names of tensors; put it in its place: {place}"
    first = min(names)
    return f"no checkpoint of family '{model.family}': no tensor {family.SINGLE_FILE.marks[-1]} (it has {first})"


def how_to_get(kind: SingleFile, root: Path, *patterns: str) -> str:
    wanted = " ".join(f"--include '{pattern}'" for pattern in patterns or ("*.json", "*.txt", "*.model"))
    return f"hf download {kind.configs} {wanted} --local-dir {root}"


def names_of(component: str, names: Iterable[str], family: Family) -> list[str]:
    """A component's tensors, as the file has them.

    The denoiser's are all that start as a denoiser's do; where nothing does, all that belong to no other component.
    """
    inside = family.SINGLE_FILE.inside
    if component != family.DENOISER:
        return [name for name in names if name.startswith(inside.get(component, ()))]
    others = tuple(prefix for prefixes in inside.values() for prefix in prefixes)
    prefixed = [name for name in names if name.startswith(DENOISER)]
    return prefixed or [name for name in names if not name.startswith(others)]


def scheduler_problems(file: Path, names: Iterable[str]) -> list[str]:
    """Marks of what a checkpoint predicts, which ComfyUI and its peers obey, against the scheduler beside it."""
    path = file.parent / "scheduler" / "scheduler_config.json"
    try:
        config = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # base_files says so
    wanted = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    return [
        f"{path} {key}: got {json.dumps(config.get(key))}, and {file.name} is marked {mark}; write {json.dumps(value)}"
        for mark, (key, value) in wanted.items()
        if mark in names and config.get(key) != value
    ]


# The conversion


def convert(file: Path, model: ModelParams, family: Family, make: bool = True) -> tuple[Path, str]:
    """The folder in the diffusers layout, made unless it stands already, and the file's sha256.

    A process that finds another at work on the same one waits for it.

    Raises:
        UserError: diffusers cannot convert the file, there is no space, or it was not done and ``make`` is False.
    """
    made_from = inputs(file, model, family)
    target = state_dir() / "bases" / sha256_json(made_from)[:16]
    if not stands(target):
        if not make:
            raise UserError(f"{file}: not converted to the diffusers layout yet; run `python -m stages.cache_latents`")
        with lock(state_dir() / "writing" / target.name, shown=file, wait=True):
            if not stands(target):
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
    """What is taken over as it stands: texts, and the weights of components that the file goes without."""
    root, inside = file.parent, held(file, model, family)
    found = [root / "model_index.json"]
    for name in family.COMPONENTS:
        if (root / name).is_dir():
            weights = {*weight_files(root / name, model.variant)} if name in inside else set()
            there = [path for path in component_files(root / name, model.variant) if path not in weights]
            found += [path for path in there if name not in inside or ".index." not in path.name]
    return found


def stands(folder: Path) -> bool:
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
        for name in held(file, model, family):
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
    import diffusers

    listed = from_json((file.parent / "model_index.json").read_text(encoding="utf-8"))
    others = [other for other, entry in listed.items() if isinstance(entry, list) and other != name]
    try:
        pipeline = getattr(diffusers, family.PIPELINE).from_single_file(
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

    OpenCLIP's (``resblocks``) may: Stable Diffusion 2 goes without the last.
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
