"""A checkpoint in one .safetensors file, as the community ships them: what is in it, and why it is refused.

It lies at the top of a folder, beside model_index.json, configs and tokenizers of its base. Headers alone are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.bases import layout
from lora_dag.bases.layout import weight_files
from lora_dag.core.console import UserError, log
from lora_dag.core.files import from_json
from lora_dag.core.tensors import read_header
from lora_dag.families.common import absent
from lora_dag.families.protocol import SingleFile, all_families, load_family

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

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


def find(root: Path, family: Family) -> Path | None:
    """The checkpoint at the top of a folder; None where the folder has the denoiser's weights in its own layout.

    Raises:
        UserError: the checkpoint itself was named, there are several, or a pickle alone.
    """
    if root.is_file():
        folder = root.parent / root.stem
        raise UserError(
            f"params.yaml model.pretrained: '{root}' is a file; put it into a folder of its own beside the configs of"
            f" its base, and name the folder: {how_to_get(SingleFile(), folder)}"
        )
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


def problems(file: Path, model: ModelParams, family: Family) -> list[str]:
    """What is wrong with the file, or with what must lie beside it, one line each."""
    found = file_problems(file, model, family)
    if found:
        return found
    root, configs = file.parent, how_to_get(family.SINGLE_FILE, file.parent)
    if not (root / "model_index.json").exists():
        return [f"{file}: no model_index.json beside it; fetch the configs of its base: {configs}"]
    if layout.index_problems(model, family, root):
        index = root / "model_index.json"
        return [f"{index}: of no {family.PIPELINE}, as {file.name} is; fetch its base's: {configs}"]
    missing = missing_components(file, model, family)
    found = [
        f"{file}: holds no {name}, and {root / name} no weights of it for model.variant '{model.variant or 'null'}';"
        f" fetch them: {how_to_get(family.SINGLE_FILE, root, f'{name}/*.safetensors')}"
        for name in missing
    ]
    weightless = {*components_in_file(file, model, family), *missing}
    return found + layout.problems(model, family, weightless=weightless)


def components_in_file(file: Path, model: ModelParams, family: Family) -> list[str]:
    """Components whose weights are taken from the file: all that it has and model_index.json does not declare null."""
    names, inside = read_header(file), family.SINGLE_FILE.inside
    there = {name for name in inside if any(key.startswith(inside[name]) for key in names)} | {family.DENOISER}
    return [name for name in family.COMPONENTS if name in there - absent(model, family.OPTIONAL)]


def missing_components(file: Path, model: ModelParams, family: Family) -> list[str]:
    """Components whose weights are neither in the file nor in their folder beside it."""
    known = {*components_in_file(file, model, family), *absent(model, family.OPTIONAL)}
    return [
        name
        for name in family.COMPONENTS
        if name not in known
        and (file.parent / name / "config.json").exists()  # schedulers and tokenizers have none
        and not weight_files(file.parent / name, model.variant)
    ]


def file_problems(file: Path, model: ModelParams, family: Family) -> list[str]:
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
    names = [name for part in components_in_file(file, model, family) for name in names_of(part, header, family)]
    bad = [name for name in names if name.endswith(SCALES) or is_quantised(name, header[name])]
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
