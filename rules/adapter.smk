# Rules of train and export: latents and embeddings -> an adapter -> files for other programs.

from lora_dag.formats import known_files


rule train:
    input:
        base=JOBS.source_files("train", "model.pretrained"),
        latents=JOBS.upstream_files("train", "latents", "manifest.json"),
    output:
        adapter="runs/{dataset}/{training}/adapter/adapter.json",
        metrics="runs/{dataset}/{training}/reports/train/metrics.json",
        loss="runs/{dataset}/{training}/reports/train/loss.csv",
    log:
        "runs/{dataset}/{training}/logs/train.log",
    conda:
        "../profiles/environment.yaml"
    threads: JOBS.threads * JOBS.processes_per_machine
    resources:
        **JOBS.training_resources(),
    params:
        **JOBS.params("train", "latents", "adapter", "train_reports"),
    shell:
        "{resources.launcher} -m stages.train --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule export:
    input:
        base=JOBS.source_files("export", "model.pretrained"),
        adapter=JOBS.upstream_files("export", "adapter", "adapter.json"),
    output:
        files=[
            f"runs/{{dataset}}/{{exports}}/export/{name}"
            for name in JOBS.common_files("export", known_files, "export.formats", "export.resized_ranks")
        ],
        metrics="runs/{dataset}/{exports}/reports/export/metrics.json",
        energy="runs/{dataset}/{exports}/reports/export/energy.csv",
        lineage="runs/{dataset}/{exports}/reports/export/lineage.json",
    log:
        "runs/{dataset}/{exports}/logs/export.log",
    conda:
        "../profiles/environment.yaml"
    threads: JOBS.threads
    resources:
        gpu=JOBS.gpus,
    params:
        **JOBS.params("export", "adapter", "export", "export_reports"),
    shell:
        "python -m stages.export --params $LORA_PARAMS {params.options} > {log} 2>&1"
