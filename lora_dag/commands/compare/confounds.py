"""What runs differ in beside the settings that were changed: strength, images seen, batch, schedule, rate, pictures.

A setting moves more than its name says: under a fixed alpha a rank moves alpha / rank, and a batch size moves the
images seen. A verdict is of all of that together, so what was moved along is said beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dag.artifacts.metrics import is_number
from lora_dag.commands.compare.settings import OF_TRAINING, SEED, differing, lora_section, unexplained
from lora_dag.commands.compare.sides import Side
from lora_dag.core.console import plural

LENGTH = ("train.num_steps", "train.lr_", "train.early_stop_patience")
BATCH = ("train.batch_size", "train.gradient_accumulation_steps")


def confounds(*sides: Side) -> list[str]:
    """A sentence of Markdown for each quantity that differs between runs beside what was changed.

    ``**Strength differs too**: alpha / rank is 0.5 against 1, so this compares strengths as well as ranks; ...``

    A quantity is left out where nothing else differs than the settings that set it, such as ``lora.alpha`` alone.

    Args:
        sides: two or more; values are named in this order.
    """
    first, *others = sides
    keys = {key for side in others for key in changed(first, side)}
    found = [] if only(keys, ("lora.alpha",)) else strength(sides, keys)
    for quantity in QUANTITIES:
        values = [quantity.of(side) for side in sides]
        if None not in values and len(set(values)) > 1 and not only(keys, quantity.settings):
            found.append(f"**{quantity.name} too**: {against(map(str, values))}{quantity.more(sides)}.")
    return found


def changed(a: Side, b: Side) -> list[str]:
    """What differs and decides the adapter: parameters but for the seed, inputs, and other code of train."""
    keys = [key for key in differing(a, b) if key.partition(".")[0] in OF_TRAINING and key != SEED]
    return keys + unexplained(a, b)


def only(keys: Collection[str], starts: tuple[str, ...]) -> bool:
    return bool(keys) and all(key.startswith(starts) for key in keys)


def against(values: Iterable[str]) -> str:
    """``2 against 0.5``; of more than two ``2, 1, 0.5``, each once."""
    shown = list(values)
    return " against ".join(shown) if len(shown) == 2 else ", ".join(dict.fromkeys(shown))


# Strength


def strength(sides: Sequence[Side], keys: Collection[str]) -> list[str]:
    """alpha / rank, of all layers and of those that a pattern names."""
    sections = [lora_section(side.params) for side in sides]
    layers = dict.fromkeys(key for lora in sections for key in (*lora["rank_pattern"], *lora["alpha_pattern"]))
    known = {layer: [strength_of(lora, layer) for lora in sections] for layer in ("", *layers)}
    moved = [
        against(f"{value:.3g}" for value in values) + (f" in {layer}" if layer else "")
        for layer, values in known.items()
        if None not in values and len({f"{value:.3g}" for value in values}) > 1
    ]
    if not moved:
        return []
    roots = {bool(lora.get("use_rslora")) for lora in sections}
    ratio = f"alpha / {'sqrt(rank)' if roots == {True} else 'rank'}"
    ratio += " (alpha / sqrt(rank) with rsLoRA)" if len(roots) > 1 else ""
    ranks = " as well as ranks" if any(key.startswith("lora.rank") for key in keys) else " too"
    what = f"so this compares strengths{ranks}{cure(sections, roots)}"
    return [f"**Strength differs too**: {ratio} is {'; '.join(moved)}, {what}."]


def strength_of(lora: Mapping[str, Any], layer: str) -> float | None:
    """Of the layers that a pattern's key names, or ("") of those that none names; None where it is no number."""
    rank, alpha = (value_in(lora[f"{name}_pattern"], layer, lora.get(name)) for name in ("rank", "alpha"))
    if not (is_number(rank) and is_number(alpha) and rank > 0):
        return None
    return alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)


