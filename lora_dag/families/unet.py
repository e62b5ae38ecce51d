"""Facts of families with a UNet2DConditionModel: pixel multiples, and layer names in original checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_dag.families import common

if TYPE_CHECKING:
    from lora_dag.core.params import ModelParams

PRESET_LAYERS: dict[str, str] = {}
ORIGINAL_LAYERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.{down}.0.op": "down_blocks.{i}.downsamplers.0.conv",
    "output_blocks.{up}.{place}.conv": "up_blocks.{i}.upsamplers.0.conv",
    **{
        f"{layer}.{there}": f"{block}.resnets.{{j}}.{ours}"
        for layer, block in (
            ("input_blocks.{input}.0", "down_blocks.{i}"),
            ("middle_block.{middle}", "mid_block"),
            ("output_blocks.{output}.0", "up_blocks.{i}"),
        )
        for there, ours in {
            "in_layers.0": "norm1",
            "in_layers.2": "conv1",
            "emb_layers.1": "time_emb_proj",
            "out_layers.0": "norm2",
            "out_layers.3": "conv2",
            "skip_connection": "conv_shortcut",
        }.items()
    },
    **{
        f"{layer}.{name}": f"{block}.attentions.{{j}}.{name}"
        for layer, block in (
            ("input_blocks.{input}.1", "down_blocks.{i}"),
            ("middle_block.1", "mid_block"),
            ("output_blocks.{output}.1", "up_blocks.{i}"),
        )
        for name in (
            *("norm", "proj_in", "proj_out"),
            *(f"transformer_blocks.{{k}}.attn{number}.to_{x}" for number in "12" for x in ("q", "k", "v", "out.0")),
            *(f"transformer_blocks.{{k}}.{x}" for x in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")),
        )
    },
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def pixel_multiple(model: ModelParams) -> int:
    """Return the number of pixels that divides every side: each block but the last halves the latents."""
    return common.vae_scale_factor(model) * 2 ** (len(common.config(model, "unet")["block_out_channels"]) - 1)
