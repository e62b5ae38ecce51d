"""Whether params.yaml, code, dvc.yaml, dvc.lock and reports/ are of one run; a clone without data can tell.

DVC gives the verdict (`dvc repro --dry --allow-missing`). What it does not say, which file and why, is read from
dvc.lock here; and so is what it forgives: reports and code that are missing, code that dvc.yaml does not list, and
stages that are frozen.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dag.core.console import UserError
from lora_dag.core.params import read_yaml
from lora_dag.pipeline.code import closure

Tree = dict[str, Any]

UP_TO_DATE = "Data and pipelines are up to date."
SHOWN = "dvc repro --dry --allow-missing"
RUN = "run `dvc repro`, then commit dvc.lock and reports/"
ADD = "add it to its deps, run"
ABSENT = object()
LOCK = Path("dvc.lock")


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
        found += [path for stage in pipeline.stages for kind in (True, False) for path in pipeline.listed(stage, kind)]
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
    stages: Tree
    """dvc.yaml's, with the parameters in their places."""
    lock: Tree
    params: Tree

    @classmethod
    def read(cls) -> Pipeline:
        params = read_yaml(Path("params.yaml"))

        def fill(value: Any) -> Any:
            if isinstance(value, dict):
                return {fill(name): fill(each) for name, each in value.items()}
            if isinstance(value, list):
                return [fill(each) for each in value]
            if isinstance(value, str):
                return re.sub(r"\$\{([\w.]+)\}", lambda key: str(look_up(params, key[1])), value)
            return value

        return cls(
            fill(read_yaml(Path("dvc.yaml"))["stages"]), read_yaml(LOCK)["stages"] if LOCK.exists() else {}, params
        )

    def files(self) -> list[File]:
        """Of the stages that both have."""
        found = []
        for stage in self.stages.keys() & self.lock.keys():
            for is_output in (False, True):
                listed, locked = self.listed(stage, is_output), self.locked(stage, is_output)
                for path in listed.keys() | locked.keys():
                    in_git = is_output and not listed.get(path, True)
                    found.append(File(stage, path, is_output, in_git, path in listed, locked.get(path)))
        order = list(self.stages)
        return sorted(found, key=lambda file: (file.path, not file.is_output, order.index(file.stage)))

    def listed(self, stage: str, is_output: bool) -> dict[str, bool]:
        """Path -> whether DVC caches it."""
        kinds = ("outs", "metrics", "plots") if is_output else ("deps",)
        entries = [entry for kind in kinds for entry in self.stages[stage].get(kind, [])]
        pairs = [next(iter(entry.items())) if isinstance(entry, dict) else (entry, {}) for entry in entries]
        return {path: options.get("cache", True) for path, options in pairs}

    def locked(self, stage: str, is_output: bool) -> dict[str, str | None]:
        """Path -> MD5."""
        return {entry["path"]: entry.get("md5") for entry in self.lock[stage].get("outs" if is_output else "deps", [])}


