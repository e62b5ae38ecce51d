"""Whether params.yaml, code, dvc.yaml, dvc.lock and reports/ are of one run; a clone without data can tell.

Code is that of the run, or was accepted since by `lora-dag relock`: dvc.lock has the same digests either way.

DVC gives the verdict (`dvc repro --dry --allow-missing`). What it does not say, which file and why, is read from
dvc.lock here; and so is what it forgives: reports and code that are missing, code that dvc.yaml does not list, and
stages that are frozen.
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

from lora_dag.core.console import UserError
from lora_dag.core.params import read_yaml
from lora_dag.pipeline import code, dvc_files
from lora_dag.pipeline.dvc_files import LOCK, PARAMS, Locked, Stage, changed_params, show

UP_TO_DATE = "Data and pipelines are up to date."
SHOWN = "dvc repro --dry --allow-missing"
RUN = "run `dvc repro`, then commit dvc.lock and reports/"
RELOCK = "run `dvc repro`, or `lora-dag relock` where it changes no result; then commit dvc.lock and reports/"
ADD = "add it to its deps, run"


def problems() -> list[str]:
    """One line per file that is not of the run that dvc.lock records; none where all are.

    Reads the current folder.
    """
    if not LOCK.is_file():
        return [f"dvc.lock: missing; {RUN}"]
    try:
        stale, pipeline = ask_dvc(), Pipeline.read()
        return [*(compare(pipeline) or stale), *unlisted_code(pipeline)]
    except UserError as error:
        return list(error.problems)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        return [f"dvc.yaml, dvc.lock or a .dvc file: not as DVC writes it ({what}); `git checkout` them, or {RUN}"]


def paths() -> list[Path]:
    """What the run consists of, as far as dvc.yaml and params.yaml can be read."""
    found = ["params.yaml", "dvc.yaml", "dvc.lock"]
    with contextlib.suppress(UserError, AttributeError, KeyError, TypeError, ValueError):
        pipeline = Pipeline.read()
        found += [path for stage in pipeline.stages.values() for path in (*stage.deps, *stage.outs)]
    return [Path(path) for path in found]


def ask_dvc() -> list[str]:
    """Nothing where every stage is up to date, else the first that is not.

    Raises:
        UserError: DVC cannot read params.yaml, dvc.yaml, dvc.lock or a .dvc file.
    """
    command = [sys.executable, "-m", *SHOWN.split()]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0 and UP_TO_DATE in done.stdout:
        return []
    stage = re.search(r"(?:Running stage|failed to reproduce) '([^']+)'", done.stdout + done.stderr)
    if stage:
        return [f"dvc.lock: stage {stage[1]} would run again; {RUN}"]
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
    raise UserError(f"dvc: {said[0] if said else f'exit code {done.returncode}'}; see `{SHOWN}`")


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
    """MD5, of a folder with DVC's suffix ``.dir``; None where dvc.lock does not have the file."""


@dataclass(frozen=True)
class Pipeline:
    stages: dict[str, Stage]
    """dvc.yaml's, with the parameters in their places."""
    lock: dict[str, Locked]
    params: dict[str, Any]

    @classmethod
    def read(cls) -> Pipeline:
        params = read_yaml(Path(PARAMS))
        return cls(dvc_files.read_pipeline(params), dvc_files.read_lock(), params)

    def files(self) -> list[File]:
        """Of the stages that both have."""
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


def compare(pipeline: Pipeline) -> list[str]:
    """Every difference between dvc.lock and what stands beside it."""
    found = [*changed_commands(pipeline), *changed_settings(pipeline), *line_ends(pipeline)]
    return [*found, *changed_files(pipeline), *changed_data(pipeline)]


def changed_commands(pipeline: Pipeline) -> Iterator[str]:
    for name, stage in pipeline.stages.items():
        if name not in pipeline.lock:
            yield f"dvc.lock: has no stage {name}, which dvc.yaml has; {RUN}"
        elif stage.cmd != pipeline.lock[name].cmd:
            yield f"dvc.yaml {name}: the command is '{stage.cmd}', and '{pipeline.lock[name].cmd}' was run; {RUN}"


