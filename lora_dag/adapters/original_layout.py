"""How the original checkpoint of each denoiser, which ComfyUI and kohya's scripts load, names and stacks its layers.

The facts are ComfyUI 0.19.3's own key map of the five bases; `pytest -m peers` compares them with a ComfyUI at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SWAPPED = "halves swapped: "
"""Scale and shift, the two halves of a modulation's rows, are in the other order there than in diffusers."""

# Layer there: layers here. Several are stacked there, row on row, in the order given. {i}, {j} and {k} are numbers of
# blocks, {last} is that of the last one; ``counted`` has those of a UNet's blocks there.
LAYOUTS: dict[str, dict[str, str]] = {
    "FluxTransformer2DModel": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "double_blocks.{i}.img_mod.lin": "transformer_blocks.{i}.norm1.linear",
        "double_blocks.{i}.img_attn.qkv": "transformer_blocks.{i}.attn. to_q to_k to_v",
        "double_blocks.{i}.img_attn.proj": "transformer_blocks.{i}.attn.to_out.0",
        "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
        "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.net.2",
        "double_blocks.{i}.txt_mod.lin": "transformer_blocks.{i}.norm1_context.linear",
        "double_blocks.{i}.txt_attn.qkv": "transformer_blocks.{i}.attn. add_q_proj add_k_proj add_v_proj",
        "double_blocks.{i}.txt_attn.proj": "transformer_blocks.{i}.attn.to_add_out",
        "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.net.0.proj",
        "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.net.2",
        "single_blocks.{i}.modulation.lin": "single_transformer_blocks.{i}.norm.linear",
        "single_blocks.{i}.linear1": "single_transformer_blocks.{i}. attn.to_q attn.to_k attn.to_v proj_mlp",
        "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.proj_out",
        "final_layer.adaLN_modulation.1": SWAPPED + "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    "SD3Transformer2DModel": {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "joint_blocks.{i}.x_block.adaLN_modulation.1": "transformer_blocks.{i}.norm1.linear",
        "joint_blocks.{i}.x_block.attn.qkv": "transformer_blocks.{i}.attn. to_q to_k to_v",
        "joint_blocks.{i}.x_block.attn.proj": "transformer_blocks.{i}.attn.to_out.0",
        "joint_blocks.{i}.x_block.attn2.qkv": "transformer_blocks.{i}.attn2. to_q to_k to_v",
        "joint_blocks.{i}.x_block.attn2.proj": "transformer_blocks.{i}.attn2.to_out.0",
        "joint_blocks.{i}.x_block.mlp.fc1": "transformer_blocks.{i}.ff.net.0.proj",
        "joint_blocks.{i}.x_block.mlp.fc2": "transformer_blocks.{i}.ff.net.2",
        "joint_blocks.{last}.context_block.adaLN_modulation.1": SWAPPED
        + "transformer_blocks.{last}.norm1_context.linear",
        "joint_blocks.{i}.context_block.adaLN_modulation.1": "transformer_blocks.{i}.norm1_context.linear",
        "joint_blocks.{i}.context_block.attn.qkv": "transformer_blocks.{i}.attn. add_q_proj add_k_proj add_v_proj",
        "joint_blocks.{i}.context_block.attn.proj": "transformer_blocks.{i}.attn.to_add_out",
        "joint_blocks.{i}.context_block.mlp.fc1": "transformer_blocks.{i}.ff_context.net.0.proj",
        "joint_blocks.{i}.context_block.mlp.fc2": "transformer_blocks.{i}.ff_context.net.2",
        "final_layer.adaLN_modulation.1": SWAPPED + "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    "ZImageTransformer2DModel": {
        "x_embedder": "all_x_embedder.2-1",
        "cap_embedder.1": "cap_embedder.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
        **{
            layer: ours
            for blocks in ("layers", "noise_refiner", "context_refiner")
            for layer, ours in {
                f"{blocks}.{{i}}.adaLN_modulation.0": f"{blocks}.{{i}}.adaLN_modulation.0",
                f"{blocks}.{{i}}.attention.qkv": f"{blocks}.{{i}}.attention. to_q to_k to_v",
                f"{blocks}.{{i}}.attention.out": f"{blocks}.{{i}}.attention.to_out.0",
                f"{blocks}.{{i}}.feed_forward.w1": f"{blocks}.{{i}}.feed_forward.w1",
                f"{blocks}.{{i}}.feed_forward.w2": f"{blocks}.{{i}}.feed_forward.w2",
                f"{blocks}.{{i}}.feed_forward.w3": f"{blocks}.{{i}}.feed_forward.w3",
            }.items()
        },
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        "final_layer.linear": "all_final_layer.2-1.linear",
    },
    "UNet2DConditionModel": {
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
    },
}


@dataclass(frozen=True)
class Part:
    """A layer of the denoiser, as rows of a layer of its original checkpoint."""

    name: str
    swapped: bool
    """Whether the halves of its rows are in the other order there."""


def parts(denoiser: Any) -> dict[str, list[Part]]:
    """Layer of the original checkpoint -> the denoiser's layers whose rows are stacked there, in order."""
    names = dict.fromkeys(name for name, _ in denoiser.named_modules())
    last = max((int(name.split(".")[1]) for name in names if re.match(r"transformer_blocks\.\d+$", name)), default=0)
    each = sum(re.fullmatch(r"up_blocks\.0\.resnets\.\d+", name) is not None for name in names)
    found: dict[str, list[Part]] = {}
    taken: set[str] = set()
    for there, here in LAYOUTS.get(type(denoiser).__name__, {}).items():
        swapped = here.startswith(SWAPPED)
        for numbers, stacked in matching(here.removeprefix(SWAPPED).replace("{last}", str(last)), names):
            if not taken.intersection(stacked):
                taken.update(stacked)
                place = 2 if f"up_blocks.{numbers.get('i')}.attentions.0" in names else 1
                layer = there.format(last=last, place=place, **counted(each, **numbers))
                found[layer] = [Part(name, swapped) for name in stacked]
    return found


def matching(pattern: str, names: dict[str, None]) -> Iterator[tuple[dict[str, int], list[str]]]:
    """Each choice of the pattern's numbers for which the denoiser has all of its layers; and those layers."""
    start, *endings = pattern.split()
    first = re.escape(start + (endings[0] if endings else ""))
    regex = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", first))
    for name in names:
        if match := regex.fullmatch(name):
            numbers = {letter: int(number) for letter, number in match.groupdict().items()}
            stacked = [(start + ending).format(**numbers) for ending in endings or [""]]
            if names.keys() >= set(stacked):
                yield numbers, stacked


def counted(each: int, i: int = 0, j: int = 0, k: int = 0) -> dict[str, int]:
    """These numbers, and those that a UNet's blocks have there, where inputs and outputs are counted through.

    Args:
        each: number of resnets of an output block; an input block has a downsampler in place of the last.
    """
    numbers = {"i": i, "j": j, "k": k, "input": 1 + each * i + j, "output": each * i + j, "middle": 2 * j}
    return numbers | {"down": each * (i + 1), "up": each * (i + 1) - 1}


def swapped_layers(denoiser: Any) -> set[str]:
    """Names of the denoiser's layers whose rows are in the other order in the original checkpoint."""
    return {part.name for layer in parts(denoiser).values() for part in layer if part.swapped}


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows, then the first; twice gives them back."""
    import torch

    return torch.cat([*reversed(rows.chunk(2))])
