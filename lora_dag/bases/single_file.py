"""Reads and checks a checkpoint in one .safetensors file, the usual form in the community.

The file is in a folder with model_index.json, configs and tokenizers of its base model. Only headers are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.bases import diffusers_folder
from lora_dag.bases.component_files import weight_files
from lora_dag.core.console import Problem, UserError, warn
from lora_dag.core.files import from_json
from lora_dag.core.tensors import read_header
from lora_dag.families.common import declared_null
from lora_dag.families.protocol import SingleFile, all_families, load_family

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

DENOISER = "model.diffusion_model."
"""Prefix of the denoiser's tensors; files of SD3 and FLUX.1 may lack it."""
FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "bfloat16",  # holds every float8 without loss
    "F8_E5M2": "bfloat16",
}
"""Dtype of safetensors -> dtype of torch that holds it without loss."""
QUANTIZATION_SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")
LORA_MARKS = ("lora_", ".lora", "hada_w1", "lokr_w1")


def find_checkpoint(model: ModelParams, family: Family) -> Path | None:
    """Return the checkpoint file of the folder ``model.pretrained``; None if the folder has the diffusers layout.

    Raises:
        UserError: it is itself a file, or the folder has several checkpoints or only a pickle.
    """
    root = Path(model.pretrained)
    if root.is_file():
        folder = root.parent / root.stem
        raise UserError(
            Problem(
                "checkpoint-not-in-folder",
                f"{model.setting('pretrained')}: '{root}' is a file. Move it into a folder, set model.pretrained to "
                f"the folder, and add the configs of its base model: {download_command(SingleFile(), folder)}",
            )
        )
    files = sorted(root.glob("*.safetensors"))
    if any((root / family.DENOISER).glob("*.safetensors")):
        if files:
            text = f"{files[0]}: not used, because {root / family.DENOISER} has weights."
            warn("checkpoint-ignored", f"{text} Remove them to train on the file.")
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(Problem("several-checkpoints", f"{root}: {len(files)} checkpoints ({names}). Keep one."))
    pickles = sorted(path for path in root.glob("*.*") if path.suffix in {".ckpt", ".pt", ".pth"})
    if pickles and not files:
        text = f"{pickles[0]}: a pickle, which can run code when loaded. Use the .safetensors file instead."
        raise UserError(Problem("pickle-weights", text))
    return files[0] if files else None


def checkpoint_problems(file: Path, model: ModelParams, family: Family) -> list[Problem]:
    """Return the problems of the file and of the configs and components that must be beside it."""
    problems = file_problems(file, model, family)
    if problems:
        return problems
    root, configs = file.parent, download_command(family.SINGLE_FILE, file.parent)
    if not (root / "model_index.json").exists():
        text = f"{file}: no model_index.json beside it. Fetch the configs of its base model: {configs}"
        return [Problem("no-model-index", text)]
    if diffusers_folder.index_problems(model, family, root):
        text = f"{root / 'model_index.json'}: not of a {family.PIPELINE}, as {file.name} needs."
        return [Problem("wrong-family", f"{text} Fetch the configs of its base model: {configs}")]
    missing = missing_components(file, model, family)
    problems = [
        Problem(
            "component-missing",
            f"{file}: it has no {name}, and {root / name} has no weights of model.variant '{model.variant or 'null'}'. "
            f"Fetch them: {download_command(family.SINGLE_FILE, root, f'{name}/*.safetensors')}",
        )
        for name in missing
    ]
    weightless = {*components_in_file(file, model, family), *missing}
    return problems + diffusers_folder.folder_problems(model, family, weightless=weightless)


def components_in_file(file: Path, model: ModelParams, family: Family) -> list[str]:
    """Return the components whose weights are in the file, without those that model_index.json declares null."""
    keys, prefixes = read_header(file), family.SINGLE_FILE.component_prefixes
    present = {name for name in prefixes if any(key.startswith(prefixes[name]) for key in keys)} | {family.DENOISER}
    return [name for name in family.COMPONENTS if name in present - declared_null(model, family.OPTIONAL)]


def missing_components(file: Path, model: ModelParams, family: Family) -> list[str]:
    """Return the components whose weights are neither in the file nor in a folder beside it."""
    known = {*components_in_file(file, model, family), *declared_null(model, family.OPTIONAL)}
    return [
        name
        for name in family.COMPONENTS
        if name not in known
        and (file.parent / name / "config.json").exists()  # schedulers and tokenizers have none
        and not weight_files(file.parent / name, model.variant)
    ]


