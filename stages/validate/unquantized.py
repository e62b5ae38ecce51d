"""Price of a quantized base: held-out loss of the trained adapter on the quantized base and on the base as it is.

Both are measured on the same rows and with the same adapter, so the price is the effect of rounding the base.
``python -m benchmarks.quantization`` also trains on the base as it is, and compares the two trainings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_dag.evaluation import bootstrap

if TYPE_CHECKING:
    from lora_dag.artifacts.metrics import Value
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams


def is_measured(eval_set: EvalSet, settings: ValidateParams) -> bool:
    """Return whether the base is quantized and the price is to be measured."""
    return eval_set.model.quantization is not None and settings.unquantized_loss


def heldout(eval_set: EvalSet) -> EvalSet:
    """Return the held-out rows, to score on the base as it is."""
    rows = [row for row in eval_set.rows if row.image.split == "heldout"]
    return replace(eval_set, rows=rows, model=eval_set.model.model_copy(update={"quantization": None}))


def metrics(eval_set: EvalSet, quantized: list[float], unquantized: list[float]) -> dict[str, Value]:
    """Return ``val.loss_unquantized`` and ``val.quantization_price``, the change by the quantization as a share of it.

    Args:
        quantized: loss of each row of ``eval_set`` on the quantized base.
        unquantized: loss of each row of ``heldout(eval_set)`` on the base as it is.
    """
    plain = heldout(eval_set).by_image(unquantized, "heldout")
    change = bootstrap.estimate(eval_set.by_image(quantized, "heldout") - plain, eval_set.seed)
    loss = bootstrap.mean(plain)
    share = bootstrap.Estimate(change.mean / loss, change.low / loss, change.high / loss)
    return {"val.loss_unquantized": loss, **share.named("val.quantization_price")}
