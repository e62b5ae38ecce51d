"""The runs whose values are pinned: stage -> run -> its settings, over the families and the options.

A run's settings are overrides of tests/helpers/workspace.py:TINY, as ``--set`` reads them. Keys without a section
choose the run's inputs, which tests/golden/inputs.py makes.

No run is in bfloat16: between AVX2 and AVX-512 its gradient norms differ by 0.5 %, the ``mix`` of lora_B by 0.03.
"""

from __future__ import annotations

from lora_dag.core.params import FAMILIES

CONV = {"lora.target_modules": "all-linear+conv", "lora.init_lora_weights": "kaiming"}
ALL_FORMATS = "[diffusers, peft, comfyui, merged]"


def of_families(**settings: str) -> dict[str, dict[str, str]]:
    return {name: {"model.family": name, **settings} for name in FAMILIES}


PREPARE: dict[str, dict[str, str]] = {
    "plain": {},
    "buckets": {
        "dataset.aspect_buckets": "true",
        "dataset.bucket_step": "8",
        "dataset.max_aspect_ratio": "3",
        "dataset.max_upscale": "4",
    },
    "captions": {
        "dataset.caption_prefix": "sks, ",
        "dataset.shuffle_tags": "true",
        "dataset.keep_tags": "1",
        "dataset.tag_dropout": "0.3",
        "dataset.num_caption_variants": "3",
    },
    "alpha": {"dataset.mask": "alpha", "dataset.unmasked_weight": "0.25", "dataset.background": '"#102030"'},
    "subsets": {
        "dataset.subsets": "[{path: a, repeats: 3}, {path: b, regularization: true, loss_weight: 0.5}]",
        "images": "subsets",
    },
    "near-duplicates": {"dataset.near_duplicate_bits": "40", "dataset.seed": "3"},
}

CACHE_LATENTS: dict[str, dict[str, str]] = {
    **of_families(),
    "views": {"cache.num_variants": "4", "views": "random crops, flips"},
    "bicubic": {"filter": "bicubic"},
    "masks": {"views": "masks"},
    "buckets": {"views": "buckets"},
    "tiling": {"cache.tiling": "true", "views": "buckets"},
}

TRAIN: dict[str, dict[str, str]] = {
    **of_families(),
    "rslora": {"lora.use_rslora": "true", "lora.rank_pattern": "{to_k: 3}", "lora.alpha_pattern": "{to_v: 5.0}"},
    "dora": {"lora.use_dora": "true", "lora.bias": "lora_only"},
    "lokr": {"lora.algo": "lokr", **CONV, "lora.use_effective_conv2d": "true"},
    "loha": {"lora.algo": "loha", "lora.init_lora_weights": "kaiming", "lora.bias": "lora_only"},
    "conv-biases": {**CONV, "lora.bias": "all", "lora.dropout": "0.25"},
    "text-encoder": {"lora.train_text_encoder": "true", "train.text_encoder_lr": "5e-4"},
    "text-encoders": {"model.family": "sdxl", "lora.train_text_encoder": "true", "train.prompt_dropout": "0.5"},
    "eva": {"lora.init_lora_weights": "eva"},
    "min-snr": {"train.loss_weighting": "min_snr", "train.snr_gamma": "5"},
    "soft-min-snr": {"train.loss_weighting": "soft_min_snr", "train.snr_gamma": "5"},
    "debiased-epsilon": {
        "model.family": "sdxl",
        "train.loss_weighting": "debiased",
        "train.timestep_range": "[0.1, 0.6]",
    },
    "zero-snr": {"base": "zero-snr", "train.loss_weighting": "p2"},
    "huber": {"train.huber_c": "0.1", "train.huber_schedule": "snr"},
    "noise": {"train.noise_offset": "0.05", "train.multires_noise_discount": "0.3", "train.input_perturbation": "0.1"},
    "flow-shift": {"model.family": "sd3", "train.timestep_shift": "3.0", "train.timestep_sampling": "logit_normal"},
    "flow-auto-shift": {"model.family": "flux", "train.timestep_shift": "auto"},
    "ema": {"train.ema_decay": "0.9", "train.ema_power": "0.6667"},
    "gradient-checkpointing": {"train.gradient_checkpointing": "true"},
    "init-from": {"start": "adapter"},
    "one-file base": {"base": "one file"},
    "accumulation": {"train.gradient_accumulation_steps": "3", "train.scale_lr": "true"},
    "mixed": {"latents": "mixed", "train.prompt_dropout": "0.3", "train.num_steps": "6"},
    "early-stop": {
        "train.early_stop_patience": "1",
        "train.num_steps": "8",
        "train.snapshot_every_n_steps": "1",
        "train.learning_rate": "0.5",
    },
    "prodigy": {"train.optimizer": "prodigy", "train.learning_rate": "1.0", "train.lr_scheduler": "constant"},
    "lion": {"train.optimizer": "lion", "train.lr_scheduler": "linear"},
    "adafactor": {"train.optimizer": "adafactor", "train.lr_scheduler": "polynomial", "train.lr_power": "2"},
    "schedule-free": {"train.optimizer": "schedule_free", "train.lr_scheduler": "constant"},
    "lora-plus": {
        "train.lora_plus_ratio": "16",
        "train.lr_scheduler": "cosine_with_restarts",
        "train.lr_num_cycles": "2",
        "train.num_steps": "6",
    },
}

VALIDATE: dict[str, dict[str, str]] = {
    **of_families(),
    "no-guidance": {
        "validate.guidance_scale": "1",
        "validate.scales": "[0.5, 1.0]",
    },
    "text-encoder": {"lora.train_text_encoder": "true"},
    "dora": {"lora.use_dora": "true", "lora.bias": "lora_only", "validate.negative_prompt": "blue boat"},
    "feature-model": {"features": "clip"},
    "mixed": {"latents": "mixed", "validate.drift_prompts": "[]", "validate.ink_measures": "false"},
}

EXPORT: dict[str, dict[str, str]] = {
    **of_families(),
    "merged": {"export.formats": ALL_FORMATS, "lora.alpha": "6"},
    "rslora": {"lora.use_rslora": "true", "lora.rank_pattern": "{to_k: 3}", "lora.alpha_pattern": "{to_v: 5.0}"},
    "dora": {"lora.use_dora": "true"},
    "lokr": {"lora.algo": "lokr", **CONV, "export.formats": "[peft, comfyui, merged]"},
    "conv-biases": {**CONV, "lora.bias": "all", "export.formats": "[comfyui, merged]"},
    "text-encoder": {"lora.train_text_encoder": "true", "export.formats": ALL_FORMATS},
    "resized-snapshot": {"lora.rank": "4", "export.resized_ranks": "[2]", "export.step": "2"},
}

REPORT: dict[str, dict[str, str]] = {"plain": {}, "overfit": {"reports": "overfit"}}

RUNS = {
    "prepare": PREPARE,
    "cache_latents": CACHE_LATENTS,
    "train": TRAIN,
    "validate": VALIDATE,
    "export": EXPORT,
    "report": REPORT,
}
"""A key without a section chooses inputs: ``images``, ``views``, ``filter``, ``latents``, ``base``, ``start``,
``features``, ``reports``."""
