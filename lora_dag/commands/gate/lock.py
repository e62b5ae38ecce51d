"""Check that params.yaml, code, dvc.yaml, dvc.lock and reports/ belong to one run; a clone without data is enough.

The code is the code of the run, or `lora-dag relock` accepted it later: dvc.lock has the same digests in both cases.

`dvc repro --dry --allow-missing` decides whether all is up to date. This module reads dvc.lock to name the file and
the reason. It also finds what DVC ignores: missing reports, missing code, code that dvc.yaml does not list, and
frozen stages.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dag.core.console import Problem, UserError
from lora_dag.core.params import read_yaml
from lora_dag.pipeline import code, dvc_files
from lora_dag.pipeline.dvc_files import LOCK, PARAMS, PIPELINE, Locked, Stage, changed_params, show
from lora_dag.pipeline.dvc_problems import INVALID, conflict_problem, invalid_problem, unmerged_problem, valid_dvc_file

UP_TO_DATE = "Data and pipelines are up to date."
DRY_RUN = "dvc repro --dry --allow-missing"
RUN = "Run `dvc repro`, then commit dvc.lock and reports/."
RELOCK = "Run `dvc repro` (or `lora-dag relock` if results stay the same), then commit dvc.lock and reports/."
RESTORE = "Restore it with `git checkout`, or run `dvc repro`."


def problems() -> list[Problem]:
    """Return one problem per file of the current folder that does not belong to the run that dvc.lock records."""
    if not LOCK.is_file():
        return [Problem("lock-missing", f"dvc.lock: the file is missing. {RUN}")]
    if conflict := conflict_problem(LOCK.read_bytes()):
        return [conflict]
    found = problems_of_valid_lock()
    unmerged = unmerged_problem() if found else None
    return [unmerged, *found] if unmerged else found


def problems_of_valid_lock() -> list[Problem]:
    try:
        stale, pipeline = stale_stages(), Pipeline.read()
        return [*(compare(pipeline) or stale), *unlisted_code(pipeline)]
    except UserError as error:
        return list(error.problems)
    except INVALID:
        return [invalid_problem("dvc.yaml, dvc.lock or a .dvc file")]


def paths() -> list[Path]:
    """Return the files and folders of the run, as far as dvc.yaml and params.yaml can be read."""
    found = ["params.yaml", "dvc.yaml", "dvc.lock"]
    with contextlib.suppress(UserError, AttributeError, KeyError, TypeError, ValueError):
        pipeline = Pipeline.read()
        found += [path for stage in pipeline.stages.values() for path in (*stage.deps, *stage.outs)]
    return [Path(path) for path in found]


def stale_stages() -> list[Problem]:
    """Return the first stage that is out of date by DVC's own check; empty if every stage is up to date.

    Raises:
        UserError: DVC cannot read params.yaml, dvc.yaml, dvc.lock or a .dvc file.
    """
    command = [sys.executable, "-m", *DRY_RUN.split()]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0 and UP_TO_DATE in done.stdout:
        return []
    stage = re.search(r"(?:Running stage|failed to reproduce) '([^']+)'", done.stdout + done.stderr)
    if stage:
        return [Problem("stage-outdated", f"dvc.lock: stage {stage[1]} is out of date. {RUN}")]
    lines = [line.removeprefix("ERROR: ").rstrip(".") for line in done.stderr.splitlines() if line.strip()]
    reason = lines[0] if lines else f"exit code {done.returncode}"
    raise UserError(Problem("dvc-failed", f"dvc: {reason}. `{DRY_RUN}` shows the details."))


@dataclass(frozen=True)
class File:
    """A dependency or an output of a stage, as dvc.yaml lists it and dvc.lock pins it."""

    stage: str
    path: str
    is_output: bool
    in_git: bool
    """An output that DVC does not cache."""
    listed: bool
    locked: str | None
    """MD5, with DVC's suffix ``.dir`` for a folder; None if dvc.lock does not have the file."""


@dataclass(frozen=True)
class Pipeline:
    stages: dict[str, Stage]
    """Stages of dvc.yaml; ``${...}`` is replaced by parameters."""
    lock: dict[str, Locked]
    params: dict[str, Any]

    @classmethod
    def read(cls) -> Pipeline:
        params = read_yaml(Path(PARAMS))
        with valid_dvc_file(PIPELINE):
            stages = dvc_files.read_pipeline(params)
        with valid_dvc_file(LOCK):
            return cls(stages, dvc_files.read_lock(), params)

    def files(self) -> list[File]:
        """Return dependencies and outputs of the stages that both dvc.yaml and dvc.lock have."""
        found = []
        for name in self.stages.keys() & self.lock.keys():
            stage, locked = self.stages[name], self.lock[name]
            for path in {*stage.deps, *locked.deps}:
                pin = locked.deps[path].get("md5") if path in locked.deps else None
                found.append(File(name, path, False, False, path in stage.deps, pin))
            for path in {*stage.outs, *locked.outs}:
                in_git = not stage.outs.get(path, True)
                found.append(File(name, path, True, in_git, path in stage.outs, locked.outs.get(path)))
        order = list(self.stages)
        return sorted(found, key=lambda file: (file.path, not file.is_output, order.index(file.stage)))


