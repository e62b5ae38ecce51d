"""Measure what the adapter changed: held-out losses, drift, copies of training images, diversity; draw samples.

In: data/latents, data/adapter, the base.  Out: reports/metrics.json, reports/validate/, reports/{samples,progress}.png
Time and memory of this machine go to reports/validate/run.json, which neither git nor DVC tracks.
Run: `python -m stages.validate [--set validate.num_timesteps=16]`
"""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts import lineage, metrics
from lora_dag.core import params
from lora_dag.core.console import log, parser, plural, run
from lora_dag.core.device import environment, return_freed_memory, speed_conditions
from lora_dag.core.files import sha256_file, write_json, write_text
from lora_dag.core.progress import Bar, elapsed
from lora_dag.core.stage_start import log_stage_start
from lora_dag.core.time_estimate import Work
from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import Score
from lora_dag.pipeline.code import stage_digest
from stages.validate import curve, features, neighbors, passes, sheets, unquantized
from stages.validate.inputs import Inputs, read_inputs
from stages.validate.measures import Results, measure
from stages.validate.provenance import provenance
from stages.validate.result_cache import ResultCache
from stages.validate.score_snapshots import score_snapshots, score_unquantized

if TYPE_CHECKING:
    import torch


def main() -> None:
    args = parser(__doc__, ["latents", "adapter", "reports"]).parse_args()
    config = params.load(args.params, args.overrides)
    log_stage_start("validate", config, args)
    inputs = read_inputs(config, args.latents, args.adapter)
    began, eval_set = time.monotonic(), inputs.eval_set
    pixels = math.prod(eval_set.image_size)
    speed = speed_conditions(eval_set.device, eval_set.model, inputs.base_digests[eval_set.family.DENOISER])
    plan = passes.plan(eval_set, inputs.adapter, inputs.settings)
    work = Work("validate", speed, plan.num_passes * pixels)
    work.announce("at most ")
    counts = plan.num_passes, plan.num_losses, plural(plan.num_images, "image")
    log.info("passes      at most %d of the denoiser, for %d losses and %s", *counts)
    results = evaluate(inputs)
    with elapsed("write", "reports and sheets"):
        measured = write_reports(args.reports, results)
    run_facts = {"environment": environment(eval_set.device), "of": sha256_file(args.reports / "metrics.json")}
    write_json(args.reports / "validate" / "run.json", run_facts | resources_used(eval_set.device, began))
    if results.num_passes * pixels > work.amount / 2:  # a run of cache hits spends its time on other things
        work.record(results.num_passes * pixels, time.monotonic() - began)
    log_end(args.reports, measured, inputs.adapter.num_steps)
    neighbors.require_copied_share(results.nearest, inputs.settings, args.reports / "validate")


def evaluate(inputs: Inputs) -> Results:
    """Score base, snapshots and final adapter, generate samples, and find their nearest training images."""
    settings, eval_set, adapter = inputs.settings, inputs.eval_set, inputs.adapter
    feature_model = features.load(settings, eval_set.device)
    result_cache = ResultCache(cache_conditions(inputs))
    with Bar("validate", passes.plan(eval_set, adapter, settings).num_passes) as bar:
        scored, vae = score_snapshots(inputs, result_cache, bar)
        gc.collect()  # frees the pipeline, whose parts refer to each other
        return_freed_memory()
        if unquantized.is_measured(eval_set, settings):
            scored.unquantized.extend(score_unquantized(inputs, result_cache, bar))
    result_cache.log_and_trim()
    space = neighbors.FeatureSpace(eval_set, inputs.cache, vae, feature_model)
    nearest = neighbors.find_neighbors(space, settings.prompts, scored.images[0], scored.images[adapter.num_steps])
    return Results(inputs, scored, nearest, space, vae, feature_model, bar.done)


def cache_conditions(inputs: Inputs) -> dict[str, Any]:
    """Return what determines losses and samples besides a request and an adapter, for the keys of the result cache."""
    eval_set = inputs.eval_set
    return {
        "base": inputs.base_digests,
        # Not RESULTS: after an edit of its code, a rerun measures everything again.
        "code": stage_digest("validate", eval_set.model.family),
        "drops_to_zeros": eval_set.family.drops_to_zeros(eval_set.model),  # from model_index.json, which has no digest
        "dtype": eval_set.model.dtype,
        "environment": environment(eval_set.device),
        "family": eval_set.model.family,
        **eval_set.model.quantization_record,
    }


