# The DAG of dvc.yaml for Snakemake: every run of params.yaml's section sweep, with what runs have in common made once.
#   snakemake                                                        params.yaml as it stands
#   snakemake --config 'grid={lora.rank: [4, 8, 16]}' seeds=[0,1]    keys of sweep, for once
# Writes below runs/, never to DVC's paths, and reports/sweep. Code and params of each rule come from dvc.yaml,
# folders from core/sweep.py.

import functools
import hashlib
import os
import shlex
import shutil
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from lora_dag.commands import check
from lora_dag.pipeline import code as closure, snakemake_records
from lora_dag.sweeps import grid as sweep
from lora_dag.core.console import UserError
from lora_dag.core.files import write_text
from lora_dag.core.params import RuntimeParams, read_yaml
from lora_dag.core.params import check as check_params
from lora_dag.pipeline.yaml_edit import flow

STAGES = read_yaml(Path("dvc.yaml"))["stages"]


def snapshot():
    """params.yaml with the sweep of the command line, in a file named by its content."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    if config:
        tree = sweep.from_command_line(read_yaml(Path("params.yaml")), config)
        check_params(tree, Path("params.yaml"))
        text = flow(tree)
    path = Path(f"runs/.params/{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml")
    if not path.exists():
        write_text(path, text)
    return str(path)


# Jobs, on a cluster too, read what this command started with: params.yaml may be edited while they run, and Snakemake
# hands them --config through a shell, which changes quotes and backslashes.
if workflow.is_main_process or not Path(os.environ.get("LORA_PARAMS", "")).is_file():
    try:
        os.environ["LORA_PARAMS"] = snapshot()
    except UserError as error:
        raise WorkflowError(*error.problems)


envvars:
    "LORA_PARAMS",


def plan():
    """The runs, every setting of theirs checked."""
    try:
        runs = sweep.plan(read_yaml(Path(os.environ["LORA_PARAMS"])))
        if problems := check.sweep_problems(runs):
            raise UserError(*problems)
    except UserError as error:
        raise WorkflowError(*error.problems)
    return runs


RUNS = plan()
RUNTIME = RUNS[0].config.section(RuntimeParams)  # the same for all
THREADS = RUNTIME.num_threads or 2
GPUS = 0 if RUNTIME.device == "cpu" else 1
PER_MACHINE = RUNTIME.num_processes // RUNTIME.num_machines
AT = {stage: {run.places[stage]: run for run in reversed(RUNS)} for stage in STAGES}

if workflow.is_main_process:
    for line in sweep.summary(RUNS, sweep.measurements(Path("."))):
        logger.info(line)


def of(stage, wanted):
    """An input or params function: what the job's run, or the first of those that share it, gives."""
    return lambda wildcards: wanted(AT[stage]["/".join(wildcards)])


code_of = functools.cache(lambda stage, family: snakemake_records.code_of(STAGES[stage]["deps"], family))


def code(stage):
    """Digest of the stage's code dependencies; as inputs of every job they would take most of the time of a plan."""
    return of(stage, lambda run: code_of(stage, run.value("model.family")))


def sections(stage):
    """The parameters that the stage reads: when they change, Snakemake runs its rule again."""
    return of(stage, lambda run: {name: run.value(name) for name in STAGES[stage]["params"]})


def options(stage, *folders):
    """The run's overrides of what the stage reads, and its folders."""

    def line(run):
        words = sweep.words(run, STAGES[stage]["params"])
        places = [word for name in folders for word in (f"--{name.replace('_', '-')}", run.folders[name])]
        return shlex.join([*words, *places])

    return of(stage, line)


def made(stage, folder, *names):
    """Files of an earlier stage."""
    return of(stage, lambda run: [f"{run.folders[folder]}/{name}" for name in names])


FILES = {}


def files(path):
    """A file, or every file below a folder: Snakemake does not notice an edit inside a directory() input."""
    if path not in FILES and Path("runs").resolve().is_relative_to(Path(path).resolve()):
        FILES[path] = [], [f"{path}: holds runs/, which Snakemake writes; name a folder of its own"]
    if path not in FILES:
        found = [path] if Path(path).is_file() else sorted(str(p) for p in Path(path).rglob("*") if p.is_file())
        problems = [f"{name}: Snakemake takes braces for wildcards; rename the file" for name in found if "{" in name]
        if not found:
            problems = [f"{path}: no such file or folder, or nothing in it; correct it, or `dvc pull {path}`"]
        FILES[path] = found, problems
    return FILES[path]


def tracked(stage, key):
    """The files of the dataset or the base."""
    return of(stage, lambda run: files(run.value(key))[0])


if missing := [p for key in ("dataset.source", "model.pretrained") for run in RUNS for p in files(run.value(key))[1]]:
    raise WorkflowError(*dict.fromkeys(missing))


