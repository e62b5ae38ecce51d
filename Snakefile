# The DAG of dvc.yaml for Snakemake: one run, or one per rank, with the dataset and its latents shared.
#   snakemake                                  params.yaml as it stands
#   snakemake --config ranks=4,8,16            one adapter per rank
# Writes below runs/, never to DVC's paths. Code and params sections of each rule come from dvc.yaml.

from pathlib import Path

from snakemake.exceptions import WorkflowError

from stages.core.console import UserError
from stages.core.params import load, read_yaml

PARAMS = load(Path("params.yaml"))
STAGES = read_yaml(Path("dvc.yaml"))["stages"]
VALUES = {name: section.model_dump() for name, section in PARAMS.sections.items()}
RANKS = str(config.get("ranks", VALUES["lora"]["rank"])).split(",")


for rank in RANKS:
    try:
        load(Path("params.yaml"), [f"lora.rank={rank}"])
    except UserError as error:
        raise WorkflowError(*(f"--config ranks={config['ranks']}: {line}" for line in error.problems))


def code(stage):
    """The stage's code dependencies, file by file."""
    paths = [dep for dep in STAGES[stage]["deps"] if dep.startswith("stages/")]
    return [path.replace("${model.family}", VALUES["model"]["family"]) for path in paths]


def value(name):
    """Of a section, or of one key in it, as dvc.yaml names them."""
    section, _, key = name.partition(".")
    return VALUES[section][key] if key else VALUES[section]


def sections(stage):
    """The parameters that the stage reads: when they change, Snakemake runs its rule again."""

    def values(wildcards):
        read = {name: value(name) for name in STAGES[stage]["params"]}
        if "lora" in read:
            read["lora"] = read["lora"] | {"rank": int(wildcards.rank)}
        return read

    return values


def files(path):
    """A file, or every file below a folder: Snakemake does not notice an edit inside a directory() input."""
    found = [path] if Path(path).is_file() else sorted(str(path) for path in Path(path).rglob("*") if path.is_file())
    braced = [f"{name}: Snakemake takes braces for wildcards; rename the file" for name in found if "{" in name]
    if braced:
        raise WorkflowError(*braced)
    return found


RAW = files(VALUES["dataset"]["source"])
BASE = files(VALUES["model"]["pretrained"])


# One file of each format.
EXPORTED = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "comfyui": f"{VALUES['export']['name']}.safetensors",
    "merged": "model_index.json",
}
FORMATS = VALUES["export"]["formats"]
RESIZED = [f"rank-{rank}/{name}" for rank in VALUES["export"]["resized_ranks"] for name in FORMATS if name != "merged"]


wildcard_constraints:
    rank=r"\d+",


# Names the outputs of every stage: with the last ones alone, results of an earlier setting would pass for current
# ones after a stage in the middle has failed.
rule all:
    default_target: True
    input:
        "runs/prepared/manifest.jsonl",
        "runs/latents/manifest.json",
        expand("runs/rank-{rank}/adapter/adapter.json", rank=RANKS),
        expand("runs/rank-{rank}/reports/metrics.json", rank=RANKS),
        expand("runs/rank-{rank}/reports/export/lineage.json", rank=RANKS),
        expand("runs/rank-{rank}/reports/report.md", rank=RANKS),


rule prepare:
    input:
        raw=RAW,
        code=code("prepare"),
    output:
        manifest="runs/prepared/manifest.jsonl",
        dataset="runs/prepared/dataset.json",
        metrics="runs/reports/dataset/metrics.json",
        contact="runs/reports/dataset/contact.png",
        pictures="runs/reports/dataset/pictures.csv",
    log:
        "runs/logs/prepare.log",
    conda:
        "profiles/environment.yaml"
    params:
        sections=sections("prepare"),
    shell:
        "python -m stages.prepare --prepared runs/prepared --dataset-reports runs/reports/dataset > {log} 2>&1"


rule cache_latents:
    input:
        raw=RAW,
        base=BASE,
        manifest="runs/prepared/manifest.jsonl",
        dataset="runs/prepared/dataset.json",
        code=code("cache_latents"),
    output:
        manifest="runs/latents/manifest.json",
        metrics="runs/reports/latents/metrics.json",
    log:
        "runs/logs/cache_latents.log",
    conda:
        "profiles/environment.yaml"
    params:
        sections=sections("cache_latents"),
    shell:
        "python -m stages.cache_latents --prepared runs/prepared --latents runs/latents"
        " --latents-reports runs/reports/latents > {log} 2>&1"


