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
from stages.validate.exam import Exam, answer
from stages.validate.passes import Passes, per_picture

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.metrics import Value
    from lora_dag.core.params import ModelParams
    from lora_dag.core.progress import Bar
    from lora_dag.diffusion.sampling import Sampling
    from stages.validate.kept import Kept
    from stages.validate.latents import Vae
    from stages.validate.params import ValidateParams


@dataclass(frozen=True)
class Evidence:
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
class Examiner:
    """A pipeline with the adapter's layers in it, what it is asked, and what it has answered before."""

    exam: Exam
    pipeline: Any
    text: Any
    """The family's text object where an adapter is in its encoders, else None."""
    sampling: Sampling
    settings: ValidateParams
    kept: Kept
    passes: Passes

    def of(self, adapter: Adapter, file: str, scale: float = 1.0) -> Examiner:
        """For the time that this file of the adapter is loaded, at this scale."""
        about = {"lora": adapter.lora_config, "text_lora": adapter.text_lora, "biases": adapter.biases, "scale": scale}
        return replace(self, kept=self.kept.under(adapter=about | {"weights": adapter.files[file]}))

    def losses(self, exam: Exam, state: str) -> list[float]:
        def make() -> list[float]:
            denoiser = getattr(self.pipeline, exam.family.DENOISER)
            return finite(answer(exam, denoiser, self.text), state, exam.model)

        with self.passes.part(len(exam.rows)):
            return self.kept.losses({"exam": exam.digest(), "encoders": self.text is not None}, make)

    def draw(self, sampling: Sampling) -> list[Image.Image]:
        from lora_dag.diffusion.sampling import draw

        with self.passes.part(len(sampling.prompts) * per_picture(self.exam, self.settings)):
            return self.kept.pictures(asdict(sampling), lambda: draw(self.pipeline, sampling, self.exam.model))

    @property
    def by_seed(self) -> list[Sampling]:
        return [replace(self.sampling, index=index) for index in range(self.settings.num_seeds)]


def examine(
    exam: Exam, adapter: Adapter, folder: Path, settings: ValidateParams, kept: Kept, vae: Vae, bar: Bar
) -> Evidence:
    """Score and draw the base, every snapshot and the final adapter, in one pipeline, which is gone afterwards."""
    from lora_dag.adapters import adapted

    pipeline = exam.family.load_pipeline(exam.model, exam.device)
    layers = adapted.in_pipeline(pipeline, exam.family.DENOISER, adapter)
    text = exam.family.text_of(pipeline) if adapter.text_lora else None
    sampling = make_sampling(exam, settings, pipeline.vae_scale_factor)
    passes = Passes(bar, getattr(pipeline, exam.family.DENOISER))
    examiner, evidence = Examiner(exam, pipeline, text, sampling, settings, kept, passes), Evidence()

    with layers.disabled():
        drifting = examine_base(examiner, evidence, vae)
    log_step(exam, evidence, 0)
    for step in adapter.snapshots:
        layers.load(adapter.weights(folder, step))
        snapshot = examiner.of(adapter, snapshot_name(step))
        evidence.losses[step] = snapshot.losses(exam, f"the snapshot of step {step}")
        evidence.pictures[step] = [snapshot.draw(sampling)]
        log_step(exam, evidence, step)
    step = adapter.num_steps
    layers.load(adapter.weights(folder))
    final = examiner.of(adapter, FINAL)
    evidence.losses[step] = final.losses(exam, "the final adapter")
    evidence.pictures[step] = [final.draw(drawn) for drawn in final.by_seed]
    log_step(exam, evidence, step)
    if drifting:
        losses = final.losses(drifting.exam, "the final adapter on the base's own pictures")
        evidence.drift.update(drift.metrics(drifting, losses))
    for scale in settings.scales:
        layers.set_scale(scale)
        drawn = evidence.pictures[step][0] if scale == 1 else examiner.of(adapter, FINAL, scale).draw(sampling)
        evidence.scaled[scale] = drawn
    kept.end()
    return evidence


def examine_base(examiner: Examiner, evidence: Evidence, vae: Vae) -> drift.Drift | None:
    """The base's part of the evidence; what drift is measured with."""
    exam, prompts = examiner.exam, examiner.settings.drift_prompts
    evidence.losses[0] = examiner.losses(exam, "the base")
    evidence.pictures[0] = [examiner.draw(sampling) for sampling in examiner.by_seed]
    if not prompts:
        return None
    drawn = examiner.draw(replace(examiner.sampling, prompts=prompts))
    pictures = dict(zip(prompts, drawn, strict=True))
    drift_exam = drift.make_exam(exam, pictures, vae, exam.family.text_of(examiner.pipeline))
    return drift.Drift(drift_exam, examiner.losses(drift_exam, "the base on its own pictures"))


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


def make_sampling(exam: Exam, settings: ValidateParams, scale_factor: int) -> Sampling:
    """Pictures of the size that the adapter was trained on."""
    from lora_dag.diffusion.sampling import Sampling

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
    """Mean loss of the held-out pictures and of the train probe's."""
    heldout, probe = (bootstrap.mean(exam.by_picture(losses, split)) for split in ("heldout", "train"))
    return heldout, probe


def step_label(step: int) -> str:
    return f"step {step}" if step else "base"
