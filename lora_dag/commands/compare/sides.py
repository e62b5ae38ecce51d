"""One revision as the comparison sees it: its settings and its reports, read without a checkout."""

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

from lora_dag.artifacts import lineage, picture_table
from lora_dag.commands.compare.revisions import find_commit, read_file
from lora_dag.core.console import UserError
from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import Score

PARAMS = "params.yaml"
METRICS_FILE = "reports/metrics.json"
METRICS_FILES = (METRICS_FILE, "reports/train/metrics.json", "reports/export/metrics.json")
SCORES = "reports/validate/heldout.csv"
LINEAGE = "reports/validate/lineage.json"
PICTURES = "reports/dataset/pictures.csv"
SAMPLES = "reports/samples.png"
LOCK = "dvc.lock"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, YAMLError, csv.Error)
"""What reading a file raises that no stage wrote so."""
MAX_SHOWN = 100  # characters of a wrong value


@dataclass(frozen=True)
class Side:
    """One revision's settings and reports."""

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
    pictures: list[picture_table.Row] | None
    """reports/dataset/pictures.csv; None for a revision from before there was one"""
    lock: bytes | None
    """dvc.lock; None where Snakemake alone is used"""

    @property
    def prompts(self) -> list[str]:
        return self.lineage["validate"]["prompts"]


def shared_prompts(sides: Sequence[Side]) -> list[str]:
    """Prompts that all drew, in the order of the first."""
    return [prompt for prompt in sides[0].prompts if all(prompt in side.prompts for side in sides)]


def read_side(name: str) -> Side:
    """Settings and reports of a branch, tag, commit or DVC experiment, or of the files in the workspace.

    Raises:
        UserError: no such revision, it has no reports, or some are damaged: a line for each file.
    """
    return read_commit(name, find_commit(name))


def read_commit(name: str, commit: str | None) -> Side:
    """The same of a commit, or of the workspace (None), that pages call ``name``."""
    parsers: dict[str, Callable[[bytes], Any]] = {
        PARAMS: parse_params,
        **dict.fromkeys(METRICS_FILES, parse_metrics),
        SCORES: parse_scores,
        LINEAGE: parse_lineage,
        SAMPLES: bytes,
        PICTURES: lambda blob: picture_table.parse(blob.decode()),
        LOCK: bytes,
    }
    found: dict[str, Any] = {}
    problems = []
    for path, parse in parsers.items():
        blob = read_file(commit, path)
        try:
            found[path] = None if blob is None else parse(blob)
        except DAMAGED as error:
            what = " ".join(str(error).split())
            problems.append(f"{name}: {path} is damaged ({type(error).__name__}: {what}); {how_to_report(commit)}")
    needed = [path for path in parsers if path not in (*METRICS_FILES[1:], PICTURES, LOCK)]
    missing = [path for path in needed if path in found and found[path] is None]
    if missing:
        problems.append(f"{name}: has no {', '.join(missing)}; {how_to_report(commit)}")
    if problems:
        raise UserError(*problems)
    return Side(
        name=name,
        commit=commit,
        params=found[PARAMS],
        metrics={key: value for path in METRICS_FILES for key, value in (found[path] or {}).items()},
        scores=found[SCORES],
        lineage=found[LINEAGE],
        samples=found[SAMPLES],
        pictures=found[PICTURES],
        lock=found[LOCK],
    )


def how_to_report(commit: str | None) -> str:
    return "run `dvc repro` first" if commit is None else "run `dvc repro` there and commit reports/"


def parse_params(blob: bytes) -> dict[str, Any]:
    """Dotted key -> value, all of JSON's types: dates and NaN are no setting's.

    Raises:
        DAMAGED: it is no params.yaml.
    """
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
    scores = heldout_table.read_scores(blob.decode())
    if not scores:
        raise ValueError("no rows")
    return scores


def parse_lineage(blob: bytes) -> dict[str, Any]:
    """Of lineage.json, with what the comparison takes from it.

    Raises:
        KeyError: it lacks some of that.
        ValueError: some of that is of another kind.
    """
    made = lineage.parse(blob)
    for section, *keys in (
        ("validate", "prompts", "scales"),
        ("sheet", "cell", "picture"),
        ("model", "dtype"),
        ("dataset", "content"),
        ("base",),
        ("latents",),
    ):
        inside = made[section]
        for key in keys:
            inside[key]
    mapping(made["base"])
    asked, cell = made["validate"], made["sheet"]["cell"]
    for key, kind in (("prompts", str), ("scales", int | float)):
        if not (isinstance(asked[key], list) and asked[key] and all(isinstance(each, kind) for each in asked[key])):
            raise ValueError(f"validate.{key} is {asked[key]!r}"[:MAX_SHOWN])
    if not isinstance(cell, int) or cell < 1:
        raise ValueError(f"sheet.cell is {cell!r}"[:MAX_SHOWN])
    return made


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where names and values are expected")
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"lora": {"rank": 8}}`` -> ``{"lora.rank": 8}``; an empty mapping is null, as the settings read it."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        deeper = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": None if value == {} else value}
    return flat