def compare(pipeline: Pipeline) -> list[Problem]:
    """Return every difference between dvc.lock and the files of the folder."""
    found = [*changed_commands(pipeline), *changed_settings(pipeline), *line_ends(pipeline)]
    return [*found, *changed_files(pipeline), *changed_data(pipeline)]


def changed_commands(pipeline: Pipeline) -> Iterator[Problem]:
    for name, stage in pipeline.stages.items():
        if name not in pipeline.lock:
            yield Problem("stage-not-run", f"dvc.lock: stage {name} of dvc.yaml is missing. {RUN}")
        elif stage.cmd != (last := pipeline.lock[name].cmd):
            text = f"dvc.yaml {name}: the command is '{stage.cmd}', but the last run used '{last}'. {RUN}"
            yield Problem("command-changed", text)


def changed_settings(pipeline: Pipeline) -> Iterator[Problem]:
    """Yield each parameter that changed since the last run, and each number RESULTS that did."""
    read_by: dict[str, list[str]] = {}
    for name in pipeline.stages.keys() & pipeline.lock.keys():
        for key, then, now in changed_params(pipeline.stages[name], pipeline.lock[name], pipeline.params):
            read_by.setdefault(f"params.yaml {key}: got {show(now)}, but dvc.lock has {show(then)}", []).append(name)
    for line, stages in sorted(read_by.items()):
        yield Problem("setting-changed", f"{line} ({stage_names(pipeline, stages)}). {RUN}")
    for name in (name for name in pipeline.stages if name in pipeline.lock):
        file = Path("stages", name, "__init__.py")
        now, then = code.results_of(name) if file.is_file() else None, pipeline.lock[name].results
        if now != then:
            text = f"{file}: RESULTS is {now}, but dvc.lock has {then} from the last run of {name}. {RUN}"
            yield Problem("results-changed", text)


def line_ends(pipeline: Pipeline) -> list[Problem]:
    """Return one problem for all files whose only difference to dvc.lock are line ends: git can convert them."""
    converted = {file.path for file in pipeline.files() if other_line_ends(Path(file.path), file.locked)}
    found = sorted({file for path in converted for file in code.files_in(Path(path)) if b"\n" in file.read_bytes()})
    if not found:
        return []
    here, there = ("CRLF", "LF") if b"\r\n" in found[0].read_bytes() else ("LF", "CRLF")
    count = "1 file has" if len(found) == 1 else f"{len(found)} files have"
    hint = (
        "Commit or stash your changes, then run `git config core.autocrlf false && git rm -r -q --cached . && "
        "git reset --hard`."
    )
    text = f"line ends: {count} {here} where dvc.lock has {there} (core.autocrlf?), such as {found[0]}. {hint}"
    return [Problem("line-ends-converted", text)]


def other_line_ends(path: Path, locked: str | None) -> bool:
    """Return whether a file, or a folder of code, matches dvc.lock after a conversion of line ends."""
    if locked is None or not (path.is_file() or code.is_code(str(path))) or code.dvc_md5(path) == locked:
        return False
    return locked in (code.dvc_md5(path, with_lf), code.dvc_md5(path, with_crlf))