def changed_settings(pipeline: Pipeline) -> Iterator[str]:
    """Parameters key by key, and the numbers of the results."""
    read_by: dict[str, list[str]] = {}
    for name in pipeline.stages.keys() & pipeline.lock.keys():
        for key, then, now in changed_params(pipeline.stages[name], pipeline.lock[name], pipeline.params):
            read_by.setdefault(f"params.yaml {key}: {show(now)}, and dvc.lock has {show(then)}", []).append(name)
    for line, stages in sorted(read_by.items()):
        yield f"{line} ({in_order(pipeline, stages)}): changed without a new dvc.lock; {RUN}"
    for name in (name for name in pipeline.stages if name in pipeline.lock):
        file = Path("stages", name, "__init__.py")
        now, then = code.results_of(name) if file.is_file() else None, pipeline.lock[name].results
        if now != then:
            yield f"{file}: RESULTS is {now}, and dvc.lock has {then}: {name} has not run since; {RUN}"


def line_ends(pipeline: Pipeline) -> list[str]:
    """One line for all files that differ from dvc.lock in their line ends alone: git can be set to convert them."""
    converted = {file.path for file in pipeline.files() if other_line_ends(Path(file.path), file.locked)}
    found = sorted({file for path in converted for file in code.files_in(Path(path)) if b"\n" in file.read_bytes()})
    if not found:
        return []
    here, there = ("CRLF", "LF") if b"\r\n" in found[0].read_bytes() else ("LF", "CRLF")
    count = "1 file has" if len(found) == 1 else f"{len(found)} files have"
    cure = (
        "commit or stash your changes, run `git config core.autocrlf false && git rm -r -q --cached . && "
        "git reset --hard`"
    )
    return [f"line ends: {count} {here} where dvc.lock has {there} (core.autocrlf?), such as {found[0]}; {cure}"]


def other_line_ends(path: Path, locked: str | None) -> bool:
    """Of a file, or of a folder of code."""
    if locked is None or not (path.is_file() or code.is_code(str(path))) or code.dvc_md5(path) == locked:
        return False
    return locked in (code.dvc_md5(path, with_lf), code.dvc_md5(path, with_crlf))