rule train:
    input:
        base=BASE,
        latents="runs/latents/manifest.json",
        code=code("train"),
    output:
        adapter="runs/rank-{rank}/adapter/adapter.json",
        metrics="runs/rank-{rank}/reports/train/metrics.json",
        loss="runs/rank-{rank}/reports/train/loss.csv",
    log:
        "runs/rank-{rank}/logs/train.log",
    retries: 2  # a retry goes on from the last checkpoint
    conda:
        "profiles/environment.yaml"
    threads: 2
    resources:
        gpu=1,
    params:
        sections=sections("train"),
    shell:
        "python -m stages.train --set lora.rank={wildcards.rank} --latents runs/latents"
        " --adapter runs/rank-{wildcards.rank}/adapter --train-reports runs/rank-{wildcards.rank}/reports/train"
        " > {log} 2>&1"


rule validate:
    input:
        base=BASE,
        latents="runs/latents/manifest.json",
        adapter="runs/rank-{rank}/adapter/adapter.json",
        code=code("validate"),
    output:
        metrics="runs/rank-{rank}/reports/metrics.json",
        samples="runs/rank-{rank}/reports/samples.png",
        progress="runs/rank-{rank}/reports/progress.png",
        heldout="runs/rank-{rank}/reports/validate/heldout.csv",
        curve="runs/rank-{rank}/reports/validate/curve.csv",
        nearest="runs/rank-{rank}/reports/validate/nearest.png",
        neighbours="runs/rank-{rank}/reports/validate/nearest.csv",
        lineage="runs/rank-{rank}/reports/validate/lineage.json",
    log:
        "runs/rank-{rank}/logs/validate.log",
    conda:
        "profiles/environment.yaml"
    threads: 2
    resources:
        gpu=1,
    params:
        sections=sections("validate"),
    shell:
        "python -m stages.validate --set lora.rank={wildcards.rank} --latents runs/latents"
        " --adapter runs/rank-{wildcards.rank}/adapter --reports runs/rank-{wildcards.rank}/reports > {log} 2>&1"


rule export:
    input:
        base=BASE,
        adapter="runs/rank-{rank}/adapter/adapter.json",
        code=code("export"),
    output:
        files=[f"runs/rank-{{rank}}/export/{name}/{EXPORTED[name]}" for name in FORMATS],
        resized=[f"runs/rank-{{rank}}/export/resized/{path}/{EXPORTED[Path(path).name]}" for path in RESIZED],
        metrics="runs/rank-{rank}/reports/export/metrics.json",
        energy="runs/rank-{rank}/reports/export/energy.csv",
        lineage="runs/rank-{rank}/reports/export/lineage.json",
    log:
        "runs/rank-{rank}/logs/export.log",
    conda:
        "profiles/environment.yaml"
    threads: 2
    resources:
        gpu=1,
    params:
        sections=sections("export"),
    shell:
        "python -m stages.export --set lora.rank={wildcards.rank} --adapter runs/rank-{wildcards.rank}/adapter"
        " --export runs/rank-{wildcards.rank}/export --export-reports runs/rank-{wildcards.rank}/reports/export"
        " > {log} 2>&1"


rule report:
    input:
        dataset="runs/reports/dataset/metrics.json",
        contact="runs/reports/dataset/contact.png",
        pictures="runs/reports/dataset/pictures.csv",
        latents="runs/reports/latents/metrics.json",
        train="runs/rank-{rank}/reports/train/metrics.json",
        loss="runs/rank-{rank}/reports/train/loss.csv",
        metrics="runs/rank-{rank}/reports/metrics.json",
        samples="runs/rank-{rank}/reports/samples.png",
        progress="runs/rank-{rank}/reports/progress.png",
        curve="runs/rank-{rank}/reports/validate/curve.csv",
        lineage="runs/rank-{rank}/reports/validate/lineage.json",
        export="runs/rank-{rank}/reports/export/metrics.json",
        made="runs/rank-{rank}/reports/export/lineage.json",
        energy="runs/rank-{rank}/reports/export/energy.csv",
        code=code("report"),
    output:
        report="runs/rank-{rank}/reports/report.md",
        dataset="runs/rank-{rank}/reports/dataset.md",
        card="runs/rank-{rank}/reports/model_card.md",
        loss="runs/rank-{rank}/reports/loss.png",
    log:
        "runs/rank-{rank}/logs/report.log",
    conda:
        "profiles/environment.yaml"
    params:
        sections=sections("report"),
    shell:
        "python -m stages.report --set lora.rank={wildcards.rank} --reports runs/rank-{wildcards.rank}/reports"
        " --train-reports runs/rank-{wildcards.rank}/reports/train --dataset-reports runs/reports/dataset"
        " --latents-reports runs/reports/latents"
        " --export-reports runs/rank-{wildcards.rank}/reports/export --export runs/rank-{wildcards.rank}/export"
        " > {log} 2>&1"
