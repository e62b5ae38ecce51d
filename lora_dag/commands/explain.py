"""List the changes between two revisions (parameters, data, base, code, environment) and the stages they affect.

In: dvc.lock of both revisions, with the digests and parameters of each stage; package versions of
reports/export/lineage.json.
Out: a page on the terminal. A stage that read a changed output of another stage is listed as its consequence. Other
outputs from the same inputs come from another environment. If the code alone differs, with the same RESULTS and
outputs, dvc.lock does not show whether the stage ran again or `lora-dag relock` accepted the code.
Run: `lora-dag explain [A] [B ...]`, such as `lora-dag explain HEAD rank-16`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dag.artifacts import lineage
from lora_dag.commands.compare.page import show_params
from lora_dag.commands.compare.revision_report import DAMAGED, LOCK, PARAMS, flatten, mapping, parse_params
from lora_dag.commands.compare.revisions import WORKSPACE, add_revisions, find_commit, read_file, with_defaults
from lora_dag.core.console import Problem, UserError, log
from lora_dag.pages.markdown import table
from lora_dag.pipeline.code import is_code
from lora_dag.pipeline.dvc_files import Locked, parse_lock
from lora_dag.pipeline.dvc_problems import conflict_problem, warn_of_merge

EXPORTED = "reports/export/lineage.json"
ABSENT = object()
CAUSES = ("parameters", "data", "base", "code", "environment")
MAX_FILES = 3  # per stage and cause


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_revisions(parser)


def main(args: argparse.Namespace) -> None:
    first, *others = with_defaults(args.revisions)
    if WORKSPACE in (first, *others):
        warn_of_merge()
    for name in others:
        log.info("%s", write_page(read_lock(first), read_lock(name)))


@dataclass(frozen=True)
class Revision:
    """Content of dvc.lock, params.yaml and the export's lineage in one revision."""

    name: str
    stages: dict[str, Locked]
    params: dict[str, Any]
    """Dotted key of params.yaml -> value."""
    packages: dict[str, str]
    """Package -> version at the last export."""

    def stage(self, name: str) -> Locked:
        return self.stages.get(name, Locked())

    def settings(self, stage: str) -> dict[str, Any]:
        """Return the parameters of the last run of a stage: dotted key -> value."""
        return flatten(self.stage(stage).params.get(PARAMS, {}))

    def writer(self, path: str) -> str | None:
        """Return the stage that writes a file or folder."""
        return next((name for name, stage in self.stages.items() if path in stage.outs), None)


@dataclass(frozen=True)
class Reason:
    """A change that made a stage run again, or may have done so."""

    cause: str
    """One of CAUSES; or the name of the stage whose changed output was read."""
    change: str
    is_other_code: bool = False
    """Whether code changed that `lora-dag relock` can accept, because RESULTS is the same."""


def read_lock(name: str) -> Revision:
    """Read dvc.lock of a branch, tag, commit, DVC experiment, or of the workspace.

    Raises:
        UserError: no such revision; its dvc.lock is missing, damaged, or has merge conflicts.
    """
    commit = find_commit(name)
    lock, params, exported = (read_file(commit, path) for path in (LOCK, PARAMS, EXPORTED))
    if lock is None or params is None:
        missing = LOCK if lock is None else PARAMS
        text = f"{name}: {missing} is missing in this revision. Run `dvc repro` there and commit {missing}."
        raise UserError(Problem("revision-incomplete", text))
    if conflict := conflict_problem(lock):
        raise UserError(conflict.at(name))
    try:
        return Revision(
            name=name,
            stages=parse_lock(lock),
            params=parse_params(params),
            packages=mapping(lineage.parse(exported).get("packages", {})) if exported else {},
        )
    except UserError as error:
        raise error.at(name) from None
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        fault = f"{LOCK}, {PARAMS} or {EXPORTED} is damaged or of another version ({reason})"
        text = f"{name}: {fault}. Run `dvc repro` there."
        raise UserError(Problem("revision-damaged", text)) from None


# The page


def write_page(a: Revision, b: Revision) -> str:
    """Return Markdown: the root causes first, then each stage with the changes that affect it."""
    reasons = {stage: list(reasons_for(stage, a, b)) for stage in dict.fromkeys([*a.stages, *b.stages])}
    found = {cause: roots(cause, reasons) for cause in CAUSES}
    found["environment"] = packages_that_differ(a, b) or found["environment"]
    changed = [f"- **{cause}**: {', '.join(changes)}" for cause, changes in found.items() if changes]
    same = [cause for cause, changes in found.items() if not changes]
    summary = ["Changed:\n\n" + "\n".join(changed)] if changed else ["Nothing changed."]
    summary += [f"Not changed: {', '.join(same)}."] if changed and same else []
    rows = [(stage, stage_status(stage, reasons[stage], a, b)) for stage in reasons]
    sections = [f"# From {a.name} to {b.name}", *summary, table(("Stage", "effect"), rows, align=":---")]
    return "\n\n".join(sections + [line for revision in (a, b) for line in not_run(revision)]) + "\n"


