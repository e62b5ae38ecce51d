# The DAG of dvc.yaml as Snakemake rules: all runs of section sweep in params.yaml. A stage that runs share runs once.
#   snakemake                                                        the runs of params.yaml
#   snakemake --config 'grid={lora.rank: [4, 8, 16]}' seeds=[0,1]    other values in sweep, for this command only
# It writes to runs/ and reports/sweep, never to DVC's paths. Files:
#   rules/*.smk                     one rule per stage: inputs, outputs, command
#   dvc.yaml                        code and parameters of each stage
#   lora_dag/sweeps/grid.py         runs of a sweep, and their folders
#   lora_dag/sweeps/snakemake.py    JOBS: settings and files of a run, by its wildcards

import os
from pathlib import Path

from snakemake.logging import logger

from lora_dag.commands.check_settings import sweep_problems
from lora_dag.sweeps import grid
from lora_dag.sweeps.snakemake import Jobs, read_runs, save_params, workflow_errors

# Jobs read a copy of params.yaml, so you may edit params.yaml while they run. The copy includes --config, because
# Snakemake passes --config to jobs through a shell, which changes quotes and backslashes.
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


# All stages are listed. With the last stages only, results of earlier settings would count as current after a failure
# in an earlier stage.
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


# The leaderboard's rule needs all runs, so after a failure the leaderboard is written here. It lists failed runs too.
onerror:
    if len(RUNS) > 1:
        shell("python -m lora_dag leaderboard --params $LORA_PARAMS || true")
