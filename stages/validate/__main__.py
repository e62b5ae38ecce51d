"""What the adapter changed: held-out losses of base, snapshots and final adapter on one frozen table, and pictures.

In: data/latents, data/adapter, the base.  Out: reports/metrics.json, reports/validate/, reports/{samples,progress}.png
Run: `python -m stages.validate [--set validate.num_timesteps=16]`; with `--adapters a.safetensors:0.8 b.safetensors:1`
it writes none of these but compare/adapters.png, which shows the files together (stages/validate/several.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifacts import metrics
from stages.artifacts.adapter import FINAL, Adapter
from stages.artifacts.latent_cache import LatentCache
from stages.core import base_files, bases, evaluation, params
from stages.core.console import UserError, log, parser, run
from stages.core.device import setup
from stages.core.evaluation import Score
from stages.core.files import sha256_json, write_json, write_text
from stages.core.params import ModelParams, RuntimeParams
from stages.families.base import load_family
from stages.validate import feature_files, features, several
from stages.validate.exam import Exam, answer, make_exam
from stages.validate.params import ValidateParams, prompt_problems

if TYPE_CHECKING:
    from PIL import Image

    from stages.core.bases import Base
    from stages.core.sampling import Sampling

SHEET_BYTES = 300_000  # each stays in git's history
DIGEST_DIGITS = 12  # enough to tell files apart by eye


def main() -> None:
    arguments = parser(__doc__, ["latents", "adapter", "reports"])
    arguments.add_argument("--adapters", nargs="+", metavar="FILE:SCALE", help="draw several adapters together instead")
    args = arguments.parse_args()
    config = params.load(args.params, args.overrides)
    settings, asked = config.section(ValidateParams), config.section(ModelParams)
    family = load_family(asked.family)
    if found := prompt_problems(settings, family) + feature_files.problems(settings.feature_model):
        raise UserError(*found)
    origin = bases.resolve(asked, family)
    model, base = origin.model, base_files.digests(origin.model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    base_files.require_same_base(cache.base, base, args.latents)
    if args.adapters:
        entries = several.read_entries(args.adapters, base)
    else:
        adapter = Adapter.load(args.adapter)
        base_files.require_same_base(adapter.base, base, args.adapter)

    device = setup(config.section(RuntimeParams), model)
    exam = make_exam(settings, model, family, cache, device)
    if args.adapters:
        several.draw_grid(exam, lambda factor: make_sampling(exam, settings, factor), settings.prompts, entries)
        return
    feature_model = features.load(settings, device)
    evidence = examine(exam, adapter, args.adapter, settings)
    targets = {component: base[component] for component in (*family.VAE, "scheduler")}
    names = evaluation.row_names(exam.rows, settings.seed, targets)
    measured = write_losses(args.reports, exam, names, evidence, settings)
    measured["val.table"] = evaluation.digest(exam.rows, settings.seed, targets)
    measured |= draw_sheets(args.reports, evidence, settings)
    made_from = lineage(settings, origin, base, cache, adapter, exam) | {"sheet": sheet_sizes(evidence)}
    if feature_model:
        drawn = (evidence.pictures[step] for step in (0, adapter.num_steps))
        measured |= features.measure(feature_model, exam, settings.prompts, *drawn)
        made_from["feature_model"] = feature_model.name
    write_json(args.reports / "validate" / "lineage.json", made_from)
    metrics.save(args.reports / "metrics.json", measured)
    log_end(args.reports, measured)


# Base, snapshots, final adapter


@dataclass(frozen=True)
class Evidence:
    """Everything measured and drawn, by training step; step 0 is the base."""

    losses: dict[int, list[float]]
    """One per row of the table."""
    pictures: dict[int, list[Image.Image]]
    """One per prompt, the adapter at full strength."""
    scaled: dict[float, list[Image.Image]]
    """The final adapter at each of validate.scales."""


def examine(exam: Exam, adapter: Adapter, folder: Path, settings: ValidateParams) -> Evidence:
    """Score and draw the base, every snapshot and the final adapter, in one pipeline."""
    from stages.core import adapted
    from stages.core.sampling import draw

    pipeline = exam.family.load_pipeline(exam.model, exam.device)
    layers = adapted.in_pipeline(pipeline, exam.family.DENOISER, adapter)
    denoiser = layers.modules[""]
    text = exam.family.text_of(pipeline) if adapter.text_lora else None
    sampling = make_sampling(exam, settings, pipeline.vae_scale_factor)
    evidence = Evidence({}, {}, {})

    with layers.disabled():
        evidence.losses[0] = finite(answer(exam, denoiser, text), "the base", exam.model)
        evidence.pictures[0] = draw(pipeline, sampling, exam.model)
    log_step(exam, evidence, 0)
    for step in [*adapter.snapshots, adapter.num_steps]:
        is_final = step == adapter.num_steps
        layers.load(adapter.weights(folder, None if is_final else step))
        layers.set_scale(1.0)
        state = "the final adapter" if is_final else f"the snapshot of step {step}"
        evidence.losses[step] = finite(answer(exam, denoiser, text), state, exam.model)
        evidence.pictures[step] = draw(pipeline, sampling, exam.model)
        log_step(exam, evidence, step)
    for scale in settings.scales:
        layers.set_scale(scale)
        evidence.scaled[scale] = evidence.pictures[step] if scale == 1 else draw(pipeline, sampling, exam.model)
    return evidence


def finite(losses: list[float], state: str, model: ModelParams) -> list[float]:
    """The losses themselves.

    Raises:
        UserError: some are NaN or infinite; no figure could be trusted.
    """
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        cures = ["fetch the base again" if state == "the base" else "lower train.learning_rate"]
        if model.dtype != "float32":
            cures.insert(0, "set model.dtype to float32")
        found = f"{bad} of {len(losses)} losses of {state} are not finite in {model.dtype}"
        raise UserError(f"validate: {found}; {' or '.join(cures)}")
    return losses


def make_sampling(exam: Exam, settings: ValidateParams, scale_factor: int) -> Sampling:
    """Pictures of the size that the adapter was trained on."""
    from stages.core.sampling import Sampling

    height, width = (side * scale_factor for side in exam.picture_size)
    return Sampling(
        prompts=settings.prompts,
        negative_prompt=settings.negative_prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=height,
        width=width,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def log_step(exam: Exam, evidence: Evidence, step: int) -> None:
    heldout, probe = split_losses(exam, evidence.losses[step])
    log.info("%-11s held-out loss %.6f   train probe %.6f", step_label(step), heldout, probe)


def split_losses(exam: Exam, losses: list[float]) -> tuple[float, float]:
    """Mean loss of the held-out rows and of the train probe's."""
    by_split = {
        split: [loss for row, loss in zip(exam.rows, losses, strict=True) if row.picture.split == split]
        for split in ("heldout", "train")
    }
    return evaluation.mean(by_split["heldout"]), evaluation.mean(by_split["train"])


