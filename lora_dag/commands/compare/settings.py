"""What tells two revisions apart: parameters and the digests of what went in; and which runs repeat one setting."""

from __future__ import annotations

import re
from typing import Any

from lora_dag.adapters.params import with_alphas
from lora_dag.commands.compare.sides import Side
from lora_dag.core.files import sha256_json

SEED = "train.seed"
IGNORED_SECTIONS = ("runtime", "report", "sweep")  # they change no result
OF_TRAINING = ("model", "dataset", "cache", "lora", "train")  # sections that decide the adapter
PICTURES, LATENTS = "pictures and captions", "latents and prompt embeddings"
NAME_THE_BASE = ("model.family", "model.pretrained", "model.variant")
MOVE_LATENTS = ("model.", "dataset.", "cache.")


def differing(a: Side, b: Side) -> list[str]:
    """Dotted keys of parameters; ``lora.alpha`` null and the rank as a number are one value where ranks are equal."""
    keys = sorted(a.params.keys() | b.params.keys())
    if lora_section(a.params) == lora_section(b.params):
        keys = [key for key in keys if not key.startswith("lora.")]
    absent = object()
    return [
        key
        for key in keys
        if key.partition(".")[0] not in IGNORED_SECTIONS and a.params.get(key, absent) != b.params.get(key, absent)
    ]


def went_in(side: Side) -> dict[str, str]:
    """Digests of what the adapter was made from, by the names that the page gives them."""
    lineage = side.lineage
    base = {f"the base's {component}": digest for component, digest in lineage["base"].items()}
    return base | {PICTURES: lineage["dataset"]["content"], LATENTS: lineage["latents"]}


def changed_inputs(a: Side, b: Side) -> list[str]:
    before, after = went_in(a), went_in(b)
    return [name for name in before | after if before.get(name) != after.get(name)]


def unexplained(a: Side, b: Side) -> list[str]:
    """Inputs and code that differ though no differing parameter moves them."""
    keys = differing(a, b)
    other_base = any(key in NAME_THE_BASE for key in keys)
    other_latents = any(key.startswith(MOVE_LATENTS) for key in keys)
    found = [
        name
        for name in changed_inputs(a, b)
        if not (other_latents if name == LATENTS else other_base and name != PICTURES)
    ]
    numbers = [train_results(side.lock) for side in (a, b)]
    return found + ["RESULTS of train"] * (None not in numbers and numbers[0] != numbers[1])


def setting(side: Side) -> str:
    """The same for runs that differ in nothing but train.seed, as far as the adapter goes: hex digits."""
    return sha256_json(
        {"params": setting_params(side.params), "inputs": went_in(side), "results": train_results(side.lock)}
    )


def setting_params(params: dict[str, Any]) -> dict[str, Any]:
    of_training = {key: value for key, value in params.items() if key.partition(".")[0] in OF_TRAINING and key != SEED}
    return {key: value for key, value in of_training.items() if not key.startswith("lora.")} | {
        "lora": lora_section(params)
    }


def lora_section(params: dict[str, Any]) -> dict[str, Any]:
    """Section ``lora``, patterns as mappings, with numbers where ``alpha`` is null: the same for equal adapters."""
    own = {key.removeprefix("lora."): value for key, value in params.items() if key.startswith("lora.")}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = {key: own.pop(key) for key in list(own) if key.startswith(f"{name}.")}
        own[name] = {key.removeprefix(f"{name}."): value for key, value in pattern.items()} or own.get(name) or {}
    return with_alphas(own)


def train_results(lock: bytes | None) -> str | None:
    """The number of the results that stage train gave, as dvc.lock has it; read as text: YAML takes 0.2 s."""
    found = re.search(r"^ +stages/train/__init__\.py:\n +RESULTS: (\d+)$", (lock or b"").decode(errors="replace"), re.M)
    return found[1] if found else None
