"""What a training proves of itself while it runs. A failure here is our fault, and loud."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lora_dag.core.console import UserError, log, plural

if TYPE_CHECKING:
    from lora_dag.adapters.adapted import Adapted
    from lora_dag.core.params import Dtype

MAX_NON_FINITE = 3  # steps in a row with a loss or gradient that is no number, before the run gives up
MAX_DISTANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # share of the norm
MAX_OVERFLOWS = 20  # the same for gradients under a GradScaler, which halves its scale of 65,536 at each


def step_zero(adapted: Adapted, predict: Callable[[], torch.Tensor], fresh: bool = True) -> None:
    """Before the first step a fresh adapter changes nothing, to the bit; one that was started from does.

    Args:
        predict: from captions through text encoders that are trained, if any.

    Raises:
        UserError: the base or the adapter's strength is no number to start from.
        RuntimeError: a fresh one does.
    """
    with torch.no_grad():
        found = predict()
        with adapted.disabled():
            plain = predict()
    if not plain.isfinite().all():
        raise UserError(
            "model.pretrained: the base predicts NaN or infinity; use model.dtype float32 or fetch it again"
        )
    if not found.isfinite().all():
        raise UserError(
            "params.yaml lora.alpha: so large that the fresh adapter gives NaN; use null, which is the rank"
        )
    if not fresh and torch.equal(found, plain):
        log.warning("warning: lora.init_from: the file's adapter changes nothing; training starts at the base")
    if fresh and not torch.equal(found, plain):
        raise RuntimeError(f"the fresh adapter changes the base's output by {(found - plain).abs().max():.3g}")


def same_prompts(encoded: dict[str, torch.Tensor], cached: dict[str, torch.Tensor], dtype: Dtype) -> None:
    """Before the first step text encoders say what the cache says, up to the kernels of another batch size or device.

    Raises:
        RuntimeError: they do not, so that losses before and after would not be of one base.
    """
    for name, tensor in encoded.items():
        distance, size = float((tensor - cached[name]).norm()), float(cached[name].norm())
        if not distance <= MAX_DISTANCE[dtype] * size:
            raise RuntimeError(f"the text encoders' {name} differs from the cached one by {distance:.3g} of {size:.3g}")


class GradientMonitor:
    """Looks at each step's gradients, and refuses a training that would not be one."""

    def __init__(self, trainable: dict[str, torch.nn.Parameter], max_grad_norm: float) -> None:
        self.trainable, self.max_grad_norm = trainable, max_grad_norm
        self.without_gradient = set(trainable)
        """Parameters that have had no gradient yet."""
        self.steps = 0
        self.clipping_seen = False
        self.non_finite = 0

    def note_gradients(self) -> None:
        """Before clipping: note which parameters have a gradient."""
        self.steps += 1
        gradients = {name: self.trainable[name].grad for name in self.without_gradient}
        self.without_gradient -= {name for name, grad in gradients.items() if grad is not None and bool(grad.any())}

    def check_clipping(self, grad_norm: float) -> None:
        """After clipping, the first time that it was due: prove that it happened.

        Raises:
            RuntimeError: the gradients' norm is still above the limit.
        """
        if self.clipping_seen or not math.isfinite(grad_norm) or grad_norm <= self.max_grad_norm:
            return
        clipped = float(torch.nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None]))
        if clipped > self.max_grad_norm * 1.001:
            raise RuntimeError(f"gradient norm is {clipped:.4g} after clipping to {self.max_grad_norm}")
        self.clipping_seen = True

    def is_finite(self, loss: float, grad_norm: float, step: int, scaled: bool) -> bool:
        """Whether an update may be applied; ``scaled`` when a GradScaler looks for its scale.

        Raises:
            UserError: too many steps in a row could not.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.non_finite = 0
            return True
        self.non_finite += 1
        log.warning("warning: step %d: loss %s, gradient norm %s; no update", step, loss, grad_norm)
        if self.non_finite >= (MAX_OVERFLOWS if scaled and math.isfinite(loss) else MAX_NON_FINITE):
            raise UserError(
                f"train: no finite loss and gradient in {self.non_finite} steps in a row (last: step {step}); "
                "lower train.learning_rate, or set model.dtype to float32"
            )
        return False

    def check_end(self) -> None:
        """Every parameter has had a gradient; A's is zero until B has moved, which takes a step, and warmup one more.

        A layer or bias without any is one that the base has and never uses; that is warned of.

        Raises:
            UserError: the last step or a weight is not finite; no gradient was left by the settings.
            RuntimeError: part of a layer had none; naming the first.
        """
        broken = [name for name, parameter in self.trainable.items() if not bool(parameter.isfinite().all())]
        if broken or self.non_finite > 1:
            raise UserError(
                f"train: the run ended in {f'weights that are not finite, such as {broken[0]}' if broken else 'NaN'}; "
                "lower train.learning_rate or train.weight_decay"
            )
        if self.steps <= 3:
            return
        biases = sorted(name for name in self.without_gradient if name.endswith(".delta"))
        if biases:  # lora.bias all takes every one
            what = plural(len(biases), "trained bias", "trained biases")
            log.warning("warning: no gradient ever reached %s, such as %s", what, biases[0])
        layers = {name: layer(name) for name in self.trainable if not name.endswith(".delta")}
        reached = {layers[name] for name in layers.keys() - self.without_gradient}
        unused = sorted(set(layers.values()) - reached)
        if layers and not reached:
            raise UserError(
                "train: no gradient was left for any layer; look at train.learning_rate, max_grad_norm, huber_c, "
                "snr_gamma, lora.alpha and lora.dropout for values near zero (or one)"
            )
        broken = sorted(name for name in self.without_gradient & layers.keys() if layers[name] in reached)
        if broken:
            raise RuntimeError(f"no gradient ever reached {broken[:4]}")
        if unused:
            where = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
            what = "the base never uses their output; name them in lora.exclude_modules"
            log.warning("warning: no gradient ever reached %s: %s", where, what)

    def state_dict(self) -> dict[str, list[str]]:
        return {"without_gradient": sorted(self.without_gradient)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        self.without_gradient = set(state["without_gradient"])


def layer(parameter: str) -> str:
    """``mid_block.to_q.lora_A.default.weight`` -> ``mid_block.to_q``."""
    return re.split(r"\.(?:lora|lokr|hada)_", parameter)[0]
