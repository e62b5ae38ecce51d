"""What the Snakefile's rules read from the runs of a sweep: files, parameters, options, resources.

In: the runs of sweeps/grid.py, the stages of dvc.yaml.  Out: ``Jobs``, whose methods give a rule its values, or
functions of the wildcards, which Snakemake calls for every job.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from snakemake.exceptions import WorkflowError

from lora_dag.core.console import UserError
from lora_dag.core.files import write_text
from lora_dag.core.params import RuntimeParams, check, read_yaml
from lora_dag.pipeline import dvc_files
from lora_dag.pipeline.code import command_digest, digest, results_of
from lora_dag.pipeline.yaml_edit import flow
from lora_dag.sweeps import grid
from lora_dag.sweeps.grid import Run

T = TypeVar("T")
PARAMS = Path("params.yaml")


@contextlib.contextmanager
def workflow_errors() -> Iterator[None]:
    """Problems of the parameters end Snakemake with their lines, without a traceback."""
    try:
        yield
    except UserError as error:
        raise WorkflowError(*error.problems) from None


def save_params(changes: dict[str, Any]) -> str:
    """Write params.yaml, with ``changes`` of its section sweep, to a file that is named by its content.

    Args:
        changes: what ``snakemake --config`` sets, such as ``{"seeds": [0, 1]}``.
    """
    text = PARAMS.read_text(encoding="utf-8")
    if changes:
        tree = grid.from_command_line(read_yaml(PARAMS), changes)
        check(tree, PARAMS)
        text = flow(tree)
    path = Path(f"runs/.params/{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml")
    if not path.exists():
        write_text(path, text)
    return str(path)


def read_runs(params: Path, find_problems: Callable[[list[Run]], list[str]]) -> list[Run]:
    """The runs of the section sweep.

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
    """Of each stage's job, which its wildcards name: what it reads, runs with and needs."""

    runs: list[Run]
    stages: dict[str, dvc_files.Stage] = field(default_factory=dvc_files.read_pipeline)
    """Of dvc.yaml, by name: dependencies and parameters."""

    @functools.cached_property
    def run_by_folder(self) -> dict[str, dict[str, Run]]:
        """Stage -> its folder below runs/ -> the first of the runs that share it."""
        return {stage: {run.places[stage]: run for run in reversed(self.runs)} for stage in self.stages}

    def for_run(self, stage: str, compute: Callable[[Run], T]) -> Callable[[Any], T]:
        """A function of the wildcards: ``compute`` of the run whose folder they name."""
        return lambda wildcards: compute(self.run_by_folder[stage]["/".join(wildcards)])

    # Inputs and outputs

    def source_files(self, stage: str, key: str) -> Callable[[Any], list[str]]:
        """Every file of the dataset or the base, which ``key`` names: dataset.source or model.pretrained.

        Snakemake does not notice an edit inside a directory() input.
        """
        return self.for_run(stage, lambda run: files_below(run.value(key)))

    def upstream_files(self, stage: str, folder: str, *names: str) -> Callable[[Any], list[str]]:
        """Files that an earlier stage wrote into one of the run's folders."""
        return self.for_run(stage, lambda run: [f"{run.folders[folder]}/{name}" for name in names])

    def all_files(self, stage: str, folder: str, *names: str) -> list[str]:
        """Files that all jobs of a stage write."""
        return [f"{run.folders[folder]}/{name}" for run in self.run_by_folder[stage].values() for name in names]

    def common_files(self, stage: str, name_files: Callable[..., set[str]], *keys: str) -> list[str]:
        """Files that every job of a stage writes: the jobs of a rule cannot differ in their outputs.

        Args:
            name_files: the files of a job, by the values of ``keys`` in params.yaml.
        """
        runs = self.run_by_folder[stage].values()
        return sorted(set.intersection(*(name_files(*map(run.value, keys)) for run in runs)))

    def require_sources(self) -> None:
        """Raises UserError for a dataset or a base that is not here, or that Snakemake cannot read."""
        paths = dict.fromkeys(run.value(key) for key in ("dataset.source", "model.pretrained") for run in self.runs)
        if problems := [problem for path in paths for problem in source_problems(path)]:
            raise UserError(*problems)

    # Parameters

    def params(self, stage: str, *folders: str) -> dict[str, Any]:
        """A rule's params: when ``code``, ``results`` or ``sections`` change, Snakemake runs it again.

        code      digest of the stage's code: its files as inputs of every job would take most of the time of a plan
        results   number of the results that this code gives; where it is the same, `lora-dag relock` accepts other code
        sections  the parameters that the stage reads
        options   words of its command line: the run's overrides, and its ``folders``
        """
        keys = self.stages[stage].params[dvc_files.PARAMS]
        code = functools.cache(lambda family: digest(self.stages[stage].deps, family))

        def options(run: Run) -> str:
            paths = [word for name in folders for word in (f"--{name.replace('_', '-')}", run.folders[name])]
            return shlex.join([*grid.words(run, keys), *paths])

        return {
            "code": self.for_run(stage, lambda run: code(run.value("model.family"))),
            "results": results_of(stage),
            "sections": self.for_run(stage, lambda run: {key: run.value(key) for key in keys}),
            "options": self.for_run(stage, options),
        }

    @property
    def leaderboard_code(self) -> str:
        """Digest of the packages that the leaderboard's imports reach; it is no stage of dvc.yaml."""
        return command_digest("leaderboard")

    def report_labels(self, wildcards: Any) -> dict[str, str]:
        """What the pages of ``snakemake --report`` are filtered by."""
        run = self.run_by_folder["report"]["/".join(wildcards)]
        swept = {key: grid.readable(value) for key, value in run.overrides.items() if key not in grid.OWN_AXIS}
        rank, seed = str(run.value("lora.rank")), str(run.value("train.seed"))
        return {"dataset": wildcards.dataset, "lora.rank": rank} | swept | {"seed": seed}

    # Resources

    @property
    def runtime(self) -> RuntimeParams:
        """The same for all runs."""
        return self.runs[0].config.section(RuntimeParams)

    @property
    def threads(self) -> int:
        """Of a process."""
        return self.runtime.num_threads or 2

    @property
    def gpus(self) -> int:
        """Of a process."""
        return 0 if self.runtime.device == "cpu" else 1

    @property
    def processes_per_machine(self) -> int:
        """Of a training."""
        return self.runtime.num_processes // self.runtime.num_machines

    def training_resources(self) -> dict[str, Any]:
        """Launcher and GPUs; with several machines, the Slurm executor must know that the command calls srun.

        Raises:
            UserError: several machines without Slurm.
        """
        machines, processes = self.runtime.num_machines, self.processes_per_machine
        if machines == 1:
            return {"launcher": "python", "gpu": self.gpus * processes}
        if not shutil.which("srun"):
            several = f"params.yaml runtime.num_machines: {machines} machines need Slurm"
            raise UserError(f"{several}; use profiles/slurm, or set it to 1")
        each = f"--nodes={machines} --ntasks-per-node=1 --cpus-per-task={self.threads * processes}"
        own: dict[str, Any] = {"gres": f"gpu:{processes}"} if self.gpus else {}
        own |= {"mpi": "srun", "nodes": machines, "tasks": machines, "tasks_per_gpu": 0}
        return own | {"launcher": f"srun {each} --kill-on-bad-exit=1 profiles/slurm/torchrun {processes}"}


@functools.cache
def files_below(path: str) -> list[str]:
    """The file itself, or every file below the folder."""
    return [path] if Path(path).is_file() else sorted(str(p) for p in Path(path).rglob("*") if p.is_file())


def source_problems(path: str) -> list[str]:
    if Path("runs").resolve().is_relative_to(Path(path).resolve()):
        return [f"{path}: holds runs/, which Snakemake writes; name a folder of its own"]
    if not (found := files_below(path)):
        return [f"{path}: no such file or folder, or nothing in it; correct it, or `dvc pull {path}`"]
    return [f"{name}: Snakemake takes braces for wildcards; rename the file" for name in found if "{" in name]
