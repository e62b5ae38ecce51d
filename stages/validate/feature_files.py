"""``validate.feature_model``: the image-text model's files, before anything is imported that could load them.

A folder in the transformers layout, or a YAML file that pins a model of the Hugging Face Hub to a commit
(``lora_dag/bases/hub.py``). Both are pinned in params.yaml by a digest, since no stage can depend on a path that may
be null.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.adapters import init_from_pin
from lora_dag.bases import hub
from lora_dag.bases import layout as base_files
from lora_dag.bases.resolve import NUM_DIGITS, PINS
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, sha256_file

if TYPE_CHECKING:
    from lora_dag.bases.hub import Pin
    from stages.validate.params import FeatureModelParams

SETTING = "validate.feature_model"
KINDS = ("clip", "siglip", "siglip2")
"""``model_type`` in config.json of what gives pictures and texts features in one space; OpenCLIP exports are clip."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
FETCHED = (
    *("config.json", *PROCESSORS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
    *("model.safetensors", "model.safetensors.index.json", "model-0*.safetensors"),
)
"""Of a repository of the Hub."""


@dataclass(frozen=True)
class Source:
    """An image-text model as it is loaded, and as a person knows it."""

    folder: Path
    name: str
    """owner/name@commit for a pin, else the folder's name as params.yaml has it: a link's target is this machine's."""


def resolve(asked: FeatureModelParams) -> Source:
    """The model's folder, checked; downloaded where that was not done yet.

    Raises:
        UserError: naming everything that is wrong with it.
    """
    path = Path(asked.path)
    found = problems(asked)
    if not found and path.suffix in PINS:
        chosen = read_pin(path)
        if not is_here(asked):
            look(path, chosen)
        source = Source(hub.fetch(path, pin=chosen), f"{chosen.hub}@{chosen.revision[:NUM_DIGITS]}")
        found = folder_problems(source.folder)
    else:
        source = Source(path, path.name)
    if found:
        raise UserError(*found)
    return source


def problems(asked: FeatureModelParams | None) -> list[str]:
    """Everything that keeps it from being loaded, one line each; asks no network. Another digest only when all else is
    well, with the one to pin.
    """
    if asked is None:
        return []
    path = Path(asked.path)
    where = f"params.yaml {SETTING}: '{asked.path}'"
    if path.suffix in PINS:
        try:
            chosen = read_pin(path)
        except UserError as error:
            return list(error.problems)
        found = folder_problems(chosen.folder) if hub.is_fetched(chosen) else []
    elif path.is_dir():
        found = folder_problems(path)
    else:
        how = "hf download OWNER/NAME --local-dir data/clip, or name a YAML file that pins it"
        return [f"{where} is no folder; fetch it: {how}"]
    return found or digest_problems(where, asked)


def is_here(asked: FeatureModelParams) -> bool:
    """Whether nothing would have to be downloaded."""
    path = Path(asked.path)
    return path.suffix not in PINS or hub.is_fetched(read_pin(path))


def digest_problems(where: str, asked: FeatureModelParams) -> list[str]:
    found = digest(Path(asked.path))
    if asked.sha256 == found:
        return []
    says = f"params.yaml pins {asked.sha256}" if asked.sha256 else "params.yaml pins no sha256"
    use = init_from_pin.override(SETTING, asked.path, found)
    return [f"{where} has the digest {found}, {says}; to measure with it: {use}"]


def digest(path: Path) -> str:
    """sha256 over the names and bytes of a folder's files; of a pin, which names a commit, its own."""
    return sha256_file(path) if path.suffix in PINS else base_files.digest(path, None)


def folder_problems(folder: Path) -> list[str]:
    """No image-text model of KINDS in safetensors, with what prepares pictures and texts for it."""
    want = f"{SETTING} takes CLIP, SigLIP and SigLIP 2 in the transformers layout"
    if (folder / "model_index.json").exists():
        return [f"{folder}: a diffusers pipeline; {want}"]
    if not (folder / "config.json").exists():
        return [f"{folder}: no config.json; {want}, also as OpenCLIP's models are exported to it"]
    if damaged := base_files.config_problems(folder) or base_files.text_problems(folder):
        return damaged
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in KINDS:
        return [f"{folder / 'config.json'} model_type: got {kind!r}, no model of pictures and texts both; {want}"]
    found = [] if any((folder / name).exists() for name in PROCESSORS) else [without(folder, PROCESSORS[0])]
    tokenizer = folder / "tokenizer_config.json"
    if not tokenizer.exists():
        found.append(without(folder, tokenizer.name))
    elif read_json(tokenizer).get("tokenizer_class") == "SiglipTokenizer" and not find_spec("sentencepiece"):
        found.append(
            f"{tokenizer}: SigLIP's tokenizer needs a package; pip install sentencepiece (SigLIP 2 needs none)"
        )
    return found + base_files.component_problems(folder, None)


def without(folder: Path, name: str) -> str:
    return f"{folder}: no {name}, so pictures and texts cannot be prepared for the model; fetch the model again"


# A pin


def read_pin(path: Path) -> Pin:
    """The pin with the files that are loaded."""
    return replace(hub.read_pin(path), files=FETCHED)


def look(path: Path, chosen: Pin) -> None:
    """Before a gigabyte is fetched: are there weights in safetensors?

    Raises:
        UserError: there are none.
    """
    names = hub.list_files(path, chosen)
    if not any(base_files.is_weight_file(name, None) for name in names):
        there = ", ".join(name for name in names if not name.endswith((".json", ".txt", ".md"))) or "none at all"
        raise UserError(f"{path}: {chosen.hub} has no weights as safetensors at its top; it has {there}")
