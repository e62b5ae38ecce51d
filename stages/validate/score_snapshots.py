"""Base, snapshots and final adapter under one pipeline: their losses, and the pictures that they draw."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL, snapshot_name
from lora_dag.core.console import UserError, log
from lora_dag.evaluation import bootstrap
from stages.validate import drift
from stages.validate.heldout_loss import EvalSet, row_losses
from stages.validate.passes import Passes, per_picture

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.metrics import Value
    from lora_dag.core.params import ModelParams
    from lora_dag.core.progress import Bar
    from lora_dag.diffusion.sampling import Sampling
    from stages.validate.params import ValidateParams
    from stages.validate.result_cache import ResultCache
    from stages.validate.vae import Vae


@dataclass(frozen=True)
class ScoresAndSamples:
    """Everything measured and drawn, by training step; step 0 is the base."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    """One per row of the table."""
    pictures: dict[int, list[list[Image.Image]]] = field(default_factory=dict)
    """By seed, and then by prompt, at full strength; snapshots have the first seed alone."""
    scaled: dict[float, list[Image.Image]] = field(default_factory=dict)
    """The final adapter at each of validate.scales, by prompt."""
    drift: dict[str, Value] = field(default_factory=dict)
    """The ``drift.*`` metrics."""


@dataclass(frozen=True)
class SnapshotScorer:
    """A pipeline with the adapter's layers in it, what it is asked, and what it has answered before."""

    eval_set: EvalSet
    pipeline: Any
    text: Any
    """The family's text object where an adapter is in its encoders, else None."""
    sampling: Sampling
    settings: ValidateParams
    result_cache: ResultCache
    passes: Passes

    def of(self, adapter: Adapter, file: str, scale: float = 1.0) -> SnapshotScorer:
        """For the time that this file of the adapter is loaded, at this scale."""
        about = {"lora": adapter.lora_config, "text_lora": adapter.text_lora, "biases": adapter.biases, "scale": scale}
        return replace(self, result_cache=self.result_cache.under(adapter=about | {"weights": adapter.files[file]}))

    def losses(self, eval_set: EvalSet, state: str) -> list[float]:
        def make() -> list[float]:
            denoiser = getattr(self.pipeline, eval_set.family.DENOISER)
            return finite(row_losses(eval_set, denoiser, self.text), state, eval_set.model)

        with self.passes.part(len(eval_set.rows)):
            return self.result_cache.losses({"exam": eval_set.digest(), "encoders": self.text is not None}, make)

    def draw(self, sampling: Sampling) -> list[Image.Image]:
        from lora_dag.diffusion.sampling import draw

        with self.passes.part(len(sampling.prompts) * per_picture(self.eval_set, self.settings)):
            return self.result_cache.pictures(
                asdict(sampling), lambda: draw(self.pipeline, sampling, self.eval_set.model)
            )

    @property
    def by_seed(self) -> list[Sampling]:
        return [replace(self.sampling, index=index) for index in range(self.settings.num_seeds)]


def score_snapshots(
    eval_set: EvalSet,
    adapter: Adapter,
    folder: Path,
    settings: ValidateParams,
    result_cache: ResultCache,
    vae: Vae,
    bar: Bar,
) -> ScoresAndSamples:
    """Score and draw the base, every snapshot and the final adapter, in one pipeline, which is gone afterwards."""
    from lora_dag.adapters import adapted

    pipeline = eval_set.family.load_pipeline(eval_set.model, eval_set.device)
    layers = adapted.in_pipeline(pipeline, eval_set.family.DENOISER, adapter)
    text = eval_set.family.text_of(pipeline) if adapter.text_lora else None
    sampling = make_sampling(eval_set, settings, pipeline.vae_scale_factor)
    passes = Passes(bar, getattr(pipeline, eval_set.family.DENOISER))
    scorer, evidence = (
        SnapshotScorer(eval_set, pipeline, text, sampling, settings, result_cache, passes),
        ScoresAndSamples(),
    )

    with layers.disabled():
        drifting = score_base(scorer, evidence, vae)
    log_step(eval_set, evidence, 0)
    for step in adapter.snapshots:
        layers.load_state_dict(adapter.weights(folder, step))
        snapshot = scorer.of(adapter, snapshot_name(step))
        evidence.losses[step] = snapshot.losses(eval_set, f"the snapshot of step {step}")
        evidence.pictures[step] = [snapshot.draw(sampling)]
        log_step(eval_set, evidence, step)
    step = adapter.num_steps
    layers.load_state_dict(adapter.weights(folder))
    final = scorer.of(adapter, FINAL)
    evidence.losses[step] = final.losses(eval_set, "the final adapter")
    evidence.pictures[step] = [final.draw(drawn) for drawn in final.by_seed]
    log_step(eval_set, evidence, step)
    if drifting:
        losses = final.losses(drifting.eval_set, "the final adapter on the base's own pictures")
        evidence.drift.update(drift.metrics(drifting, losses))
    for scale in settings.scales:
        layers.set_scale(scale)
        drawn = evidence.pictures[step][0] if scale == 1 else scorer.of(adapter, FINAL, scale).draw(sampling)
        evidence.scaled[scale] = drawn
    result_cache.end()
    return evidence


def score_base(scorer: SnapshotScorer, evidence: ScoresAndSamples, vae: Vae) -> drift.DriftBaseline | None:
    """The base's part of the evidence; what drift is measured with."""
    eval_set, prompts = scorer.eval_set, scorer.settings.drift_prompts
    evidence.losses[0] = scorer.losses(eval_set, "the base")
    evidence.pictures[0] = [scorer.draw(sampling) for sampling in scorer.by_seed]
    if not prompts:
        return None
    drawn = scorer.draw(replace(scorer.sampling, prompts=prompts))
    pictures = dict(zip(prompts, drawn, strict=True))
    drift_exam = drift.make_eval_set(eval_set, pictures, vae, eval_set.family.text_of(scorer.pipeline))
    return drift.DriftBaseline(drift_exam, scorer.losses(drift_exam, "the base on its own pictures"))


def finite(losses: list[float], state: str, model: ModelParams) -> list[float]:
    """The losses themselves.

    Raises:
        UserError: some are NaN or infinite; no figure could be trusted.
    """
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        cures = ["fetch the base again" if state.startswith("the base") else "lower train.learning_rate"]
        if model.dtype != "float32":
            cures.insert(0, "set model.dtype to float32")
        found = f"{bad} of {len(losses)} losses of {state} are not finite in {model.dtype}"
        raise UserError(f"validate: {found}; {' or '.join(cures)}")
    return losses


def make_sampling(eval_set: EvalSet, settings: ValidateParams, scale_factor: int) -> Sampling:
    """Pictures of the size that the adapter was trained on."""
    from lora_dag.diffusion.sampling import Sampling

    height, width = (side * scale_factor for side in eval_set.picture_size)
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


def log_step(eval_set: EvalSet, evidence: ScoresAndSamples, step: int) -> None:
    heldout, probe = split_losses(eval_set, evidence.losses[step])
    log.info("%-11s held-out loss %.6f   train probe %.6f", step_label(step), heldout, probe)


def split_losses(eval_set: EvalSet, losses: list[float]) -> tuple[float, float]:
    """Mean loss of the held-out pictures and of the train probe's."""
    heldout, probe = (bootstrap.mean(eval_set.by_picture(losses, split)) for split in ("heldout", "train"))
    return heldout, probe


def step_label(step: int) -> str:
    return f"step {step}" if step else "base"
