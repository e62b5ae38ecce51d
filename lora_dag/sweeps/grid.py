"""Section ``sweep`` of params.yaml -> the runs that Snakemake makes of it, all known before the first job starts.

In: params.yaml by ``read_yaml``.  Out: ``plan(tree)``, a Run (overrides, settings, folders) per dataset, setting and
seed. Stages with equal settings share one folder, so that common results of runs are computed once.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from ruamel.yaml import YAML, YAMLError

from lora_dag.core.console import Problem, UserError, plural
from lora_dag.core.files import from_json
from lora_dag.core.labels import as_yaml
from lora_dag.core.param_errors import unknown_setting
from lora_dag.core.param_kinds import accepts_null, inside, is_text
from lora_dag.core.params import SECTIONS, Config, Origin, Params, annotation_of, check, check_section, params_class
from lora_dag.core.time_estimate import duration
from lora_dag.pipeline.yaml_edit import to_flow_yaml

Overrides = dict[str, Any]
"""``section.key`` -> value, such as ``{"lora.rank": 16}``."""

SWEPT = tuple(name for name in SECTIONS if name not in ("runtime", "sweep"))
UPSTREAM_SECTIONS = {
    "prepare": ("dataset",),
    "cache_latents": ("dataset", "model", "cache"),
    "train": ("dataset", "model", "cache", "lora", "train"),
    "export": ("dataset", "model", "cache", "lora", "train", "export"),
    "validate": SWEPT,  # same folder as report
    "report": SWEPT,
}
"""Stage -> the sections that it and the stages before it read. Equal sections give equal results."""
OWN_AXIS = {"dataset.source": "datasets", "train.seed": "seeds"}
PATHS = ("dataset.source", "model.pretrained")
MOST_RUNS = 10_000
"""Limit of a sweep, as Snakemake would plan more runs for many minutes."""
LONGEST_NAME = 160
"""Characters of a folder's name; file systems allow 255 bytes."""


