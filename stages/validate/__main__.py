"""What the adapter changed: losses on a frozen table, drift, copies of training pictures, diversity, and pictures.

In: data/latents, data/adapter, the base.  Out: reports/metrics.json, reports/validate/, reports/{samples,progress}.png
What was measured on this machine, time and memory, goes to reports/validate/run.json, which nobody tracks.
Run: `python -m stages.validate [--set validate.num_timesteps=16]`
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts import lineage, metrics
from lora_dag.artifacts.adapter import Adapter
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.bases import layout, resolve
from lora_dag.core import params
from lora_dag.core.console import UserError, log, parser, run
from lora_dag.core.device import environment, setup, speed_conditions
from lora_dag.core.files import sha256_file, write_json, write_text
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.core.progress import Bar
from lora_dag.core.took import Work
from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import Score
from lora_dag.families.long_texts import warn_of_long_prompts
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.code import stage_digest
from stages.validate import curve, feature_files, features, neighbours, passes, sheets
from stages.validate.heldout_loss import EvalSet, make_eval_set
from stages.validate.measures import Results, measure
from stages.validate.params import ValidateParams, prompt_problems
from stages.validate.provenance import provenance
from stages.validate.result_cache import ResultCache
from stages.validate.score_snapshots import ScoresAndSamples, score_snapshots
from stages.validate.vae import Vae

if TYPE_CHECKING:
    import torch

    from lora_dag.bases.resolve import Base


def main() -> None:
    args = parser(__doc__, ["latents", "adapter", "reports"]).parse_args()
    config = params.load(args.params, args.overrides)
    settings, asked = config.section(ValidateParams), config.section(ModelParams)
    family = load_family(asked.family)
    if found := prompt_problems(settings, family) + feature_files.problems(settings.feature_model):
        raise UserError(*found)
    origin = resolve.resolve(asked, family)
    model, base = origin.model, layout.digests(origin.model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    layout.require_same_base(cache.base, base, args.latents)
    adapter = Adapter.load(args.adapter)
    layout.require_same_base(adapter.base, base, args.adapter)

    device = setup(config.section(RuntimeParams), model)
    eval_set = make_eval_set(settings, model, family, cache, device)
    warn_of_long_prompts([*settings.prompts, *settings.drift_prompts, settings.negative_prompt], family, model)
    report(args, settings, eval_set, cache, adapter, origin, base)


def report(
    args: argparse.Namespace,
    settings: ValidateParams,
    eval_set: EvalSet,
    cache: LatentCache,
    adapter: Adapter,
    origin: Base,
    base: dict[str, str],
) -> None:
    """Examine base and adapter, and write all that was measured and drawn.

    Args:
        base: digest per component.
    """
    began = time.monotonic()
    feature_model = features.load(settings, eval_set.device)
    result_cache, vae = ResultCache(conditions(base, eval_set)), Vae(eval_set)
    total, pixels = passes.planned(eval_set, adapter, settings), math.prod(eval_set.picture_size)
    speed = speed_conditions(eval_set.device, eval_set.model, base[eval_set.family.DENOISER])
    work = Work("validate", speed, total * pixels)
    work.announce("at most ")
    with Bar("validate", total) as bar:
        evidence = score_snapshots(eval_set, adapter, args.adapter, settings, result_cache, vae, bar)
    gc.collect()  # frees the pipeline, whose parts refer to each other
    drawn = evidence.pictures[0], evidence.pictures[adapter.num_steps]
    space = neighbours.FeatureSpace(eval_set, cache, vae, feature_model)
    near = neighbours.compare(space, settings.prompts, *drawn)

    targets = {component: base[component] for component in (*eval_set.family.VAE, "scheduler")}
    names = heldout_table.row_names(eval_set.rows, settings.seed, targets)
    measured = write_losses(args.reports, eval_set, names, evidence, settings)
    measured["val.table"] = heldout_table.digest(eval_set.rows, settings.seed, targets)
    cell = sheets.draw(args.reports, evidence, settings, sheets.trained_captions(cache))
    neighbours.write(args.reports / "validate", near, vae, cache, sheets.cells(evidence))
    measured |= measure(Results(settings, eval_set, cache, adapter, evidence, near, vae, feature_model))
    sizes = {"cell": cell, "picture": list(evidence.pictures[0][0][0].size)}  # in pixels; as the pictures were drawn
    came_from = provenance(settings, origin, base, cache, adapter, eval_set) | {"sheet": sizes}
    came_from["neighbours"] = neighbours.scale(near, space)
    came_from |= {"feature_model": feature_model.name} if feature_model else {}
    lineage.save(args.reports / "validate" / "lineage.json", came_from)
    metrics.save(args.reports / "metrics.json", measured)
    own = {"environment": environment(eval_set.device), "of": sha256_file(args.reports / "metrics.json")}
    write_json(args.reports / "validate" / "run.json", own | used(eval_set.device, began))
    if bar.done > total / 2:  # of a run that finds nearly all in <state>/evidence, the rest is not the passes' time
        work.record(bar.done * pixels, time.monotonic() - began)
    log_end(args.reports, measured, adapter.num_steps)
    neighbours.require_few_copied(near, settings.max_copied_share, args.reports / "validate")


def conditions(base: dict[str, str], eval_set: EvalSet) -> dict[str, Any]:
    """What decides losses and pictures beside what is asked, and an adapter."""
    return {
        "base": base,
        # Not RESULTS: after an edit of its code, a rerun measures everything again.
        "code": stage_digest("validate", eval_set.model.family),
        "drops_to_zeros": eval_set.family.drops_to_zeros(eval_set.model),  # model_index.json's, in no component's files
        "dtype": eval_set.model.dtype,
        "environment": environment(eval_set.device),
        "family": eval_set.model.family,
    }


# Reports


def write_losses(
    reports: Path, eval_set: EvalSet, names: list[str], evidence: ScoresAndSamples, settings: ValidateParams
) -> dict[str, metrics.Value]:
    """heldout.csv and curve.csv; returns the ``val.*`` metrics."""
    final = max(evidence.losses)
    scores = [
        Score(name, row.picture.file_name, row.picture.split, row.timestep, base, adapter)
        for name, row, base, adapter in zip(
            names, eval_set.rows, evidence.losses[0], evidence.losses[final], strict=True
        )
    ]
    by_step = {
        split: {step: eval_set.by_picture(losses, split) for step, losses in evidence.losses.items()}
        for split in ("heldout", "train")
    }
    points = curve.make_curve(by_step["heldout"], by_step["train"], settings.seed)
    write_text(reports / "validate" / "heldout.csv", heldout_table.write_scores(scores))
    write_text(reports / "validate" / "curve.csv", curve.write(points))
    return {**heldout_table.metrics(scores, eval_set.num_train_timesteps, settings.seed), **curve.metrics(points)}


def used(device: torch.device, began: float) -> dict[str, float]:
    """Seconds since ``began``, and the most memory that was held: of the process, and of the GPU where there is one."""
    import resource
    import sys

    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    peak = {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        peak["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return {name: round(value, 3) for name, value in peak.items()} | {"seconds": round(time.monotonic() - began, 1)}


def log_end(reports: Path, measured: dict[str, Any], num_steps: int) -> None:
    log.info("held-out    %.6f, base %.6f", measured["val.loss"], measured["val.loss_base"])
    for label, name in (("change", "val.loss_change"), ("drift", "drift.loss_change")):
        if name in measured:
            values = (f"{measured[f'{name}{bound}']:+z.6f}" for bound in ("", "_low", "_high"))
            log.info("%-11s %s, 95%% interval %s to %s", label, *values)
    log.info(
        "copied      share of the samples %.3f, of the base's %.3f",
        *(measured[f"samples.copied_share{suffix}"] for suffix in ("", "_base")),
    )
    if 0 < (best := measured["val.best_step"]) < num_steps:
        log.info("best step   %d of %d: dvc exp run -S export.step=%d", best, num_steps, best)
    log.info("wrote       %s, %s", reports / "metrics.json", reports / "validate")
    log.info("pictures    %s, %s", reports / "samples.png", reports / "progress.png")
    log.info("next        python -m stages.export")


if __name__ == "__main__":
    run(main, kept="finished losses and images are kept")
