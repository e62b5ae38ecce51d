"""Compare the run with the committed report, in a line: settings, images, base, held-out loss."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dag.artifacts import lineage
from lora_dag.core.files import from_json
from lora_dag.pages.markdown import codes
from lora_dag.pipeline.git import git
from stages.report.inputs import Inputs

MAX_CHANGES = 8  # listed in the line
MAX_VALUE = 60  # characters
GIT_SECONDS = 10


def changes_line(inputs: Inputs, reports: Path, export: Path) -> str:
    """Return a line on the differences from the committed report; empty without git or a committed report."""
    paths = (export / "lineage.json", reports / "validate" / "lineage.json", reports / "metrics.json")
    found = [committed(path) for path in paths]
    commit = git("rev-parse", "--short", "HEAD", timeout=GIT_SECONDS)
    if commit is None or None in found:
        return ""
    try:
        made, of_samples = (lineage.parse(text or b"") for text in found[:2])
        measured = from_json(found[2] or b"")
        differences = list(changed_inputs(made, inputs.made, of_samples, inputs.lineage))
        before, after = measured["val.loss"], inputs.measured["val.loss"]
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""  # the report of a version with another format
    name = commit.decode().strip()
    if not differences:
        return f"Compared with commit {name}: same settings, images, base and packages."
    more = [f"and {len(differences) - MAX_CHANGES} more"] if len(differences) > MAX_CHANGES else []
    loss = f"held-out loss {before:.4f} → {after:.4f}" if before != after else "equal held-out loss"
    if measured.get("val.table") != inputs.measured.get("val.table"):
        loss = "the held-out tables differ"
    return f"Compared with commit {name}: {', '.join([*differences[:MAX_CHANGES], *more])}. Result: {loss}."


def committed(path: Path) -> bytes | None:
    return git("show", f"HEAD:./{Path(os.path.relpath(path)).as_posix()}", timeout=GIT_SECONDS)


def changed_inputs(made: Any, new_made: Any, of_samples: Any, new_of_samples: Any) -> Iterator[str]:
    """Yield changed settings by their names in params.yaml, then other changed inputs."""
    before = {name: made.get(name, {}) for name in ("lora", "train", "export")} | of_samples
    after = {name: new_made.get(name, {}) for name in ("lora", "train", "export")} | new_of_samples
    for section in ("model", "lora", "train", "validate", "export"):
        old, new = before[section], after[section]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                before_after = (json.dumps(each.get(key), ensure_ascii=False) for each in (old, new))
                yield f"`{section}.{key}` {' → '.join(codes(list(before_after), MAX_VALUE))}"
    for name in ("images", "captions", "base", "packages"):
        if made.get(name) != new_made.get(name):
            yield f"{name} changed"
