"""``validate.feature_model``: checks of the image-text model's files, without importing torch or transformers.

The setting names a folder in the transformers layout, or a YAML file that pins a model of the Hugging Face Hub to a
commit (``lora_dag/bases/hub.py``). params.yaml also has its digest, because a DVC stage cannot depend on a path that
may be null.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.adapters import init_from_pin
from lora_dag.bases import component_files, diffusers_folder, hub
from lora_dag.bases.resolve import NUM_DIGITS, PINS
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import read_json, sha256_file
from lora_dag.core.labels import as_yaml

if TYPE_CHECKING:
    from lora_dag.bases.hub import Pin
    from stages.validate.params import FeatureModelParams

SETTING = "validate.feature_model"
PLACE = f"params.yaml {SETTING}"
"""Place of the setting in a message where the file that was read is unknown."""
KINDS = ("clip", "siglip", "siglip2")
"""Accepted ``model_type`` in config.json: models of images and texts in one space. OpenCLIP exports are clip."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
FETCHED = (
    *("config.json", *PROCESSORS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
    *("model.safetensors", "model.safetensors.index.json", "model-0*.safetensors"),
)
"""Files that are downloaded from a repository of the Hub."""


@dataclass(frozen=True)
class ModelFiles:
    """Folder and name of an image-text model."""

    folder: Path
    name: str
    """owner/name@commit for a pin, else the folder's name in params.yaml. A link keeps its own name."""


def resolve_model(params: FeatureModelParams, setting: str = PLACE) -> ModelFiles:
    """Return the model's checked folder, after a download if it is a pin that was not fetched yet.

    Args:
        setting: place of the setting for messages.

    Raises:
        UserError: every problem of the model.
    """
    path = Path(params.path)
    problems = model_problems(params, setting)
    if not problems and path.suffix in PINS:
        pin = read_pin(path)
        if not is_fetched(params):
            require_safetensors(path, pin)
        files = ModelFiles(hub.fetch(path, pin=pin), f"{pin.hub}@{pin.revision[:NUM_DIGITS]}")
        problems = folder_problems(files.folder)
    else:
        files = ModelFiles(path, path.name)
    if problems:
        raise UserError(*problems)
    return files


def model_problems(params: FeatureModelParams | None, setting: str = PLACE) -> list[Problem]:
    """Return all problems of the model, without network access. The digest is only compared if there is no other one.

    Args:
        setting: place of the setting for messages.
    """
    if params is None:
        return []
    path = Path(params.path)
    if path.suffix in PINS:
        try:
            pin = read_pin(path)
        except UserError as error:
            return list(error.problems)
        problems = folder_problems(pin.folder) if hub.is_fetched(pin) else []
    elif path.is_dir():
        problems = folder_problems(path)
    else:
        remedy = "Download a model (hf download OWNER/NAME --local-dir data/clip), or name a YAML file that pins one."
        return [Problem("feature-model-missing", f"{setting}: '{params.path}' is not a folder. {remedy}")]
    return problems or digest_problems(params, setting)


def is_fetched(params: FeatureModelParams) -> bool:
    """Return whether nothing has to be downloaded."""
    path = Path(params.path)
    return path.suffix not in PINS or hub.is_fetched(read_pin(path))


def digest_problems(params: FeatureModelParams, setting: str) -> list[Problem]:
    """Return a problem if ``validate.feature_model.sha256`` is missing or not the model's digest."""
    actual = digest(Path(params.path))
    if params.sha256 == actual:
        return []
    expected = params.sha256 or "null"
    remedy = f"To use this model: {init_from_pin.override(SETTING, params.path, actual)}"
    return [
        Problem(
            "feature-model-digest",
            f"{setting}: '{params.path}' has the digest {actual}, but sha256 is {expected}. {remedy}",
        )
    ]


def digest(path: Path) -> str:
    """Return the sha256 over names and bytes of a folder's files; for a pin, which names a commit, of the YAML file."""
    return sha256_file(path) if path.suffix in PINS else component_files.digest(path, None)


def folder_problems(folder: Path) -> list[Problem]:
    """Return what keeps a folder from being an image-text model of KINDS in safetensors with its processors."""
    expected = "Use a CLIP, SigLIP or SigLIP 2 model in the transformers layout."
    if (folder / "model_index.json").exists():
        return [Problem("no-feature-model", f"{folder}: this is a diffusers pipeline. {expected}")]
    if not (folder / "config.json").exists():
        return [Problem("no-feature-model", f"{folder}: config.json is missing. {expected}")]
    if damaged := diffusers_folder.config_problems(folder) or diffusers_folder.text_problems(folder):
        return [*damaged]
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in KINDS:
        key = f"{folder / 'config.json'} model_type"
        return [Problem("no-feature-model", f"{key}: got {as_yaml(kind)}, which is no image-text model. {expected}")]
    problems = [] if any((folder / name).exists() for name in PROCESSORS) else [missing_file(folder, PROCESSORS[0])]
    tokenizer = folder / "tokenizer_config.json"
    if not tokenizer.exists():
        problems.append(missing_file(folder, tokenizer.name))
    elif read_json(tokenizer).get("tokenizer_class") == "SiglipTokenizer" and not find_spec("sentencepiece"):
        problems.append(
            Problem(
                "package-missing",
                f"{tokenizer}: SigLIP's tokenizer needs the package sentencepiece. Run `pip install sentencepiece`.",
            )
        )
    return [*problems, *diffusers_folder.component_problems(folder, None)]


def missing_file(folder: Path, name: str) -> Problem:
    """Return the problem of a model without one of its processor files."""
    return Problem(
        "feature-model-incomplete",
        f"{folder}: {name} is missing, which prepares the model's inputs. Download the model again.",
    )


# A pin


def read_pin(path: Path) -> Pin:
    """Read a YAML file that pins a model of the Hub."""
    return replace(hub.read_pin(path), files=FETCHED)


def require_safetensors(path: Path, pin: Pin) -> None:
    """Check before the download of a gigabyte that the repository has weights in safetensors.

    Raises:
        UserError: there are none.
    """
    names = hub.list_files(path, pin)
    if not any(component_files.is_weight_file(name, None) for name in names):
        others = ", ".join(name for name in names if not name.endswith((".json", ".txt", ".md"))) or "none"
        raise UserError(
            Problem(
                "no-safetensors",
                f"{path}: {pin.hub} has no safetensors weights in its top folder. Other files: {others}.",
            )
        )
