"""Reasons why a finished run of a sweep is out of date in the workspace, by Snakemake's records of its jobs."""

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

FINAL_OUTPUT = {
    "prepare": ("prepared", "dataset.json"),
    "cache_latents": ("latents", "manifest.json"),
    "train": ("adapter", "adapter.json"),
    "validate": ("reports", "metrics.json"),
    "export": ("export_reports", "lineage.json"),
    "report": ("reports", "report.md"),
}
"""Stage -> the folder and name of the output whose record describes the job."""
AGAIN = "Run `snakemake` again, or undo the change."


def reasons_outdated(stage: str, record: Record, wanted: Run, ignored_folder: str = "") -> Iterator[str]:
    """Yield what has changed since the job: parameters, code, input files."""
    yield from changed_parameters(record, wanted)
    if record.results != code.results_of(stage):
        yield f"made with RESULTS {record.results} of {stage}, which now has {code.results_of(stage)}"
    elif record.code != current_code(stage, wanted.value("model.family")):
        yield f"made with other code of {stage} of equal RESULTS (`lora-dag relock` accepts it)"
    yield from changed_inputs(stage, record, wanted, ignored_folder)


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


def changed_inputs(stage: str, record: Record, wanted: Run, ignored_folder: str) -> Iterator[str]:
    """Yield changes of images, the base model and outputs of earlier stages."""
    source = wanted.value("dataset.source")
    for path, digest in record.inputs.items():
        if ignored_folder and is_within(path, ignored_folder):
            continue
        if not Path(path).is_file():
            yield f"{path}, an input of {stage}, is missing"
        elif has_changed(Path(path), digest, record.started):
            yield f"{path}, an input of {stage}, has changed"
    now = {str(path) for path in Path(source).rglob("*") if path.is_file()} if stage == "prepare" else set()
    if added := sorted(now - record.inputs.keys()):
        yield f"{source} has new files ({', '.join(added[:3])})"


def has_changed(path: Path, digest: str | None, started: float) -> bool:
    """Return whether a file has changed; for large files, which Snakemake does not hash, by their time."""
    return sha256_file(path) != digest if digest else path.stat().st_mtime > started


def is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
