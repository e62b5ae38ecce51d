"""Sum of the gradients of a step's micro-batches over all processes, bit-identical for every order.

Gradients are added as integers, so that the sum does not depend on the order. Every process makes the same step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed

from lora_dag.core.console import Problem, UserError

FRACTION_BITS = 44  # resolution 6e-14; the largest sum is 2^18


class GradientSum:
    """Sum of the gradients of ``accumulation`` micro-batches; a single micro-batch's gradients stay unchanged."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], accumulation: int) -> None:
        self.parameters = list(parameters)
        self.is_one = accumulation == 1
        self.limit = 2.0 ** (62 - FRACTION_BITS) / accumulation
        self.clear()

    def clear(self) -> None:
        """Set the sum to zero."""
        self.totals: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.overflow = torch.tensor(False)

    def add(self) -> None:
        """Add the gradients of a backward pass and clear them; None stays None."""
        if self.is_one:
            return
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            self.overflow = self.overflow.to(parameter.device) | ~(parameter.grad.abs() < self.limit).all()  # or NaN
            fixed = (parameter.grad * 2.0**FRACTION_BITS).round().long()  # exact: a power of two
            total = self.totals[index]
            self.totals[index] = fixed if total is None else total + fixed
            parameter.grad = None

    def reduce(self, losses: torch.Tensor, stop: bool) -> bool:
        """Set the parameters' gradients to the sum over all processes, or to NaN after an overflow.

        Args:
            losses: float32 [accumulation], loss of each micro-batch; 0 for other processes' ones, filled in here.
            stop: whether this process received a signal to stop.

        Returns:
            Whether any process received a signal to stop.
        """
        if self.is_one:
            return stop
        used = [index for index, total in enumerate(self.totals) if total is not None]
        flat = torch.cat([self.totals[index].flatten() for index in used])  # type: ignore[union-attr]
        status = torch.cat([losses, torch.tensor([float(stop)]).to(losses), self.overflow.to(losses)[None]])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            torch.distributed.all_reduce(status)  # each is a sum of one number and zeros
        losses.copy_(status[:-2])
        values = torch.where(status[-1] > 0, torch.nan, flat.float() * 2.0**-FRACTION_BITS)
        sizes = [self.parameters[index].numel() for index in used]
        for index, value in zip(used, values.split(sizes), strict=True):
            self.parameters[index].grad = value.view_as(self.parameters[index])
        self.clear()
        return bool(status[-2] > 0)


def require_same(value: object) -> None:
    """Require that all processes have the same value.

    Raises:
        UserError: the value differs on another machine.
    """
    if not torch.distributed.is_initialized():
        return
    values: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        text = (
            "train: the processes have different processors, GPUs, Python versions, files or checkpoints. Use equal "
            "machines and one state directory ($LORA_STATE_DIR) on a shared disk."
        )
        raise UserError(Problem("processes-differ", text))
