"""What tells two revisions apart: parameters and the digests of what went in; and which runs repeat one setting."""

from __future__ import annotations

import functools
import re
from typing import Any

from lora_dag.adapters.params import with_alphas
from lora_dag.commands.compare.sides import DAMAGED, Side
from lora_dag.core.files import sha256_json
from lora_dag.pipeline.code import is_code
from lora_dag.pipeline.dvc_files import Locked, parse_lock

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
    return found + changed_training(a, b) * ("model.family" not in keys)


def changed_training(a: Side, b: Side) -> list[str]:
    """The code of stage train, where it differs and its outputs do not show that this changes nothing.

    An equal number ``RESULTS`` is what today's code claims of its results; equal outputs are the proof.
    """
    numbers, code = [[get(trained(side.lock)) for side in (a, b)] for get in (lambda run: run.results, code_of)]
    if None not in numbers and numbers[0] != numbers[1]:
        return ["RESULTS of train"]
    if not all(code) or code[0] == code[1] or same_outputs(a, b):
        return []
    return ["other code of train" + " (of the same RESULTS)" * (None not in numbers)]


def same_setting(a: Side, b: Side) -> bool:
    """Whether they differ in nothing but train.seed; code may differ too where it gave the same adapter."""
    return setting(a) == setting(b) or (without_code(a) == without_code(b) and same_outputs(a, b))


def setting(side: Side) -> str:
    """The same for runs that differ in nothing but train.seed, as far as the adapter goes: hex digits.

    Runs of other code of train are of two settings, whatever was edited, until `lora-dag relock` accepts the older one:
    then both have today's code, and RESULTS is the claim that this is right.
    """
    return sha256_json(without_code(side) | {"code": code_of(trained(side.lock))})


def without_code(side: Side) -> dict[str, Any]:
    results = trained(side.lock).results
    return {"params": setting_params(side.params), "inputs": went_in(side), "results": results}


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


# Of dvc.lock


@functools.cache
def trained(lock: bytes | None) -> Locked:
    """The last run of stage train; empty where dvc.lock has none. Its lines alone are read: all of them take 0.2 s."""
    lines = re.search(rb"^  train:\n(?:    .*\n|\n)+", lock or b"", re.MULTILINE)
    try:
        return parse_lock(b"stages:\n" + lines[0])["train"] if lines else Locked()
    except DAMAGED:
        return Locked()


def code_of(run: Locked) -> dict[str, Any]:
    """File or folder of code -> md5."""
    return {path: dep.get("md5") for path, dep in run.deps.items() if is_code(path)}


def same_outputs(a: Side, b: Side) -> bool:
    """Whether both trainings wrote the same adapter and the same figures."""
    outs = trained(a.lock).outs
    return bool(outs) and outs == trained(b.lock).outs
