"""Reports of five stages, written by hand: what the stage report reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from lora_dag.artifacts import image_table, metrics
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.files import write_text

MEASURED: dict[str, Any] = {
    "val.loss": 0.09,
    "val.loss_base": 0.13,
    "val.loss_change": -0.04,
    "val.loss_change_low": -0.045,
    "val.loss_change_high": -0.035,
    "val.train_loss": 0.08,
    "val.train_loss_base": 0.12,
    "val.overfit_gap": 0.002,
    "val.overfit_gap_low": -0.003,
    "val.overfit_gap_high": 0.007,
    "val.best_step": 4,
    "val.table": "0123456789abcdef",
    **{f"val.loss_{band}_noise{suffix}": 0.1 for band in ("low", "mid", "high") for suffix in ("", "_base")},
    "samples.chroma": 18.0,
    "samples.chroma_base": 120.0,
    "samples.dark_share": 0.6,
    "samples.dark_share_base": 0.02,
}
OVERFIT = {"val.overfit_gap": 0.02, "val.overfit_gap_low": 0.01, "val.overfit_gap_high": 0.03, "val.best_step": 2}
LINEAGE: dict[str, Any] = {
    "adapter": "aaaaaaaaaaaa",
    "base": {"scheduler": "bbbbbbbbbbbb", "unet": "cccccccccccc"},
    "dataset": {"heldout": 2, "train": 6},
    "latents": "dddddddddddd",
    "lora_config": {"r": 8, "lora_alpha": 8, "target_modules": ["down.0.attn1.to_q", "down.1.attn1.to_q"]},
    "model": {"family": "sd", "pretrained": "base", "variant": None, "dtype": "float32"},
    "num_steps": 4,
    "sheet": {"cell": 128},
    "table": {"num_images": {"heldout": 2, "train": 2}, "num_rows": 8, "prediction_type": "v_prediction"},
    "validate": {
        "prompts": ["red apple"],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "negative_prompt": "",
        "seed": 0,
        "scales": [1.0],
        "num_timesteps": 2,
    },
}
TRAIN = {
    "train.loss_final": 0.1,
    "train.num_steps": 4,
    "train.images_seen": 64,
    "train.num_trainable_parameters": 107520,
    "train.base_unchanged": True,
}
DATASET: dict[str, Any] = {
    "num_images": 8,
    "num_train": 6,
    "num_heldout": 2,
    "num_left_out": 0,
    "num_unlisted": 0,
    "num_captions": 8,
    "caption_words_median": 2.0,
    "caption_words_max": 3,
    "chroma": 1.5,
}
LATENTS: dict[str, Any] = {
    "captions.num": 9,
    "captions.num_cut": 0,
    "captions.max_tokens": 11,
    "captions.tokens_median": 5.5,
    "captions.tokens_limit": 77,
    "latents.num_views": 8,
    "latents.num_masks": 0,
}


MADE: dict[str, Any] = {
    "adapter": "a" * 64,
    "base": {"scheduler": "b" * 64, "unet": "c" * 64},
    "base_name": "base",
    "biases": [],
    "captions": "1" * 64,
    "export": {
        "name": "icons",
        "formats": ["diffusers", "peft", "comfyui"],
        "resized_ranks": [],
        "prompt": "red apple",
        "base_model": None,
        "license": None,
        "seed": 0,
    },
    "family": "sd",
    "files": {"diffusers/pytorch_lora_weights.safetensors": {"bytes": 450_000, "sha256": "e" * 64}},
    "latents": "d" * 64,
    "lora": {"rank": 8, "target_modules": ["to_q"]},
    "lora_config": {"r": 8, "lora_alpha": 4.0, "target_modules": ["to_k", "to_q"], "bias": "none"},
    "num_steps": 4,
    "packages": {"peft": "0.21.2"},
    "images": "2" * 64,
    "pipeline": {
        "class": "StableDiffusionPipeline",
        "denoiser": "unet",
        "load": 'pipe = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)',
        "pretrained": "data/base",
        "variant": None,
    },
    "train": {"batch_size": 16, "snr_gamma": None},
}
ENERGY = """layer,rank,energy
down.0.attn1.to_q,1,0.95
down.0.attn1.to_q,4,0.99
up.0.attn1.to_q,1,0.5
up.0.attn1.to_q,4,0.9
up.0.attn1.to_k,1,0
up.0.attn1.to_k,4,0.8
"""


def row(file_name: str, **changes: str) -> image_table.Row:
    """One of images.csv: kept, to train on."""
    values = {"split": "train", "width": "64", "height": "64", "bucket": "32x32", "repeats": "1", "num_captions": "1"}
    return values | {"file_name": file_name, "captions": f"image {file_name}", "sha256": file_name} | changes


ROWS = [row(f"{index}.png", split="train" if index < 6 else "heldout") for index in range(8)]


def write_reports(folder: Path, overfit: bool = False) -> None:
    """What the other stages would have written below ``folder``."""
    metrics.save(folder / "metrics.json", MEASURED | (OVERFIT if overfit else {}))
    save_lineage(folder / "validate" / "lineage.json", LINEAGE)
    write_text(folder / "validate" / "curve.csv", "step,heldout,train_probe\n0,0.13,0.12\n2,0.1,0.09\n4,0.09,0.08\n")
    metrics.save(folder / "train" / "metrics.json", TRAIN)
    rows = "".join(f"{step},{0.2 - step / 50},{step * 1e-4},0.5\n" for step in range(1, 5))
    write_text(folder / "train" / "loss.csv", "step,loss,learning_rate,grad_norm\n" + rows)
    metrics.save(folder / "dataset" / "metrics.json", DATASET)
    metrics.save(folder / "latents" / "metrics.json", LATENTS)
    image_table.save(folder / "dataset" / "images.csv", ROWS)
    metrics.save(
        folder / "export" / "metrics.json",
        {"export.diffusers.max_abs_error": 1.5e-7, "export.effect": 0.5, "export.megabytes": 0.43},
    )
    save_lineage(folder / "export" / "lineage.json", MADE)
    write_text(folder / "export" / "energy.csv", ENERGY)
    for name in ("samples.png", "progress.png", "dataset/contact.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