def step_label(step: int) -> str:
    return f"step {step}" if step else "base"


# Reports


def write_losses(
    reports: Path, exam: Exam, names: list[str], evidence: Evidence, settings: ValidateParams
) -> dict[str, metrics.Value]:
    """heldout.csv and curve.csv; returns the ``val.*`` metrics."""
    final = max(evidence.losses)
    scores = [
        Score(name, row.picture.file_name, row.picture.split, row.timestep, base, adapter)
        for name, row, base, adapter in zip(names, exam.rows, evidence.losses[0], evidence.losses[final], strict=True)
    ]
    curve = {step: split_losses(exam, losses) for step, losses in evidence.losses.items()}
    lines = [(step, f"{heldout:.6g}", f"{probe:.6g}") for step, (heldout, probe) in sorted(curve.items())]
    write_text(reports / "validate" / "heldout.csv", evaluation.write_scores(scores))
    write_text(reports / "validate" / "curve.csv", evaluation.write_csv(("step", "heldout", "train_probe"), lines))
    best_step = min(curve, key=lambda step: (curve[step][0], step))
    return {**evaluation.metrics(scores, exam.num_train_timesteps, settings.seed), "val.best_step": best_step}


def draw_sheets(reports: Path, evidence: Evidence, settings: ValidateParams) -> dict[str, metrics.Value]:
    """samples.png and progress.png; returns the ``samples.*`` metrics."""
    from stages.core.sheets import save_png, sheet

    cell = sheet_cell(evidence)
    samples = {"base": evidence.pictures[0]} | {scale_label(scale): drawn for scale, drawn in evidence.scaled.items()}
    progress = {step_label(step): drawn for step, drawn in sorted(evidence.pictures.items())}
    for name, columns in (("samples.png", samples), ("progress.png", progress)):
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        save_png(reports / name, sheet(rows, settings.prompts, list(columns), cell), max_bytes=SHEET_BYTES)
    if not settings.ink_measures:
        return {}
    return ink_measures("_base", evidence.pictures[0]) | ink_measures("", evidence.pictures[max(evidence.pictures)])


