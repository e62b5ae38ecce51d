"""Losses and samples of the base, every snapshot and the final adapter, all in one pipeline."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL, snapshot_name
from lora_dag.core.console import Problem, UserError, log
from lora_dag.core.progress import elapsed, show_elapsed
from lora_dag.evaluation import bootstrap
from lora_dag.families import common
from stages.validate import drift, unquantized
from stages.validate.heldout_loss import EvalSet, Prompts, encode_captions, row_losses
from stages.validate.passes import Passes, is_guided, passes_per_image
from stages.validate.vae import Vae

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.metrics import Value
    from lora_dag.core.params import ModelParams
    from lora_dag.core.progress import Bar
    from lora_dag.diffusion.sampling import Sampling
    from stages.validate.inputs import Inputs
    from stages.validate.params import ValidateParams
    from stages.validate.result_cache import ResultCache

MAX_DECODED_PIXELS = 2**20
"""Pixels of a batch that the VAE decodes together, such as one image of 1024 x 1024. More are decoded one by one, which
changes the last bits: SDXL's VAE needs 6 GB for such an image in float32."""


@dataclass(frozen=True)
class ScoresAndSamples:
    """Losses and samples by training step. Step 0 is the base."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    """Step -> loss of each row of the evaluation set."""
    images: dict[int, list[list[Image.Image]]] = field(default_factory=dict)
    """Step -> seed -> prompt -> sample at full strength. Snapshots have only the first seed."""
    scaled: dict[float, list[Image.Image]] = field(default_factory=dict)
    """Strength of validate.scales -> samples of the final adapter by prompt."""
    drift: dict[str, Value] = field(default_factory=dict)
    """The ``drift.*`` metrics."""
    unquantized: list[float] = field(default_factory=list)
    """Loss of each held-out row with the final adapter on the unquantized base; empty if it is not measured."""


@dataclass(frozen=True)
class SnapshotScorer:
    """A pipeline with the adapter's layers, its evaluation set, and the cache of earlier results."""

    eval_set: EvalSet
    pipeline: Any
    text: Any
    """The family's text object if the adapter is also in the text encoders, else None."""
    sampling: Sampling
    settings: ValidateParams
    result_cache: ResultCache
    passes: Passes

    def for_adapter(self, adapter: Adapter, file: str, scale: float = 1.0) -> SnapshotScorer:
        """Return the scorer to use while this file of the adapter is loaded at this scale."""
        identity = {
            "lora": adapter.lora_config,
            "text_lora": adapter.text_lora,
            "biases": adapter.biases,
            "scale": scale,
        }
        return replace(
            self, result_cache=self.result_cache.with_conditions(adapter=identity | {"weights": adapter.files[file]})
        )

    def losses(self, eval_set: EvalSet, state: str) -> list[float]:
        """Return the loss of each row; ``state`` names the loaded weights in an error."""

        def make() -> list[float]:
            denoiser = getattr(self.pipeline, eval_set.family.DENOISER)
            return require_finite(row_losses(eval_set, denoiser, self.text), state, eval_set.model)

        with self.passes.segment(len(eval_set.rows)):
            return self.result_cache.losses({"exam": eval_set.digest(), "encoders": self.text is not None}, make)

    def draw(self, sampling: Sampling) -> list[Image.Image]:
        """Return one sample per prompt."""
        from lora_dag.diffusion.sampling import draw

        with self.passes.segment(len(sampling.prompts) * passes_per_image(self.eval_set, self.settings)):
            return self.result_cache.images(
                asdict(sampling), lambda: draw(self.pipeline, sampling, self.eval_set.model)
            )

    @property
    def samplings_by_seed(self) -> list[Sampling]:
        """Sampling settings of each of ``validate.num_seeds`` seeds."""
        return [replace(self.sampling, index=index) for index in range(self.settings.num_seeds)]


