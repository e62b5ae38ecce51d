# Rules of prepare and cache_latents: images and captions -> a checked manifest -> latents and embeddings.
# Each rule has a message, because Snakemake would otherwise log its inputs, which are the names of all images.


rule prepare:
    input:
        raw=JOBS.source_files("prepare", "dataset.source"),
    output:
        manifest="runs/{dataset}/prepared/manifest.jsonl",
        dataset="runs/{dataset}/prepared/dataset.json",
        metrics="runs/{dataset}/reports/dataset/metrics.json",
        contact="runs/{dataset}/reports/dataset/contact.png",
        images="runs/{dataset}/reports/dataset/images.csv",
    log:
        "runs/{dataset}/logs/prepare.log",
    conda:
        "../profiles/environment.yaml"
    params:
        **JOBS.params("prepare", "prepared", "dataset_reports"),
    message:
        "prepare: {wildcards.dataset}"
    shell:
        "python -m stages.prepare --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule cache_latents:
    input:
        raw=JOBS.source_files("cache_latents", "dataset.source"),
        base=JOBS.source_files("cache_latents", "model.pretrained"),
        prepared=JOBS.upstream_files("cache_latents", "prepared", "manifest.jsonl", "dataset.json"),
    output:
        manifest="runs/{dataset}/{latents}/manifest.json",
        metrics="runs/{dataset}/reports/{latents}/metrics.json",
    log:
        "runs/{dataset}/logs/{latents}.log",
    conda:
        "../profiles/environment.yaml"
    threads: JOBS.threads
    resources:
        gpu=JOBS.gpus,
    params:
        **JOBS.params("cache_latents", "prepared", "latents", "latents_reports"),
    message:
        "cache_latents: {wildcards.dataset}/{wildcards.latents}"
    shell:
        "python -m stages.cache_latents --params $LORA_PARAMS {params.options} > {log} 2>&1"