def with_lf(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")


def with_crlf(path: Path) -> bytes:
    return with_lf(path).replace(b"\n", b"\r\n")


def changed_files(pipeline: Pipeline) -> Iterator[str]:
    """Code, reports and the other files that git has; each path once, an output by its own stage."""
    files = pipeline.files()
    made = {file.path for file in files if file.is_output}
    by_path: dict[str, list[File]] = {}
    for file in files:
        by_path.setdefault(file.path, []).append(file)
    for path, uses in by_path.items():
        yield from (
            unlisted(pipeline, path, uses)
            or (written(uses[0]) if uses[0].in_git else [])
            or (used(pipeline, path, uses) if path not in made or uses[0].in_git else [])
        )


def unlisted(pipeline: Pipeline, path: str, uses: list[File]) -> list[str]:
    """Where dvc.yaml and dvc.lock do not list the same files.

    DVC reruns no stage for a file that dvc.yaml does not list any more; a dependency that is as it was is no matter.
    """
    found = []
    for is_output, what in ((True, "an output"), (False, "a dependency")):
        new = [file.stage for file in uses if file.is_output is is_output and file.locked is None]
        old = [file.stage for file in uses if file.is_output is is_output and not file.listed]
        if new:
            found.append(
                f"dvc.yaml: {path} is {what} of {in_order(pipeline, new)}, and dvc.lock does not have it; {RUN}"
            )
        if old and (is_output or used(pipeline, path, uses)):
            force = RUN.replace("repro", f"repro --force {old[0]}")
            found.append(f"dvc.yaml: {path} is not {what} of {in_order(pipeline, old)}, and dvc.lock has it; {force}")
    return found


def written(output: File) -> list[str]:
    """A report that is not what its stage wrote."""
    undo = "`git checkout` the committed one, or `dvc repro`"
    if not Path(output.path).is_file():
        return [f"{output.path}: missing, and stage {output.stage} wrote it; {undo}"]
    here = code.dvc_md5(Path(output.path))
    if here == output.locked or other_line_ends(Path(output.path), output.locked):
        return []
    digests = f"(md5 {here[:8]}, dvc.lock has {str(output.locked)[:8]})"
    return [f"{output.path}: not what stage {output.stage} wrote {digests}: edited or replaced by hand; {undo}"]


def used(pipeline: Pipeline, path: str, uses: list[File]) -> list[str]:
    """A dependency that is another than at the last run."""
    if Path(path).is_dir() and not code.is_code(path):  # DVC compares it
        return []
    if not Path(path).exists():
        stages = in_order(pipeline, (file.stage for file in uses))
        cure = "restore it" if code.is_code(path) else "restore it, or commit its .dvc file"
        return [] if pointer(path) else [f"{path}: missing, and a dependency of {stages}; {cure}"]
    here = code.dvc_md5(Path(path))
    same = {file.locked for file in uses if file.locked == here or other_line_ends(Path(path), file.locked)}
    other = in_order(pipeline, (file.stage for file in uses if file.locked not in same))
    cure = RELOCK if code.is_code(path) else RUN
    return [f"{path}: changed since {other} ran, without a new dvc.lock; {cure}"] if other else []


def unlisted_code(pipeline: Pipeline) -> Iterator[str]:
    """Code that a stage imports and dvc.yaml does not list: neither DVC nor a digest would tell that it changed."""
    family = str(dvc_files.look_up(pipeline.params, "model.family"))
    for name, stage in pipeline.stages.items():
        module = re.search(r"-m stages\.(\w+)", stage.cmd)
        try:
            imported = code.dependencies(module[1], Path.cwd()) if module else []
        except FileNotFoundError:  # named elsewhere, as a missing dependency
            continue
        except (OSError, SyntaxError) as error:
            yield f"dvc.yaml {name}: its code cannot be read ({type(error).__name__}: {error}); restore it"
            continue
        paths = [path.replace("${model.family}", family) for path in imported]
        if unlisted := [path for path in paths if path not in stage.deps]:
            more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
            yield f"dvc.yaml: {unlisted[0]}{more} is code of {name}, which does not list it; {RUN.replace('run', ADD)}"


def changed_data(pipeline: Pipeline) -> list[str]:
    """Data that need not be here: its .dvc file, or the stage that makes it, names what the next stage ran with."""
    files = pipeline.files()
    made = {file.path: file for file in files if file.is_output and not file.in_git}
    found: dict[str, list[str]] = {}
    for file in files:
        if file.is_output or file.locked is None:
            continue
        maker, tracked = made.get(file.path), pointer(file.path)
        if maker and maker.locked and maker.locked != file.locked:
            line = f"dvc.lock: {file.path} is {maker.locked[:8]} as {maker.stage} wrote it, and {file.locked[:8]}"
            found.setdefault(line, []).append(file.stage)
        elif tracked and tracked[1] and tracked[1] != file.locked:
            line = f"{tracked[0]}: names data {tracked[1][:8]}, and dvc.lock has {file.locked[:8]}"
            found.setdefault(line, []).append(file.stage)
    return [f"{line} ({in_order(pipeline, stages)}): {RUN}" for line, stages in found.items()]


def pointer(path: str) -> tuple[Path, str | None] | None:
    """The .dvc file that brings a path, and the MD5 it names for it: None where it brings a folder around it."""
    for place in (Path(path), *Path(path).parents):
        file = place.with_name(f"{place.name}.dvc") if place.name else place
        if file.is_file():
            outs = read_yaml(file).get("outs", [])
            named = [out.get("md5") for out in outs if out.get("path") == place.name]
            return file, named[0] if named and place == Path(path) else None
    return None


def in_order(pipeline: Pipeline, stages: Iterable[str]) -> str:
    """Names, as dvc.yaml orders them."""
    chosen = set(stages)
    return ", ".join(name for name in pipeline.stages if name in chosen)
