# Rules of validate, report and leaderboard: measurements of each adapter, a page per run, and a page of all runs.


rule validate:
    input:
        base=JOBS.source_files("validate", "model.pretrained"),
        latents=JOBS.upstream_files("validate", "latents", "manifest.json"),
        adapter=JOBS.upstream_files("validate", "adapter", "adapter.json"),
    output:
        metrics="runs/{dataset}/{run}/reports/metrics.json",
        samples=report("runs/{dataset}/{run}/reports/samples.png", category="Samples", labels=JOBS.report_labels),
        progress=report("runs/{dataset}/{run}/reports/progress.png", category="Progress", labels=JOBS.report_labels),
        heldout="runs/{dataset}/{run}/reports/validate/heldout.csv",
        curve="runs/{dataset}/{run}/reports/validate/curve.csv",
        nearest=report(
            "runs/{dataset}/{run}/reports/validate/nearest.png", category="Nearest images", labels=JOBS.report_labels
        ),
        neighbors="runs/{dataset}/{run}/reports/validate/nearest.csv",
        lineage="runs/{dataset}/{run}/reports/validate/lineage.json",
    log:
        "runs/{dataset}/{run}/logs/validate.log",
    conda:
        "../profiles/environment.yaml"
    threads: JOBS.threads
    resources:
        gpu=JOBS.gpus,
    params:
        **JOBS.params("validate", "latents", "adapter", "reports"),
    shell:
        "python -m stages.validate --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule report:
    input:
        dataset=JOBS.upstream_files("report", "dataset_reports", "metrics.json", "contact.png", "images.csv"),
        latents=JOBS.upstream_files("report", "latents_reports", "metrics.json"),
        train=JOBS.upstream_files("report", "train_reports", "metrics.json", "loss.csv"),
        validate=JOBS.upstream_files("report", "reports", "metrics.json", "samples.png", "progress.png"),
        detail=JOBS.upstream_files("report", "reports", "validate/curve.csv", "validate/lineage.json"),
        nearest=JOBS.upstream_files("report", "reports", "validate/nearest.png", "validate/nearest.csv"),
        export=JOBS.upstream_files("report", "export_reports", "metrics.json", "lineage.json", "energy.csv"),
    output:
        headline="runs/{dataset}/{run}/reports/headline.json",
        report="runs/{dataset}/{run}/reports/report.md",
        dataset="runs/{dataset}/{run}/reports/dataset.md",
        card="runs/{dataset}/{run}/reports/model_card.md",
        loss=report("runs/{dataset}/{run}/reports/loss.png", category="Curves", labels=JOBS.report_labels),
    log:
        "runs/{dataset}/{run}/logs/report.log",
    conda:
        "../profiles/environment.yaml"
    params:
        **JOBS.params(
            "report", "reports", "dataset_reports", "latents_reports", "train_reports", "export_reports", "export"
        ),
    shell:
        "python -m stages.report --params $LORA_PARAMS {params.options} > {log} 2>&1"


rule leaderboard:
    input:
        pages=JOBS.all_files("report", "reports", "report.md"),
        validate=JOBS.all_files(
            "validate", "reports", "metrics.json", "samples.png", "validate/heldout.csv", "validate/lineage.json"
        ),
        train=JOBS.all_files("train", "train_reports", "metrics.json"),
        export=JOBS.all_files("export", "export_reports", "lineage.json"),
    output:
        page=report("reports/sweep/leaderboard.md", category="Leaderboard"),
        table=report("reports/sweep/leaderboard.csv", category="Leaderboard"),
        effects=report("reports/sweep/leaderboard.png", category="Leaderboard"),
        contact=report("reports/sweep/contact.png", category="Leaderboard"),
    log:
        "runs/leaderboard.log",
    conda:
        "../profiles/environment.yaml"
    params:
        code=lambda wildcards: JOBS.leaderboard_code,
    shell:
        "python -m lora_dag leaderboard --params $LORA_PARAMS > {log} 2>&1"
