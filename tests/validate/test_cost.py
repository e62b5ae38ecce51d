"""Arithmetic per image, against the stock UNet with a stock adapter, run and counted."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from lora_dag.artifacts.adapter import Adapter
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.core import params
from lora_dag.core.params import ModelParams
from lora_dag.families import sd
from stages.validate.cost import tflop_per_image
from stages.validate.heldout_loss import make_eval_set
from stages.validate.params import ValidateParams
from tests.helpers.caches import write_mixed_cache
from tests.helpers.workspace import Workspace


def test_counted_arithmetic_equals_a_computed_training_step(workspace: Workspace) -> None:
    write_mixed_cache()
    config, cache = params.load(Path("params.yaml")), LatentCache(Path("data/latents"))
    eval_set = make_eval_set(
        config.section(ValidateParams), config.section(ModelParams), sd, cache, torch.device("cpu")
    )
    lora_config = {"r": 3, "lora_alpha": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": True}
    found = tflop_per_image(eval_set, Adapter(lora_config, {}, 4, [], {}), cache)

    unet = UNet2DConditionModel.from_pretrained("data/base/unet").requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())  # the counter does not know the CPU's fused attention
    forward = count(unet, backward=False)
    unet.add_adapter(LoraConfig(**lora_config))
    assert round(found * 1e12) == count(unet, backward=True)
    assert forward < found * 1e12 < 3 * forward  # frozen weights get no gradients


def count(unet: UNet2DConditionModel, backward: bool) -> int:
    """Of one image whose latents are 4 x 12."""
    with FlopCounterMode(display=False) as counter:
        output = unet(torch.zeros(1, 4, 4, 12), torch.zeros(1), torch.zeros(1, 5, 32)).sample
        if backward:
            output.mean().backward()
    return counter.get_total_flops()