def file_problems(file: Path, model: ModelParams, family: Family) -> list[Problem]:
    """Return the problems of the file itself, from its header and the scheduler's config."""
    header = read_header(file)
    if not header or not is_readable(file):
        return [Problem("base-damaged", f"{file}: truncated, or no safetensors file. Fetch it again.")]
    lora = next((name for name in header if any(mark in name for mark in LORA_MARKS)), None)
    if lora:
        text = f"{file}: a LoRA (it has {lora}), but a checkpoint is expected. Use its base model."
        return [Problem("lora-as-base", text)]
    detected = family_in(header)
    if detected != model.family and (detected or family.SINGLE_FILE.marker_tensors):
        return [family_problem(file, header, detected, model, family)]
    names = [name for part in components_in_file(file, model, family) for name in tensor_names(part, header, family)]
    quantized = [n for n in names if n.endswith(QUANTIZATION_SCALES) or is_quantized(n, header[n])]
    if quantized:
        text = f"{file}: quantized ({quantized[0]} is {header[quantized[0]]['dtype']})."
        return [Problem("checkpoint-quantized", f"{text} Use the checkpoint in float16, bfloat16 or float32.")]
    return scheduler_problems(file, header)


def is_readable(file: Path) -> bool:
    """Return whether safetensors accepts the header: every shape, dtype and offset."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def is_quantized(name: str, entry: dict[str, Any]) -> bool:
    """Return whether a tensor is no float; integer positions and counters are not weights and do not count."""
    return entry["dtype"] not in FLOATS and not name.endswith(".position_ids") and math.prod(entry["shape"]) != 1


def family_in(names: Iterable[str]) -> str | None:
    """Return the family whose marker tensors are all present; of several, the one with the most markers.

    SDXL's files have SD's marker too.
    """
    known = set(names)
    marks = {name: family.SINGLE_FILE.marker_tensors for name, family in all_families().items()}
    fit = [name for name in marks if marks[name] and all({m, m.removeprefix(DENOISER)} & known for m in marks[name])]
    return max(fit, key=lambda name: len(marks[name]), default=None)


def family_problem(
    file: Path, names: Iterable[str], detected: str | None, model: ModelParams, family: Family
) -> Problem:
    """Return the problem of a file that is no checkpoint of ``model.family``, with the kind that it is instead."""
    if detected:
        configs = download_command(load_family(detected).SINGLE_FILE, file.parent)
        return Problem(
            "wrong-family",
            f"{file}: a checkpoint of family '{detected}', but model.family is '{model.family}'. "
            f"Set model.family: {detected} and fetch the configs of its base model: {configs}",
        )
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in names):
        target = file.parent / family.DENOISER / "diffusion_pytorch_model.safetensors"
        return Problem("wrong-family", f"{file}: a denoiser with diffusers' tensor names. Move it to {target}.")
    expected = family.SINGLE_FILE.marker_tensors[-1]
    return Problem(
        "wrong-family",
        f"{file}: no checkpoint of family '{model.family}': it lacks the tensor {expected}, and has {min(names)}.",
    )


def download_command(kind: SingleFile, root: Path, *patterns: str) -> str:
    """Return the command that downloads files of the family's usual repository; by default, its configs."""
    includes = " ".join(f"--include '{pattern}'" for pattern in patterns or ("*.json", "*.txt", "*.model"))
    return f"hf download {kind.configs_repo} {includes} --local-dir {root}"


def tensor_names(component: str, names: Iterable[str], family: Family) -> list[str]:
    """Return the names of a component's tensors in the file.

    The denoiser's tensors have its prefix. In a file without it, they are all tensors of no other component.
    """
    by_component = family.SINGLE_FILE.component_prefixes
    if component != family.DENOISER:
        return [name for name in names if name.startswith(by_component.get(component, ()))]
    others = tuple(prefix for prefixes in by_component.values() for prefix in prefixes)
    prefixed = [name for name in names if name.startswith(DENOISER)]
    return prefixed or [name for name in names if not name.startswith(others)]


def scheduler_problems(file: Path, names: Iterable[str]) -> list[Problem]:
    """Return problems where marker tensors of the prediction type, which ComfyUI obeys, contradict the scheduler."""
    path = file.parent / "scheduler" / "scheduler_config.json"
    try:
        config = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # diffusers_folder reports it
    markers = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    return [
        Problem(
            "scheduler-mismatch",
            f"{path} {key}: got {json.dumps(config.get(key))}, but {file.name} has the marker {marker}. "
            f"Write {json.dumps(value)}.",
        )
        for marker, (key, value) in markers.items()
        if marker in names and config.get(key) != value
    ]
