"""Inputs of the stage: settings, base model, latent cache and adapter, checked to belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.artifacts.adapter import Adapter
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.bases import component_files, resolve
from lora_dag.core.console import UserError
from lora_dag.core.device import setup
from lora_dag.core.params import Config, ModelParams, RuntimeParams
from lora_dag.families.long_texts import warn_of_long_prompts
from lora_dag.families.protocol import load_family
from stages.validate import feature_files
from stages.validate.heldout_loss import EvalSet, make_eval_set
from stages.validate.params import ValidateParams, prompt_problems

if TYPE_CHECKING:
    from lora_dag.bases.resolve import Base


@dataclass(frozen=True)
class Inputs:
    """Everything that the stage reads."""

    settings: ValidateParams
    base: Base
    base_digests: dict[str, str]
    """Component of the base model -> digest."""
    cache: LatentCache
    adapter: Adapter
    adapter_folder: Path
    eval_set: EvalSet

    @property
    def target_digests(self) -> dict[str, str]:
        """Digests of the components that determine the targets of the losses: VAE and scheduler."""
        return {name: self.base_digests[name] for name in (*self.eval_set.family.VAE, "scheduler")}


def read_inputs(config: Config, latents: Path, adapter_folder: Path) -> Inputs:
    """Read and check all inputs.

    Raises:
        UserError: a setting does not fit the base model, or latents or adapter were made with another base model.
    """
    settings, model = config.section(ValidateParams), config.section(ModelParams)
    family = load_family(model.family)
    problems = [
        *prompt_problems(settings, family),
        *feature_files.model_problems(settings.feature_model, settings.setting("feature_model")),
    ]
    if problems:
        raise UserError(*problems)
    base = resolve.resolve(model, family)
    digests = component_files.digests(base.model, family.COMPONENTS)
    cache = LatentCache(latents)
    component_files.require_same_base(cache.base, digests, latents)
    adapter = Adapter.load(adapter_folder)
    component_files.require_same_base(adapter.base, digests, adapter_folder)

    device = setup(config.section(RuntimeParams), base.model)
    eval_set = make_eval_set(settings, base.model, family, cache, device)
    warn_of_long_prompts([*settings.prompts, *settings.drift_prompts, settings.negative_prompt], family, base.model)
    return Inputs(settings, base, digests, cache, adapter, adapter_folder, eval_set)
