"""Accept the results of runs that edits of code do not change: dvc.lock gets today's code, and nothing runs.

In: dvc.lock, Snakemake's records of jobs, the code, and RESULTS in stages/STAGE/__init__.py: the number of the results
that the stage's code gives, which tests/golden holds. Where a stage's code alone differs from its last run, and that
run has today's number, it is accepted. Every other difference is a reason to run the stage, and is listed.
Out: dvc.lock and .snakemake/metadata. Outputs, and what is recorded of them, stay as they are.
Run: `lora-dag relock`; exit code 0 nothing has to run, 3 some stages have to, 2 the command cannot work here
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

from lora_dag.core.console import UserError, log, plural
from lora_dag.core.files import write_text
from lora_dag.core.params import read_yaml
from lora_dag.pipeline import code, dvc_files
from lora_dag.pipeline.dvc_files import LOCK, PARAMS, Locked, Stage, show
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
    parser.add_argument("--dry-run", action="store_true", help="say what would be accepted, and write nothing")
    parser.add_argument(
        "--assume-results",
        type=int,
        metavar="N",
        help="runs from before there were numbers gave the results of number N",
    )


def main(args: argparse.Namespace) -> None:
    if not LOCK.is_file() and not METADATA.is_dir():
        raise UserError("dvc.lock: no such file, and Snakemake has run nothing here; run `dvc repro` or `snakemake`")
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
    """Refuse code that no stage could run: its results cannot be those of any number."""
    problems = []
    for path in (path for folder in code.FOLDERS for path in sorted(Path(folder).rglob("*.py"))):
        try:
            ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            problems.append(f"{path}:{getattr(error, 'lineno', None) or 1}: no Python ({error.args[0]}); correct it")
    if problems:
        raise UserError(*problems)


def relock_stages(args: argparse.Namespace) -> list[Verdict]:
    """Judge every stage of dvc.yaml, and accept those whose code alone differs."""
    require_merged()
    with opened() as repo:
        verdicts = judge(repo, args.assume_results)
        if not args.dry_run:
            accept(repo, [verdict for verdict in verdicts if verdict.is_accepted])
    report(verdicts)
    return verdicts


def report(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        for reason in verdict.reasons:
            log.info("must run    %s: %s", verdict.name, reason)
        if verdict.follows and not verdict.reasons:
            log.info("may follow  %s: it reads what %s", verdict.name, verdict.follows)
        if verdict.is_accepted:
            log.info("accepted    %s: of %s alone", verdict.name, ", ".join(verdict.code))
    if not any(verdict.reasons or verdict.is_accepted for verdict in verdicts):
        log.info("up to date  dvc.lock has the code of today")


# DVC


@dataclass(frozen=True)
class Verdict:
    """On one stage of dvc.yaml."""

    name: str
    code: list[str]
    """Files and packages that are other code than that of the last run."""
    reasons: list[str]
    """Why it has to run."""
    follows: str
    """``train writes``, of a stage that has to run; empty where there is none."""

    @property
    def is_accepted(self) -> bool:
        return bool(self.code) and not self.reasons


def require_merged() -> None:
    if "\n<<<<<<< " in "\n" + LOCK.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            "dvc.lock: a merge left conflicts in it; `git checkout --ours dvc.lock`, or --theirs, takes the side whose "
            "runs have the parameters and data of the merge; then run `lora-dag relock`"
        )


@contextlib.contextmanager
def opened() -> Iterator[Repo]:
    """DVC's repository, which no other DVC command changes meanwhile.

    Raises:
        UserError: DVC cannot read its files.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            yield repo
    except (DvcException, OSError) as error:
        raise UserError(f"dvc: {str(error).splitlines()[0]}; `dvc status` says more") from None


def judge(repo: Repo, assumed: int | None) -> list[Verdict]:
    """In the order of dvc.yaml."""
    params = read_yaml(Path(PARAMS))
    try:
        listed, locked = dvc_files.read_pipeline(params), dvc_files.read_lock()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"dvc.yaml or dvc.lock: not as DVC writes it ({what}); `git checkout` it") from None
    stages: dict[str, PipelineStage] = {each.name: each for each in repo.index.stages if hasattr(each, "name")}
    outputs = {out.fs_path: out for each in repo.index.stages for out in each.outs}
    found: list[Verdict] = []
    for name, entry in listed.items():
        stage, last = stages[name], locked.get(name)
        reasons = ["it has not run yet"]
        if last is not None:
            reasons = [
                *changed_settings(name, entry, last, params, assumed),
                *changed_data(stage, outputs),
                *changed_outputs(stage, entry, last),
            ]
        upstream = next((each.name for each in found if runs(each) and set(listed[each.name].outs) & {*entry.deps}), "")
        found.append(Verdict(name, changed_code(stage, last or Locked()), reasons, upstream and f"{upstream} writes"))
    return found