def stage_status(stage: str, reasons: Sequence[Reason], a: Revision, b: Revision) -> str:
    """Return what happened to a stage, such as ``ran again: parameters (lora.rank 8 → 16)``.

    If the code alone differs, dvc.lock does not show whether the stage ran or `relock` accepted the code.
    """
    if not reasons:
        return "unchanged"
    if stage not in a.stages or stage not in b.stages:
        return f"only in {b.name if stage in b.stages else a.name}"
    if reasons[0].cause == "environment":
        return f"other outputs from the same inputs: {reasons[0].change}"
    causes = dict.fromkeys(reason.cause for reason in reasons)
    because = [f"{cause} ({', '.join(of_cause(cause, reasons))})" for cause in causes if cause in CAUSES]
    because += [f"{', '.join(of_cause(cause, reasons))} from {cause}" for cause in causes if cause not in CAUSES]
    same = a.stage(stage).outs == b.stage(stage).outs
    if same and all(reason.is_other_code for reason in reasons):
        return f"other code with the same results: {', '.join(of_cause('code', reasons))}"
    return f"ran again: {'; '.join(because)}" + (" (bit-identical outputs)" if same else "")


def of_cause(cause: str, reasons: Sequence[Reason]) -> list[str]:
    """Return the changes of one cause; the first of many files."""
    changes = [reason.change for reason in reasons if reason.cause == cause]
    more = len(changes) - MAX_FILES
    return changes if cause == "parameters" or more <= 0 else [*changes[:MAX_FILES], f"{more} more"]


def roots(cause: str, reasons: Mapping[str, Sequence[Reason]]) -> list[str]:
    """Return all changes of a cause, each once."""
    return list(dict.fromkeys(reason.change for found in reasons.values() for reason in found if reason.cause == cause))


def not_run(revision: Revision) -> Iterator[str]:
    """Yield a sentence on parameters of params.yaml that no stage has used yet."""
    ran_with = {key: value for stage in revision.stages for key, value in revision.settings(stage).items()}
    ahead = [key for key, value in ran_with.items() if revision.params.get(key, ABSENT) != value]
    if ahead:
        keys = ", ".join(ahead)
        name = revision.name
        yield f"{name}: {PARAMS} has changed since the last run ({keys}). `dvc repro` runs these stages."


# Reasons of a stage


def reasons_for(stage: str, a: Revision, b: Revision) -> Iterator[Reason]:
    """Yield the changes that affect a stage; nothing if its inputs, parameters and outputs are the same."""
    known = [*parameters(stage, a, b), *files(stage, a, b)]
    if a.stage(stage).cmd != b.stage(stage).cmd:
        known.append(Reason("code", "its command in dvc.yaml"))
    numbers = a.stage(stage).results, b.stage(stage).results
    if numbers[0] != numbers[1] and None not in numbers:
        known.append(Reason("code", f"RESULTS of {stage} {numbers[0]} → {numbers[1]}"))
    yield from known
    if not known and a.stage(stage).outs != b.stage(stage).outs:
        packages = ", ".join(packages_that_differ(a, b))
        yield Reason("environment", packages or "another machine, or packages that no report lists")


def parameters(stage: str, a: Revision, b: Revision) -> Iterator[Reason]:
    before, after = a.settings(stage), b.settings(stage)
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, ABSENT) != after.get(key, ABSENT):
            old, new = show_params((before, after), key)
            yield Reason("parameters", f"{key} {old} → {new}")


def files(stage: str, a: Revision, b: Revision) -> Iterator[Reason]:
    """Yield each file or folder that the stage reads and that changed."""
    before, after = a.stage(stage).deps, b.stage(stage).deps
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path, {}), after.get(path, {})
        if old.get("md5") != new.get("md5"):
            counts = [dep.get("nfiles", 0) for dep in (old, new)]
            num_files = f" ({counts[0]} → {counts[1]} files)" if counts[0] != counts[1] else ""
            writer = a.writer(path) or b.writer(path)
            cause = writer or cause_of(path, a, b)
            yield Reason(cause, path if writer else path + num_files, is_other_code=cause == "code")


def cause_of(path: str, a: Revision, b: Revision) -> str:
    """Return the cause of CAUSES for a changed file that no stage writes."""
    if is_code(path):
        return "code"
    return "base" if path in (a.params.get("model.pretrained"), b.params.get("model.pretrained")) else "data"


def packages_that_differ(a: Revision, b: Revision) -> list[str]:
    if not a.packages or not b.packages:
        return []
    names = dict.fromkeys([*a.packages, *b.packages])
    old, new = ({name: revision.packages.get(name, "none") for name in names} for revision in (a, b))
    return [f"{name} {old[name]} → {new[name]}" for name in names if old[name] != new[name]]
