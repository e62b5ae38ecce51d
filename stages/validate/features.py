"""Samples, prompts and held-out pictures as features of an image-text model, and the ``samples.*`` metrics from them.

In: ``validate.feature_model`` (``feature_files.py`` says what it may name).  The estimates: ``distances.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lora_dag.core import quiet
from lora_dag.core.console import UserError, log, plural
from lora_dag.core.files import read_json
from lora_dag.evaluation import bootstrap
from lora_dag.families import common
from lora_dag.families.long_texts import warn_of_long
from stages.validate import distances, feature_files

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.artifacts.metrics import Value
    from stages.validate.feature_files import Source
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams
    from stages.validate.vae import Vae

T = TypeVar("T")


# The model


@dataclass(frozen=True)
class FeatureModel:
    """A frozen image-text model in float32; every batch is full, so that no feature depends on what is asked beside it.

    (On one machine with one batch size; another size gives other last bits.)
    """

    name: str
    kind: str
    """One of feature_files.KINDS."""
    model: Any
    processor: Any
    batch_size: int

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures of any size -> float32 [N, D] of unit length."""

        def encode(batch: list[Image.Image]) -> Any:
            inputs = self.processor.image_processor(images=batch, return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self.model.device))

        return self._features(pictures, encode)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> float32 [N, D] of unit length; what is beyond the model's context is cut off, and logged.

        Padded to the context, and padding attended to, as SigLIP was trained; CLIP reads nothing behind its end token.
        SigLIP and SigLIP 2 were trained on lower case, which not all of their tokenizers make.
        """
        read = [caption.lower() if self.kind != "clip" else caption for caption in captions]
        length = self.model.config.text_config.max_position_embeddings
        counts = common.num_tokens(self.processor.tokenizer, read)
        warn_of_long("caption", read, counts, length, by=f" by {self.name}")

        def encode(batch: list[str]) -> Any:
            ids = common.input_ids(self.processor.tokenizer, batch, length, self.model.device)
            return self.model.get_text_features(input_ids=ids)

        return self._features(read, encode)

    def _features(self, items: Sequence[T], encode: Callable[[list[T]], Any]) -> np.ndarray:
        import torch

        found = []
        for batch in full_batches(items, self.batch_size):
            with torch.inference_mode():
                features = encode(batch).pooler_output.float()  # [B, D]
            found.append((features / features.norm(dim=-1, keepdim=True)).cpu().numpy())
        return np.concatenate(found)[: len(items)]


def load(settings: ValidateParams, device: torch.device) -> FeatureModel | None:
    """The model of ``validate.feature_model``; None where none is given.

    Raises:
        UserError: everything that is wrong with it.
    """
    if settings.feature_model is None:
        return None
    import transformers

    source = feature_files.resolve(settings.feature_model)
    with quiet.no_warnings():  # of image processors that ask for torchvision; of weights, which are counted here
        quiet.disable_progress_bars()
        processor = understood(source, lambda: load_processor(source))
        model, state = understood(
            source,
            lambda: transformers.AutoModel.from_pretrained(
                source.folder, dtype="float32", output_loading_info=True, **LOCAL, **STRICT
            ),
        )
    if lacking := sorted({*state["missing_keys"], *(names[0] for names in state["mismatched_keys"])}):
        what = f"{len(lacking)} tensors that config.json asks for are missing or of another size, such as {lacking[0]}"
        raise UserError(f"{source.folder}: {what}; fetch the model again")
    kind = read_json(source.folder / "config.json")["model_type"]
    model = model.eval().requires_grad_(False).to(device)
    return FeatureModel(source.name, kind, model, processor, settings.batch_size)


LOCAL = {"local_files_only": True, "trust_remote_code": False}
STRICT = {"use_safetensors": True, "ignore_mismatched_sizes": True}  # the latter lists them in place of its own error


def load_processor(source: Source) -> Any:
    """Tokenizer and image processor.

    Raises:
        ValueError: one of them is missing.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source.folder, **LOCAL)
    if lacking := [name for name in ("image_processor", "tokenizer") if getattr(processor, name, None) is None]:
        raise ValueError(f"no {' and no '.join(lacking)}")
    return processor


def understood(source: Source, work: Callable[[], T]) -> T:
    """What ``work`` returns.

    Raises:
        UserError: transformers does not take the folder.
    """
    try:
        return work()
    except MemoryError:
        raise
    except Exception as error:  # whatever its classes raise on a config that is none of theirs
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source.folder}: transformers does not load it ({reason}); fetch the model again") from None


def full_batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """All items in order, ``size`` at a time; the last batch repeats its last one."""
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
    """``samples.*``: fit to the prompts, and distances to the table's held-out pictures; of adapter, base and change.

    Held-out ones alone, so that an adapter gains nothing by repeating what it was trained on.

    Args:
        base: a picture per prompt; so is ``adapter``.
    """
    real = model.images(heldout_pictures(eval_set, vae))
    before, after, texts = model.images(base), model.images(adapter), model.texts(prompts)
    name, score = ("clip_score", distances.clip_scores) if model.kind == "clip" else ("cosine", distances.cosines)
    scores = {"": score(after, texts), "_base": score(before, texts)}
    found: dict[str, Value] = {f"samples.{name}{suffix}": float(values.mean()) for suffix, values in scores.items()}
    found |= bootstrap.estimate(scores[""] - scores["_base"], eval_set.seed).named(f"samples.{name}_change")
    for name, kernel in (("cmmd", distances.gaussian), ("feature_kid", distances.cubic)):
        found[f"samples.{name}"] = distances.mmd(kernel, after, real)
        found[f"samples.{name}_base"] = distances.mmd(kernel, before, real)
        found |= distances.mmd_change(kernel, before, after, real).named(f"samples.{name}_change")
    log.info("features    %s: %s, %s", model.name, plural(len(after), "sample"), plural(len(real), "held-out picture"))
    for name in [name for name in found if f"{name}_base" in found]:
        log.info("%-11s %.4g, base %.4g", name.removeprefix("samples."), found[name], found[f"{name}_base"])
    return found


def heldout_pictures(eval_set: EvalSet, vae: Vae) -> list[Image.Image]:
    """The table's held-out pictures as the model can at best draw them: the latents' means, decoded by the base's VAE.

    So what the VAE costs, and how the pictures were cut and scaled, is on both sides of a distance.
    """
    return [vae.decode(eval_set.cache.latents(view)[0]) for view in eval_set.heldout_views]
