"""Numbers and facts of what a stage wrote: those of its outputs that hold on every kind of processor.

Of tensors: how many, a digest of their names and shapes, their norm, and ``mix``, their mean product with a fixed
pattern, which changes where values change places. Digests of bytes are left out: the last bits differ between machines.
What is not a number, such as where an adapter came from, is a digest of its text, with digests of bytes masked.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat

from lora_dag.artifacts import lineage
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Manifest
from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_metadata, load_tensors

REPORTS = Path("reports")
ROUNDING = re.compile(r"(diffusers|peft|comfyui|merged)\.max_abs_error")
KIND = re.compile(
    r"lora_[AB]|lora_(up|down)|lokr_[wt]\d|hada_[wt]\d|lora_mid|magnitude|dora_scale|alpha$|bias_delta|diff_b$"
)
DIGEST = re.compile(r"\b[0-9a-f]{12,64}\b")


def measure(stage: str) -> dict[str, Any]:
    """Of the outputs in the current directory."""
    return {
        "prepare": prepared,
        "cache_latents": cached,
        "train": trained,
        "validate": validated,
        "export": exported,
        "report": reported,
    }[stage]()


def prepared() -> dict[str, Any]:
    folder = REPORTS / "dataset"
    manifest = Manifest.load(Path("data/prepared"))
    rows = [json.loads(line) for line in Path("data/prepared/manifest.jsonl").read_text("utf-8").splitlines()]
    table = read_csv(folder / "images.csv")
    return {
        "items": {
            row.pop("file_name"): ", ".join(f"{key}={value!r}" for key, value in row.items() if "sha256" not in key)
            for row in rows
        },
        "dataset": text(read_json(Path("data/prepared/dataset.json"))),
        "views": digest(manifest.augmentation.views(item, 4) for item in manifest.items if manifest.augmentation.flip),
        "metrics": read_json(folder / "metrics.json"),
        "images": digest({key: value for key, value in row.items() if key != "sha256"} for row in table),
        "contact": measured_image(folder / "contact.png"),
    }


def cached() -> dict[str, Any]:
    cache = LatentCache(Path("data/latents"))
    views = [key for item in cache.items for key in item.views]
    masks = [key for item in cache.items for key in item.masks]
    prompts = [cache.prompt(caption) for caption in sorted(cache.manifest["captions"])]
    found = {name: tensors([prompt[name] for prompt in prompts]) for name in prompts[0]}
    found |= {name: tensors(cache.tensors[f"{key}.{name}"] for key in views) for name in cache.by_view}
    return found | {
        "mean": tensors(cache.latents(key)[0] for key in views),
        "std": tensors(cache.latents(key)[1] for key in views),
        "masks": tensors(cache.mask(key) for key in masks),
        "items": digest(
            [item.file_name, item.split, item.caption, item.captions, len(item.views), item.repeats]
            for item in cache.items
        ),
        "metrics": read_json(REPORTS / "latents/metrics.json"),
    }


def trained() -> dict[str, Any]:
    steps = read_csv(REPORTS / "train/loss.csv")
    record = read_json(Path("data/adapter/adapter.json"))
    return {
        "losses": [float(row["loss"]) for row in steps],
        "learning rates": [float(row["learning_rate"]) for row in steps],
        "gradient norms": [float(row["grad_norm"]) for row in steps],
        "adapter": file(Path("data/adapter/adapter.safetensors")),
        "snapshots": [file(path) for path in sorted(Path("data/adapter/snapshots").glob("*"))],
        "record": digest([record["lora_config"], record["biases"], record.get("text_lora"), record["num_steps"]]),
        "files": [sorted(record[name]) for name in ("files", "base")],
        "made from": masked(record["made_from"]),
        "metrics": numbers(read_json(REPORTS / "train/metrics.json")),
    }


def validated() -> dict[str, Any]:
    rows = read_csv(REPORTS / "validate/heldout.csv")
    nearest = read_csv(REPORTS / "validate/nearest.csv")
    origin = lineage.load(REPORTS / "validate/lineage.json")
    return {
        "metrics": numbers(read_json(REPORTS / "metrics.json")),
        "rows": digest([row["file_name"], row["split"], row["timestep"]] for row in rows),
        "losses": vector(float(row["adapter"]) for row in rows),
        "base losses": vector(float(row["base"]) for row in rows),
        "curve": [
            [float(value or "nan") for value in row.values()] for row in read_csv(REPORTS / "validate/curve.csv")
        ],
        "nearest": digest(
            [row[name] for name in ("prompt", "seed", "nearest", "copied", "base_nearest", "base_copied")]
            for row in nearest
        ),
        "distances": vector(float(row["distance"]) for row in nearest),
        "base distances": vector(float(row["base_distance"]) for row in nearest),
        "table": text(origin.pop("table")),
        "neighbors": origin.pop("neighbors"),
        "made from": masked(origin),
        "nearest sheet": measured_image(REPORTS / "validate/nearest.png"),
        "samples": measured_image(REPORTS / "samples.png"),
        "progress": measured_image(REPORTS / "progress.png"),
    }


def exported() -> dict[str, Any]:
    folder = Path("data/export")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    metrics = read_json(REPORTS / "export/metrics.json")
    energies = read_csv(REPORTS / "export/energy.csv")
    origin = lineage.load(REPORTS / "export/lineage.json")
    origin["files"] = sorted(origin["files"])
    adapters = {name: path for name, path in paths.items() if name.endswith(".safetensors")}
    return {
        "files": sorted(paths),
        "tensors": {name: file(path) for name, path in adapters.items()},
        "headers": {name: header(load_metadata(path)) for name, path in adapters.items()},
        "configs": digest(stable(path.read_text("utf-8")) for name, path in paths.items() if "adapter_config" in name),
        "metrics": {
            name: value
            for name, value in metrics.items()
            if not re.search(r"(diffusers|peft|comfyui|merged).*error", name)
        },
        "energy": vector(float(row["energy"]) for row in energies),
        "made from": masked(origin),
    }


def reported() -> dict[str, Any]:
    """The pages word by word, a digest for each heading: what they are made of is written by hand."""
    pages = sorted(path for path in REPORTS.glob("*.md"))
    return {
        **{path.name: sections(path.read_text("utf-8")) for path in pages},
        "headline": read_json(REPORTS / "headline.json"),
        "loss": measured_image(REPORTS / "loss.png"),
    }


# The parts


def tensors(found: Iterable[torch.Tensor] | Mapping[str, torch.Tensor]) -> dict[str, Any]:
    named = dict(found) if isinstance(found, Mapping) else {str(index): tensor for index, tensor in enumerate(found)}
    if not named:
        return {"count": 0}
    keys = sorted(named, key=lambda name: (len(name), name)) if not isinstance(found, Mapping) else sorted(named)
    whole = torch.cat([named[name].double().flatten() for name in keys])
    names = digest([name, list(named[name].shape)] for name in keys)
    return {"count": len(named), "names": names, **vector(whole.tolist())}


def file(path: Path) -> dict[str, Any]:
    """The tensors of each kind, such as lora_A: B's change would be lost in A's norm."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_tensors(path).items():
        kinds.setdefault(found[0] if (found := KIND.search(name)) else "weights", {})[name] = tensor
    return {kind: tensors(named) for kind, named in sorted(kinds.items())}


