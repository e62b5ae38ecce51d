"""Checks during a training. A RuntimeError here is a bug of this project; a UserError is a wrong setting."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lora_dag.core.console import Problem, UserError, plural, warn

if TYPE_CHECKING:
    from lora_dag.adapters.adapter_set import AdapterSet
    from lora_dag.core.params import Dtype

MAX_NON_FINITE = 3  # steps in a row with a loss or gradient that is not finite, before the run stops
MAX_DISTANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # fraction of the norm
MAX_OVERFLOWS = 20  # the same with a GradScaler, which halves its scale of 65,536 at each


def check_step_zero(
    adapter: AdapterSet, predict: Callable[[], torch.Tensor], is_new: bool = True, dtype: Dtype = "float32"
) -> None:
    """Check that a new adapter does not change the base's output before the first step; it must be bit-identical.

    Args:
        predict: forward pass, including text encoders that are trained.
        is_new: False for an adapter that starts from a file.
        dtype: ``model.dtype``, for the advice.

    Raises:
        UserError: the base's or the adapter's output is not finite.
        RuntimeError: a new adapter changes the output.
    """
    with torch.no_grad():
        output = predict()
        with adapter.disabled():
            base_output = predict()
    if not base_output.isfinite().all():
        fix = "Fetch it again." if dtype == "float32" else "Set model.dtype: float32."
        raise UserError(
            Problem("base-not-finite", f"model.pretrained: the base model predicts NaN or infinity in {dtype}. {fix}")
        )
    if not output.isfinite().all():
        text = "lora.alpha: it is so large that the new adapter gives NaN. Use null, which is the rank."
        raise UserError(Problem("alpha-too-large", text))
    if not is_new and torch.equal(output, base_output):
        warn("adapter-no-effect", "lora.init_from: the file's adapter changes nothing. Training starts at the base.")
    if is_new and not torch.equal(output, base_output):
        raise RuntimeError(f"the new adapter changes the base's output by {(output - base_output).abs().max():.3g}")


def check_prompt_embeddings(encoded: dict[str, torch.Tensor], cached: dict[str, torch.Tensor], dtype: Dtype) -> None:
    """Check that text encoders compute the cached embeddings before the first step, up to rounding by other kernels.

    Raises:
        RuntimeError: they differ, so that training and cache would use different bases.
    """
    for name, tensor in encoded.items():
        distance, size = float((tensor - cached[name]).norm()), float(cached[name].norm())
        if not distance <= MAX_DISTANCE[dtype] * size:
            raise RuntimeError(f"the text encoders' {name} differs from the cached one by {distance:.3g} of {size:.3g}")


class GradientMonitor:
    """Checks of the gradients of every step."""

    def __init__(self, trainable: dict[str, torch.nn.Parameter], max_grad_norm: float) -> None:
        self.trainable, self.max_grad_norm = trainable, max_grad_norm
        self.without_gradient = set(trainable)
        """Parameters without a nonzero gradient so far."""
        self.steps = 0
        self.clipping_seen = False
        self.non_finite = 0

    def note_gradients(self) -> None:
        """Record, before clipping, which parameters have a gradient."""
        self.steps += 1
        gradients = {name: self.trainable[name].grad for name in self.without_gradient}
        self.without_gradient -= {name for name, grad in gradients.items() if grad is not None and bool(grad.any())}

    def check_clipping(self, grad_norm: float) -> None:
        """Check once, after the first clipping, that it took effect.

        Raises:
            RuntimeError: the norm of the gradients is still above the limit.
        """
        if self.clipping_seen or not math.isfinite(grad_norm) or grad_norm <= self.max_grad_norm:
            return
        clipped = float(torch.nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None]))
        if clipped > self.max_grad_norm * 1.001:
            raise RuntimeError(f"gradient norm is {clipped:.4g} after clipping to {self.max_grad_norm}")
        self.clipping_seen = True

    def can_update(self, loss: float, grad_norm: float, step: int, scaled: bool) -> bool:
        """Return whether loss and gradients are finite, so that the optimizer can update the weights.

        Args:
            scaled: whether a GradScaler is used, which begins with a scale that may be too large.

        Raises:
            UserError: too many steps in a row are not finite.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.non_finite = 0
            return True
        self.non_finite += 1
        text = f"step {step} has loss {loss} and gradient norm {grad_norm}. The weights are not updated."
        warn("step-not-finite", text)
        if self.non_finite >= (MAX_OVERFLOWS if scaled and math.isfinite(loss) else MAX_NON_FINITE):
            text = (
                f"train: loss or gradients were not finite in {self.non_finite} steps in a row, up to step {step}. "
                "Lower train.learning_rate, or set model.dtype to float32."
            )
            raise UserError(Problem("training-diverged", text))
        return False

    def check_end(self) -> None:
        """Check after the last step that the weights are finite and that every parameter had a gradient.

        A's gradient is zero until B has changed, which takes one step, and one more with warmup. A layer or bias
        without any gradient is one whose output the base never uses; that is a warning.

        Raises:
            UserError: the last step or a weight is not finite, or the settings leave no gradient for any layer.
            RuntimeError: a part of a layer had no gradient.
        """
        self.require_finite()
        if self.steps <= 3:
            return
        biases = sorted(name for name in self.without_gradient if name.endswith(".delta"))
        if biases:  # lora.bias all includes unused ones
            count = plural(len(biases), "trained bias", "trained biases")
            warn(
                "no-gradient", f"{count} never had a gradient, such as {biases[0]}. The base does not use their output."
            )
        layers = {name: layer_name(name) for name in self.trainable if not name.endswith(".delta")}
        reached = {layers[name] for name in layers.keys() - self.without_gradient}
        unused = sorted(set(layers.values()) - reached)
        if layers and not reached:
            text = (
                "train: no layer had a gradient. Look for values near zero (or one) in train.learning_rate, "
                "max_grad_norm, huber_c, snr_gamma, lora.alpha and lora.dropout."
            )
            raise UserError(Problem("no-gradient", text))
        broken = sorted(name for name in self.without_gradient & layers.keys() if layers[name] in reached)
        if broken:
            raise RuntimeError(f"no gradient ever reached {broken[:4]}")
        if unused:
            names = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
            reason = "The base does not use their output. Add them to lora.exclude_modules."
            warn("no-gradient", f"{plural(len(unused), 'layer')} never had a gradient: {names}. {reason}")

    def require_finite(self) -> None:
        """Raise UserError if the last step or a weight is not finite."""
        broken = [name for name, parameter in self.trainable.items() if not bool(parameter.isfinite().all())]
        if broken or self.non_finite > 1:
            result = f"weights that are not finite, such as {broken[0]}" if broken else "a loss that is not finite"
            text = f"train: the run ended with {result}. Lower train.learning_rate or train.weight_decay."
            raise UserError(Problem("training-diverged", text))

    def state_dict(self) -> dict[str, list[str]]:
        return {"without_gradient": sorted(self.without_gradient)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        self.without_gradient = set(state["without_gradient"])


def layer_name(parameter: str) -> str:
    """Return the layer of a parameter: ``mid_block.to_q.lora_A.default.weight`` -> ``mid_block.to_q``."""
    return re.split(r"\.(?:lora|lokr|hada)_", parameter)[0]
