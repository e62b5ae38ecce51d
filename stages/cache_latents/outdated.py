"""What data/prepared was made with and the parameters have otherwise by now: prepare would make it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_dag.artifacts.manifest import Manifest
from lora_dag.core.params import Config
from lora_dag.pictures.decode import preprocessing

AUGMENTATION = ("crop", "flip", "seed")


def made_otherwise(manifest: Manifest, prepared: Path, config: Config) -> str:
    """What data/prepared records of how it was made and the parameters have otherwise by now, in one line, or nothing.

    Section ``dataset`` is no parameter of this stage: nothing here decides a result.
    """
    dataset = config.sections["dataset"].model_dump()
    asked = preprocessing(dataset["background"], dataset["image_interpolation_mode"])
    pairs: dict[str, tuple[Any, Any]] = {"dataset.source": (Path(manifest.source), Path(dataset["source"]))}
    pairs["dataset.resolution"] = (sizes(manifest, dataset), dataset["resolution"])
    pairs |= {f"dataset.{name}": (getattr(manifest.augmentation, name), dataset[name]) for name in AUGMENTATION}
    pairs |= {f"preprocessing {name}": (manifest.preprocessing.get(name), value) for name, value in asked.items()}
    pairs["dataset.unmasked_weight"] = (manifest.unmasked_weight, dataset["unmasked_weight"])
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if not differ:
        return ""
    before = ", ".join(f"{name} {said(then)}" for name, (then, _) in differ.items())
    return (
        f"{prepared} was made with {before}; {config.source} says {', '.join(said(now) for _, now in differ.values())}"
    )


def sizes(manifest: Manifest, dataset: dict[str, Any]) -> int | str:
    """``dataset.resolution`` if every picture has a size that it gives, else the first size that it does not give."""
    side, step = dataset["resolution"], dataset["bucket_step"]

    def is_given(width: int, height: int) -> bool:
        if not dataset["aspect_buckets"]:
            return width == height == side
        largest = max(width * height + step * width, width * height + step * height) > side**2 >= width * height
        return largest and width % step == height % step == 0

    other = sorted({(item.width, item.height) for item in manifest.items if not is_given(item.width, item.height)})
    if not other:
        return side
    width, height = other[0]
    return width if width == height else f"{width}x{height}"


def said(value: Any) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
