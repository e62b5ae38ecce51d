"""Compare the inputs of two runs: parameters, digests of data and base, code; and find runs of the same setting."""

from __future__ import annotations

import functools
import re
from typing import Any

from lora_dag.adapters.params import with_alphas
from lora_dag.commands.compare.revision_report import DAMAGED, RevisionReport
from lora_dag.core.files import sha256_json
from lora_dag.pipeline.code import is_code
from lora_dag.pipeline.dvc_files import Locked, parse_lock

SEED = "train.seed"
IGNORED_SECTIONS = ("runtime", "report", "sweep")  # they do not affect results
TRAINING_SECTIONS = ("model", "dataset", "cache", "lora", "train")  # sections that affect the adapter
IMAGES, LATENTS = "images and captions", "latents and prompt embeddings"
NAME_THE_BASE = ("model.family", "model.pretrained", "model.variant")
MOVE_LATENTS = ("model.", "dataset.", "cache.")


def differing_params(a: RevisionReport, b: RevisionReport) -> list[str]:
    """Return dotted keys of differing parameters; ``lora.alpha: null`` equals the rank as a number."""
    keys = sorted(a.params.keys() | b.params.keys())
    if lora_section(a.params) == lora_section(b.params):
        keys = [key for key in keys if not key.startswith("lora.")]
    absent = object()
    return [
        key
        for key in keys
        if key.partition(".")[0] not in IGNORED_SECTIONS and a.params.get(key, absent) != b.params.get(key, absent)
    ]


def input_digests(revision: RevisionReport) -> dict[str, str]:
    """Return digests of the adapter's inputs: name on the page -> digest."""
    lineage = revision.lineage
    base = {f"the base's {component}": digest for component, digest in lineage["base"].items()}
    return base | {IMAGES: lineage["dataset"]["content"], LATENTS: lineage["latents"]}


def changed_inputs(a: RevisionReport, b: RevisionReport) -> list[str]:
    before, after = input_digests(a), input_digests(b)
    return [name for name in before | after if before.get(name) != after.get(name)]


def unexplained_inputs(a: RevisionReport, b: RevisionReport) -> list[str]:
    """Inputs and code that differ though no differing_params parameter moves them."""
    keys = differing_params(a, b)
    other_base = any(key in NAME_THE_BASE for key in keys)
    other_latents = any(key.startswith(MOVE_LATENTS) for key in keys)
    found = [
        name
        for name in changed_inputs(a, b)
        if not (other_latents if name == LATENTS else other_base and name != IMAGES)
    ]
    return found + changed_training(a, b) * ("model.family" not in keys)


def changed_training(a: RevisionReport, b: RevisionReport) -> list[str]:
    """Return a line if the code of stage train differs and its outputs differ too.

    An equal number ``RESULTS`` claims that results are the same. Equal outputs prove it.
    """
    numbers, code = [
        [get(locked_training(revision.lock)) for revision in (a, b)] for get in (lambda run: run.results, code_of)
    ]
    if None not in numbers and numbers[0] != numbers[1]:
        return ["RESULTS of train"]
    if not all(code) or code[0] == code[1] or same_outputs(a, b):
        return []
    return ["other code of train" + " (with the same RESULTS)" * (None not in numbers)]


def same_setting(a: RevisionReport, b: RevisionReport) -> bool:
    """Return whether only train.seed differs; code may differ if it gave the same adapter."""
    return setting(a) == setting(b) or (without_code(a) == without_code(b) and same_outputs(a, b))


def setting(revision: RevisionReport) -> str:
    """Return a digest of all that affects the adapter, except for train.seed.

    Runs with different code of train have different settings, until `lora-dag relock` accepts the older run: then both
    have today's code, and RESULTS claims that this is right.
    """
    return sha256_json(without_code(revision) | {"code": code_of(locked_training(revision.lock))})


def without_code(revision: RevisionReport) -> dict[str, Any]:
    results = locked_training(revision.lock).results
    return {"params": setting_params(revision.params), "inputs": input_digests(revision), "results": results}


def setting_params(params: dict[str, Any]) -> dict[str, Any]:
    of_training = {
        key: value for key, value in params.items() if key.partition(".")[0] in TRAINING_SECTIONS and key != SEED
    }
    return {key: value for key, value in of_training.items() if not key.startswith("lora.")} | {
        "lora": lora_section(params)
    }


def lora_section(params: dict[str, Any]) -> dict[str, Any]:
    """Return section ``lora`` with patterns as mappings and numbers for ``alpha: null``, to compare adapters."""
    own = {key.removeprefix("lora."): value for key, value in params.items() if key.startswith("lora.")}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = {key: own.pop(key) for key in list(own) if key.startswith(f"{name}.")}
        own[name] = {key.removeprefix(f"{name}."): value for key, value in pattern.items()} or own.get(name) or {}
    return with_alphas(own)


# dvc.lock


@functools.cache
def locked_training(lock: bytes | None) -> Locked:
    """Return the last run of stage train in dvc.lock; empty if there is none.

    Only the lines of this stage are parsed: parsing all of them takes 0.2 s.
    """
    lines = re.search(rb"^  train:\n(?:    .*\n|\n)+", lock or b"", re.MULTILINE)
    try:
        return parse_lock(b"stages:\n" + lines[0])["train"] if lines else Locked()
    except DAMAGED:
        return Locked()


def code_of(run: Locked) -> dict[str, Any]:
    """Return file or folder of code -> md5."""
    return {path: dep.get("md5") for path, dep in run.deps.items() if is_code(path)}


def same_outputs(a: RevisionReport, b: RevisionReport) -> bool:
    """Return whether both trainings wrote the same adapter and the same metrics."""
    outs = locked_training(a.lock).outs
    return bool(outs) and outs == locked_training(b.lock).outs
