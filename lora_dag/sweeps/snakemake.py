"""Values for the rules of the Snakefile: files, parameters, options and resources of the jobs of a sweep.

In: the runs of sweeps/grid.py, the stages of dvc.yaml.  Out: ``Jobs``, whose methods give a rule its values, or
functions of the wildcards, which Snakemake calls for every job.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from snakemake.exceptions import WorkflowError

from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import write_text
from lora_dag.core.params import Origin, RuntimeParams, check, read_yaml
from lora_dag.pipeline import dvc_files
from lora_dag.pipeline.code import command_digest, digest, results_of
from lora_dag.pipeline.yaml_edit import to_flow_yaml
from lora_dag.sweeps import grid
from lora_dag.sweeps.grid import Run

T = TypeVar("T")
PARAMS = Path("params.yaml")


@contextlib.contextmanager
def workflow_errors() -> Iterator[None]:
    """End Snakemake with the lines of a UserError, without a traceback."""
    try:
        yield
    except UserError as error:
        raise WorkflowError(*(f"{problem} [{problem.code}]" for problem in error.problems)) from None


def save_params(changes: dict[str, Any]) -> str:
    """Write params.yaml, with ``changes`` of its section sweep, to a file named by its content, and return its path.

    Args:
        changes: values of ``snakemake --config``, such as ``{"seeds": [0, 1]}``.
    """
    tree = read_yaml(PARAMS)  # its problems name params.yaml, not the copy
    text = PARAMS.read_text(encoding="utf-8")
    if changes:
        tree = grid.from_command_line(tree, changes)
        check(tree, Origin(PARAMS))
        text = to_flow_yaml(tree)
    path = Path(f"runs/.params/{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml")
    if not path.exists():
        write_text(path, text)
    return str(path)


def read_runs(params: Path, find_problems: Callable[[list[Run]], Sequence[Problem]]) -> list[Run]:
    """Return the runs of the section sweep.

    Args:
        find_problems: further checks of every run's settings.

    Raises:
        UserError: a setting of any run is wrong.
    """
    runs = grid.plan(read_yaml(params))
    if problems := find_problems(runs):
        raise UserError(*problems)
    return runs


@dataclass(frozen=True)
class Jobs:
    """Inputs, parameters and resources of the jobs of each stage, by the job's wildcards."""

    runs: list[Run]
    stages: dict[str, dvc_files.Stage] = field(default_factory=dvc_files.read_pipeline)
    """Stages of dvc.yaml by name: dependencies and parameters."""

    @functools.cached_property
    def run_by_folder(self) -> dict[str, dict[str, Run]]:
        """Stage -> its folder in runs/ -> the first run that uses the folder."""
        return {stage: {run.stage_folders[stage]: run for run in reversed(self.runs)} for stage in self.stages}

    def for_run(self, stage: str, compute: Callable[[Run], T]) -> Callable[[Any], T]:
        """Return a function of the wildcards that applies ``compute`` to the run of their folder."""
        return lambda wildcards: compute(self.run_by_folder[stage]["/".join(wildcards)])

    # Inputs and outputs

    def source_files(self, stage: str, key: str) -> Callable[[Any], list[str]]:
        """Return every file of the dataset or base model. ``key`` is dataset.source or model.pretrained.

        Snakemake does not notice an edit inside a directory() input.
        """
        return self.for_run(stage, lambda run: files_below(run.value(key)))

    def upstream_files(self, stage: str, folder: str, *names: str) -> Callable[[Any], list[str]]:
        """Return files that an earlier stage wrote into one of the run's folders."""
        return self.for_run(stage, lambda run: [f"{run.folders[folder]}/{name}" for name in names])

    def all_files(self, stage: str, folder: str, *names: str) -> list[str]:
        """Return the files that all jobs of a stage write."""
        return [f"{run.folders[folder]}/{name}" for run in self.run_by_folder[stage].values() for name in names]

    def common_files(self, stage: str, name_files: Callable[..., set[str]], *keys: str) -> list[str]:
        """Return the files that every job of a stage writes, as jobs of a rule cannot differ in their outputs.

        Args:
            name_files: returns the files of a job by the values of ``keys`` in params.yaml.
        """
        runs = self.run_by_folder[stage].values()
        return sorted(set.intersection(*(name_files(*map(run.value, keys)) for run in runs)))

    def require_sources(self) -> None:
        """Raise UserError for a dataset or base model that is missing, or that Snakemake cannot read."""
        paths = dict.fromkeys(run.value(key) for key in ("dataset.source", "model.pretrained") for run in self.runs)
        if problems := [problem for path in paths for problem in source_problems(path)]:
            raise UserError(*problems)

    # Parameters

    def params(self, stage: str, *folders: str) -> dict[str, Any]:
        """Return the params of a rule. Snakemake reruns it if ``code``, ``results`` or ``sections`` change.

        code      digest of the stage's code: its files as inputs of every job would slow down planning
        results   RESULTS of the stage; if it is equal, `lora-dag relock` accepts changed code
        sections  the settings that the stage reads
        options   command line arguments: the run's overrides and ``folders``
        """
        keys = self.stages[stage].params[dvc_files.PARAMS]
        code = functools.cache(lambda family: digest(self.stages[stage].deps, family))

        def options(run: Run) -> str:
            paths = [word for name in folders for word in (f"--{name.replace('_', '-')}", run.folders[name])]
            return shlex.join([*grid.cli_overrides(run, keys), *paths])

        return {
            "code": self.for_run(stage, lambda run: code(run.value("model.family"))),
            "results": results_of(stage),
            "sections": self.for_run(stage, lambda run: {key: run.value(key) for key in keys}),
            "options": self.for_run(stage, options),
        }

    @property
    def leaderboard_code(self) -> str:
        """Digest of the packages that the leaderboard imports; it is no stage of dvc.yaml."""
        return command_digest("leaderboard")

    def report_labels(self, wildcards: Any) -> dict[str, str]:
        """Return the labels by which pages of ``snakemake --report`` are filtered."""
        run = self.run_by_folder["report"]["/".join(wildcards)]
        swept = {key: grid.readable(value) for key, value in run.overrides.items() if key not in grid.OWN_AXIS}
        rank, seed = str(run.value("lora.rank")), str(run.value("train.seed"))
        return {"dataset": wildcards.dataset, "lora.rank": rank} | swept | {"seed": seed}

    # Resources

    @property
    def runtime(self) -> RuntimeParams:
        """Section runtime, which is the same for all runs."""
        return self.runs[0].config.section(RuntimeParams)

    @property
    def threads(self) -> int:
        """Threads of a process."""
        return self.runtime.num_threads or 2

    @property
    def gpus(self) -> int:
        """GPUs of a process."""
        return 0 if self.runtime.device == "cpu" else 1

    @property
    def processes_per_machine(self) -> int:
        """Processes of a training on each machine."""
        return self.runtime.num_processes // self.runtime.num_machines

    def training_resources(self) -> dict[str, Any]:
        """Return launcher and GPUs; with several machines, the Slurm executor must know that the command calls srun.

        Raises:
            UserError: several machines without Slurm.
        """
        machines, processes = self.runtime.num_machines, self.processes_per_machine
        if machines == 1:
            return {"launcher": "python", "gpu": self.gpus * processes}
        if not shutil.which("srun"):
            text = f"{self.runtime.setting('num_machines')}: {machines} machines need Slurm."
            raise UserError(Problem("slurm-missing", f"{text} Use profiles/slurm, or set it to 1."))
        each = f"--nodes={machines} --ntasks-per-node=1 --cpus-per-task={self.threads * processes}"
        own: dict[str, Any] = {"gres": f"gpu:{processes}"} if self.gpus else {}
        own |= {"mpi": "srun", "nodes": machines, "tasks": machines, "tasks_per_gpu": 0}
        return own | {"launcher": f"srun {each} --kill-on-bad-exit=1 profiles/slurm/torchrun {processes}"}


@functools.cache
def files_below(path: str) -> list[str]:
    """Return the file itself, or every file in the folder."""
    return [path] if Path(path).is_file() else sorted(str(p) for p in Path(path).rglob("*") if p.is_file())


def source_problems(path: str) -> list[Problem]:
    """Return why Snakemake cannot read a dataset or a base model."""
    if Path("runs").resolve().is_relative_to(Path(path).resolve()):
        text = f"{path}: contains runs/, where Snakemake writes. Name a folder without it."
        return [Problem("source-contains-runs", text)]
    if not (files := files_below(path)):
        text = f"{path}: no such file or folder, or an empty folder. Correct the path, or run `dvc pull {path}`."
        return [Problem("source-missing", text)]
    text = "Snakemake reads braces as wildcards. Rename the file."
    return [Problem("braces-in-name", f"{name}: {text}") for name in files if "{" in name]