def look_up(tree: Tree, key: str) -> Any:
    """A section or a dotted key; ABSENT where there is none."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def compare(pipeline: Pipeline) -> list[str]:
    """Every difference between dvc.lock and what stands beside it."""
    found = [*changed_commands(pipeline), *changed_params(pipeline), *line_ends(pipeline)]
    return [*found, *changed_files(pipeline), *changed_data(pipeline)]


def changed_commands(pipeline: Pipeline) -> Iterator[str]:
    for name, stage in pipeline.stages.items():
        if name not in pipeline.lock:
            yield f"dvc.lock: has no stage {name}, which dvc.yaml has; {RUN}"
        elif stage["cmd"] != pipeline.lock[name]["cmd"]:
            yield f"dvc.yaml {name}: the command is '{stage['cmd']}', and '{pipeline.lock[name]['cmd']}' was run; {RUN}"


def changed_params(pipeline: Pipeline) -> Iterator[str]:
    """Key by key, also where dvc.yaml lists a whole section."""
    read_by: dict[str, list[str]] = {}
    for stage in pipeline.stages.keys() & pipeline.lock.keys():
        recorded = pipeline.lock[stage].get("params", {}).get("params.yaml", {})
        for name in pipeline.stages[stage].get("params", []):
            here, then = (
                dict(leaves(name, look_up(pipeline.params, name))),
                dict(leaves(name, recorded.get(name, ABSENT))),
            )
            for key in here.keys() | then.keys():
                now, before = here.get(key, ABSENT), then.get(key, ABSENT)
                if now != before:
                    line = f"params.yaml {key}: {show(now)}, and dvc.lock has {show(before)}"
                    read_by.setdefault(line, []).append(stage)
    for line, stages in sorted(read_by.items()):
        yield f"{line} ({in_order(pipeline, stages)}): changed without a new dvc.lock; {RUN}"


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values below a section; a key that is absent has none."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from leaves(f"{key}.{name}", each)
    elif value is not ABSENT:
        yield key, value


def show(value: Any) -> str:
    return "no such key" if value is ABSENT else "null" if value is None else f"{value}"


def line_ends(pipeline: Pipeline) -> list[str]:
    """One line for all files that differ from dvc.lock in their line ends alone: git can be set to convert them."""
    found = sorted({file.path for file in pipeline.files() if other_line_ends(Path(file.path), file.locked)})
    if not found:
        return []
    here, there = ("CRLF", "LF") if b"\r\n" in Path(found[0]).read_bytes() else ("LF", "CRLF")
    count = "1 file has" if len(found) == 1 else f"{len(found)} files have"
    cure = (
        "commit or stash your changes, run `git config core.autocrlf false && git rm -r -q --cached . && "
        "git reset --hard`"
    )
    return [f"line ends: {count} {here} where dvc.lock has {there} (core.autocrlf?), such as {found[0]}; {cure}"]


def other_line_ends(path: Path, locked: str | None) -> bool:
    if locked is None or not path.is_file() or md5(path) == locked:
        return False
    lf = path.read_bytes().replace(b"\r\n", b"\n")
    return locked in (digest(lf), digest(lf.replace(b"\n", b"\r\n")))


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
    here = md5(Path(output.path))
    if here == output.locked or other_line_ends(Path(output.path), output.locked):
        return []
    digests = f"(md5 {here[:8]}, dvc.lock has {str(output.locked)[:8]})"
    return [f"{output.path}: not what stage {output.stage} wrote {digests}: edited or replaced by hand; {undo}"]


def used(pipeline: Pipeline, path: str, uses: list[File]) -> list[str]:
    """A dependency that is another than at the last run."""
    if Path(path).is_dir():  # DVC compares it
        return []
    if not Path(path).exists():
        stages = in_order(pipeline, (file.stage for file in uses))
        cure = "restore it" if path.startswith(("lora_dag/", "stages/")) else "restore it, or commit its .dvc file"
        return [] if pointer(path) else [f"{path}: missing, and a dependency of {stages}; {cure}"]
    here = md5(Path(path))
    same = {file.locked for file in uses if file.locked == here or other_line_ends(Path(path), file.locked)}
    other = in_order(pipeline, (file.stage for file in uses if file.locked not in same))
    return [f"{path}: changed since {other} ran, without a new dvc.lock; {RUN}"] if other else []


def unlisted_code(pipeline: Pipeline) -> Iterator[str]:
    """Code that a stage imports and dvc.yaml does not list: neither DVC nor a digest would tell that it changed."""
    for name, stage in pipeline.stages.items():
        module = re.search(r"-m stages\.(\w+)", str(stage["cmd"]))
        try:
            imported = closure(module[1], Path.cwd()) if module else []
        except FileNotFoundError:  # named elsewhere, as a missing dependency
            continue
        except (OSError, SyntaxError) as error:
            yield f"dvc.yaml {name}: its code cannot be read ({type(error).__name__}: {error}); restore it"
            continue
        family = str(look_up(pipeline.params, "model.family"))
        code = [path.replace("${model.family}", family) for path in imported]
        if unlisted := [path for path in code if path not in pipeline.listed(name, is_output=False)]:
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


def md5(path: Path) -> str:
    return digest(path.read_bytes())


def digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