class SweepParams(Params):
    """Section ``sweep``: each dataset with each setting and each seed. An empty list means the value in params.yaml."""

    datasets: list[Annotated[str, Field(min_length=1)] | Overrides]
    """Values of dataset.source, or sets of overrides that contain it, such as one with its own
    dataset.instance_prompt."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]]
    """Dotted key -> values. All combinations are run."""
    rows: list[Overrides]
    """Further settings, one set of overrides per run. {} is params.yaml without overrides."""
    seeds: list[int]
    """Values of train.seed. Data, split, evaluation set and samples stay the same, so that seeds can be compared."""
    exclude: list[Annotated[Overrides, Field(min_length=1)]]
    """Runs to leave out: every run that has all values of one entry."""


@dataclass(frozen=True)
class Run:
    """One run of all stages."""

    overrides: Overrides
    """Validated differences from params.yaml; null is kept, and so are paths in mappings that affect no result."""
    config: Config
    values: dict[str, dict[str, Any]]
    """Section -> settings in JSON types, overrides applied. Read-only, as runs share them."""
    stage_folders: dict[str, str]
    """Stage -> folder in runs/ with its files, which runs of equal settings share."""

    @property
    def name(self) -> str:
        """Name of the run, such as ``raw/rank-16-s0``."""
        return self.stage_folders["report"]

    @property
    def folders(self) -> dict[str, str]:
        """Artifact (a name in ``console.PATHS``) -> folder."""
        at = {stage: f"runs/{folder}" for stage, folder in self.stage_folders.items()}
        dataset, _, latents = at["cache_latents"].rpartition("/")
        return {
            "prepared": f"{at['prepare']}/prepared",
            "dataset_reports": f"{at['prepare']}/reports/dataset",
            "latents": at["cache_latents"],
            "latents_reports": f"{dataset}/reports/{latents}",
            "adapter": f"{at['train']}/adapter",
            "train_reports": f"{at['train']}/reports/train",
            "export": f"{at['export']}/export",
            "export_reports": f"{at['export']}/reports/export",
            "reports": f"{at['report']}/reports",
        }

    def value(self, key: str) -> Any:
        """Return the settings of a section, or one setting."""
        section, _, name = key.partition(".")
        return self.values[section][name] if name else self.values[section]


def plan(tree: dict[str, Any], source: Path = Path("params.yaml"), overrides: Sequence[str] = ()) -> list[Run]:
    """Return the runs of the section ``sweep``, in its order, without duplicates.

    Args:
        source: file of the tree, for messages.
        overrides: ``section.key=value`` of ``--set``, which are applied already.

    Raises:
        UserError: all problems of the file, of the section, and of the settings of its runs.
    """
    origin = Origin(source, overrides)
    base = check(tree, origin)
    sweep = base.section(SweepParams)
    if problems := list(key_problems(sweep, origin)):
        raise UserError(*problems)
    combined = combinations(sweep, origin.place("sweep"))
    reader = Reader(tree, base, origin)
    runs = [reader.run(overrides) for overrides in combined]
    if reader.problems:
        raise UserError(*dict.fromkeys(reader.problems))
    kept = [run for run in runs if not any(has_values(run, pattern) for pattern in sweep.exclude)]
    idle = [pattern for pattern in sweep.exclude if not any(has_values(run, pattern) for run in runs)]
    place = origin.place("sweep.exclude")
    problems = [
        Problem("exclude-unused", f"{place}: {as_yaml(pattern)} matches no run. Correct or delete it.")
        for pattern in idle
    ]
    if not kept:
        problems.append(Problem("sweep-empty", f"{place}: all runs are excluded. Delete an entry."))
    if problems:
        raise UserError(*problems)
    return with_stage_folders(kept, constant_keys(runs, tree), origin.place("sweep"))


def from_command_line(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with keys of ``sweep`` replaced, as in ``snakemake --config 'grid={lora.rank: [4, 8]}'``.

    Snakemake passes every scalar as text without quotes. Values of text settings are kept; others are read as YAML 1.2,
    as by ``--set``.
    """
    known = list(SweepParams.model_fields)
    if problems := [unknown_setting("--config", str(key), known) for key in given if key not in known]:
        raise UserError(*problems)
    section = tree.get("sweep", {})
    if given and isinstance(section, dict):  # else `check` reports the problem
        section = section | {key: parse_sweep_key(key, value) for key, value in given.items()}
    return tree | {"sweep": section}


def parse_sweep_key(key: str, value: Any) -> Any:
    """Return one key of ``sweep``: grid has lists of values by dotted key, the other keys have lists of overrides."""

    def overrides(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: parse_text(each, annotation_of(str(name))) for name, each in item.items()}
        return parse_text(item, str if key == "datasets" else Any)

    if key == "grid" and isinstance(value, dict):
        return {name: parse_text(values, list[annotation_of(str(name))]) for name, values in value.items()}  # type: ignore[misc]
    return [overrides(item) for item in value] if isinstance(value, list) else parse_text(value, Any)