def vector(values: Iterable[float]) -> dict[str, Any]:
    """Norm, and the product with a fixed pattern as a share of it, both of n values."""
    whole = torch.tensor(list(values), dtype=torch.float64)
    norm = float(whole.norm())
    pattern = torch.cos(1.7 * torch.arange(len(whole), dtype=torch.float64)) * 2**0.5
    return {"size": len(whole), "norm": norm, "mix": float(whole @ pattern) / (norm or 1)}


def measured_image(path: Path) -> dict[str, Any]:
    """Width and height, the mean of red, green and blue, 0 to 255, and the brightness of 8 x 8 tiles, 0 to 1."""
    with Image.open(path) as image:
        tiles = image.convert("L").convert("F").resize((8, 8), Image.Resampling.BOX)
        grid = (torch.tensor(list(tiles.tobytes()), dtype=torch.uint8).view(torch.float32).double() / 255).view(8, 8)
        return {
            "size": list(image.size),
            "mean": ImageStat.Stat(image.convert("RGB")).mean,
            "grid": grid.tolist(),
        }


def header(metadata: dict[str, str]) -> str:
    """Digest of a header without digests of bytes and versions of packages."""
    return digest(stable(text(metadata)))


def masked(made_from: dict[str, Any]) -> str:
    """A digest for each name's value, without digests of bytes and versions of packages."""
    kept = {name: sorted(value) if name == "packages" else value for name, value in made_from.items()}
    return ", ".join(f"{name} {digest(stable(text(value)))[:6]}" for name, value in kept.items())


def stable(written: str) -> str:
    return re.sub(r'(version[\\": ]+|"packages[\\]*": )[^,}]*', r"\1", DIGEST.sub("#", written))


def sections(page: str) -> dict[str, str]:
    """Heading -> digest of the text below it."""
    parts = re.split(r"^(#+ .+)$", page, flags=re.MULTILINE)
    return {name: digest(below) for name, below in zip(["", *parts[1::2]], parts[::2], strict=True)}


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics but those that are digests of bytes."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def digest(value: Any) -> str:
    whole = value if isinstance(value, str) else text(list(value))
    return hashlib.sha256(whole.encode()).hexdigest()[:12]