def sheet_sizes(evidence: Evidence) -> dict[str, Any]:
    """In pixels: of a cell, and of the pictures as they were drawn."""
    return {"cell": sheet_cell(evidence), "picture": list(evidence.pictures[0][0].size)}


def sheet_cell(evidence: Evidence) -> int:
    """Side of a sheet's picture in pixels: small ones are scaled up, large ones down."""
    return min(256, max(128, *evidence.pictures[0][0].size))


def scale_label(scale: float) -> str:
    return "adapter" if scale == 1 else f"adapter x {scale:g}"


def ink_measures(suffix: str, drawn: list[Image.Image]) -> dict[str, metrics.Value]:
    """Chroma (0 to 255) and dark share (0 to 1), mean over pictures."""
    import numpy as np

    from stages.core.pictures import chroma, dark_share

    arrays = [np.asarray(picture) for picture in drawn]
    return {
        f"samples.chroma{suffix}": evaluation.mean(map(chroma, arrays)),
        f"samples.dark_share{suffix}": evaluation.mean(map(dark_share, arrays)),
    }


def lineage(
    settings: ValidateParams, origin: Base, base: dict[str, str], cache: LatentCache, adapter: Adapter, exam: Exam
) -> dict[str, Any]:
    """What the figures and pictures came from; `report` and `compare` read it."""
    counts = Counter(item.split for item in cache.items)
    shown = sha256_json(sorted([item.split, item.content, item.caption] for item in cache.items))
    found = {
        "adapter": adapter.files[FINAL][:DIGEST_DIGITS],
        "base": {component: digest[:DIGEST_DIGITS] for component, digest in base.items()},
        "dataset": {"train": counts["train"], "heldout": counts["heldout"], "content": shown[:DIGEST_DIGITS]},
        "latents": cache.digest[:DIGEST_DIGITS],
        "lora_config": adapter.lora_config,
        "model": origin.model.model_dump() | {"pretrained": origin.label},  # no path of this machine
        "num_steps": adapter.num_steps,
        "table": {
            "num_pictures": dict(Counter(row.picture.split for row in exam.rows if row.stratum == 0)),
            "num_rows": len(exam.rows),
            "prediction_type": exam.prediction_type,
        },
        "validate": settings.model_dump(),
    }
    return found | ({"text_lora": adapter.text_lora} if adapter.text_lora else {})


def log_end(reports: Path, measured: dict[str, Any]) -> None:
    log.info("held-out    %.6f, base %.6f", measured["val.loss"], measured["val.loss_base"])
    log.info(
        "change      %+.6f, 95%% interval %+.6f to %+.6f",
        *(measured[f"val.loss_change{bound}"] for bound in ("", "_low", "_high")),
    )
    log.info("wrote       %s, %s", reports / "metrics.json", reports / "validate")
    log.info("pictures    %s, %s", reports / "samples.png", reports / "progress.png")
    log.info("next        python -m stages.export")


if __name__ == "__main__":
    run(main)
