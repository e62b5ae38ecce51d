"""EVA: A starts as the directions in which a layer's inputs vary most, by PEFT, from the run's own first batches.

B stays zero, so that step 0 equals the base; ranks are not redistributed. Source: arXiv:2410.07170.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import SVDHook, get_eva_state_dict

from lora_dag.adapters import lora
from lora_dag.adapters.targets import ending
from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.train.batches import Batch

NUM_BATCHES = 8
"""Batches that the inputs are taken from, again and again until the directions settle."""
MAX_PASSES = 1000
"""Forward passes after which they never will: the demo's settle after 44 to 155 (rank 8 to 32)."""
WHERE = "params.yaml lora.init_lora_weights: eva:"


class Base(torch.nn.Module):
    """The denoiser without the marks that ``get_eva_state_dict`` would take for those of a PeftModel."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser


def initialize(denoiser: Any, batches: list[Batch], predict: Callable[[Batch], torch.Tensor]) -> int:
    """Fill A of every linear target; convolutions keep the start they have. Returns the number of passes it took.

    Args:
        denoiser: carries a fresh adapter.
        predict: the denoiser's forward pass for a batch.

    Raises:
        UserError: a layer sees too few inputs for its rank, or inputs whose directions never settle.
    """
    layers = {
        name: layer
        for name in lora.targets(denoiser)
        if isinstance((layer := denoiser.get_submodule(name)).get_base_layer(), torch.nn.Linear)
    }
    rank = max((layer.r[lora.NAME] for layer in layers.values()), default=0)
    if not layers:
        raise UserError(f"{WHERE} no target is a linear layer; use kaiming")
    model, modes = Base(denoiser), {module: module.training for module in denoiser.modules()}
    passes = Passes(model, predict, rank)
    # One rank for all: where layers share their input, PEFT would redistribute ranks that differ.
    config = LoraConfig(
        r=rank,
        target_modules=[f"denoiser.{name}.base_layer" for name in layers],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    with lora.disabled(denoiser):
        found = get_eva_state_dict(
            model,
            batches,
            config,
            forward_fn=passes.forward,
            prepare_model_inputs_fn=lambda *_: None,
            prepare_layer_inputs_fn=passes.rows,
            gather_distributed_inputs=False,  # every process sees the same batches
            show_progress_bar=False,
        )
    for module, mode in modes.items():  # PEFT gives all of them one mode: dropout would be off in training
        module.training = mode
    for name, layer in layers.items():
        weight = layer.lora_A[lora.NAME].weight
        with torch.no_grad():
            weight.copy_(found[f"denoiser.{name}.base_layer"][: len(weight)])  # [rank, in]
    return passes.count


class Passes:
    """The forward passes of one initialisation, watched: PEFT's own loop would never end."""

    def __init__(self, model: Base, predict: Callable[[Batch], torch.Tensor], rank: int) -> None:
        self.model, self.predict, self.rank = model, predict, rank
        self.count = 0
        self.small: dict[str, str] = {}
        """Kind of layer -> why the rank is too high for it."""

    def rows(self, layer_input: Any, _: None, name: str) -> torch.Tensor:
        """A layer's inputs as PEFT wants them, [rows, in]. It takes twice the rank in directions, and keeps half."""
        rows = layer_input[0].flatten(0, -2).contiguous()
        if min(rows.shape) < 2 * self.rank:
            what = "inputs per batch" if rows.shape[0] < rows.shape[1] else "features"
            few = f"{min(rows.shape)} {what} of '{kind(name)}' are too few for twice the rank {self.rank}"
            self.small[kind(name)] = few
        return rows

    def forward(self, model: Base, batch: Batch) -> None:
        self.predict(batch)
        self.count += 1
        if self.small:
            raise UserError(
                *(
                    f"{WHERE} {line}; lower lora.rank, or name it in lora.exclude_modules"
                    for line in self.small.values()
                )
            )
        if self.count < MAX_PASSES:
            return
        names = ", ".join(sorted({kind(hook.name) for hook in self.unsettled()}))
        raise UserError(
            f"{WHERE} the directions of {names} do not settle; name them in lora.exclude_modules, or use kaiming"
        )

    def unsettled(self) -> list[SVDHook]:
        hooks = (hook for module in self.model.modules() for hook in module._forward_hooks.values())
        return [hook for hook in hooks if isinstance(hook, SVDHook) and not hook.converged.all()]


def kind(hooked: str) -> str:
    """``denoiser.down_blocks.0.attn1.to_q.base_layer`` -> ``to_q``."""
    return ending(hooked.removesuffix(".base_layer"))
