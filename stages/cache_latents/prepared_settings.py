"""Compares the settings that data/prepared was made with to params.yaml, to warn of an outdated data/prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_dag.artifacts.manifest import Manifest
from lora_dag.core.params import Config
from lora_dag.images.decode import preprocessing

AUGMENTATION = ("crop", "flip", "seed")


def describe_outdated_settings(manifest: Manifest, prepared: Path, config: Config) -> str:
    """Return the settings of data/prepared that params.yaml has changed since, in one line; empty for none.

    Section ``dataset`` is no parameter of this stage: nothing here affects a result.
    """
    dataset = config.sections["dataset"].model_dump()
    requested = preprocessing(dataset["background"], dataset["image_interpolation_mode"])
    pairs: dict[str, tuple[Any, Any]] = {"dataset.source": (Path(manifest.source), Path(dataset["source"]))}
    pairs["dataset.resolution"] = (sizes(manifest, dataset), dataset["resolution"])
    pairs |= {f"dataset.{name}": (getattr(manifest.augmentation, name), dataset[name]) for name in AUGMENTATION}
    pairs |= {f"preprocessing {name}": (manifest.preprocessing.get(name), value) for name, value in requested.items()}
    pairs["dataset.unmasked_weight"] = (manifest.unmasked_weight, dataset["unmasked_weight"])
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if not differ:
        return ""
    before = ", ".join(f"{name} {as_yaml(then)}" for name, (then, _) in differ.items())
    now = ", ".join(as_yaml(value) for _, value in differ.values())
    return f"{prepared} was made with {before}, but the settings now have {now}"


def sizes(manifest: Manifest, dataset: dict[str, Any]) -> int | str:
    """Return ``dataset.resolution`` if every image's size follows from it, else the first size that does not."""
    side, step = dataset["resolution"], dataset["bucket_step"]

    def fits_resolution(width: int, height: int) -> bool:
        if not dataset["aspect_buckets"]:
            return width == height == side
        largest = max(width * height + step * width, width * height + step * height) > side**2 >= width * height
        return largest and width % step == height % step == 0

    other = sorted(
        {(item.width, item.height) for item in manifest.items if not fits_resolution(item.width, item.height)}
    )
    if not other:
        return side
    width, height = other[0]
    return width if width == height else f"{width}x{height}"


def as_yaml(value: Any) -> str:
    """Return a value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