def exported(run):
    """One file of each format whose name is known before, below the folder of the exports."""
    names = {
        "diffusers": "pytorch_lora_weights.safetensors",
        "peft": "adapter_model.safetensors",
        "merged": "model_index.json",
    }
    formats = [name for name in run.value("export.formats") if name in names]
    ranks = run.value("export.resized_ranks")
    resized = [f"resized/rank-{rank}/{name}/{names[name]}" for rank in ranks for name in formats if name != "merged"]
    return [f"{name}/{names[name]}" for name in formats] + resized


# Outputs cannot differ between the jobs of a rule: those that all runs have. The lineage stands for the others.
EXPORTED = sorted(set.intersection(*(set(exported(run)) for run in AT["export"].values())))


def labels(wildcards):
    """What the pages of `snakemake --report` are filtered by."""
    run = AT["report"]["/".join(wildcards)]
    swept = {key: sweep.readable(value) for key, value in run.overrides.items() if key not in sweep.OWN_AXIS}
    rank, seed = run.value("lora.rank"), run.value("train.seed")
    return {"dataset": wildcards.dataset, "lora.rank": str(rank)} | swept | {"seed": str(seed)}


def machines():
    """What a training asks for; of several machines the Slurm executor wants to know that the shell calls srun."""
    if RUNTIME.num_machines == 1:
        return {"launcher": "python", "gpu": GPUS * PER_MACHINE}
    if not shutil.which("srun"):
        raise WorkflowError("params.yaml runtime.num_machines: several machines want Slurm; use profiles/slurm, or 1")
    each = f"--nodes={RUNTIME.num_machines} --ntasks-per-node=1 --cpus-per-task={THREADS * PER_MACHINE}"
    own = {"gres": f"gpu:{PER_MACHINE}"} if GPUS else {}
    own |= {"mpi": "srun", "nodes": RUNTIME.num_machines, "tasks": RUNTIME.num_machines, "tasks_per_gpu": 0}
    return own | {"launcher": f"srun {each} --kill-on-bad-exit=1 profiles/slurm/torchrun {PER_MACHINE}"}


# What failed belongs on the leaderboard, whose rule waits for every run.
onerror:
    if len(RUNS) > 1:
        shell("python -m lora_dag.commands.leaderboard --params $LORA_PARAMS || true")


localrules:
    all,
    leaderboard,


wildcard_constraints:
    dataset="[^/]+",
    latents="latents[^/]*",
    training="[^/]+-s[0-9]+",
    exports="[^/]+-s[0-9]+",
    run="[^/]+-s[0-9]+",


# Names the outputs of every stage: with the last ones alone, results of an earlier setting would pass for current
# ones after a stage in the middle has failed.
rule all:
    default_target: True
    input:
        [f"{run.folders['prepared']}/manifest.jsonl" for run in AT["prepare"].values()],
        [f"{run.folders['latents']}/manifest.json" for run in AT["cache_latents"].values()],
        [f"{run.folders['adapter']}/adapter.json" for run in AT["train"].values()],
        [f"{run.folders['reports']}/metrics.json" for run in AT["validate"].values()],
        [f"{run.folders['export_reports']}/lineage.json" for run in AT["export"].values()],
        [f"{run.folders['reports']}/report.md" for run in AT["report"].values()],
        ["reports/sweep/leaderboard.md"] if len(RUNS) > 1 else [],


