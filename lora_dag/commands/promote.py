"""Make a run of a sweep the experiment of the workspace: its settings, data and reports. Nothing is trained again.

In: a folder below runs/, and Snakemake's records of the jobs that filled it.
Out: params.yaml with the overrides of the run; the outputs at DVC's paths, in its cache, run cache and dvc.lock.
Run: `lora-dag promote raw/rank-16-s0`; after an interruption, the same command finishes.

A run is rejected if it is unfinished, or if the code, data, base model or other settings of the workspace have changed
since it was made.
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
from lora_dag.bases.component_files import digests
from lora_dag.core import params
from lora_dag.core.console import PATHS, Problem, UserError, log
from lora_dag.core.files import atomic, read_json, replaced, sha256_file, state_dir, write_json, write_text
from lora_dag.core.locks import lock
from lora_dag.core.params import ModelParams
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.dvc_files import read_pipeline
from lora_dag.pipeline.snakemake_records import Record, read_record
from lora_dag.pipeline.yaml_edit import value_in, with_values
from lora_dag.sweeps import grid
from lora_dag.sweeps.stale import AGAIN, FINAL_OUTPUT, is_within, reasons_outdated

PARAMS = Path("params.yaml")
COPIED_STAGES = ("prepare", "cache_latents", "train", "validate", "export")
"""Stages whose outputs are copied. The report has links to folders, so it is written again, which takes 2 s."""
WRITING_STAGE = {
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
"""Artifact -> the stage whose job writes it."""
UNTRACKED = ("reports/train/run.json", "reports/validate/run.json")
"""Time and memory for report.html, tracked by neither git nor DVC."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="its folder below runs/, such as raw/rank-16-s0")


def main(args: argparse.Namespace) -> None:
    name = args.run.removeprefix("./").removeprefix("runs/").strip("/")
    with lock(state_dir() / "promote", shown_as=Path("promote")):
        records = read_records(name)
        overrides = {key: value for record in records.values() for key, value in assignments(record)}
        tree = params.read_yaml(PARAMS)
        wanted = with_overrides(tree, overrides)
        journal = state_dir() / "promote" / "journal.json"
        base = wanted.value("model.pretrained")  # compared by its digests, not by the times of large files
        changed = [
            problem for stage, record in records.items() for problem in reasons_outdated(stage, record, wanted, base)
        ]
        changed += changed_base(records, wanted)
        problems = [Problem("run-out-of-date", f"{text}. {AGAIN}") for text in changed]
        problems += [*damaged(records), *unsaved_outputs(name, journal)]
        if problems:
            raise UserError(*dict.fromkeys(problem.at(name) for problem in problems))
        write_json(journal, {"run": name})
        adopt(records, {key: v for key, v in overrides.items() if value_in(tree, key) != v})
        journal.unlink()
    log.info("adopted     %s: params.yaml, dvc.lock, data/ and reports/ are its own", name)
    log.info("next        git add params.yaml dvc.lock reports && git commit")


# The run


