"""Weights that a run saves: the trained ones, their moving average (EMA), or a schedule-free optimizer's average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel

if TYPE_CHECKING:
    from stages.train.params import TrainParams


class AveragedWeights:
    """Average of the trained parameters. Inside ``with averaged.swapped_in()`` the model has the saved weights."""

    def __init__(self, params: TrainParams, parameters: list[torch.nn.Parameter], optimizer: Any) -> None:
        self.parameters = parameters
        self.ema = None
        if params.ema_decay is not None:
            power = {} if params.ema_power is None else {"use_ema_warmup": True, "power": params.ema_power}
            self.ema = EMAModel(parameters, decay=params.ema_decay, **power)
        self.schedule_free = optimizer if hasattr(optimizer, "eval") and hasattr(optimizer, "train") else None

    def step(self) -> None:
        """Update the average after an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the weights to be saved into the model; restore the trained ones bit-identically afterwards."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        if self.schedule_free is not None:
            self.schedule_free.eval()
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.schedule_free is not None:
                self.schedule_free.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, trained, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the EMA; empty without one, since a schedule-free optimizer saves its own state."""
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the EMA."""
        if self.ema is not None:
            self.ema.load_state_dict(state)
            self.ema.to(self.parameters[0].device)