def parse_text(value: Any, kind: Any) -> Any:
    """Return the value with texts parsed that are not of a text setting; ``kind`` is the annotation of the setting.

    Raises:
        UserError: a text is invalid YAML, or a date.
    """
    if isinstance(value, dict):
        return {key: parse_text(item, inside(kind, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [parse_text(item, inside(kind)) for item in value]
    if not isinstance(value, str) or is_text(kind) and not (accepts_null(kind) and value in ("null", "~", "")):
        return value
    try:
        read = YAML(typ="safe", pure=True).load(value)
    except (YAMLError, ValueError, RecursionError):
        raise UserError(Problem("invalid-yaml", f"--config: {value!r} is invalid YAML.")) from None
    if isinstance(read, datetime.date):  # also a time
        text = f"--config: YAML reads {value!r} as a date, which no setting accepts. Correct it."
        raise UserError(Problem("wrong-value", text))
    return read


def key_problems(sweep: SweepParams, origin: Origin) -> Iterator[Problem]:
    """Yield a problem for keys that no section has, that have their own axis, or that two axes set."""
    datasets = [item for item in sweep.datasets if isinstance(item, dict)]
    per_dataset = {key for item in datasets for key in item}
    for index, item in enumerate(datasets):
        if "dataset.source" not in item:
            add = f"Add dataset.source to entry {index + 1} of the entries with overrides."
            yield Problem(
                "dataset-without-source", f"{origin.place('sweep.datasets')}: {as_yaml(item)} has no source. {add}"
            )
    keys_by_axis = {"datasets": per_dataset, "grid": sweep.grid, "rows": [key for row in sweep.rows for key in row]}
    keys_by_axis["exclude"] = [key for pattern in sweep.exclude for key in pattern]
    for name, keys in keys_by_axis.items():
        place = origin.place(f"sweep.{name}")
        for key in dict.fromkeys(keys):
            section, _, setting = key.partition(".")
            axis = OWN_AXIS.get(key)
            if section not in SWEPT or not setting:
                expected = "SECTION.KEY is expected, such as lora.rank."
                yield Problem("unknown-setting", f"{place} {key}: {expected} Known sections: {', '.join(SWEPT)}.")
            elif setting not in params_class(section).model_fields:
                yield unknown_setting(place, key, params_class(section).model_fields)
            elif axis and name not in ("exclude", axis):
                yield Problem("key-with-own-axis", f"{place} {key}: list its values in sweep.{axis} instead.")
            elif name in ("grid", "rows") and key in per_dataset:
                text = f"{place} {key}: sweep.datasets sets this key too. Delete it in one of them."
                yield Problem("key-set-twice", text)


def combinations(sweep: SweepParams, place: str) -> list[Overrides]:
    """Return the overrides of each dataset with each setting and each seed."""
    datasets = [item if isinstance(item, dict) else {"dataset.source": item} for item in sweep.datasets] or [{}]
    count = math.prod(map(len, sweep.grid.values())) if sweep.grid else 0
    total = len(datasets) * max(1, count + len(sweep.rows)) * max(1, len(sweep.seeds))
    if total > MOST_RUNS:
        text = f"{place}: got {total:,} runs, but at most {MOST_RUNS:,} are possible. Shorten its lists."
        raise UserError(Problem("sweep-too-large", text))
    grid = [dict(zip(sweep.grid, point, strict=True)) for point in itertools.product(*sweep.grid.values())]
    settings = [*(grid if sweep.grid else []), *sweep.rows] or [{}]
    seeds: list[Overrides] = [{"train.seed": seed} for seed in sweep.seeds] or [{}]
    return [dataset | setting | seed for dataset in datasets for setting in settings for seed in seeds]


class Reader:
    """Reader of runs that validates each distinct section once, however many runs share it."""

    def __init__(self, tree: dict[str, Any], base: Config, origin: Origin) -> None:
        self.tree, self.base = tree, base
        self.origin = Origin(Path(f"{origin.place('sweep')}:"))
        self.problems: list[Problem] = []
        self.known = {(name, "{}"): (section, dumped(section)) for name, section in base.sections.items()}

    def run(self, overrides: Overrides) -> Run:
        """Return the run without stage folders; collect problems."""
        sections: dict[str, Params] = {}
        values: dict[str, dict[str, Any]] = {}
        for name in self.base.sections:
            own = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{name}.")}
            sections[name], values[name] = self.section(name, own)
        exact = {
            key: value
            if value is None or isinstance(value, dict)
            else values[key.partition(".")[0]][key.partition(".")[2]]
            for key, value in overrides.items()
        }
        return Run(exact, Config(sections, self.base.source), values, {})

    def section(self, name: str, own: Overrides) -> tuple[Params, dict[str, Any]]:
        key = (name, canonical_json(own))
        if key not in self.known:
            try:
                section = check_section(self.origin, name, self.tree[name] | own)
            except UserError as error:
                self.problems += error.problems
                section = self.base.sections[name]
            self.known[key] = section, dumped(section)
        return self.known[key]


def dumped(section: Params) -> dict[str, Any]:
    return section.model_dump(mode="json")


def has_values(run: Run, pattern: Overrides) -> bool:
    return all(
        value in (run.value(key), as_written(run, key))
        or key in PATHS
        and os.path.normpath(str(value)) == run.value(key)
        for key, value in pattern.items()
    )


def as_written(run: Run, key: str) -> Any:
    """Return a value as params.yaml would have it: null for {}, and mappings with entries that affect no result."""
    if run.overrides.get(key, ...) is None:
        return None
    section, _, name = key.partition(".")
    value = getattr(run.config.sections[section], name)
    return (dict(value) if isinstance(value, Params) else run.value(key)) if value != {} else None


def constant_keys(runs: list[Run], tree: dict[str, Any]) -> dict[str, bool]:
    """Return keys with one value in all runs -> whether params.yaml has the same value; empty for a single run."""
    keys = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    values = {key: {canonical_json(run.overrides[key]) for run in runs} for key in keys}
    own = {key: canonical_json(tree[key.partition(".")[0]].get(key.partition(".")[2])) for key in keys}
    return {key: own[key] in values[key] for key in keys if len(values[key]) == 1}


def with_stage_folders(runs: list[Run], constant: dict[str, bool], place: str) -> list[Run]:
    """Return the runs with each stage in the folder of the first run that has equal upstream sections.

    Args:
        constant: result of ``constant_keys``.
        place: place of the section sweep for messages.

    Raises:
        UserError: two settings would write into one folder.
    """
    known: dict[tuple[str, ...], str] = {}
    texts = {id(values): canonical_json(values) for run in runs for values in run.values.values()}
    found: dict[str, Run] = {}
    for run in runs:
        stage_folders = {}
        for stage, sections in UPSTREAM_SECTIONS.items():
            key = (stage, *(texts[id(run.values[name])] for name in sections))
            stage_folders[stage] = known.setdefault(key, stage_folder(run, stage, constant))
        found.setdefault(stage_folders["report"], Run(run.overrides, run.config, run.values, stage_folders))
    users = Counter((key[0], folder) for key, folder in known.items())
    if twice := [f"runs/{folder} ({stage})" for (stage, folder), count in users.items() if count > 1]:
        text = "two settings would write into this folder. Sweep one of them, or remove their difference."
        raise UserError(*(Problem("folder-name-clash", f"{place}: {folder}: {text}") for folder in twice))
    return list(found.values())


def stage_folder(run: Run, stage: str, constant: dict[str, bool]) -> str:
    """Return ``raw``, ``raw/latents-dtype-float32`` or ``raw/rank-16-s0``, by the overrides of upstream sections."""
    source, seed = run.value("dataset.source"), run.value("train.seed")
    inside = source.removeprefix("data/")
    is_outside = inside == source  # raw is another folder than data/raw
    dataset = folder_name([readable([source] if is_outside else inside), *folder_labels(run, ("dataset",), constant)])
    if stage == "prepare":
        return dataset
    own = folder_labels(run, tuple(name for name in UPSTREAM_SECTIONS[stage] if name != "dataset"), constant)
    if stage == "cache_latents":
        return f"{dataset}/{folder_name(['latents', *own], '-')}"
    return f"{dataset}/{folder_name(own or ['default'])}-s{seed}"


def folder_labels(run: Run, sections: tuple[str, ...], constant: dict[str, bool]) -> list[str]:
    """Return labels such as ``rank-16``, in the order of the sections' fields, without datasets and seeds.

    Values common to all runs are omitted if params.yaml has them too; else several become a digest, ``with-3fa2b1``.
    """
    keys = [key for key in all_keys() if key in run.overrides and key.partition(".")[0] in sections]
    keys = [key for key in keys if key not in OWN_AXIS and not constant.get(key)]
    common = {key: run.overrides[key] for key in keys if key in constant}
    if not 1 < len(common) < len(keys):
        common = {}
    found = [f"{all_keys()[key]}-{readable(run.overrides[key])}" for key in keys if key not in common]
    return found + ([f"with-{digest(canonical_json(common))}"] if common else [])


@functools.cache
def all_keys() -> dict[str, str]:
    """Return dotted key -> its label in folder names: without the section if no other section has the key."""
    keys = [f"{section}.{name}" for section in SWEPT for name in params_class(section).model_fields]
    count = Counter(key.partition(".")[2] for key in keys)
    return {key: key.partition(".")[2] if count[key.partition(".")[2]] == 1 else key for key in keys}


def folder_name(parts: list[str], glue: str = ",") -> str:
    """Return the parts in one name; for a long name, its start and a digest."""
    name = glue.join([parts[0], ",".join(parts[1:])]) if len(parts) > 1 else parts[0]
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{digest(name)}"


def readable(value: Any) -> str:
    """Return a value for a file name: unchanged if safe and unambiguous, else its safe characters and a digest."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    written = value if isinstance(value, str) else canonical_json(value)
    if isinstance(value, str) and not is_safe_name(value) or isinstance(value, (list, dict)):
        return f"{re.sub(r'[^a-z0-9.]+', '_', written.lower()).strip('_.')[:40]}-{digest(canonical_json(value))}"
    return written


def is_safe_name(value: str) -> bool:
    """Return whether a text is safe: lower case, as some file systems ignore case, and text in YAML."""
    return bool(re.fullmatch(r"[a-z][a-z0-9_.-]{0,39}", value)) and value not in ("null", "true", "false")


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:6]


def canonical_json(value: Any) -> str:
    """Return equal texts for equal values and different texts for different values, also with keys of other types."""
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    except TypeError:
        return repr(value)


def cli_overrides(run: Run, names: list[str]) -> list[str]:
    """Return ``["--set", "lora.rank=16"]``: the overrides of these sections or single keys, as listed in dvc.yaml.

    They always include source and seed, so that the command of a folder is the same in every sweep.
    """
    keys = [key for key in [*OWN_AXIS, *run.overrides] if key in names or key.partition(".")[0] in names]
    values = {
        key: v if isinstance(v := as_written(run, key), str) and is_safe_name(v) else to_flow_yaml(v) for key in keys
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def summary(runs: list[Run], measured: list[float], root: Path = Path()) -> list[str]:
    """Return lines about the amount of work of a sweep.

    Args:
        measured: images per second of earlier trainings.
        root: root of the checkout, which may have some of the adapters.
    """
    count = {stage: len({run.stage_folders[stage] for run in runs}) for stage in UPSTREAM_SECTIONS}
    stages = ", ".join(f"{stage} {number}" for stage, number in count.items())
    adapters = {run.folders["adapter"]: run.value("train") for run in runs}
    trainings = adapters.values()
    steps = sum(train["num_steps"] for train in trainings)
    done = sum(train["num_steps"] for at, train in adapters.items() if (root / at / "adapter.json").is_file())
    here = f". {done:,} of the steps are done" if done else ""
    images = sum(train["num_steps"] * train["batch_size"] * train["gradient_accumulation_steps"] for train in trainings)
    lines = [f"sweep: {plural(len(runs), 'run')}. Jobs: {stages}"]
    if not measured:
        return [
            *lines,
            f"train: {steps:,} optimizer steps, time unknown before the first training{here}",
        ]
    speed = sorted(measured)[len(measured) // 2]
    seconds = images / speed
    rate = f"{steps / seconds:.1f} steps/s, the median of {len(measured)} earlier training{'s' * (len(measured) > 1)}"
    return [*lines, f"train: {steps:,} optimizer steps, about {duration(seconds)} one after the other at {rate}{here}"]


def measurements(root: Path) -> list[float]:
    """Return images per second of earlier trainings in a checkout, by DVC and by Snakemake."""
    speeds = []
    for path in [root / "reports/train/run.json", *sorted(root.glob("runs/*/*/reports/train/run.json"))]:
        try:
            speeds.append(float(from_json(path.read_text(encoding="utf-8"))["images_per_second"]))
        except (OSError, ValueError, KeyError, TypeError):  # missing, of another version, or incomplete
            continue
    return [speed for speed in speeds if speed > 0]
