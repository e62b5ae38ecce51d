"""Checks of a base model's folder in the diffusers layout: index, components, configs, vocabularies and weights.

It reads file names and contents only: nothing is imported from the folder and no model is built.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.bases.component_files import weight_files
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import from_json
from lora_dag.core.tensors import has_all_bytes
from lora_dag.families.protocol import all_families

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Sets of files of which a tokenizer needs one."""
FETCH_AGAIN = "Fetch the model again."


def folder_problems(
    model: ModelParams, family: Family, root: Path | None = None, weightless: Container[str] = ()
) -> list[Problem]:
    """Return every problem that keeps the base model from being loaded; empty for a sound one.

    Args:
        root: the folder to check, if ``model.pretrained`` is a pin or a single file.
        weightless: components whose weights are elsewhere.
    """
    root = root or Path(model.pretrained)
    wrong_index = index_problems(model, family, root)
    if wrong_index:
        return wrong_index
    problems = []
    index = root / "model_index.json"
    listed = from_json(index.read_text(encoding="utf-8"))
    for component, expected in family.COMPONENTS.items():
        folder = root / component
        entry = listed.get(component)
        declared = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if component in family.OPTIONAL and entry == [None, None]:
            continue
        if not folder.is_dir():
            null = f' Add it, or set "{component}": [null, null] in model_index.json.'
            text = f"{folder}: no such folder, but {family.PIPELINE} needs {expected or 'it'}."
            problems.append(Problem("base-incomplete", text + (null if component in family.OPTIONAL else "")))
        elif expected and str(declared).removesuffix("Fast") != expected:
            text = f"{index} {component}: got {declared or 'null'}, but family '{model.family}' needs {expected}."
            problems.append(Problem("wrong-family", f"{text} Choose a base model of that family."))
        elif component in weightless:
            problems += config_problems(folder) or text_problems(folder)
        else:
            problems += component_problems(folder, model.variant)
    return problems


def index_problems(model: ModelParams, family: Family, root: Path) -> list[Problem]:
    """Return at most one problem: no folder, no model_index.json, or the pipeline of another family."""
    place = f"{model.setting('pretrained')}: '{model.pretrained}'"
    if not root.is_dir():
        if model.pretrained.count("/") == 1 and not model.pretrained.startswith((".", "/", "data/")):
            local = f"data/{root.name}"
            return [
                Problem(
                    "base-missing",
                    f"{place} is no folder here. Run `hf download {model.pretrained} --local-dir {local}`, or set "
                    f"model.pretrained: {local}.yaml, a file with `hub: {model.pretrained}` and `revision: COMMIT`.",
                )
            ]
        return [Problem("base-missing", f"{place} is no folder. `dvc pull data/base` fetches the embedded base model.")]
    index = root / "model_index.json"
    if not index.exists():
        return [Problem("no-model-index", f"{place} has no model_index.json. Choose a folder in the diffusers layout.")]
    try:
        pipeline = from_json(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        return [Problem("base-damaged", f"{index}: not a model index of diffusers. Fetch the model again.")]
    if pipeline != family.PIPELINE:
        names = [name for name, other in all_families().items() if pipeline == other.PIPELINE]
        fix = f"Set model.family: {names[0]}." if names else "No family here trains this pipeline."
        text = f"{place} is a {pipeline}, but model.family '{model.family}' trains {family.PIPELINE}."
        return [Problem("wrong-family", f"{text} {fix}")]
    return []


def component_problems(folder: Path, variant: str | None) -> list[Problem]:
    """Return problems of a component's folder: configs, damaged files, missing weights."""
    damaged = config_problems(folder) or damaged_files(folder, variant)
    if damaged:
        return damaged
    if not (folder / "config.json").exists():  # schedulers and tokenizers have no weights
        return []
    if weight_files(folder, variant):
        return []
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        text = f"{folder}: its only weights are {pickles[0]}, a pickle, which can run code when loaded."
        return [Problem("pickle-weights", f"{text} Convert it to safetensors.")]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        text = f"{folder}: no weights of model.variant '{variant or 'null'}'. The folder has {', '.join(others)}."
        variants = sorted({name.split(".")[1].split("-")[0] if name.count(".") > 1 else "null" for name in others})
        return [Problem("variant-missing", f"{text} Set model.variant: {' or '.join(variants)}.")]
    return [Problem("base-incomplete", f"{folder}: no .safetensors weights. {FETCH_AGAIN}")]


def config_problems(folder: Path) -> list[Problem]:
    """Return problems of a component's folder that has Python code or no config file."""
    code = sorted(folder.glob("*.py"))
    if code:
        text = f"{code[0]}: code inside a model folder is never run. Remove it, or use another base model."
        return [Problem("code-in-base", text)]
    if not any((folder / name).exists() for name in ("config.json", "scheduler_config.json", "tokenizer_config.json")):
        return [Problem("base-incomplete", f"{folder}: no config file. {FETCH_AGAIN}")]
    return []


def damaged_files(folder: Path, variant: str | None) -> list[Problem]:
    """Return problems of damaged configs, missing shards and truncated weights; of weights, only headers are read."""
    truncated = [path for path in weight_files(folder, variant) if not has_all_bytes(path)]
    return [
        *text_problems(folder),
        *shard_problems(folder, variant),
        *(Problem("base-damaged", f"{path}: truncated, or no safetensors file. {FETCH_AGAIN}") for path in truncated),
    ]


def text_problems(folder: Path) -> list[Problem]:
    """Return problems of JSON files that are no objects, and of a tokenizer without a vocabulary."""
    problems = []
    for path in sorted(folder.glob("*.json")):
        try:
            is_object = isinstance(from_json(path.read_bytes()), dict)
        except (OSError, ValueError):
            is_object = False
        if not is_object:
            problems.append(Problem("base-damaged", f"{path}: no JSON object. {FETCH_AGAIN}"))
    # Without these, transformers silently makes up an empty vocabulary.
    if (folder / "tokenizer_config.json").exists() and not any(
        all((folder / name).is_file() for name in names) for names in VOCABULARIES
    ):
        problems.append(Problem("base-incomplete", f"{folder}: no vocab.json with merges.txt. {FETCH_AGAIN}"))
    return problems


def shard_problems(folder: Path, variant: str | None) -> list[Problem]:
    """Return problems of missing shards of the variant's ``*.index.json``, or of a missing index."""
    ending = f".safetensors.index{f'.{variant}' if variant else ''}.json"
    indexes, files = sorted(folder.glob(f"*{ending}")), weight_files(folder, variant)
    problems = []
    if not indexes and files and all("-of-" in path.name for path in files):
        problems.append(Problem("shards-missing", f"{files[0]}: a shard without its index (*{ending}). {FETCH_AGAIN}"))
    for path in indexes:
        try:
            shards = set(from_json(path.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            problems.append(Problem("base-damaged", f"{path}: no index of shards. {FETCH_AGAIN}"))
            continue
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            text = f"{path}: {len(missing)} of {len(shards)} shards are missing, such as {missing[0]}. {FETCH_AGAIN}"
            problems.append(Problem("shards-missing", text))
    return problems


def require_base(model: ModelParams, family: Family) -> None:
    """Raise UserError with every problem of the base model."""
    if problems := folder_problems(model, family):
        raise UserError(*problems)
