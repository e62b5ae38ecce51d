"""Find quantities that a changed setting changes too: strength, images seen, batch, schedule, learning rate, images.

With a fixed alpha, another rank also changes alpha / rank; another batch size also changes the number of images seen.
A verdict covers all of these changes together, so the page lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dag.artifacts.metrics import is_number
from lora_dag.commands.compare.revision_report import RevisionReport
from lora_dag.commands.compare.run_inputs import (
    SEED,
    TRAINING_SECTIONS,
    differing_params,
    lora_section,
    unexplained_inputs,
)
from lora_dag.core.console import plural

LENGTH = ("train.num_steps", "train.lr_", "train.early_stop_patience")
BATCH = ("train.batch_size", "train.gradient_accumulation_steps")


def confounds(*revisions: RevisionReport) -> list[str]:
    """Return a line of Markdown for each quantity that differs beside the changed settings.

    ``**Strength differs too**: alpha / rank is 0.5 against 1, so this compares strengths as well as ranks. ...``

    A quantity is left out if only the settings that set it differ, such as ``lora.alpha``.

    Args:
        revisions: two or more; values are listed in this order.
    """
    first, *others = revisions
    keys = {key for revision in others for key in changed_keys(first, revision)}
    found = [] if all_start_with(keys, ("lora.alpha",)) else strength(revisions, keys)
    for quantity in QUANTITIES:
        values = [quantity.value(revision) for revision in revisions]
        if None not in values and len(set(values)) > 1 and not all_start_with(keys, quantity.settings):
            found.append(f"**{quantity.name} too**: {join_values(map(str, values))}.{quantity.hint(revisions)}")
    return found


def changed_keys(a: RevisionReport, b: RevisionReport) -> list[str]:
    """Return differences that affect the adapter: parameters except for the seed, inputs, and code of train."""
    keys = [key for key in differing_params(a, b) if key.partition(".")[0] in TRAINING_SECTIONS and key != SEED]
    return keys + unexplained_inputs(a, b)


def all_start_with(keys: Collection[str], starts: tuple[str, ...]) -> bool:
    return bool(keys) and all(key.startswith(starts) for key in keys)


def join_values(values: Iterable[str]) -> str:
    """Return ``2 against 0.5``; with more than two values ``2, 1, 0.5``, each once."""
    texts = list(values)
    return " against ".join(texts) if len(texts) == 2 else ", ".join(dict.fromkeys(texts))


# Strength


def strength(revisions: Sequence[RevisionReport], keys: Collection[str]) -> list[str]:
    """Return a line on alpha / rank of all layers, and of the layers of each pattern, if it differs."""
    sections = [lora_section(revision.params) for revision in revisions]
    layers = dict.fromkeys(key for lora in sections for key in (*lora["rank_pattern"], *lora["alpha_pattern"]))
    known = {layer: [strength_of(lora, layer) for lora in sections] for layer in ("", *layers)}
    moved = [
        join_values(f"{value:.3g}" for value in values) + (f" in {layer}" if layer else "")
        for layer, values in known.items()
        if None not in values and len({f"{value:.3g}" for value in values}) > 1
    ]
    if not moved:
        return []
    roots = {bool(lora.get("use_rslora")) for lora in sections}
    ratio = f"alpha / {'sqrt(rank)' if roots == {True} else 'rank'}"
    ratio += " (alpha / sqrt(rank) with rsLoRA)" if len(roots) > 1 else ""
    ranks = " as well as ranks" if any(key.startswith("lora.rank") for key in keys) else " too"
    values = " and ".join(moved)
    hint = constant_strength(sections, roots)
    return [f"**Strength differs too**: {ratio} is {values}, so this compares strengths{ranks}. {hint}."]


def strength_of(lora: Mapping[str, Any], layer: str) -> float | None:
    """Return alpha / rank of the layers of a pattern's key ("": all other layers); None if it is not a number."""
    rank, alpha = (value_in(lora[f"{name}_pattern"], layer, lora.get(name)) for name in ("rank", "alpha"))
    if not (is_number(rank) and is_number(alpha) and rank > 0):
        return None
    return alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)


