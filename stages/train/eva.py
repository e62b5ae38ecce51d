"""EVA: initialize A with the directions in which a layer's inputs vary most, by PEFT, from the run's first batches.

B stays zero, so that step 0 equals the base. Ranks are not redistributed. Source: arXiv:2410.07170.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import SVDHook, get_eva_state_dict

from lora_dag.adapters import lora
from lora_dag.adapters.targets import ending
from lora_dag.core.console import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.train.batches import Batch

NUM_BATCHES = 8
"""Number of batches; they are repeated until the directions converge."""
SETTING = "params.yaml lora.init_lora_weights"
MAX_PASSES = 1000
"""Maximum of forward passes. The demo's directions converge after 44 to 155 (rank 8 to 32)."""


class BareDenoiser(torch.nn.Module):
    """Wrapper of the denoiser without the attributes that ``get_eva_state_dict`` expects of a PeftModel only."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser


def initialize(
    denoiser: Any, batches: list[Batch], predict: Callable[[Batch], torch.Tensor], setting: str = SETTING
) -> int:
    """Fill A of every linear target and return the number of forward passes. Convolutions keep their initialization.

    Args:
        denoiser: has a new adapter.
        predict: the denoiser's forward pass for a batch.
        setting: name of the setting for messages.

    Raises:
        UserError: a layer has too few inputs for its rank, or the directions of its inputs do not converge.
    """
    layers = {
        name: layer
        for name in lora.target_names(denoiser)
        if isinstance((layer := denoiser.get_submodule(name)).get_base_layer(), torch.nn.Linear)
    }
    rank = max((layer.r[lora.NAME] for layer in layers.values()), default=0)
    if not layers:
        text = f"{setting}: eva needs a linear layer, but lora.target_modules has none. Use kaiming."
        raise UserError(Problem("eva-needs-linear-layers", text))
    model, modes = BareDenoiser(denoiser), {module: module.training for module in denoiser.modules()}
    passes = EvaPasses(model, predict, rank, setting)
    # One rank for all layers, because PEFT redistributes different ranks of layers with the same input.
    config = LoraConfig(
        r=rank,
        target_modules=[f"denoiser.{name}.base_layer" for name in layers],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    with lora.disabled(denoiser):
        directions = get_eva_state_dict(
            model,
            batches,
            config,
            forward_fn=passes.forward,
            prepare_model_inputs_fn=lambda *_: None,
            prepare_layer_inputs_fn=passes.rows,
            gather_distributed_inputs=False,  # every process has the same batches
            show_progress_bar=False,
        )
    for module, mode in modes.items():  # PEFT sets one mode for all, which would disable dropout in training
        module.training = mode
    for name, layer in layers.items():
        weight = layer.lora_A[lora.NAME].weight
        with torch.no_grad():
            weight.copy_(directions[f"denoiser.{name}.base_layer"][: len(weight)])  # [rank, in]
    return passes.count


class EvaPasses:
    """Forward passes of one initialization, with a limit: PEFT's loop may never end."""

    def __init__(self, model: BareDenoiser, predict: Callable[[Batch], torch.Tensor], rank: int, setting: str) -> None:
        self.model, self.predict, self.rank, self.setting = model, predict, rank, setting
        self.count = 0
        self.too_small: dict[str, str] = {}
        """Kind of layer -> reason why the rank is too high for it."""

    def rows(self, layer_input: Any, _: None, name: str) -> torch.Tensor:
        """Return a layer's inputs for PEFT, [rows, in]. PEFT computes directions for twice the rank and uses half."""
        rows = layer_input[0].flatten(0, -2).contiguous()
        if min(rows.shape) < 2 * self.rank:
            unit = "inputs per batch" if rows.shape[0] < rows.shape[1] else "features"
            counts = f"'{layer_kind(name)}' has {min(rows.shape)} {unit}, but eva needs twice the rank {self.rank}"
            self.too_small[layer_kind(name)] = counts
        return rows

    def forward(self, model: BareDenoiser, batch: Batch) -> None:
        """Run one forward pass; raise UserError if the initialization cannot succeed."""
        self.predict(batch)
        self.count += 1
        if self.too_small:
            fix = "Lower lora.rank, or add the layer to lora.exclude_modules."
            counts = self.too_small.values()
            raise UserError(*(Problem("eva-too-few-inputs", f"{self.setting}: {text}. {fix}") for text in counts))
        if self.count < MAX_PASSES:
            return
        names = ", ".join(sorted({layer_kind(hook.name) for hook in self.unconverged()}))
        fix = "Add them to lora.exclude_modules, or use kaiming."
        text = f"{self.setting}: eva's directions for {names} do not converge. {fix}"
        raise UserError(Problem("eva-not-converged", text))

    def unconverged(self) -> list[SVDHook]:
        hooks = (hook for module in self.model.modules() for hook in module._forward_hooks.values())
        return [hook for hook in hooks if isinstance(hook, SVDHook) and not hook.converged.all()]


def layer_kind(name: str) -> str:
    """Return the kind of a layer: ``denoiser.down_blocks.0.attn1.to_q.base_layer`` -> ``to_q``."""
    return ending(name.removesuffix(".base_layer"))
