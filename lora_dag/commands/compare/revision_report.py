"""Read the settings and reports of one revision, without a checkout."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lora_dag.artifacts import image_table, lineage
from lora_dag.commands.compare.revisions import find_commit, read_file
from lora_dag.core.console import Problem, UserError
from lora_dag.core.params import conflict_line, markers_problem
from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import Score

PARAMS = "params.yaml"
METRICS_FILE = "reports/metrics.json"
METRICS_FILES = (METRICS_FILE, "reports/train/metrics.json", "reports/export/metrics.json")
SCORES = "reports/validate/heldout.csv"
LINEAGE = "reports/validate/lineage.json"
IMAGES = "reports/dataset/images.csv"
SAMPLES = "reports/samples.png"
LOCK = "dvc.lock"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, YAMLError, csv.Error)
"""Exceptions that reading a file raises if no stage wrote its content."""
MAX_SHOWN = 100  # characters of a wrong value


@dataclass(frozen=True)
class RevisionReport:
    """Settings and reports of one revision."""

    name: str
    commit: str | None
    """None for the workspace."""
    params: dict[str, Any]
    """Dotted key -> value."""
    metrics: dict[str, Any]
    scores: list[Score]
    lineage: dict[str, Any]
    samples: bytes
    """reports/samples.png"""
    images: list[image_table.Row] | None
    """reports/dataset/images.csv; None for a revision of an older version"""
    lock: bytes | None
    """dvc.lock; None without DVC"""

    @property
    def prompts(self) -> list[str]:
        return self.lineage["validate"]["prompts"]


def shared_prompts(revisions: Sequence[RevisionReport]) -> list[str]:
    """Return the prompts of all revisions, in the order of the first."""
    return [prompt for prompt in revisions[0].prompts if all(prompt in revision.prompts for revision in revisions)]


def read_revision(name: str) -> RevisionReport:
    """Read settings and reports of a branch, tag, commit, DVC experiment, or of the workspace.

    Raises:
        UserError: no such revision; or one problem per missing or damaged file.
    """
    return read_commit(name, find_commit(name))


def read_commit(name: str, commit: str | None) -> RevisionReport:
    """Read a commit, or the workspace (None), which pages call ``name``."""
    parsers: dict[str, Callable[[bytes], Any]] = {
        PARAMS: parse_params,
        **dict.fromkeys(METRICS_FILES, parse_metrics),
        SCORES: parse_scores,
        LINEAGE: parse_lineage,
        SAMPLES: bytes,
        IMAGES: lambda blob: image_table.parse(blob.decode()),
        LOCK: bytes,
    }
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for path, parse in parsers.items():
        blob = read_file(commit, path)
        try:
            found[path] = None if blob is None else parse(blob)
        except UserError as error:
            problems += error.at(name).problems
        except DAMAGED as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"{name}: {path} is damaged or of another version ({reason}). {how_to_report(commit)}"
            problems.append(Problem("report-damaged", text))
    needed = [path for path in parsers if path not in (*METRICS_FILES[1:], IMAGES, LOCK)]
    missing = [path for path in needed if path in found and found[path] is None]
    if missing:
        be = "is" if len(missing) == 1 else "are"
        text = f"{name}: {', '.join(missing)} {be} missing. {how_to_report(commit)}"
        problems.append(Problem("revision-incomplete", text))
    if problems:
        raise UserError(*problems)
    return RevisionReport(
        name=name,
        commit=commit,
        params=found[PARAMS],
        metrics={key: value for path in METRICS_FILES for key, value in (found[path] or {}).items()},
        scores=found[SCORES],
        lineage=found[LINEAGE],
        samples=found[SAMPLES],
        images=found[IMAGES],
        lock=found[LOCK],
    )


def how_to_report(commit: str | None) -> str:
    return "Run `dvc repro` first." if commit is None else "Run `dvc repro` there and commit reports/."


def parse_params(blob: bytes) -> dict[str, Any]:
    """Return dotted key -> value, with types of JSON: settings contain no dates and no NaN.

    Raises:
        DAMAGED: the file is not a valid params.yaml.
        UserError: git left a merge conflict in it.
    """
    if conflict := conflict_line(blob.decode()):
        raise UserError(markers_problem(f"{PARAMS}:{conflict}"))
    found = flatten(mapping(YAML(typ="safe", pure=True).load(io.BytesIO(blob))))
    json.dumps(found, allow_nan=False)
    return found


def parse_object(blob: bytes) -> dict[str, Any]:
    return mapping(json.loads(blob))


def parse_metrics(blob: bytes) -> dict[str, Any]:
    metrics = parse_object(blob)
    if large := [name for name, value in metrics.items() if isinstance(value, int) and abs(value) > sys.maxsize]:
        raise ValueError(f"{large[0]} is beyond 64 bits")
    return metrics


def parse_scores(blob: bytes) -> list[Score]:
    scores = heldout_table.scores_from_csv(blob.decode())
    if not scores:
        raise ValueError("no rows")
    return scores


def parse_lineage(blob: bytes) -> dict[str, Any]:
    """Parse lineage.json and check the values that the comparison reads.

    Raises:
        KeyError: a value is missing.
        ValueError: a value has the wrong type.
    """
    made = lineage.parse(blob)
    for section, *keys in (
        ("validate", "prompts", "scales"),
        ("sheet", "cell", "image"),
        ("model", "dtype"),
        ("dataset", "content"),
        ("base",),
        ("latents",),
    ):
        inside = made[section]
        for key in keys:
            inside[key]
    mapping(made["base"])
    settings, cell = made["validate"], made["sheet"]["cell"]
    for key, kind in (("prompts", str), ("scales", int | float)):
        if not (
            isinstance(settings[key], list) and settings[key] and all(isinstance(each, kind) for each in settings[key])
        ):
            raise ValueError(f"validate.{key} is {settings[key]!r}"[:MAX_SHOWN])
    if not isinstance(cell, int) or cell < 1:
        raise ValueError(f"sheet.cell is {cell!r}"[:MAX_SHOWN])
    return made


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"got a {type(value).__name__}, but names with values are expected")
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"lora": {"rank": 8}}`` to ``{"lora.rank": 8}``; an empty mapping becomes None, as in settings."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        deeper = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": None if value == {} else value}
    return flat