# A message takes the place of the list of inputs, which here are all pictures by name.
rule prepare:
    input:
        raw=tracked("prepare", "dataset.source"),
    output:
        manifest="runs/{dataset}/prepared/manifest.jsonl",
        dataset="runs/{dataset}/prepared/dataset.json",
        metrics="runs/{dataset}/reports/dataset/metrics.json",
        contact="runs/{dataset}/reports/dataset/contact.png",
        pictures="runs/{dataset}/reports/dataset/pictures.csv",
    log:
        "runs/{dataset}/logs/prepare.log",
    conda:
        "profiles/environment.yaml"
    params:
        code=code("prepare"),
        sections=sections("prepare"),
        options=options("prepare", "prepared", "dataset_reports"),
    message:
        "prepare: {wildcards.dataset}"
    shell:
        "python -m stages.prepare --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule cache_latents:
    input:
        raw=tracked("cache_latents", "dataset.source"),
        base=tracked("cache_latents", "model.pretrained"),
        prepared=made("cache_latents", "prepared", "manifest.jsonl", "dataset.json"),
    output:
        manifest="runs/{dataset}/{latents}/manifest.json",
        metrics="runs/{dataset}/reports/{latents}/metrics.json",
    log:
        "runs/{dataset}/logs/{latents}.log",
    conda:
        "profiles/environment.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
    params:
        code=code("cache_latents"),
        sections=sections("cache_latents"),
        options=options("cache_latents", "prepared", "latents", "latents_reports"),
    message:
        "cache_latents: {wildcards.dataset}/{wildcards.latents}"
    shell:
        "python -m stages.cache_latents --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule train:
    input:
        base=tracked("train", "model.pretrained"),
        latents=made("train", "latents", "manifest.json"),
    output:
        adapter="runs/{dataset}/{training}/adapter/adapter.json",
        metrics="runs/{dataset}/{training}/reports/train/metrics.json",
        loss="runs/{dataset}/{training}/reports/train/loss.csv",
    log:
        "runs/{dataset}/{training}/logs/train.log",
    conda:
        "profiles/environment.yaml"
    threads: THREADS * PER_MACHINE
    resources:
        **machines(),
    params:
        code=code("train"),
        sections=sections("train"),
        options=options("train", "latents", "adapter", "train_reports"),
    shell:
        "{resources.launcher} -m stages.train --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule validate:
    input:
        base=tracked("validate", "model.pretrained"),
        latents=made("validate", "latents", "manifest.json"),
        adapter=made("validate", "adapter", "adapter.json"),
    output:
        metrics="runs/{dataset}/{run}/reports/metrics.json",
        samples=report("runs/{dataset}/{run}/reports/samples.png", category="Samples", labels=labels),
        progress=report("runs/{dataset}/{run}/reports/progress.png", category="Progress", labels=labels),
        heldout="runs/{dataset}/{run}/reports/validate/heldout.csv",
        curve="runs/{dataset}/{run}/reports/validate/curve.csv",
        nearest=report("runs/{dataset}/{run}/reports/validate/nearest.png", category="Nearest pictures", labels=labels),
        neighbours="runs/{dataset}/{run}/reports/validate/nearest.csv",
        lineage="runs/{dataset}/{run}/reports/validate/lineage.json",
    log:
        "runs/{dataset}/{run}/logs/validate.log",
    conda:
        "profiles/environment.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
    params:
        code=code("validate"),
        sections=sections("validate"),
        options=options("validate", "latents", "adapter", "reports"),
    shell:
        "python -m stages.validate --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule export:
    input:
        base=tracked("export", "model.pretrained"),
        adapter=made("export", "adapter", "adapter.json"),
    output:
        files=[f"runs/{{dataset}}/{{exports}}/export/{name}" for name in EXPORTED],
        metrics="runs/{dataset}/{exports}/reports/export/metrics.json",
        energy="runs/{dataset}/{exports}/reports/export/energy.csv",
        lineage="runs/{dataset}/{exports}/reports/export/lineage.json",
    log:
        "runs/{dataset}/{exports}/logs/export.log",
    conda:
        "profiles/environment.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
    params:
        code=code("export"),
        sections=sections("export"),
        options=options("export", "adapter", "export", "export_reports"),
    shell:
        "python -m stages.export --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule report:
    input:
        dataset=made("report", "dataset_reports", "metrics.json", "contact.png", "pictures.csv"),
        latents=made("report", "latents_reports", "metrics.json"),
        train=made("report", "train_reports", "metrics.json", "loss.csv"),
        validate=made("report", "reports", "metrics.json", "samples.png", "progress.png"),
        detail=made("report", "reports", "validate/curve.csv", "validate/lineage.json"),
        nearest=made("report", "reports", "validate/nearest.png", "validate/nearest.csv"),
        export=made("report", "export_reports", "metrics.json", "lineage.json", "energy.csv"),
    output:
        headline="runs/{dataset}/{run}/reports/headline.json",
        report="runs/{dataset}/{run}/reports/report.md",
        dataset="runs/{dataset}/{run}/reports/dataset.md",
        card="runs/{dataset}/{run}/reports/model_card.md",
        loss=report("runs/{dataset}/{run}/reports/loss.png", category="Curves", labels=labels),
    log:
        "runs/{dataset}/{run}/logs/report.log",
    conda:
        "profiles/environment.yaml"
    params:
        code=code("report"),
        sections=sections("report"),
        options=options(
            "report", "reports", "dataset_reports", "latents_reports", "train_reports", "export_reports", "export"
        ),
    shell:
        "python -m stages.report --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule leaderboard:
    input:
        validate=[
            f"{run.folders['reports']}/{name}"
            for run in RUNS
            for name in ("report.md", "metrics.json", "samples.png", "validate/heldout.csv", "validate/lineage.json")
        ],
        train=sorted({f"{run.folders['train_reports']}/metrics.json" for run in RUNS}),
        export=sorted({f"{run.folders['export_reports']}/lineage.json" for run in RUNS}),
    output:
        page=report("reports/sweep/leaderboard.md", category="Leaderboard"),
        table=report("reports/sweep/leaderboard.csv", category="Leaderboard"),
        effects=report("reports/sweep/leaderboard.png", category="Leaderboard"),
        contact=report("reports/sweep/contact.png", category="Leaderboard"),
    log:
        "runs/leaderboard.log",
    conda:
        "profiles/environment.yaml"
    params:
        code=lambda wildcards: closure.code_digest("leaderboard", RUNS[0].value("model.family")),
    shell:
        "python -m lora_dag.commands.leaderboard --params $LORA_PARAMS > {log} 2>&1"
