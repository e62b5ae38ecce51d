"""A run of a sweep becomes the workspace's experiment: its settings, data and reports, known to DVC, nothing retrained.

In: a folder below runs/, and what Snakemake recorded of the jobs that filled it.
Out: params.yaml with the run's overrides, the outputs at DVC's paths, in its cache, run cache and dvc.lock.
Refused: a run that is unfinished, or that the workspace's code, data, base and other parameters would not make again.
Stopped in the middle, the same command finishes. Run: `lora-dag promote raw/rank-16-s0`
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dag.artifacts import lineage
from lora_dag.bases import resolve
from lora_dag.bases.layout import digests
from lora_dag.core import params
from lora_dag.core.console import PATHS, UserError, log
from lora_dag.core.files import atomic, read_json, replaced, sha256_file, state_dir, write_json, write_text
from lora_dag.core.locks import lock
from lora_dag.core.params import ModelParams
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.dvc_files import read_pipeline
from lora_dag.pipeline.snakemake_records import Record, read_record
from lora_dag.pipeline.yaml_edit import with_values
from lora_dag.sweeps import grid
from lora_dag.sweeps.stale import AGAIN, WITNESS, lies_in, outdated

PARAMS = Path("params.yaml")
COMMITTED = ("prepare", "cache_latents", "train", "validate", "export")
"""Stages whose outputs are copied. The report names the folders that it was made from, so it is written anew: 2 s."""
MAKER = {
    "prepared": "prepare",
    "dataset_reports": "prepare",
    "latents": "cache_latents",
    "latents_reports": "cache_latents",
    "adapter": "train",
    "train_reports": "train",
    "export": "export",
    "export_reports": "export",
    "reports": "validate",
}
"""Folder -> the stage whose job names it."""
MEASURED = ("reports/train/run.json", "reports/validate/run.json")
"""Time and memory, for report.html; neither git nor DVC has them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="its folder below runs/, such as raw/rank-16-s0")


def main(args: argparse.Namespace) -> None:
    name = args.run.removeprefix("./").removeprefix("runs/").strip("/")
    with lock(state_dir() / "promote", shown=Path("promote")):
        records = read_records(name)
        overrides = {key: value for record in records.values() for key, value in assignments(record)}
        tree = params.read_yaml(PARAMS)
        wanted = applied(tree, overrides)
        journal = state_dir() / "promote" / "journal.json"
        base = wanted.value("model.pretrained")  # told by its digests, not by the times of large files
        changed = [problem for stage, record in records.items() for problem in outdated(stage, record, wanted, base)]
        problems = [f"{problem}; {AGAIN}" for problem in [*changed, *changed_base(records, wanted)]]
        problems += [*damaged(records), *at_risk(name, journal)]
        if problems:
            raise UserError(*dict.fromkeys(f"{name}: {problem}" for problem in problems))
        write_json(journal, {"run": name})
        adopt(records, {key: v for key, v in overrides.items() if value_in(tree, key) != v})
        journal.unlink()
    log.info("adopted     %s: params.yaml, dvc.lock, data/ and reports/ are its own", name)
    log.info("next        git add params.yaml dvc.lock reports && git commit")


# What the run was made with


def read_records(name: str) -> dict[str, Record]:
    """Stage -> its job's record.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    known = sorted(p.relative_to("runs").as_posix()[: -len("/reports")] for p in Path("runs").glob("*/*-s*/reports"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:5] or ["none; run `snakemake` first"]
        raise UserError(f"{name}: no such run below runs/ (near: {', '.join(near)})")
    folders = {"reports": f"runs/{name}/reports"}
    found: dict[str, Record] = {}
    for stage in reversed(WITNESS):  # each names folders of those before it
        at, file = WITNESS[stage]
        record = read_record(f"{folders[at]}/{file}") if at in folders else None
        if record is None:
            raise UserError(f"{name}: not finished, {stage} has not written {file}; run `snakemake` again")
        found[stage] = record
        names = [word[2:].replace("-", "_") for word in record.options if word.startswith("--") and word != "--set"]
        folders |= {option: record.folder(option) for option in names}
    return {stage: found[stage] for stage in WITNESS}


def assignments(record: Record) -> Iterator[tuple[str, Any]]:
    for override in record.overrides:
        key, _, text = override.partition("=")
        tree: dict[str, Any] = {key.partition(".")[0]: {}}
        params.apply_override(tree, override)
        yield key, tree[key.partition(".")[0]][key.partition(".")[2]]


def applied(tree: dict[str, Any], overrides: dict[str, Any]) -> grid.Run:
    """params.yaml with the run's overrides, checked."""
    changed = {section: dict(values) for section, values in tree.items()}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        changed[section][name] = value
    config = params.check(changed, PARAMS)
    return grid.Run(overrides, config, {name: grid.dumped(each) for name, each in config.sections.items()}, {})