def score_snapshots(inputs: Inputs, result_cache: ResultCache, bar: Bar) -> tuple[ScoresAndSamples, Vae]:
    """Score the base, every snapshot and the final adapter, and generate their samples.

    Returns:
        The scores with the samples, and the VAE for later use.
    """
    from lora_dag.adapters import adapter_set

    eval_set, adapter, settings = inputs.eval_set, inputs.adapter, inputs.settings
    sampling = make_sampling(eval_set, settings, eval_set.family.vae_scale_factor(eval_set.model))
    pipeline, drift_captions = load_pipeline(inputs, sampling)
    layers = adapter_set.inject_into_pipeline(pipeline, eval_set.family.DENOISER, adapter)
    text = eval_set.family.text_of(pipeline) if adapter.text_lora else None
    passes = Passes(bar, getattr(pipeline, eval_set.family.DENOISER))
    show_elapsed(getattr(pipeline, eval_set.family.DENOISER), "validate", f"a pass of the {eval_set.family.DENOISER}")
    scorer = SnapshotScorer(eval_set, pipeline, text, sampling, settings, result_cache, passes)
    scored, vae = ScoresAndSamples(), Vae(eval_set, pipeline.vae)

    with layers.disabled():
        drift_baseline = score_base(scorer, scored, vae, drift_captions)
    log_step(eval_set, scored, 0)
    for step in adapter.snapshots:
        layers.load_state_dict(adapter.weights(inputs.adapter_folder, step))
        snapshot = scorer.for_adapter(adapter, snapshot_name(step))
        scored.losses[step] = snapshot.losses(eval_set, f"the snapshot of step {step}")
        scored.images[step] = [snapshot.draw(sampling)]
        log_step(eval_set, scored, step)
    step = adapter.num_steps
    layers.load_state_dict(adapter.weights(inputs.adapter_folder))
    final = scorer.for_adapter(adapter, FINAL)
    scored.losses[step] = final.losses(eval_set, "the final adapter")
    scored.images[step] = [final.draw(sampling) for sampling in final.samplings_by_seed]
    log_step(eval_set, scored, step)
    if drift_baseline:
        losses = final.losses(drift_baseline.eval_set, "the final adapter on the base's own images")
        scored.drift.update(drift.metrics(drift_baseline, losses))
    for scale in settings.scales:
        layers.set_scale(scale)
        scaled = scorer.for_adapter(adapter, FINAL, scale)
        scored.scaled[scale] = scored.images[step][0] if scale == 1 else scaled.draw(sampling)
    return scored, vae


def score_unquantized(inputs: Inputs, result_cache: ResultCache, bar: Bar) -> list[float]:
    """Return the loss of each held-out row with the final adapter on the base as it is."""
    from lora_dag.adapters import base_modules

    eval_set, adapter = unquantized.heldout(inputs.eval_set), inputs.adapter
    modules = base_modules.load(eval_set.model, eval_set.family, adapter.text_lora, eval_set.device)
    modules.inject(adapter, adapter.weights(inputs.adapter_folder))
    passes = Passes(bar, modules.denoiser)

    def make() -> list[float]:
        losses = row_losses(eval_set, modules.denoiser, modules.text)
        return require_finite(losses, "the final adapter on the unquantized base", eval_set.model)

    request = {"exam": eval_set.digest(), "unquantized": adapter.files[FINAL], "lora": adapter.lora_config}
    request |= {"text_lora": adapter.text_lora, "biases": adapter.biases}
    with passes.segment(len(eval_set.rows)):
        return result_cache.losses(request, make)