def with_lf(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")


def with_crlf(path: Path) -> bytes:
    return with_lf(path).replace(b"\n", b"\r\n")


def changed_files(pipeline: Pipeline) -> Iterator[Problem]:
    """Yield problems of code, reports and other files in git: each path once, an output by its own stage."""
    files = pipeline.files()
    made = {file.path for file in files if file.is_output}
    by_path: dict[str, list[File]] = {}
    for file in files:
        by_path.setdefault(file.path, []).append(file)
    for path, uses in by_path.items():
        yield from (
            list_differences(pipeline, path, uses)
            or (edited_output(uses[0]) if uses[0].in_git else [])
            or (changed_dependency(pipeline, path, uses) if path not in made or uses[0].in_git else [])
        )


def list_differences(pipeline: Pipeline, path: str, uses: list[File]) -> list[Problem]:
    """Return problems of a path that only one of dvc.yaml and dvc.lock lists.

    DVC reruns no stage for a file that dvc.yaml does not list any more. An unchanged dependency is no problem then.
    """
    found = []
    for is_output, what in ((True, "an output"), (False, "a dependency")):
        new = [file.stage for file in uses if file.is_output is is_output and file.locked is None]
        old = [file.stage for file in uses if file.is_output is is_output and not file.listed]
        if new:
            text = f"dvc.yaml: {path} is {what} of {stage_names(pipeline, new)}, but dvc.lock does not have it. {RUN}"
            found.append(Problem("file-not-locked", text))
        if old and (is_output or changed_dependency(pipeline, path, uses)):
            force = RUN.replace("repro", f"repro --force {old[0]}")
            text = f"dvc.yaml: {path} is not {what} of {stage_names(pipeline, old)}, but dvc.lock has it. {force}"
            found.append(Problem("file-not-listed", text))
    return found


def edited_output(output: File) -> list[Problem]:
    """Return the problem of a report that its stage did not write."""
    if not Path(output.path).is_file():
        text = f"{output.path}: this output of stage {output.stage} is missing. {RESTORE}"
        return [Problem("report-missing", text)]
    here = code.dvc_md5(Path(output.path))
    if here == output.locked or other_line_ends(Path(output.path), output.locked):
        return []
    digests = f"md5 {here[:8]}, but dvc.lock has {str(output.locked)[:8]}"
    text = f"{output.path}: edited since stage {output.stage} wrote it ({digests}). {RESTORE}"
    return [Problem("report-edited", text)]


def changed_dependency(pipeline: Pipeline, path: str, uses: list[File]) -> list[Problem]:
    """Return the problem of a dependency that is missing or changed since the last run."""
    if Path(path).is_dir() and not code.is_code(path):  # DVC compares it
        return []
    if not Path(path).exists():
        stages = stage_names(pipeline, (file.stage for file in uses))
        hint = "Restore it." if code.is_code(path) else "Restore it, or commit its .dvc file."
        text = f"{path}: this dependency of {stages} is missing. {hint}"
        return [] if dvc_file_of(path) else [Problem("dependency-missing", text)]
    here = code.dvc_md5(Path(path))
    same = {file.locked for file in uses if file.locked == here or other_line_ends(Path(path), file.locked)}
    other = stage_names(pipeline, (file.stage for file in uses if file.locked not in same))
    hint = RELOCK if code.is_code(path) else RUN
    return [Problem("dependency-changed", f"{path}: changed since the last run of {other}. {hint}")] if other else []


def unlisted_code(pipeline: Pipeline) -> Iterator[Problem]:
    """Yield code that a stage imports and dvc.yaml does not list: no digest would change with it."""
    family = str(dvc_files.look_up(pipeline.params, "model.family"))
    for name, stage in pipeline.stages.items():
        module = re.search(r"-m stages\.(\w+)", stage.cmd)
        try:
            imported = code.dependencies(module[1], Path.cwd()) if module else []
        except FileNotFoundError:  # named elsewhere, as a missing dependency
            continue
        except (OSError, SyntaxError) as error:
            text = f"dvc.yaml {name}: its code cannot be read ({type(error).__name__}: {error}). Restore it."
            yield Problem("code-unreadable", text)
            continue
        paths = [path.replace("${model.family}", family) for path in imported]
        if unlisted := [path for path in paths if path not in stage.deps]:
            more = f" (and {len(unlisted) - 1} more)" if len(unlisted) > 1 else ""
            text = f"dvc.yaml: stage {name} imports {unlisted[0]}{more}, but its deps do not list it. Add it. {RUN}"
            yield Problem("code-not-listed", text)


def changed_data(pipeline: Pipeline) -> list[Problem]:
    """Return data whose digest differs between the stage that reads it and its .dvc file, or the stage that writes it.

    The data itself need not be here.
    """
    files = pipeline.files()
    made = {file.path: file for file in files if file.is_output and not file.in_git}
    found: dict[str, list[str]] = {}
    for file in files:
        if file.is_output or file.locked is None:
            continue
        maker, tracked = made.get(file.path), dvc_file_of(file.path)
        if maker and maker.locked and maker.locked != file.locked:
            line = f"dvc.lock: {maker.stage} wrote {file.path} {maker.locked[:8]}, but {file.locked[:8]} was read"
            found.setdefault(line, []).append(file.stage)
        elif tracked and tracked[1] and tracked[1] != file.locked:
            line = f"{tracked[0]}: has data {tracked[1][:8]}, but dvc.lock has {file.locked[:8]}"
            found.setdefault(line, []).append(file.stage)
    return [
        Problem("data-changed", f"{line} ({stage_names(pipeline, stages)}). {RUN}") for line, stages in found.items()
    ]


def dvc_file_of(path: str) -> tuple[Path, str | None] | None:
    """Return the .dvc file that tracks a path, and the path's MD5 in it; None as MD5 if it tracks a parent folder."""
    for parent in (Path(path), *Path(path).parents):
        file = parent.with_name(f"{parent.name}.dvc") if parent.name else parent
        if file.is_file():
            outs = read_yaml(file).get("outs", [])
            digests = [out.get("md5") for out in outs if out.get("path") == parent.name]
            return file, digests[0] if digests and parent == Path(path) else None
    return None


def stage_names(pipeline: Pipeline, stages: Iterable[str]) -> str:
    """Return names of stages in the order of dvc.yaml."""
    chosen = set(stages)
    return ", ".join(name for name in pipeline.stages if name in chosen)
