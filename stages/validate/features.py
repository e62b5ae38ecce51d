"""Features of samples, prompts and held-out images by an image-text model, and the ``samples.*`` metrics from them.

In: ``validate.feature_model``, which ``feature_files.py`` checks.  Formulas of the metrics: ``distances.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lora_dag.core import quiet
from lora_dag.core.console import Problem, UserError, log, plural
from lora_dag.core.files import read_json
from lora_dag.evaluation import bootstrap
from lora_dag.families import common
from lora_dag.families.long_texts import warn_of_long
from stages.validate import distances, feature_files

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.artifacts.metrics import Value
    from stages.validate.feature_files import ModelFiles
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams
    from stages.validate.vae import Vae

T = TypeVar("T")


# The model


@dataclass(frozen=True)
class FeatureModel:
    """A frozen image-text model in float32.

    Every batch is full, so that a feature does not depend on the other inputs. On another machine or with another batch
    size the last bits differ.
    """

    name: str
    kind: str
    """One of feature_files.KINDS."""
    model: Any
    processor: Any
    batch_size: int

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the features of RGB images of any size, float32 [N, D] of unit length."""

        def encode(batch: list[Image.Image]) -> Any:
            inputs = self.processor.image_processor(images=batch, return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self.model.device))

        return self._features(images, encode)

    def embed_texts(self, captions: Sequence[str]) -> np.ndarray:
        """Return the features of captions, float32 [N, D] of unit length. Longer captions are cut, with a warning.

        Texts are padded to the context, and padding is attended to, as in SigLIP's training; CLIP ignores everything
        after its end token. SigLIP and SigLIP 2 were trained on lower case, but not all of their tokenizers apply it.
        """
        texts = [caption.lower() if self.kind != "clip" else caption for caption in captions]
        length = self.model.config.text_config.max_position_embeddings
        counts = common.num_tokens(self.processor.tokenizer, texts)
        warn_of_long("caption", texts, counts, length, by=f" by {self.name}")

        def encode(batch: list[str]) -> Any:
            ids = common.input_ids(self.processor.tokenizer, batch, length, self.model.device)
            return self.model.get_text_features(input_ids=ids)

        return self._features(texts, encode)

    def _features(self, items: Sequence[T], encode: Callable[[list[T]], Any]) -> np.ndarray:
        import torch

        parts = []
        for batch in full_batches(items, self.batch_size):
            with torch.inference_mode():
                features = encode(batch).pooler_output.float()  # [B, D]
            parts.append((features / features.norm(dim=-1, keepdim=True)).cpu().numpy())
        return np.concatenate(parts)[: len(items)]


def load(settings: ValidateParams, device: torch.device) -> FeatureModel | None:
    """Load the model of ``validate.feature_model``; None without one.

    Raises:
        UserError: every problem of the model.
    """
    if settings.feature_model is None:
        return None
    import transformers

    source = feature_files.resolve_model(settings.feature_model, settings.setting("feature_model"))
    with quiet.without_warnings():  # image processors recommend torchvision; missing weights are counted below
        quiet.disable_progress_bars()
        processor = load_or_refuse(source, lambda: load_processor(source))
        model, state = load_or_refuse(
            source,
            lambda: transformers.AutoModel.from_pretrained(
                source.folder, dtype="float32", output_loading_info=True, **LOCAL, **STRICT
            ),
        )
    if missing := sorted({*state["missing_keys"], *(names[0] for names in state["mismatched_keys"])}):
        reason = f"{len(missing)} tensors of config.json are missing or have another size, such as {missing[0]}"
        raise UserError(Problem("feature-model-incomplete", f"{source.folder}: {reason}. Download the model again."))
    kind = read_json(source.folder / "config.json")["model_type"]
    model = model.eval().requires_grad_(False).to(device)
    return FeatureModel(source.name, kind, model, processor, settings.batch_size)


LOCAL = {"local_files_only": True, "trust_remote_code": False}
STRICT = {"use_safetensors": True, "ignore_mismatched_sizes": True}  # the latter returns them instead of an error


def load_processor(source: ModelFiles) -> Any:
    """Return tokenizer and image processor.

    Raises:
        ValueError: one of them is missing.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source.folder, **LOCAL)
    if missing := [name for name in ("image_processor", "tokenizer") if getattr(processor, name, None) is None]:
        raise ValueError(f"no {' and no '.join(missing)}")
    return processor


def load_or_refuse(source: ModelFiles, work: Callable[[], T]) -> T:
    """Return the result of ``work``.

    Raises:
        UserError: transformers cannot load the folder.
    """
    try:
        return work()
    except MemoryError:
        raise
    except Exception as error:  # its classes raise anything on an unexpected config
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            Problem(
                "feature-model-damaged",
                f"{source.folder}: transformers cannot load the model ({reason}). Download the model again.",
            )
        ) from None


def full_batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Yield all items in order, ``size`` at a time. The last batch is filled with copies of its last item."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


# The metrics


def measure(
    model: FeatureModel,
    eval_set: EvalSet,
    prompts: Sequence[str],
    base: Sequence[Image.Image],
    adapter: Sequence[Image.Image],
    vae: Vae,
) -> dict[str, Value]:
    """Return ``samples.*``: fit to the prompts and distances to the held-out images, of adapter, base and change.

    Training images take no part, so that an adapter gains nothing by copying them.

    Args:
        base: one sample of the base per prompt.
        adapter: one sample of the adapter per prompt.
    """
    real = model.embed_images(heldout_images(eval_set, vae))
    before, after, texts = model.embed_images(base), model.embed_images(adapter), model.embed_texts(prompts)
    name, score = ("clip_score", distances.clip_scores) if model.kind == "clip" else ("cosine", distances.cosines)
    scores = {"": score(after, texts), "_base": score(before, texts)}
    measured: dict[str, Value] = {f"samples.{name}{suffix}": float(values.mean()) for suffix, values in scores.items()}
    measured |= bootstrap.estimate(scores[""] - scores["_base"], eval_set.seed).named(f"samples.{name}_change")
    for name, kernel in (("cmmd", distances.gaussian), ("feature_kid", distances.cubic)):
        measured[f"samples.{name}"] = distances.mmd(kernel, after, real)
        measured[f"samples.{name}_base"] = distances.mmd(kernel, before, real)
        measured |= distances.mmd_change(kernel, before, after, real).named(f"samples.{name}_change")
    log.info("features    %s: %s, %s", model.name, plural(len(after), "sample"), plural(len(real), "held-out image"))
    for name in [name for name in measured if f"{name}_base" in measured]:
        log.info("%-11s %.4g, base %.4g", name.removeprefix("samples."), measured[name], measured[f"{name}_base"])
    return measured


def heldout_images(eval_set: EvalSet, vae: Vae) -> list[Image.Image]:
    """Return the held-out images as decoded by the base's VAE, which no sample can surpass.

    The VAE's losses, and crop and size of the images, then affect both sides of a distance.
    """
    return [vae.decode(eval_set.cache.latents(view)[0]) for view in eval_set.heldout_views]