# Reports


def write_reports(reports: Path, results: Results) -> dict[str, metrics.Value]:
    """Write metrics.json, lineage.json, tables and sheets; return the metrics."""
    inputs, scored = results.inputs, results.scored
    measured = write_losses(reports, results)
    measured["val.table"] = heldout_table.table_digest(
        inputs.eval_set.rows, inputs.settings.seed, inputs.target_digests
    )
    cell = sheets.write_sheets(reports, scored, inputs.settings, sheets.trained_captions(inputs.cache))
    cells = sheets.cell_sizes(scored)
    neighbors.write_reports(reports / "validate", results.nearest, results.vae, inputs.cache, cells)
    measured |= measure(results)
    sizes = {"cell": cell, "image": list(scored.images[0][0][0].size)}  # in pixels; the size of the generated images
    record = provenance(inputs) | {
        "sheet": sizes,
        "neighbors": neighbors.distance_scale(results.nearest, results.space),
    }
    record |= {"feature_model": results.feature_model.name} if results.feature_model else {}
    lineage.save(reports / "validate" / "lineage.json", record)
    metrics.save(reports / "metrics.json", measured)
    return measured


def write_losses(reports: Path, results: Results) -> dict[str, metrics.Value]:
    """Write heldout.csv and curve.csv; return the ``val.*`` metrics."""
    inputs, losses_by_step = results.inputs, results.scored.losses
    eval_set, seed = inputs.eval_set, inputs.settings.seed
    digests = heldout_table.row_digests(eval_set.rows, seed, inputs.target_digests)
    scores = [
        Score(digest, row.image.file_name, row.image.split, row.timestep, base, adapter)
        for digest, row, base, adapter in zip(
            digests, eval_set.rows, losses_by_step[0], losses_by_step[max(losses_by_step)], strict=True
        )
    ]
    by_step = {
        split: {step: eval_set.by_image(losses, split) for step, losses in losses_by_step.items()}
        for split in ("heldout", "train")
    }
    points = curve.make_curve(by_step["heldout"], by_step["train"], seed)
    write_text(reports / "validate" / "heldout.csv", heldout_table.scores_to_csv(scores))
    write_text(reports / "validate" / "curve.csv", curve.to_csv(points))
    measured = {**heldout_table.loss_metrics(scores, eval_set.num_train_timesteps, seed), **curve.metrics(points)}
    if results.scored.unquantized:
        measured |= unquantized.metrics(eval_set, losses_by_step[max(losses_by_step)], results.scored.unquantized)
    return measured


def resources_used(device: torch.device, began: float) -> dict[str, float]:
    """Return the seconds since ``began`` and the peak memory of the process and, if there is one, of the GPU, in GB."""
    import resource
    import sys

    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    peak = {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        peak["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return {name: round(value, 3) for name, value in peak.items()} | {"seconds": round(time.monotonic() - began, 1)}


def log_end(reports: Path, measured: dict[str, Any], num_steps: int) -> None:
    """Log the main results, the best step, the written files and the next command."""
    log.info("held-out    loss %.6f, base %.6f", measured["val.loss"], measured["val.loss_base"])
    for label, name in (("change", "val.loss_change"), ("drift", "drift.loss_change")):
        if name in measured:
            change, low, high = (measured[f"{name}{bound}"] for bound in ("", "_low", "_high"))
            interval = "no interval" if math.isnan(low) else f"95% interval {low:+z.6f} to {high:+z.6f}"
            log.info("%-11s %+.6f, %s", label, change, interval)
    if "val.quantization_price" in measured:
        bounds = (100 * measured[f"val.quantization_price{bound}"] for bound in ("", "_low", "_high"))
        log.info("quantized   held-out loss %+.2f %%, 95%% interval %+.2f to %+.2f, against the base as it is", *bounds)
    log.info(
        "copied      %.1f %% of the samples, base %.1f %%",
        *(100 * measured[f"samples.copied_share{suffix}"] for suffix in ("", "_base")),
    )
    if 0 < (best := measured["val.best_step"]) < num_steps:
        log.info("best step   %d of %d (to export it: dvc exp run -S export.step=%d)", best, num_steps, best)
    log.info("wrote       %s, %s", reports / "metrics.json", reports / "validate")
    log.info("images      %s, %s", reports / "samples.png", reports / "progress.png")
    log.info("next        python -m stages.export")


if __name__ == "__main__":
    run(main, kept="finished losses and images are kept")