def runs(verdict: Verdict) -> bool:
    return bool(verdict.reasons or verdict.follows)


def changed_settings(
    name: str, entry: Stage, last: Locked, params: dict[str, Any], assumed: int | None
) -> Iterator[str]:
    """Command, parameters, and the number of the results."""
    if entry.cmd != last.cmd:
        yield f"its command was `{last.cmd}`"
    for key, then, now in dvc_files.changed_params(entry, last, params):
        yield f"params.yaml {key} {show(then)} → {show(now)}"
    then, now = last.results if last.results is not None else assumed, code.results_of(name)
    if then is None:
        yield (
            f"its last run recorded no RESULTS, so that its code may give others; where it gave those of {now}, "
            f"`lora-dag relock --assume-results {now}`"
        )
    elif then != now:
        yield f"RESULTS {then} → {now}"


def changed_data(stage: PipelineStage, outputs: dict[str, Output]) -> Iterator[str]:
    """Dataset, base, and what other stages wrote; where it is not here, as the .dvc file or its stage has it."""
    for dep in stage.deps:
        if is_parameters(dep) or code.is_code(dep.def_path):
            continue
        state = dep.status().get(str(dep))
        if state == "deleted":  # a clone before `dvc pull`
            maker = outputs.get(dep.fs_path)
            if maker is None:
                yield f"{dep.def_path} is not here; `dvc pull {dep.def_path}`"
            elif maker.hash_info != dep.hash_info:
                yield f"{dep.def_path} is not what it read"
        elif state:
            yield f"{dep.def_path} is not what it read"


def changed_outputs(stage: PipelineStage, entry: Stage, last: Locked) -> Iterator[str]:
    """What is not here is in DVC's cache or its remote, but for git's files."""
    for path in [path for path in last.outs if path not in entry.outs]:
        yield f"dvc.yaml does not list {path}, which it wrote"
    for out in stage.outs:
        state = out.workspace_status().get(str(out))
        put_back = f"`{'dvc' if out.use_cache else 'git'} checkout {out.def_path}` puts that back"
        if state == "new" or out.def_path not in last.outs:
            yield f"dvc.yaml lists {out.def_path}, which it did not write"
        elif state == "modified":
            yield f"{out.def_path} is not what it wrote; {put_back}"
        elif state == "deleted" and not out.use_cache:
            yield f"{out.def_path} is not here; {put_back}"


def changed_code(stage: PipelineStage, last: Locked) -> list[str]:
    """What dvc.yaml lists and the last run read otherwise, or not at all; and a number that it did not record."""
    listed = {dep.def_path: dep for dep in stage.deps if not is_parameters(dep) and code.is_code(dep.def_path)}
    changed = [path for path, dep in listed.items() if dep.status()]
    gone = [path for path in last.deps if code.is_code(path) and path not in listed]
    return [*changed, *gone[:1]] if last.results is not None else [*changed, *gone[:1]] or ["RESULTS"]


def is_parameters(dep: Dependency) -> bool:
    from dvc.dependency.param import ParamsDependency

    return isinstance(dep, ParamsDependency)


def accept(repo: Repo, verdicts: list[Verdict]) -> None:
    """Write the digests of today's code into dvc.lock and into the run cache; no output is read or written.

    dvc.lock is replaced as a whole: DVC's own ``stage.dump`` empties the file first, and a kill then leaves it empty.
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
    """The same for what Snakemake has recorded of jobs below runs/; it finds every other change by itself.

    Returns:
        Whether some of these jobs have to run.

    Raises:
        UserError: Snakemake is at work.
    """
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        raise UserError(f"{LOCKS}: snakemake is at work; wait for it, or after a kill run `snakemake --unlock`")
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
        log.info("must run    runs/: %s (%s); `snakemake` runs what it plans of them", reason, plural(count, "file"))
    return bool(other)


# What the command relies on


def warn_of_edits() -> None:
    """Numbers are a claim that tests hold; an edit of one's own has not been through them yet."""
    changed = (git("status", "--porcelain", "--", *code.FOLDERS) or b"").decode().splitlines()
    if changed:
        files = f"{changed[0][3:]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}"
        log.warning("warning: %s: not committed; `pytest tests/golden` says whether a result has changed", files)


def warn_of_merge() -> None:
    """git takes dvc.lock of one side whole (.gitattributes): lines of two runs are of none."""
    if git("ls-files", "--unmerged", "--", str(LOCK)):
        branch = (git("rev-parse", "--abbrev-ref", "HEAD") or b"HEAD").decode().strip()
        log.warning(
            "warning: dvc.lock: a merge has changed it on both sides, and this one is %s's; where the other side has "
            "the runs, `git checkout --theirs dvc.lock` and run this again",
            branch,
        )
