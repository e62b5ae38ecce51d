"""The base on disk: which files a component loads, their digests, and why a folder is refused.

Looks at names and bytes only; nothing is imported from the folder and no model is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.core.console import UserError
from lora_dag.core.files import from_json, sha256_file
from lora_dag.core.tensors import has_all_bytes
from lora_dag.families.common import absent
from lora_dag.families.protocol import all_families

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
WEIGHTS = {"model", "diffusion_pytorch_model"}
NUM_EXAMPLES = 5  # sides in a message


def problems(
    model: ModelParams, family: Family, root: Path | None = None, weightless: Container[str] = ()
) -> list[str]:
    """Everything that keeps ``model.pretrained`` from being loaded, one line each; empty when all is well.

    Args:
        root: the folder that stands for it, where it is none itself.
        weightless: components whose weights are elsewhere.
    """
    root = root or Path(model.pretrained)
    found = index_problems(model, family, root)
    if found:
        return found
    index = root / "model_index.json"
    listed = from_json(index.read_text(encoding="utf-8"))
    for component, expected in family.COMPONENTS.items():
        folder = root / component
        entry = listed.get(component)
        declared = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if component in family.OPTIONAL and entry == [None, None]:
            continue
        if not folder.is_dir():
            found.append(f"{folder}: no such folder; {family.PIPELINE} needs {expected or 'it'} there")
            if component in family.OPTIONAL:
                found[-1] += f", or [null, null] for {component} in model_index.json"
        elif expected and str(declared).removesuffix("Fast") != expected:
            found.append(
                f"{index} {component}: got {declared}, expected {expected}; this is no base of family '{model.family}'"
            )
        elif component in weightless:
            found += config_problems(folder) or text_problems(folder)
        else:
            found += component_problems(folder, model.variant)
    return found


def index_problems(model: ModelParams, family: Family, root: Path) -> list[str]:
    """At most one: no folder, no model_index.json, or another pipeline than the family's."""
    where = f"params.yaml model.pretrained: '{model.pretrained}'"
    if not root.is_dir():
        if model.pretrained.count("/") == 1 and not model.pretrained.startswith((".", "/", "data/")):
            place = f"data/{root.name}"
            return [
                f"{where} is no folder here; write the lines `hub: {model.pretrained}` and `revision: ` with its commit"
                f" into {place}.yaml and name that, or fetch it: hf download {model.pretrained} --local-dir {place}"
            ]
        return [f"{where} is no folder; `dvc pull data/base` brings the embedded base"]
    index = root / "model_index.json"
    if not index.exists():
        return [f"{where} has no model_index.json; expected a folder in the diffusers layout"]
    try:
        pipeline = from_json(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        return [f"{index}: not a diffusers model index; fetch the model again"]
    if pipeline != family.PIPELINE:
        names = [name for name, other in all_families().items() if pipeline == other.PIPELINE]
        known = f"use model.family: {names[0]}" if names else "no family here trains that"
        return [f"{where} is a {pipeline}; model.family '{model.family}' trains {family.PIPELINE}; {known}"]
    return []


def component_problems(folder: Path, variant: str | None) -> list[str]:
    damaged = config_problems(folder) or damage(folder, variant)
    if damaged:
        return damaged
    if not (folder / "config.json").exists():  # schedulers and tokenizers have no weights
        return []
    if weight_files(folder, variant):
        return []
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return [f"{folder}: only {pickles[0]}, a pickle, which can run code when loaded; convert it to safetensors"]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return [f"{folder}: no weights of model.variant '{variant or 'null'}'; there is {', '.join(others)}"]
    return [f"{folder}: no .safetensors weights; the folder is incomplete, fetch the model again"]


def config_problems(folder: Path) -> list[str]:
    """Code, or no config file."""
    code = sorted(folder.glob("*.py"))
    if code:
        return [f"{code[0]}: code inside a model folder is never run; remove it or use another base"]
    if not any((folder / name).exists() for name in ("config.json", "scheduler_config.json", "tokenizer_config.json")):
        return [f"{folder}: no config file; the folder is incomplete, fetch the model again"]
    return []


def damage(folder: Path, variant: str | None) -> list[str]:
    """Texts that are damaged, weights cut short; of these, headers alone are read."""
    cut = [path for path in weight_files(folder, variant) if not has_all_bytes(path)]
    found = text_problems(folder) + shard_problems(folder, variant)
    return found + [f"{path}: truncated or no safetensors file; fetch the model again" for path in cut]


def text_problems(folder: Path) -> list[str]:
    """JSON that is no object, a tokenizer without a vocabulary."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            whole = isinstance(from_json(path.read_bytes()), dict)
        except (OSError, ValueError):
            whole = False
        if not whole:
            found.append(f"{path}: no JSON object; fetch the model again")
    # Without these, transformers makes an empty vocabulary up and says nothing.
    if (folder / "tokenizer_config.json").exists() and not any(
        all((folder / name).is_file() for name in names) for names in VOCABULARIES
    ):
        found.append(f"{folder}: no vocab.json with merges.txt; the folder is incomplete, fetch the model again")
    return found


def shard_problems(folder: Path, variant: str | None) -> list[str]:
    """Shards that the variant's ``*.index.json`` names and the folder lacks, or shards without an index."""
    ending = f".safetensors.index{f'.{variant}' if variant else ''}.json"
    indexes, files = sorted(folder.glob(f"*{ending}")), weight_files(folder, variant)
    found = []
    if not indexes and files and all("-of-" in path.name for path in files):
        found.append(f"{files[0]}: a shard without its index (*{ending}); fetch the model again")
    for path in indexes:
        try:
            shards = set(from_json(path.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found.append(f"{path}: no index of shards; fetch the model again")
            continue
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            found.append(f"{path}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}); fetch them")
    return found


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that ``from_pretrained(variant=...)`` reads, sharded ones included."""
    return [path for path in sorted(folder.glob("*.safetensors")) if is_weight_file(path.name, variant)]


def is_weight_file(name: str, variant: str | None) -> bool:
    suffix = f".{variant}" if variant else ""
    return name.endswith(".safetensors") and any(
        name == f"{stem}{suffix}.safetensors" or name.startswith(f"{stem}{suffix}-0") for stem in WEIGHTS
    )


def component_files(folder: Path, variant: str | None) -> list[Path]:
    """Config, tokenizer and weight files of one component: all that can change what it computes."""
    texts = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model", ".jinja"})
    return texts + weight_files(folder, variant)


def digests(model: ModelParams, components: Iterable[str]) -> dict[str, str]:
    """sha256 per component, over the names and bytes of its files; ``absent`` for one that the base goes without."""
    names = sorted(components)
    without = absent(model, names)
    return {
        name: "absent" if name in without else digest(Path(model.pretrained) / name, model.variant) for name in names
    }


def digest(folder: Path, variant: str | None) -> str:
    total = hashlib.sha256()
    for path in component_files(folder, variant):
        total.update(f"{path.name} {sha256_file(path)}\n".encode())
    return total.hexdigest()


def size_problems(
    model: ModelParams, family: Family, sizes: Iterable[tuple[int, int]], pretrained: str = ""
) -> list[str]:
    """Lines if pictures of these widths and heights, in pixels, are nothing that the base can take.

    Args:
        pretrained: what params.yaml names, where ``model`` is the folder that stands for it.
    """
    pretrained = pretrained or model.pretrained
    try:
        multiple, limit = family.pixel_multiple(model), family.max_side(model)
    except (KeyError, TypeError) as error:
        return [f"{pretrained}: a config.json lacks what the family reads ({error}); fetch the model again"]
    sides = sorted({side for size in sizes for side in size})
    found = []
    if limit is not None and sides[-1] > limit:
        found.append(too_long(pretrained, sides, multiple, limit))
    bad = [side for side in sides if side % multiple]
    if bad and not (found and len(sides) == 1):  # whose line names the multiple too
        found.append(uneven(pretrained, sides, bad, multiple))
    return found


def too_long(pretrained: str, sides: list[int], multiple: int, limit: int) -> str:
    above = f"above {limit}, the longest side that {pretrained} has positions for"
    if len(sides) > 1:
        found = f"its buckets have sides of up to {sides[-1]} pixels"
        return f"params.yaml dataset.resolution: {found}, {above}; lower it, or dataset.max_aspect_ratio"
    return f"params.yaml dataset.resolution: {sides[0]} is {above}; use a multiple of {multiple} up to {limit}"


def uneven(pretrained: str, sides: list[int], bad: list[int], multiple: int) -> str:
    if len(sides) > 1:
        more = f" and {len(bad) - NUM_EXAMPLES:,} more" if len(bad) > NUM_EXAMPLES else ""
        shown = ", ".join(map(str, bad[:NUM_EXAMPLES])) + more
        found = f"sides of {shown} pixels are no multiples of {multiple}"
        return f"params.yaml dataset.bucket_step: {found}, which {pretrained} needs; use {multiple}"
    below = bad[0] - bad[0] % multiple
    near = f"{below} or {below + multiple}" if below else str(multiple)
    where = f"params.yaml dataset.resolution: {bad[0]}"
    return f"{where} is no multiple of {multiple}, which {pretrained} needs; use {near}"


def require_base(model: ModelParams, family: Family) -> None:
    """Raises UserError naming everything that is wrong with the base."""
    found = problems(model, family)
    if found:
        raise UserError(*found)


def require_same_base(recorded: dict[str, str], actual: dict[str, str], artifact: Path) -> None:
    """Refuse an artifact that was made with another base than params.yaml names.

    Raises:
        UserError: naming the components that differ.
    """
    differ = [name for name, value in actual.items() if name in recorded and recorded[name] != value]
    if differ:
        raise UserError(
            f"{artifact}: made with another {', '.join(differ)} than model.pretrained holds now; run `dvc repro`"
        )