def value_in(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """A pattern's value for a layer, its keys read as PEFT reads them: endings, or regexes over one."""
    if layer in pattern:
        return pattern[layer]
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def cure(sections: Sequence[Mapping[str, Any]], roots: Collection[bool]) -> str:
    if True in roots:
        return "; `lora.alpha=null` without `lora.use_rslora` keeps it at 1"
    if all(
        lora["alpha"] == lora["rank"] and lora["rank_pattern"].keys() <= lora["alpha_pattern"].keys()
        for lora in sections
    ):
        return "; without `lora.alpha_pattern` it is 1"
    return "; `lora.alpha=null` keeps it at 1"


# What a training comes to


@dataclass(frozen=True)
class Quantity:
    name: str
    of: Callable[[Side], str | None]
    """As the page shows it; None where a revision does not say it."""
    settings: tuple[str, ...]
    """What sets it: starts of dotted keys."""
    more: Callable[[Sequence[Side]], str] = lambda sides: ""
    """How it would be kept equal."""


def images_seen(side: Side) -> str | None:
    """As counted, where the training may have ended early."""
    seen = side.metrics.get("train.images_seen")
    seen = seen if is_number(seen) else product(side, "train.num_steps", *BATCH)
    return None if seen is None else f"{seen:,.0f}"


def as_many_steps(sides: Sequence[Side]) -> str:
    """``; train.num_steps=200 for rank-16 makes them equal``: of the first of two, where that is a whole number."""
    seen, batches = [product(side, "train.num_steps", *BATCH) for side in sides], product(sides[0], *BATCH)
    if len(sides) != 2 or [images_seen(side) for side in sides] != [f"{number:,.0f}" for number in seen if number]:
        return ""
    steps = (seen[1] or 0) / (batches or 1)
    return f"; `train.num_steps={steps:.0f}` for {sides[0].name} makes them equal" if steps and steps % 1 == 0 else ""


def effective_batch(side: Side) -> str | None:
    size = product(side, *BATCH)
    return None if size is None else f"{size:g}"


def schedule(side: Side) -> str | None:
    """``cosine over 400 steps (20 of warmup)``; a constant rate has no length."""
    kind, steps, warmup = (
        side.params.get(f"train.{name}") for name in ("lr_scheduler", "num_steps", "lr_warmup_steps")
    )
    if kind is None or not isinstance(steps, int) or not isinstance(warmup, int):
        return None
    length = "" if kind == "constant" else f" over {plural(steps, 'step')}"
    return f"{kind}{length}" + (f" ({warmup:,} of warmup)" if warmup else "")


def scaled_rate(side: Side) -> str | None:
    """Of ``train.scale_lr``, which batches move."""
    rate, factor = side.params.get("train.learning_rate"), product(side, *BATCH)
    if not side.params.get("train.scale_lr") or not is_number(rate) or factor is None:
        return None
    return f"{rate * factor:.3g}"


def product(side: Side, *keys: str) -> float | None:
    values = [value for key in keys if is_number(value := side.params.get(key))]
    return math.prod(values) if len(values) == len(keys) else None


def num_pictures(side: Side) -> str | None:
    count = side.lineage["dataset"].get("train")
    return f"{count:,}" if is_number(count) else None


def epochs(sides: Sequence[Side]) -> str:
    """``, which were seen in 23.3 against 206 epochs``"""
    known = [f"{value:.3g}" for side in sides if is_number(value := side.metrics.get("train.epochs"))]
    return f", seen in {against(known)} epochs" if len(known) == len(sides) and len(set(known)) > 1 else ""


QUANTITIES = (
    Quantity("Images seen differ", images_seen, LENGTH, as_many_steps),
    Quantity("The effective batch differs", effective_batch, BATCH),
    Quantity("The schedule differs", schedule, LENGTH),
    Quantity("The learning rate differs", scaled_rate, ("train.learning_rate", "train.scale_lr")),
    Quantity("The number of training pictures differs", num_pictures, (), epochs),
)