def value_in(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return a pattern's value for a layer, with keys as PEFT reads them: endings, or regexes of an ending."""
    if layer in pattern:
        return pattern[layer]
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def constant_strength(sections: Sequence[Mapping[str, Any]], roots: Collection[bool]) -> str:
    """Return the setting that keeps the strength at 1."""
    if True in roots:
        return "`lora.alpha=null` without `lora.use_rslora` keeps it at 1"
    if all(
        lora["alpha"] == lora["rank"] and lora["rank_pattern"].keys() <= lora["alpha_pattern"].keys()
        for lora in sections
    ):
        return "Without `lora.alpha_pattern` it is 1"
    return "`lora.alpha=null` keeps it at 1"


# Quantities of a training


@dataclass(frozen=True)
class Quantity:
    name: str
    value: Callable[[RevisionReport], str | None]
    """Text for the page; None if a revision does not have the value."""
    settings: tuple[str, ...]
    """Starts of the dotted keys that set the quantity."""
    hint: Callable[[Sequence[RevisionReport]], str] = lambda revisions: ""
    """A sentence behind the values, such as how to make them equal."""


def images_seen(revision: RevisionReport) -> str | None:
    """Return the counted number of images, because the training may have ended early."""
    seen = revision.metrics.get("train.images_seen")
    seen = seen if is_number(seen) else product(revision, "train.num_steps", *BATCH)
    return None if seen is None else f"{seen:,.0f}"


def equal_images_hint(revisions: Sequence[RevisionReport]) -> str:
    """Return `` `train.num_steps=200` for rank-16 makes them equal.`` for two runs, if this is a whole number."""
    seen, batches = (
        [product(revision, "train.num_steps", *BATCH) for revision in revisions],
        product(revisions[0], *BATCH),
    )
    if len(revisions) != 2 or [images_seen(revision) for revision in revisions] != [
        f"{number:,.0f}" for number in seen if number
    ]:
        return ""
    steps = (seen[1] or 0) / (batches or 1)
    return (
        f" `train.num_steps={steps:.0f}` for {revisions[0].name} makes them equal." if steps and steps % 1 == 0 else ""
    )


def effective_batch(revision: RevisionReport) -> str | None:
    size = product(revision, *BATCH)
    return None if size is None else f"{size:g}"


def schedule(revision: RevisionReport) -> str | None:
    """Return ``cosine over 400 steps (20 of warmup)``; a constant rate has no length."""
    kind, steps, warmup = (
        revision.params.get(f"train.{name}") for name in ("lr_scheduler", "num_steps", "lr_warmup_steps")
    )
    if kind is None or not isinstance(steps, int) or not isinstance(warmup, int):
        return None
    length = "" if kind == "constant" else f" over {plural(steps, 'step')}"
    return f"{kind}{length}" + (f" ({warmup:,} of warmup)" if warmup else "")


def scaled_rate(revision: RevisionReport) -> str | None:
    """Return the learning rate with ``train.scale_lr``, which depends on the batch size."""
    rate, factor = revision.params.get("train.learning_rate"), product(revision, *BATCH)
    if not revision.params.get("train.scale_lr") or not is_number(rate) or factor is None:
        return None
    return f"{rate * factor:.3g}"


def product(revision: RevisionReport, *keys: str) -> float | None:
    values = [value for key in keys if is_number(value := revision.params.get(key))]
    return math.prod(values) if len(values) == len(keys) else None


def num_images(revision: RevisionReport) -> str | None:
    count = revision.lineage["dataset"].get("train")
    return f"{count:,}" if is_number(count) else None


def epochs(revisions: Sequence[RevisionReport]) -> str:
    """Return `` They were seen in 23.3 against 206 epochs.``"""
    known = [f"{value:.3g}" for revision in revisions if is_number(value := revision.metrics.get("train.epochs"))]
    return (
        f" They were seen in {join_values(known)} epochs."
        if len(known) == len(revisions) and len(set(known)) > 1
        else ""
    )


QUANTITIES = (
    Quantity("Images seen differ", images_seen, LENGTH, equal_images_hint),
    Quantity("The effective batch differs", effective_batch, BATCH),
    Quantity("The schedule differs", schedule, LENGTH),
    Quantity("The learning rate differs", scaled_rate, ("train.learning_rate", "train.scale_lr")),
    Quantity("The number of training images differs", num_images, (), epochs),
)
