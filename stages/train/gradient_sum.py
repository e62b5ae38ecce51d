"""The gradients of a step's micro-batches, summed over all processes to the same bits in any order.

They are added as integers, whose sum does not depend on the order; every process then takes the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed

from lora_dag.core.console import UserError

FRACTION_BITS = 44  # a gradient's smallest part is 6e-14; the largest sum is 2^18


class GradientSum:
    """Adds up the gradients of ``accumulation`` micro-batches; of one alone they stay as they are."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], accumulation: int) -> None:
        self.parameters = list(parameters)
        self.is_one = accumulation == 1
        self.limit = 2.0 ** (62 - FRACTION_BITS) / accumulation
        self.clear()

    def clear(self) -> None:
        self.totals: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.overflow = torch.tensor(False)

    def add(self) -> None:
        """Take the gradients that a backward pass has left; None stays None."""
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
        """Leave the sum over all processes as the parameters' gradients; NaN in all of them after an overflow.

        Args:
            losses: float32, of all micro-batches of the step, 0 where another process has computed it; filled here.
            stop: whether this process received a signal to stop.

        Returns:
            Whether any process received one.
        """
        if self.is_one:
            return stop
        used = [index for index, total in enumerate(self.totals) if total is not None]
        flat = torch.cat([self.totals[index].flatten() for index in used])  # type: ignore[union-attr]
        said = torch.cat([losses, torch.tensor([float(stop)]).to(losses), self.overflow.to(losses)[None]])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            torch.distributed.all_reduce(said)  # each is a sum of one number and zeros
        losses.copy_(said[:-2])
        values = torch.where(said[-1] > 0, torch.nan, flat.float() * 2.0**-FRACTION_BITS)
        sizes = [self.parameters[index].numel() for index in used]
        for index, value in zip(used, values.split(sizes), strict=True):
            self.parameters[index].grad = value.view_as(self.parameters[index])
        self.clear()
        return bool(said[-2] > 0)


def require_same(value: object) -> None:
    """All processes must start from one state.

    Raises:
        UserError: on another machine something is otherwise.
    """
    if not torch.distributed.is_initialized():
        return
    found: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    if any(other != found[0] for other in found):
        raise UserError(
            "train: processes differ in the kind of processor, GPU or Python, in their files, or in the checkpoints "
            "that they see; use machines of one kind, with one state directory ($LORA_STATE_DIR) on a disk of all"
        )
