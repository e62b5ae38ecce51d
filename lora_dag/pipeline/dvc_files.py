"""dvc.yaml and dvc.lock: what each stage is to read and write, and what it read and wrote at its last run.

Their one reader. Nothing here starts DVC or looks at the files that they name.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_dag.core.params import read_yaml

PIPELINE, LOCK, PARAMS = Path("dvc.yaml"), Path("dvc.lock"), "params.yaml"
RESULTS = "RESULTS"
ABSENT = object()


@dataclass(frozen=True)
class Stage:
    """An entry of dvc.yaml."""

    cmd: str
    deps: list[str]
    params: dict[str, list[str]]
    """File -> sections, or single keys; such as params.yaml's."""
    outs: dict[str, bool]
    """Path -> whether DVC caches it; git has the others."""


@dataclass(frozen=True)
class Locked:
    """An entry of dvc.lock: the last run of a stage."""

    cmd: str = ""
    deps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Path -> md5, which ends in ``.dir`` for a folder, and nfiles of one."""
    outs: Mapping[str, str | None] = field(default_factory=dict)
    """Path -> md5."""
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """File -> section or key -> value."""

    @property
    def results(self) -> int | None:
        """The number of the results that it gave; None of a run from before there were numbers."""
        return next((values[RESULTS] for values in self.params.values() if RESULTS in values), None)


def read_pipeline(params: Mapping[str, Any] | None = None, root: Path = Path()) -> dict[str, Stage]:
    """The stages of dvc.yaml in ``root``, in the order of the file.

    Args:
        params: as in params.yaml; they take the place of ``${model.pretrained}`` and the like. None leaves these.

    Raises:
        UserError: no such file, or no YAML.
        AttributeError, KeyError, TypeError, ValueError: not as DVC reads it.
    """
    fill = filled(params) if params is not None else lambda value: value
    return {name: parse_stage(fill(entry)) for name, entry in read_yaml(root / PIPELINE)["stages"].items()}


def read_lock() -> dict[str, Locked]:
    """The stages of dvc.lock in the current folder; none where there is no such file. Raises as ``read_pipeline``."""
    return locked_stages(read_yaml(LOCK)) if LOCK.exists() else {}


def parse_lock(content: bytes) -> dict[str, Locked]:
    """The stages of dvc.lock, such as of a commit.

    Raises:
        YAMLError, AttributeError, KeyError, TypeError, ValueError: not as DVC writes it.
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
    return Stage(str(entry["cmd"]), list(entry.get("deps", [])), keys, cached)


def locked_stages(tree: Mapping[str, Any]) -> dict[str, Locked]:
    return {
        str(name): Locked(
            cmd=entry["cmd"],
            deps={dep["path"]: dep for dep in entry.get("deps", [])},
            outs={out["path"]: out.get("md5") for out in entry.get("outs", [])},
            params=entry.get("params", {}),
        )
        for name, entry in tree["stages"].items()
    }


def filled(params: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Puts parameters in the place of their names, in all that dvc.yaml has below a stage."""

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
    """A section or a dotted key; ABSENT where there is none."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values below a section; a key that is absent has none."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from leaves(f"{key}.{name}", each)
    elif value is not ABSENT:
        yield key, value


def changed_params(stage: Stage, locked: Locked, params: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value then, value now), also where dvc.yaml lists a whole section; of params.yaml alone."""
    recorded = locked.params.get(PARAMS, {})
    for name in stage.params.get(PARAMS, []):
        then, now = dict(leaves(name, recorded.get(name, ABSENT))), dict(leaves(name, look_up(params, name)))
        for key in then | now:
            if then.get(key, ABSENT) != now.get(key, ABSENT):
                yield key, then.get(key, ABSENT), now.get(key, ABSENT)


def show(value: Any) -> str:
    return "no such key" if value is ABSENT else "null" if value is None else f"{value}"
