"""The reader of dvc.yaml and dvc.lock: inputs and outputs of each stage, as declared and as of its last run.

It neither starts DVC nor reads the listed files. (core/stage_start.py reads single entries of dvc.lock for its line.)
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_dag.core.clone import PROJECT
from lora_dag.core.labels import as_yaml
from lora_dag.core.params import read_yaml

PIPELINE, LOCK, PARAMS = Path("dvc.yaml"), Path("dvc.lock"), "params.yaml"
RESULTS = "RESULTS"
ABSENT = object()


@dataclass(frozen=True)
class Stage:
    """An entry of dvc.yaml."""

    cmd: str
    deps: list[str]
    """Paths, without the prefix of the base model's."""
    params: dict[str, list[str]]
    """File, such as params.yaml -> sections or single keys."""
    outs: dict[str, bool]
    """Path -> whether DVC caches it; git tracks the others."""


@dataclass(frozen=True)
class Locked:
    """An entry of dvc.lock: the last run of a stage."""

    cmd: str = ""
    deps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Path, without the prefix of the base model's -> md5, which ends in ``.dir`` for a folder, and its nfiles."""
    outs: Mapping[str, str | None] = field(default_factory=dict)
    """Path -> md5."""
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """File -> section or key -> value."""

    @property
    def results(self) -> int | None:
        """RESULTS of the run; None for a run from before RESULTS was introduced."""
        return next((values[RESULTS] for values in self.params.values() if RESULTS in values), None)


def read_pipeline(params: Mapping[str, Any] | None = None, root: Path = Path()) -> dict[str, Stage]:
    """Return the stages of dvc.yaml in ``root``, in the order of the file.

    Args:
        params: content of params.yaml, which replaces templates such as ``${model.pretrained}``. None keeps them.

    Raises:
        UserError: the file is missing or invalid YAML.
        AttributeError, KeyError, TypeError, ValueError: the file has another structure than DVC reads.
    """
    fill = substitution(params) if params is not None else lambda value: value
    return {name: parse_stage(fill(entry)) for name, entry in read_yaml(root / PIPELINE)["stages"].items()}


def read_lock() -> dict[str, Locked]:
    """Return the stages of dvc.lock in the current folder; none without the file. Raises as ``read_pipeline``."""
    return locked_stages(read_yaml(LOCK)) if LOCK.exists() else {}


def parse_lock(content: bytes) -> dict[str, Locked]:
    """Return the stages of the content of a dvc.lock.

    Raises:
        YAMLError, AttributeError, KeyError, TypeError, ValueError: the content has another structure than DVC writes.
    """
    return locked_stages(YAML(typ="safe", pure=True).load(io.BytesIO(content)))


def parse_stage(entry: Mapping[str, Any]) -> Stage:
    keys: dict[str, list[str]] = {}
    for item in entry.get("params", []):
        for file, names in item.items() if isinstance(item, dict) else [(PARAMS, [item])]:
            keys.setdefault(file, []).extend(names)
    outs = [item for kind in ("outs", "metrics", "plots") for item in entry.get(kind, [])]
    pairs = [next(iter(item.items())) if isinstance(item, dict) else (item, {}) for item in outs]
    cached = {path: options.get("cache", True) for path, options in pairs}
    deps = [path.removeprefix(PROJECT) for path in entry.get("deps", [])]
    return Stage(str(entry["cmd"]), deps, keys, cached)


def locked_stages(tree: Mapping[str, Any]) -> dict[str, Locked]:
    return {
        str(name): Locked(
            cmd=entry["cmd"],
            deps={dep["path"].removeprefix(PROJECT): dep for dep in entry.get("deps", [])},
            outs={out["path"]: out.get("md5") for out in entry.get("outs", [])},
            params=entry.get("params", {}),
        )
        for name, entry in tree["stages"].items()
    }


def substitution(params: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a function that replaces templates by parameters in an entry of dvc.yaml."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {fill(name): fill(each) for name, each in value.items()}
        if isinstance(value, list):
            return [fill(each) for each in value]
        if isinstance(value, str):
            return re.sub(r"\$\{([\w.]+)\}", lambda key: str(look_up(params, key[1])), value)
        return value

    return fill


# Parameters


def look_up(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of a section or dotted key; ABSENT if there is none."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a section; nothing for an absent key."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from leaves(f"{key}.{name}", each)
    elif value is not ABSENT:
        yield key, value


def changed_params(stage: Stage, locked: Locked, params: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of params.yaml, also for whole sections in dvc.yaml."""
    recorded = locked.params.get(PARAMS, {})
    for name in stage.params.get(PARAMS, []):
        then, now = dict(leaves(name, recorded.get(name, ABSENT))), dict(leaves(name, look_up(params, name)))
        for key in then | now:
            if then.get(key, ABSENT) != now.get(key, ABSENT):
                yield key, then.get(key, ABSENT), now.get(key, ABSENT)


def show(value: Any) -> str:
    return "no such key" if value is ABSENT else value if isinstance(value, str) else as_yaml(value)
