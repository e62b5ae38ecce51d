# The DAG of dvc.yaml for Snakemake: every run of params.yaml's section sweep, with what runs have in common made once.
#   snakemake                                                        params.yaml as it is
#   snakemake --config 'grid={lora.rank: [4, 8, 16]}' seeds=[0,1]    keys of sweep, for this command alone
# Writes below runs/ and reports/sweep, never to DVC's paths. Where to look:
#   rules/*.smk                     a rule for each stage: its inputs, outputs and command
#   dvc.yaml                        code and parameters of each stage
#   lora_dag/sweeps/grid.py         the runs of a sweep, and their folders
#   lora_dag/sweeps/snakemake.py    JOBS: what a rule reads from the run that its wildcards name

import os
from pathlib import Path

from snakemake.logging import logger

from lora_dag.commands.check_settings import sweep_problems
from lora_dag.sweeps import grid
from lora_dag.sweeps.snakemake import Jobs, read_runs, save_params, workflow_errors

# Jobs, on a cluster too, read what this command started with: params.yaml may be edited while they run, and Snakemake
# hands them --config through a shell, which changes quotes and backslashes.
if workflow.is_main_process or not Path(os.environ.get("LORA_PARAMS", "")).is_file():
    with workflow_errors():
        os.environ["LORA_PARAMS"] = save_params(config)


envvars:
    "LORA_PARAMS",


with workflow_errors():
    RUNS = read_runs(Path(os.environ["LORA_PARAMS"]), sweep_problems)
    JOBS = Jobs(RUNS)
    JOBS.require_sources()

if workflow.is_main_process:
    for line in grid.summary(RUNS, grid.measurements(Path("."))):
        logger.info(line)


localrules:
    all,
    leaderboard,


wildcard_constraints:
    dataset="[^/]+",
    latents="latents[^/]*",
    training="[^/]+-s[0-9]+",
    exports="[^/]+-s[0-9]+",
    run="[^/]+-s[0-9]+",


include: "rules/dataset.smk"
include: "rules/adapter.smk"
include: "rules/reports.smk"


# Names the outputs of every stage: with the last ones alone, results of an earlier setting would pass for current
# ones after a stage in the middle has failed.
rule all:
    default_target: True
    input:
        JOBS.all_files("prepare", "prepared", "manifest.jsonl"),
        JOBS.all_files("cache_latents", "latents", "manifest.json"),
        JOBS.all_files("train", "adapter", "adapter.json"),
        JOBS.all_files("validate", "reports", "metrics.json"),
        JOBS.all_files("export", "export_reports", "lineage.json"),
        JOBS.all_files("report", "reports", "report.md"),
        ["reports/sweep/leaderboard.md"] if len(RUNS) > 1 else [],


# What failed belongs on the leaderboard, whose rule waits for every run.
onerror:
    if len(RUNS) > 1:
        shell("python -m lora_dag leaderboard --params $LORA_PARAMS || true")
