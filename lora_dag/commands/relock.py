"""Record today's code in dvc.lock for results that the edits do not change, without running a stage.

In: dvc.lock, Snakemake's records of jobs, the code, and the number RESULTS in stages/STAGE/__init__.py. Tests in
tests/golden ensure that equal numbers mean equal results. If only the code of a stage changed since its last run, and
RESULTS is the same, the stage is accepted. Every other difference is listed as a reason to run the stage.
Out: dvc.lock and .snakemake/metadata. Outputs and their digests stay the same.
Run: `lora-dag relock`; exit code 0: all is up to date, 3: some stages must run, 2: an input is invalid
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.clone import PROJECT
from lora_dag.core.console import Problem, UserError, log, plural, warn
from lora_dag.core.files import write_text
from lora_dag.core.params import read_yaml
from lora_dag.pipeline import code, dvc_files
from lora_dag.pipeline.dvc_files import LOCK, PARAMS, PIPELINE, Locked, Stage, show
from lora_dag.pipeline.dvc_problems import conflict_problem, valid_dvc_file, warn_of_merge
from lora_dag.pipeline.git import git
from lora_dag.pipeline.snakemake_records import METADATA, accept_code, read_record, recorded_paths

if TYPE_CHECKING:
    from dvc.dependency.base import Dependency
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

MUST_RUN = 3
"""Exit code."""
LOCKS = METADATA.parent / "locks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="list the stages that would be accepted, and write nothing"
    )
    parser.add_argument(
        "--assume-results",
        type=int,
        metavar="N",
        help="RESULTS of runs that recorded none, such as runs of an older version",
    )


def main(args: argparse.Namespace) -> None:
    if not LOCK.is_file() and not METADATA.is_dir():
        text = "dvc.lock: the file is missing, and so are Snakemake's records. Run `dvc repro` or `snakemake` first."
        raise UserError(Problem("lock-missing", text))
    require_python()
    verdicts = relock_stages(args) if LOCK.is_file() else []
    stale_runs = relock_runs(args)
    warn_of_edits()
    warn_of_merge()
    stale_stages = any(verdict.reasons for verdict in verdicts)
    if stale_stages:
        log.info("next        dvc repro")
    if stale_stages or stale_runs:
        sys.exit(MUST_RUN)


def require_python() -> None:
    """Check that all code parses: no number RESULTS can be right for code that cannot run.

    Raises:
        UserError: one problem per file with a syntax error.
    """
    problems = []
    for path in (path for folder in code.FOLDERS for path in sorted(Path(folder).rglob("*.py"))):
        try:
            ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            text = f"{path}:{line}: Python cannot read the code ({error.args[0]}). Correct it."
            problems.append(Problem("code-unreadable", text))
    if problems:
        raise UserError(*problems)


def relock_stages(args: argparse.Namespace) -> list[Verdict]:
    """Return a verdict per stage of dvc.yaml, and accept the stages of which only the code changed."""
    if conflict := conflict_problem(LOCK.read_bytes()):
        raise UserError(conflict)
    with open_repo() as repo:
        verdicts = judge_stages(repo, args.assume_results)
        if not args.dry_run:
            accept(repo, [verdict for verdict in verdicts if verdict.is_accepted])
    report(verdicts)
    return verdicts


def report(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        for reason in verdict.reasons:
            log.info("must run    %s: %s", verdict.name, reason)
        if verdict.follows and not verdict.reasons:
            log.info("may run     %s: it reads outputs of %s", verdict.name, verdict.follows)
        if verdict.is_accepted:
            log.info("accepted    %s: only %s changed", verdict.name, ", ".join(verdict.code))
    if not any(verdict.reasons or verdict.is_accepted for verdict in verdicts):
        log.info("up to date  dvc.lock has the current code")


# DVC


@dataclass(frozen=True)
class Verdict:
    """Verdict on one stage of dvc.yaml."""

    name: str
    code: list[str]
    """Files and folders of code that changed since the last run."""
    reasons: list[str]
    """Reasons to run the stage."""
    follows: str
    """Name of a stage that must run before and writes inputs of this one; empty if there is none."""

    @property
    def is_accepted(self) -> bool:
        return bool(self.code) and not self.reasons


@contextlib.contextmanager
def open_repo() -> Iterator[Repo]:
    """Open DVC's repository and lock it against other DVC commands.

    Raises:
        UserError: DVC cannot read its files.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            yield repo
    except (DvcException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(Problem("dvc-failed", f"dvc: {reason}. `dvc status` shows the details.")) from None


def judge_stages(repo: Repo, assumed: int | None) -> list[Verdict]:
    """Return a verdict per stage, in the order of dvc.yaml.

    Raises:
        UserError: dvc.yaml or dvc.lock is invalid.
    """
    params = read_yaml(Path(PARAMS))
    with valid_dvc_file(PIPELINE):
        listed = dvc_files.read_pipeline(params)
    with valid_dvc_file(LOCK):
        locked = dvc_files.read_lock()
    stages: dict[str, PipelineStage] = {each.name: each for each in repo.index.stages if hasattr(each, "name")}
    outputs = {out.fs_path: out for each in repo.index.stages for out in each.outs}
    found: list[Verdict] = []
    for name, entry in listed.items():
        stage, last = stages[name], locked.get(name)
        reasons = ["the stage has not run yet"]
        if last is not None:
            fill_base(stage, last)
            reasons = [
                *changed_settings(name, entry, last, params, assumed),
                *changed_data(stage, outputs),
                *changed_outputs(stage, entry, last),
            ]
        may_run = (each.name for each in found if each.reasons or each.follows)
        upstream = next((other for other in may_run if set(listed[other].outs) & {*entry.deps}), "")
        found.append(Verdict(name, changed_code(stage, last or Locked()), reasons, upstream))
    return found


def fill_base(stage: PipelineStage, last: Locked) -> None:
    """Give the base model its digest of the last run where dvc.lock has its path without the prefix."""
    from dvc_data.hashfile.hash_info import HashInfo

    for dep in stage.deps:
        if dep.def_path.startswith(PROJECT) and not dep.hash_info:
            md5 = last.deps.get(dep.def_path.removeprefix(PROJECT), {}).get("md5")
            dep.hash_info = HashInfo("md5", md5) if md5 else dep.hash_info


def changed_settings(
    name: str, entry: Stage, last: Locked, params: dict[str, Any], assumed: int | None
) -> Iterator[str]:
    """Yield changes of the command, of parameters and of the number RESULTS."""
    if entry.cmd != last.cmd:
        yield f"the command changed from `{last.cmd}`"
    for key, then, now in dvc_files.changed_params(entry, last, params):
        yield f"params.yaml {key} {show(then)} → {show(now)}"
    then, now = last.results if last.results is not None else assumed, code.results_of(name)
    if then is None:
        yield (
            f"the last run recorded no RESULTS. If its results are the ones of RESULTS {now}, "
            f"run `lora-dag relock --assume-results {now}`"
        )
    elif then != now:
        yield f"RESULTS {then} → {now}"


def changed_data(stage: PipelineStage, outputs: dict[str, Output]) -> Iterator[str]:
    """Yield changed data: dataset, base and outputs of other stages.

    If the data is not here, its .dvc file or its stage in dvc.lock has the digest.
    """
    for dep in stage.deps:
        if is_parameters(dep) or code.is_code(dep.def_path):
            continue
        path, state = dep.def_path.removeprefix(PROJECT), dep.status().get(str(dep))
        if state == "deleted":  # a clone before `dvc pull`
            maker = outputs.get(dep.fs_path)
            if maker is None:
                yield f"{path} is missing. Run `dvc pull {path}`"
            elif maker.hash_info != dep.hash_info:
                yield f"{path} changed since the last run"
        elif state:
            yield f"{path} changed since the last run"


def changed_outputs(stage: PipelineStage, entry: Stage, last: Locked) -> Iterator[str]:
    """Yield changed outputs. Missing outputs are in DVC's cache or remote, except for files that git tracks."""
    for path in [path for path in last.outs if path not in entry.outs]:
        yield f"dvc.yaml does not list its output {path}"
    for out in stage.outs:
        state = out.workspace_status().get(str(out))
        restore = f"`{'dvc' if out.use_cache else 'git'} checkout {out.def_path}` restores it"
        if state == "new" or out.def_path not in last.outs:
            yield f"dvc.yaml lists {out.def_path}, which the last run did not write"
        elif state == "modified":
            yield f"{out.def_path} was edited after the last run. {restore}"
        elif state == "deleted" and not out.use_cache:
            yield f"{out.def_path} is missing. {restore}"


def changed_code(stage: PipelineStage, last: Locked) -> list[str]:
    """Return code that changed since the last run, or that only one of dvc.yaml and dvc.lock lists.

    The result is ``RESULTS`` if nothing but this number is missing in dvc.lock.
    """
    listed = {dep.def_path: dep for dep in stage.deps if not is_parameters(dep) and code.is_code(dep.def_path)}
    changed = [path for path, dep in listed.items() if dep.status()]
    gone = [path for path in last.deps if code.is_code(path) and path not in listed]
    return [*changed, *gone[:1]] if last.results is not None else [*changed, *gone[:1]] or ["RESULTS"]


def is_parameters(dep: Dependency) -> bool:
    from dvc.dependency.param import ParamsDependency

    return isinstance(dep, ParamsDependency)


def accept(repo: Repo, verdicts: list[Verdict]) -> None:
    """Write the digests of the current code into dvc.lock and the run cache, without reading or writing outputs.

    dvc.lock is replaced as a whole: DVC's own ``stage.dump`` empties the file first, so a kill could leave it empty.
    """
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    stages = {each.name: each for each in repo.index.stages if hasattr(each, "name")}
    lock = parse_yaml_for_update(LOCK.read_text(encoding="utf-8"), str(LOCK))
    for stage in (stages[verdict.name] for verdict in verdicts):
        stage.save_deps(allow_missing=True)
        if all(each.exists for each in (*stage.deps, *stage.outs)):
            repo.stage_cache.save(stage)
        lock["stages"].update(to_lockfile(stage))
    if verdicts:
        write_text(LOCK, dumps_yaml(lock))


# Snakemake


def relock_runs(args: argparse.Namespace) -> bool:
    """Accept jobs below runs/ in Snakemake's records. Snakemake finds all changes other than code by itself.

    Returns:
        Whether some of these jobs must run.

    Raises:
        UserError: Snakemake is running.
    """
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        text = f"{LOCKS}: Snakemake is running. Wait for it; if it was killed, run `snakemake --unlock`."
        raise UserError(Problem("snakemake-running", text))
    stages = dvc_files.read_pipeline()
    digest = functools.cache(lambda stage, family: code.digest(stages[stage].deps, family))
    accepted: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for path in recorded_paths():
        record = read_record(path) if not path.startswith("reports/sweep/") else None
        if record is None or record.rule not in stages:
            continue
        today, number = digest(record.rule, record.family), code.results_of(record.rule)
        then = record.results if record.results is not None else args.assume_results
        if then != number:
            other[f"{record.rule}: RESULTS {'not recorded' if then is None else then} → {number}"] += 1
        elif (record.code, record.results) != (today, number):
            accepted[record.rule] += 1
            if not args.dry_run:
                accept_code(record, today, number)
    for stage, count in accepted.items():
        log.info("accepted    runs/: %s of %s", plural(count, "file"), stage)
    for reason, count in other.items():
        log.info("must run    runs/: %s (%s). Run `snakemake`", reason, plural(count, "file"))
    return bool(other)


# Warnings


def warn_of_edits() -> None:
    """Warn of uncommitted code: RESULTS is right only if the golden tests pass, and they may not have run yet."""
    changed = (git("status", "--porcelain", "--", *code.FOLDERS) or b"").decode().splitlines()
    if changed:
        files = f"{changed[0][3:]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}"
        warn("code-uncommitted", f"{files}: not committed. `pytest tests/golden` checks whether results changed.")
