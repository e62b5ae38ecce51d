"""Whether the workspace would make a run below runs/ again as it is: by parameters, code and files that its jobs read.

In: what Snakemake recorded of a run's jobs.  Out: a line for each difference; none where the run is current.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core import params, sweep
from stages.core.files import sha256_file
from stages.core.job_records import Record, code_of

WITNESS = {
    "prepare": ("prepared", "manifest.jsonl"),
    "cache_latents": ("latents", "manifest.json"),
    "train": ("adapter", "adapter.json"),
    "validate": ("reports", "metrics.json"),
    "export": ("export_reports", "lineage.json"),
    "report": ("reports", "report.md"),
}
"""Stage -> an output that its record is found by: the folder, and a file in it."""


def unsettled(records: dict[str, Record], wanted: sweep.Run) -> Iterator[str]:
    """Parameters that the run was made with and params.yaml, overrides aside, has no more."""
    for record in records.values():
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


def changed_code(records: dict[str, Record], wanted: sweep.Run) -> Iterator[str]:
    stages, family = pipeline(), wanted.value("model.family")
    changed = [stage for stage, record in records.items() if record.code != code_of(stages[stage]["deps"], family)]
    if changed:
        yield f"made by other code of {', '.join(changed)} than stages/ has now"


def changed_inputs(records: dict[str, Record], wanted: sweep.Run, but: str | None = None) -> Iterator[str]:
    """Files that a stage read and that are other ones now: pictures, and what an earlier stage wrote.

    Args:
        but: a folder whose files are not looked at.
    """
    for stage, record in records.items():
        for path, digest in record.inputs.items():
            if but is not None and lies_in(path, but):
                continue
            if not Path(path).is_file():
                yield f"{stage} read {path}, which is not here"
            elif other(Path(path), digest, record.started):
                yield f"{stage} read another {path}"
    if "prepare" in records:
        source = wanted.value("dataset.source")
        now = {str(path) for path in Path(source).rglob("*") if path.is_file()}
        if added := sorted(now - records["prepare"].inputs.keys()):
            yield f"{source} has files that it was made without ({', '.join(added[:3])})"


def other(path: Path, digest: str | None, started: float) -> bool:
    """Large files, which Snakemake takes no digest of, are told by their time."""
    return sha256_file(path) != digest if digest else path.stat().st_mtime > started


def pipeline() -> dict[str, Any]:
    """The stages of dvc.yaml."""
    stages: dict[str, Any] = params.read_yaml(Path("dvc.yaml"))["stages"]
    return stages


def lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