def read_records(name: str) -> dict[str, Record]:
    """Return stage -> record of its job.

    Raises:
        UserError: the run does not exist or is not finished.
    """
    known = sorted(p.relative_to("runs").as_posix()[: -len("/reports")] for p in Path("runs").glob("*/*-s*/reports"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:5]
        hint = f"Did you mean {' or '.join(near)}?" if near else "Run `snakemake` first."
        raise UserError(Problem("run-missing", f"{name}: no such run in runs/. {hint}"))
    folders = {"reports": f"runs/{name}/reports"}
    found: dict[str, Record] = {}
    for stage in reversed(FINAL_OUTPUT):  # the record of each stage has the folders of earlier stages
        at, file = FINAL_OUTPUT[stage]
        record = read_record(f"{folders[at]}/{file}") if at in folders else None
        if record is None:
            text = f"{name}: not finished, as {stage} has not written {file}. Run `snakemake` again."
            raise UserError(Problem("run-unfinished", text))
        found[stage] = record
        names = [word[2:].replace("-", "_") for word in record.options if word.startswith("--") and word != "--set"]
        folders |= {option: record.folder(option) for option in names}
    return {stage: found[stage] for stage in FINAL_OUTPUT}


def assignments(record: Record) -> Iterator[tuple[str, Any]]:
    for override in record.overrides:
        key, _, text = override.partition("=")
        tree: dict[str, Any] = {key.partition(".")[0]: {}}
        params.apply_override(tree, override)
        yield key, tree[key.partition(".")[0]][key.partition(".")[2]]


def with_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> grid.Run:
    """Return params.yaml with the run's overrides, checked."""
    changed = {section: dict(values) for section, values in tree.items()}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        changed[section][name] = value
    config = params.check(changed, params.Origin(PARAMS))
    return grid.Run(overrides, config, {name: grid.dumped(each) for name, each in config.sections.items()}, {})


# Problems


def changed_base(records: dict[str, Record], wanted: grid.Run) -> Iterator[str]:
    """Yield that the base model has changed, by the digests in the export."""
    family = load_family(wanted.value("model.family"))
    origin = resolve.resolve(wanted.config.section(ModelParams), family, make=False)
    recorded = entries(Path(records["export"].path), "base")
    parts = [name for name, digest in digests(origin.model, family.COMPONENTS).items() if recorded.get(name) != digest]
    if parts:
        yield f"made with another base model than {wanted.value('model.pretrained')} ({', '.join(parts)})"


def damaged(records: dict[str, Record]) -> Iterator[Problem]:
    """Yield weights that have changed since they were written."""
    adapter = Path(records["train"].path)
    exported = Path(records["export"].folder("export"))
    files = {adapter.parent / name: digest for name, digest in entries(adapter, "files").items()}
    written = entries(Path(records["export"].path), "files")
    files |= {exported / n: each.get("sha256") if isinstance(each, dict) else None for n, each in written.items()}
    for path, digest in files.items():
        if not path.is_file() or sha256_file(path) != digest:
            text = f"{path} is missing or damaged. Delete {path.parent} and run `snakemake` again."
            yield Problem("adapter-damaged", text)


def entries(path: Path, key: str) -> dict[str, Any]:
    """Return the mapping ``key`` of a run's file.

    Raises:
        UserError: there is no such mapping.
    """
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(found := lineage.load(path).get(key), dict):
            return found
    text = f"{path}: damaged, it has no '{key}'. Delete it and run `snakemake` again."
    raise UserError(Problem("artifact-damaged", text))


def unsaved_outputs(name: str, journal: Path) -> Iterator[Problem]:
    """Yield outputs of the workspace without a copy in DVC, except those of the same promotion if it was stopped."""
    stopped = read_json(journal) if journal.exists() else {"run": None}
    if not isinstance(stopped, dict) or "run" not in stopped:
        text = f"{journal}: damaged, it has no run. Delete it. `dvc checkout` restores the outputs."
        raise UserError(Problem("journal-damaged", text))
    begun = stopped["run"]
    if begun == name:
        log.info("resumed     a promotion that was stopped")
        return
    if begun:
        text = f"the promotion of {begun} was stopped before its end. Finish it with `lora-dag promote {begun}`."
        yield Problem("promotion-unfinished", text)
        return
    for stage, entries in json.loads(dvc("status", "--json")).items():
        changes = [e["changed outs"] for e in (entries if isinstance(entries, list) else []) if "changed outs" in e]
        unsaved = [
            path for outs in changes for path, state in outs.items() if state != "deleted" and Path(path).exists()
        ]
        if unsaved:
            text = f"{', '.join(unsaved)} of {stage} would be lost, as dvc.lock has other outputs."
            remedy = "Keep it with `dvc commit`, or restore the last version with `dvc checkout` or `git checkout`."
            yield Problem("outputs-unsaved", f"{text} {remedy}")


# Copying


def adopt(records: dict[str, Record], overrides: dict[str, Any]) -> None:
    """Write settings first, as DVC records the run with them; every step can be repeated."""
    if overrides:
        write_text(PARAMS, with_values(PARAMS.read_text(encoding="utf-8"), overrides))
        shown = (f"{key} {json.dumps(value)}" for key, value in overrides.items())
        log.info("params      %s", ", ".join(shown))
    folders = {name: records[stage].folder(name) for name, stage in WRITING_STAGE.items()}
    stages = read_pipeline()
    for stage in COPIED_STAGES:
        for path in stages[stage].outs:
            copy(Path(path_in_run(path, folders)), Path(path))
    for path in UNTRACKED:
        Path(path).unlink(missing_ok=True)
        if Path(path_in_run(path, folders)).is_file():
            copy(Path(path_in_run(path, folders)), Path(path))
    dvc("commit", "--force", *COPIED_STAGES)
    dvc("repro", "--single-item", "report")


def path_in_run(path: str, folders: dict[str, str]) -> str:
    """Return the path in the run's folders of one of DVC's paths."""
    name = max((name for name, folder in PATHS.items() if is_within(path, folder)), key=lambda name: len(PATHS[name]))
    return folders[name] + path.removeprefix(PATHS[name])


def copy(source: Path, target: Path) -> None:
    """Replace the target as a whole; DVC's links into its cache are replaced, not written through."""
    if source.is_dir():
        with replaced(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".snakemake_timestamp"))
    else:
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)


def dvc(*words: str) -> str:
    """Return the standard output of a DVC command.

    Raises:
        UserError: DVC's errors.
    """
    command = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[
            -1:
        ]
        texts = (f"`dvc {' '.join(words)}`: {line.removeprefix('ERROR: ')}" for line in errors)
        raise UserError(*(Problem("dvc-failed", text) for text in texts))
    return done.stdout