def load_pipeline(inputs: Inputs, sampling: Sampling) -> tuple[Any, Prompts]:
    """Load the pipeline that draws, and encode the drift prompts as captions by the base's text encoders.

    Text encoders without an adapter are loaded first, encode all prompts, and are freed before the denoiser is loaded:
    T5 alone can be as large as half of the denoiser.
    """
    from lora_dag.core import device
    from lora_dag.diffusion.sampling import encode_prompts, use_encoded

    eval_set, settings = inputs.eval_set, inputs.settings
    family, model = eval_set.family, eval_set.model
    samplings = [sampling, *([replace(sampling, prompts=settings.drift_prompts)] if settings.drift_prompts else [])]
    if inputs.adapter.text_lora:
        pipeline = family.load_pipeline(model, eval_set.device)
        captions = encode_captions(eval_set, settings.drift_prompts, family.text_of(pipeline))
    else:
        part = family.load_pipeline(model, eval_set.device, **{family.DENOISER: None, "vae": None})
        denoiser_config = SimpleNamespace(**common.config(model, family.DENOISER))
        setattr(part, family.DENOISER, SimpleNamespace(config=denoiser_config))  # SD 3 without T5 reads it
        with elapsed("encode", "the prompts"):
            encoded = encode_prompts(part, samplings, is_guided(eval_set, settings), model)
            captions = encode_captions(eval_set, settings.drift_prompts, family.text_of(part))
        del part
        gc.collect()
        device.return_freed_memory()
        encoders = [name for name in family.COMPONENTS if name.startswith("text_encoder")]
        pipeline = family.load_pipeline(model, eval_set.device, **dict.fromkeys(encoders))
        use_encoded(pipeline, encoded)
    if sampling.height * sampling.width * min(sampling.batch_size, len(sampling.prompts)) > MAX_DECODED_PIXELS:
        pipeline.vae.enable_slicing()
    return pipeline, captions


def score_base(
    scorer: SnapshotScorer, scored: ScoresAndSamples, vae: Vae, drift_captions: Prompts
) -> drift.DriftBaseline | None:
    """Score the base and generate its samples; return its losses on its own images, or None without drift prompts.

    Args:
        drift_captions: drift prompt -> embeddings of the base's text encoders.
    """
    eval_set, prompts = scorer.eval_set, scorer.settings.drift_prompts
    scored.losses[0] = scorer.losses(eval_set, "the base")
    scored.images[0] = [scorer.draw(sampling) for sampling in scorer.samplings_by_seed]
    if not prompts:
        return None
    images = dict(zip(prompts, scorer.draw(replace(scorer.sampling, prompts=prompts)), strict=True))
    drift_set = drift.make_drift_set(eval_set, images, vae, drift_captions)
    return drift.DriftBaseline(drift_set, scorer.losses(drift_set, "the base on its own images"))


def require_finite(losses: list[float], state: str, model: ModelParams) -> list[float]:
    """Return the losses.

    Raises:
        UserError: some are NaN or infinite, so that no metric could be trusted.
    """
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        remedies = ["fetch the base model again" if state.startswith("the base") else "lower train.learning_rate"]
        if model.dtype != "float32":
            remedies.insert(0, "set model.dtype to float32")
        remedy = " or ".join(remedies).capitalize()
        raise UserError(
            Problem(
                "loss-not-finite",
                f"validate: {bad} of {len(losses)} losses of {state} are not finite in {model.dtype}. {remedy}.",
            )
        )
    return losses


def make_sampling(eval_set: EvalSet, settings: ValidateParams, scale_factor: int) -> Sampling:
    """Return the sampling settings of ``validate`` for images of the size that the adapter was trained on."""
    from lora_dag.diffusion.sampling import Sampling

    height, width = (side * scale_factor for side in eval_set.image_size)
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


def log_step(eval_set: EvalSet, scored: ScoresAndSamples, step: int) -> None:
    """Log the mean losses of a snapshot."""
    heldout, probe = split_losses(eval_set, scored.losses[step])
    log.info("%-11s held-out loss %.6f   train probe %.6f", step_label(step), heldout, probe)


def split_losses(eval_set: EvalSet, losses: list[float]) -> tuple[float, float]:
    """Return the mean loss of the held-out images and of the train probe."""
    heldout, probe = (bootstrap.mean(eval_set.by_image(losses, split)) for split in ("heldout", "train"))
    return heldout, probe


def step_label(step: int) -> str:
    """Return the name of a snapshot for log and sheets."""
    return f"step {step}" if step else "base"
