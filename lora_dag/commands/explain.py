"""What changed between two revisions: data, base, code, parameters or environment, and which stages that concerns.

From dvc.lock, which holds the digest of everything that a stage read and the parameters that it ran with; packages'
versions are in reports/export/lineage.json. A stage that read what another one wrote anew is a consequence, and a
stage that gave other bytes for the same inputs was run in another environment. A stage whose code alone differs, with
the same RESULTS and outputs, ran again or was accepted by `lora-dag relock`: dvc.lock cannot tell.
Run: `lora-dag explain [A] [B ...]`, such as `lora-dag explain HEAD rank-16`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dag.artifacts import lineage
from lora_dag.commands.compare.page import show_params
from lora_dag.commands.compare.revisions import add_revisions, find_commit, read_file, with_defaults
from lora_dag.commands.compare.sides import DAMAGED, LOCK, PARAMS, flatten, mapping, parse_params
from lora_dag.core.console import UserError, log
from lora_dag.pages.markdown import table
from lora_dag.pipeline.code import is_code
from lora_dag.pipeline.dvc_files import Locked, parse_lock

EXPORTED = "reports/export/lineage.json"
ABSENT = object()
CAUSES = ("parameters", "data", "base", "code", "environment")
MAX_FILES = 3  # named for a stage, of one cause


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_revisions(parser)


def main(args: argparse.Namespace) -> None:
    first, *others = with_defaults(args.revisions)
    for name in others:
        log.info("%s", write_page(read_lock(first), read_lock(name)))


@dataclass(frozen=True)
class Revision:
    """What dvc.lock says of one."""

    name: str
    stages: dict[str, Locked]
    params: dict[str, Any]
    """Dotted key -> value, of params.yaml."""
    packages: dict[str, str]
    """Package -> version, of the last export."""

    def stage(self, name: str) -> Locked:
        return self.stages.get(name, Locked())

    def settings(self, stage: str) -> dict[str, Any]:
        """Dotted key -> value, that a stage ran with."""
        return flatten(self.stage(stage).params.get(PARAMS, {}))

    def writer(self, path: str) -> str | None:
        """The stage that writes a file or folder."""
        return next((name for name, stage in self.stages.items() if path in stage.outs), None)


@dataclass(frozen=True)
class Reason:
    """Why a stage ran anew, or may have."""

    cause: str
    """One of CAUSES, or the stage whose output it read: then it is a consequence."""
    what: str
    is_other_code: bool = False
    """Code itself, which `lora-dag relock` accepts where the number of the results is the same."""


def read_lock(name: str) -> Revision:
    """dvc.lock of a branch, tag, commit or DVC experiment, or of the workspace.

    Raises:
        UserError: no such revision; no dvc.lock there, or a damaged one.
    """
    commit = find_commit(name)
    lock, params, exported = (read_file(commit, path) for path in (LOCK, PARAMS, EXPORTED))
    if lock is None or params is None:
        missing = LOCK if lock is None else PARAMS
        raise UserError(f"{name}: has no {missing}, which says what every stage read; run `dvc repro` there, commit it")
    try:
        return Revision(
            name=name,
            stages=parse_lock(lock),
            params=parse_params(params),
            packages=mapping(lineage.parse(exported).get("packages", {})) if exported else {},
        )
    except DAMAGED as error:
        what = " ".join(str(error).split())
        raise UserError(f"{name}: {LOCK}, {PARAMS} or {EXPORTED} is damaged ({what}); run `dvc repro` there") from None


# The page


def write_page(a: Revision, b: Revision) -> str:
    """Markdown: root causes, then stage by stage what ran anew, or has other code, and because of what."""
    reasons = {stage: list(reasons_for(stage, a, b)) for stage in dict.fromkeys([*a.stages, *b.stages])}
    found = {cause: roots(cause, reasons) for cause in CAUSES}
    found["environment"] = packages_that_differ(a, b) or found["environment"]
    changed = [f"**{cause}** ({', '.join(what)})" for cause, what in found.items() if what]
    same = [cause for cause, what in found.items() if not what]
    summary = f"{' and '.join(changed) if changed else 'Nothing'} changed"
    rest = f"; {', '.join(same)} {'is' if same == ['environment'] else 'are'} the same." if changed and same else "."
    rows = [(stage, in_words(stage, reasons[stage], a, b)) for stage in reasons]
    sections = [f"# From {a.name} to {b.name}", summary + rest, table(("stage", ""), rows, align=":---")]
    return "\n\n".join(sections + [line for side in (a, b) for line in not_run(side)]) + "\n"


def in_words(stage: str, reasons: Sequence[Reason], a: Revision, b: Revision) -> str:
    """``ran anew: lora.rank 8 → 16``; of other code alone nobody can tell whether it ran or `relock` accepted it."""
    if not reasons:
        return "as before"
    if stage not in a.stages or stage not in b.stages:
        return f"only in {b.name if stage in b.stages else a.name}"
    if reasons[0].cause == "environment":
        return f"gave other bytes: {reasons[0].what}"
    causes = dict.fromkeys(reason.cause for reason in reasons)
    because = [f"{cause} ({', '.join(of_cause(cause, reasons))})" for cause in causes if cause in CAUSES]
    because += [f"{', '.join(of_cause(cause, reasons))} from {cause}" for cause in causes if cause not in CAUSES]
    same = a.stage(stage).outs == b.stage(stage).outs
    if same and all(reason.is_other_code for reason in reasons):
        return f"other code, of the same results: {', '.join(of_cause('code', reasons))}"
    return f"ran anew: {'; '.join(because)}" + (", and wrote the same bytes" if same else "")


def of_cause(cause: str, reasons: Sequence[Reason]) -> list[str]:
    """What changed; of many files the first."""
    what = [reason.what for reason in reasons if reason.cause == cause]
    more = len(what) - MAX_FILES
    return what if cause == "parameters" or more <= 0 else [*what[:MAX_FILES], f"{more} more"]


def roots(cause: str, reasons: Mapping[str, Sequence[Reason]]) -> list[str]:
    """All that changed of a kind, once each."""
    return list(dict.fromkeys(reason.what for found in reasons.values() for reason in found if reason.cause == cause))


def not_run(side: Revision) -> Iterator[str]:
    """Parameters of params.yaml that no stage has run with yet."""
    ran_with = {key: value for stage in side.stages for key, value in side.settings(stage).items()}
    ahead = [key for key, value in ran_with.items() if side.params.get(key, ABSENT) != value]
    if ahead:
        keys = ", ".join(ahead)
        yield f"{side.name}: {PARAMS} has other values than the stages last ran with ({keys}); `dvc repro` runs them."


# Why a stage ran anew


def reasons_for(stage: str, a: Revision, b: Revision) -> Iterator[Reason]:
    """None where it read the same files and parameters, and wrote the same bytes."""
    known = [*parameters(stage, a, b), *files(stage, a, b)]
    if a.stage(stage).cmd != b.stage(stage).cmd:
        known.append(Reason("code", "its command in dvc.yaml"))
    numbers = a.stage(stage).results, b.stage(stage).results
    if numbers[0] != numbers[1] and None not in numbers:
        known.append(Reason("code", f"RESULTS of {stage} {numbers[0]} → {numbers[1]}"))
    yield from known
    if not known and a.stage(stage).outs != b.stage(stage).outs:
        packages = ", ".join(packages_that_differ(a, b))
        yield Reason("environment", packages or "the same inputs on another machine, or packages that no report names")


def parameters(stage: str, a: Revision, b: Revision) -> Iterator[Reason]:
    before, after = a.settings(stage), b.settings(stage)
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, ABSENT) != after.get(key, ABSENT):
            old, new = show_params((before, after), key)
            yield Reason("parameters", f"{key} {old} → {new}")


def files(stage: str, a: Revision, b: Revision) -> Iterator[Reason]:
    """Of each file or folder that the stage reads and that is another one."""
    before, after = a.stage(stage).deps, b.stage(stage).deps
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path, {}), after.get(path, {})
        if old.get("md5") != new.get("md5"):
            counts = [side.get("nfiles", 0) for side in (old, new)]
            num_files = f" ({counts[0]} → {counts[1]} files)" if counts[0] != counts[1] else ""
            writer = a.writer(path) or b.writer(path)
            cause = writer or kind(path, a, b)
            yield Reason(cause, path if writer else path + num_files, is_other_code=cause == "code")


def kind(path: str, a: Revision, b: Revision) -> str:
    """Cause that a file stands for that no stage writes."""
    if is_code(path):
        return "code"
    return "base" if path in (a.params.get("model.pretrained"), b.params.get("model.pretrained")) else "data"


def packages_that_differ(a: Revision, b: Revision) -> list[str]:
    if not a.packages or not b.packages:
        return []
    names = dict.fromkeys([*a.packages, *b.packages])
    old, new = ({name: side.packages.get(name, "none") for name in names} for side in (a, b))
    return [f"{name} {old[name]} → {new[name]}" for name in names if old[name] != new[name]]