def value_in(tree: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return tree[section].get(name)


# Why it cannot be adopted


def changed_base(records: dict[str, Record], wanted: grid.Run) -> Iterator[str]:
    """By the digests that the export recorded."""
    family = load_family(wanted.value("model.family"))
    origin = resolve.resolve(wanted.config.section(ModelParams), family, make=False)
    recorded = entries(Path(records["export"].path), "base")
    parts = [name for name, digest in digests(origin.model, family.COMPONENTS).items() if recorded.get(name) != digest]
    if parts:
        yield f"made on another base than {wanted.value('model.pretrained')} ({', '.join(parts)})"


def damaged(records: dict[str, Record]) -> Iterator[str]:
    """Weights that are not what was written."""
    adapter = Path(records["train"].path)
    exported = Path(records["export"].folder("export"))
    files = {adapter.parent / name: digest for name, digest in entries(adapter, "files").items()}
    written = entries(Path(records["export"].path), "files")
    files |= {exported / n: each.get("sha256") if isinstance(each, dict) else None for n, each in written.items()}
    for path, digest in files.items():
        if not path.is_file() or sha256_file(path) != digest:
            yield f"{path} is missing or damaged; delete {path.parent} and run `snakemake` again"


def entries(path: Path, key: str) -> dict[str, Any]:
    """What a run's file has below ``key``.

    Raises:
        UserError: nothing of that kind.
    """
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(found := lineage.load(path).get(key), dict):
            return found
    raise UserError(f"{path}: damaged, no {key} in it; delete it and run `snakemake` again")


def at_risk(name: str, journal: Path) -> Iterator[str]:
    """Outputs of the workspace that DVC has no copy of; of a promotion that was stopped, its own are none."""
    stopped = read_json(journal) if journal.exists() else {"run": None}
    if not isinstance(stopped, dict) or "run" not in stopped:
        raise UserError(f"{journal}: damaged, names no run; delete it, and `dvc checkout` puts back what was")
    begun = stopped["run"]
    if begun == name:
        log.info("resumed     a promotion that was stopped")
        return
    if begun:
        cure = f"`lora-dag promote {begun}` finishes it"
        yield f"the promotion of {begun} was stopped in the middle; {cure}"
        return
    for stage, entries in json.loads(dvc("status", "--json")).items():
        changes = [e["changed outs"] for e in (entries if isinstance(entries, list) else []) if "changed outs" in e]
        lost = [path for outs in changes for path, state in outs.items() if state != "deleted" and Path(path).exists()]
        if lost:
            yield (
                f"the workspace's {', '.join(lost)} would be lost: not what dvc.lock has of {stage}; "
                "`dvc commit` keeps it, `dvc checkout` or `git checkout` puts back what was"
            )


# Adoption


def adopt(records: dict[str, Record], overrides: dict[str, Any]) -> None:
    """Settings first, so that DVC records the run under them; every step may be repeated."""
    if overrides:
        write_text(PARAMS, with_values(PARAMS.read_text(encoding="utf-8"), overrides))
        shown = (f"{key} {json.dumps(value)}" for key, value in overrides.items())
        log.info("params      %s", ", ".join(shown))
    folders = {name: records[stage].folder(name) for name, stage in MAKER.items()}
    stages = read_pipeline()
    for stage in COMMITTED:
        for path in stages[stage].outs:
            copy(Path(moved(path, folders)), Path(path))
    for path in MEASURED:
        Path(path).unlink(missing_ok=True)
        if Path(moved(path, folders)).is_file():
            copy(Path(moved(path, folders)), Path(path))
    dvc("commit", "--force", *COMMITTED)
    dvc("repro", "--single-item", "report")


def moved(path: str, folders: dict[str, str]) -> str:
    """One of DVC's paths where the run has it."""
    name = max((name for name, place in PATHS.items() if lies_in(path, place)), key=lambda name: len(PATHS[name]))
    return folders[name] + path.removeprefix(PATHS[name])


def copy(source: Path, target: Path) -> None:
    """In the place of what was there, whole; DVC's links into its cache are replaced, never written through."""
    if source.is_dir():
        with replaced(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".snakemake_timestamp"))
    else:
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)


def dvc(*words: str) -> str:
    """Standard output.

    Raises:
        UserError: what DVC said.
    """
    command = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise UserError(*(f"`dvc {' '.join(words)}`: {line.removeprefix('ERROR: ')}" for line in said))
    return done.stdout
