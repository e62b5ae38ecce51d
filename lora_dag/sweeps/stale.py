"""Why a finished run of a sweep is not what the workspace would make of it now, by Snakemake's records of its jobs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from lora_dag.core.files import sha256_file
from lora_dag.pipeline import code
from lora_dag.pipeline.dvc_files import read_pipeline
from lora_dag.pipeline.snakemake_records import Record
from lora_dag.sweeps.grid import Run

WITNESS = {
    "prepare": ("prepared", "dataset.json"),
    "cache_latents": ("latents", "manifest.json"),
    "train": ("adapter", "adapter.json"),
    "validate": ("reports", "metrics.json"),
    "export": ("export_reports", "lineage.json"),
    "report": ("reports", "report.md"),
}
"""Stage -> an output that it has finished with, and that its record is found by: the folder, and a file in it."""
AGAIN = "run `snakemake` again, or go back to what it was"


def outdated(stage: str, record: Record, wanted: Run, but: str = "") -> Iterator[str]:
    """What has changed since the job: parameters, code, files that it read.

    Args:
        but: a folder whose files are not looked at.
    """
    yield from changed_parameters(record, wanted)
    if record.results != code.results_of(stage):
        yield f"made by code of {stage} with RESULTS {record.results}, and it has {code.results_of(stage)} now"
    elif record.code != current_code(stage, wanted.value("model.family")):
        yield f"made by other code of {stage} of the same RESULTS (`lora-dag relock` accepts it)"
    yield from changed_inputs(stage, record, wanted, but)


def changed_parameters(record: Record, wanted: Run) -> Iterator[str]:
    for name, made_with in record.sections.items():
        now = wanted.value(name)
        pairs = (
            {f"{name}.{key}": (made_with.get(key), now.get(key)) for key in made_with | now}
            if (isinstance(made_with, dict) and isinstance(now, dict) and "." not in name)
            else {name: (made_with, now)}
        )
        for key, (then, value) in pairs.items():
            if then != value:
                yield f"made with {key} {json.dumps(then)}, params.yaml has {json.dumps(value)}"


@functools.cache
def current_code(stage: str, family: str) -> str:
    return code.digest(read_pipeline()[stage].deps, family)


def changed_inputs(stage: str, record: Record, wanted: Run, but: str) -> Iterator[str]:
    """Pictures, the base, and what an earlier stage wrote."""
    source = wanted.value("dataset.source")
    for path, digest in record.inputs.items():
        if but and lies_in(path, but):
            continue
        if not Path(path).is_file():
            yield f"{stage} read {path}, which is not here"
        elif other(Path(path), digest, record.started):
            yield f"{stage} read another {path}"
    now = {str(path) for path in Path(source).rglob("*") if path.is_file()} if stage == "prepare" else set()
    if added := sorted(now - record.inputs.keys()):
        yield f"{source} has files that it was made without ({', '.join(added[:3])})"


def other(path: Path, digest: str | None, started: float) -> bool:
    """Large files, which Snakemake takes no digest of, are told by their time."""
    return sha256_file(path) != digest if digest else path.stat().st_mtime > started


def lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
