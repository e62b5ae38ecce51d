"""Tiny checkpoints in one .safetensors file with the original tensor names, as in the community.

The inverse of what diffusers does in ``from_single_file``, after CompVis' and Stability's module names.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from lora_dag.bases.component_files import weight_files
from lora_dag.core.tensors import load_tensors, save_tensors

Tensors = dict[str, torch.Tensor]

TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}
SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def checkpoint(base: Path) -> Tensors:
    """Return the tensors of a checkpoint, made of a folder in the diffusers layout of family sd or sdxl."""
    parts = {name: of(base / name) for name in ("unet", "vae", "text_encoder")}
    is_sdxl = (base / "text_encoder_2").exists()
    clip = "conditioner.embedders.0.transformer." if is_sdxl else "cond_stage_model.transformer."
    found = prefixed("model.diffusion_model.", unet(parts["unet"]))
    found |= prefixed("first_stage_model.", vae(parts["vae"])) | prefixed(clip, wrapped(parts["text_encoder"]))
    if is_sdxl:
        found |= prefixed("conditioner.embedders.1.model.", open_clip(of(base / "text_encoder_2")))
    return found


def sd3_transformer(base: Path) -> Tensors:
    """Return the transformer's tensors as in SD 3's file without encoders; queries, keys and values are one matrix."""
    tensors = of(base / "transformer")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks"))
    swapped = (f"transformer_blocks.{last}.norm1_context.", "norm_out.")  # scale and shift in the other order
    tensors = {n: torch.cat(t.chunk(2)[::-1]) if n.startswith(swapped) else t for n, t in tensors.items()}
    found: Tensors = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        new = re.sub(r"^proj_out\.", "final_layer.linear.", replaced(name, SD3))
        new = re.sub(r"^transformer_blocks\.", "joint_blocks.", new)
        if match := re.fullmatch(r"(.+)\.(?:to_([qkv])|add_([qkv])_proj)\.(weight|bias)", new):
            stem, part = match[1], match[2] or match[3]
            block = stem.replace(".attn", ".x_block.attn" if match[2] else ".context_block.attn")
            joined.setdefault(f"{block}.qkv.{match[4]}", {})[part] = tensor
        else:
            found[new] = tensor
    found |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in joined.items()}
    return prefixed("model.diffusion_model.", found)


def of(folder: Path) -> Tensors:
    (path,) = weight_files(folder, None)
    return load_tensors(path)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unet(tensors: Tensors) -> Tensors:
    places = {int(name.split(".")[3]) for name in tensors if name.startswith("up_blocks.0.resnets.")}
    return {unet_name(name, tensors, len(places)): tensor for name, tensor in tensors.items()}


def unet_name(name: str, tensors: Tensors, per_block: int) -> str:
    """Return the original name, with numbers through all blocks, ``per_block`` each: resnets and a sampler."""
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            return replaced(name.replace(ours, theirs, 1), RESNET if "resnets" in ours else {})
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    assert match, name
    side, block, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{per_block * (block + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        after_attention = any(key.startswith(f"up_blocks.{block}.attentions") for key in tensors)
        return f"output_blocks.{per_block * (block + 1) - 1}.{2 if after_attention else 1}.{rest}"
    index = per_block * block + place + (1 if side == "down" else 0)
    stem = f"{'input' if side == 'down' else 'output'}_blocks.{index}"
    return f"{stem}.0.{replaced(rest, RESNET)}" if kind == "resnets" else f"{stem}.1.{rest}"


def vae(tensors: Tensors) -> Tensors:
    num_blocks = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks"))

    def rename(name: str) -> str:
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{num_blocks - 1 - int(m[1])}", name)
        name = name.replace("encoder.down_blocks.", "encoder.down.").replace("resnets.", "block.")
        name = name.replace("mid_block.block.0", "mid.block_1").replace("mid_block.block.1", "mid.block_2")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    return {rename(name): tensor for name, tensor in tensors.items()}


def wrapped(tensors: Tensors) -> Tensors:
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in tensors.items()}


def open_clip(tensors: Tensors) -> Tensors:
    """Return open_clip's tensors: queries, keys and values in one matrix, the projection transposed."""
    found, joined = {}, {}
    for name, tensor in wrapped(tensors).items():
        new = replaced(name.removeprefix("text_model."), OPEN_CLIP)
        if match := re.fullmatch(r"(.+\.attn)\.([qkv])_proj\.(weight|bias)", new):
            joined.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            found["text_projection" if new == "text_projection.weight" else new] = tensor
    found["text_projection"] = found["text_projection"].T.contiguous()
    return found | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in joined.items()}


def replaced(name: str, mapping: dict[str, str]) -> str:
    for ours, theirs in mapping.items():
        name = name.replace(ours, theirs)
    return name


def lay_out(folder: Path, base: Path, tensors: Tensors, beside: tuple[str, ...] = ()) -> Path:
    """Write a folder as docs/models.md describes it: configs and tokenizers of the base, and the checkpoint.

    Args:
        beside: components whose weights stand in the folder.
    """
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in beside:
        shutil.copytree(base / name, folder / name, dirs_exist_ok=True)
    save_tensors(folder / "dreamshaper.safetensors", tensors)
    return folder / "dreamshaper.safetensors"
