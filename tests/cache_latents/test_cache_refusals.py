"""Errors, warnings and metrics of cache_latents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from PIL import Image

from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_tensors, save_tensors
from tests.helpers.encodings import MASKED, refusal, words
from tests.helpers.errors import assert_line, codes_of, refused
from tests.helpers.workspace import Workspace, make_image, read_rows, write_rows


def test_prepare_first(workspace: Workspace) -> None:
    (problem,) = refusal(workspace)
    assert problem.startswith("data/prepared/manifest.jsonl: ") and "`python -m stages.prepare`" in problem


def test_resolution_must_fit_the_base(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.resolution=36")
    with refused("resolution-not-multiple", "--set dataset.resolution: got 36", "data/base", "multiples of 8", "32"):
        workspace.run("cache_latents", "--set", "dataset.resolution=36")


def test_a_flip_without_effect_is_refused(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.flip=true")
    values = ("params.yaml cache.num_variants: got 1", "dataset.flip true", "2 or more", "dataset.flip to false")
    with refused("setting-ignored", *values):
        workspace.run("cache_latents", "--set", "dataset.flip=true")


def test_outdated_prepared_is_a_warning(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.flip=true")
    values = ("data/prepared", "dataset.flip true", "settings now have false", "`python -m stages.prepare`")
    with refused("prepared-outdated", *values):
        workspace.run("cache_latents")
    lines = workspace.run("cache_latents", "--set", "cache.num_variants=2")
    assert_line("\n".join(lines), "prepared-outdated", *values)


def test_a_single_random_crop_is_a_warning(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.crop=random")
    lines = workspace.run("cache_latents", "--set", "dataset.crop=random")
    values = ("params.yaml cache.num_variants: 1 ", "dataset.crop random", "Set cache.num_variants to 2 ")
    assert_line("\n".join(lines), "one-random-crop", *values)
    lines = workspace.run("cache_latents", *words(("dataset.crop=random", "cache.num_variants=2")))
    assert "one-random-crop" not in codes_of("\n".join(lines))


def test_identical_views_are_a_warning(workspace: Workspace) -> None:
    workspace.run("prepare")
    lines = workspace.run("cache_latents", "--set", "cache.num_variants=2")
    values = ("--set cache.num_variants: 2 ", "dataset.crop center", "dataset.flip false")
    assert_line("\n".join(lines), "setting-ignored", *values)
    assert codes_of("\n".join(workspace.run("cache_latents"))) == []


def test_changed_and_missing_images_are_all_named(workspace: Workspace) -> None:
    workspace.run("prepare")
    make_image(50).save("data/raw/05.png")
    make_image(51).save("data/raw/07.png")
    os.remove("data/raw/06.png")
    changed, missing, other = refusal(workspace)
    for problem, name in ((changed, "05.png"), (other, "07.png")):
        assert problem.startswith(f"data/raw/{name}: ") and "`python -m stages.prepare`" in problem
        assert problem.code == "file-changed"
    assert missing.startswith("data/raw: ") and "06.png" in missing


def test_a_changed_mask_is_named(masked: Workspace) -> None:
    masked.run("prepare", *words(MASKED))
    Image.new("L", (32, 32), 255).save("data/raw/masks/03.png")
    with refused("file-changed", "data/raw/masks/03.png: "):
        masked.run("cache_latents", *words(MASKED))


def test_base_that_is_no_pipeline(workspace: Workspace) -> None:
    workspace.run("prepare")
    Path("data/empty").mkdir()
    with refused("no-model-index", "--set model.pretrained: 'data/empty'", "model_index.json"):
        workspace.run("cache_latents", "--set", "model.pretrained=data/empty")


def test_base_of_pickles_only(workspace: Workspace) -> None:
    workspace.run("prepare")
    shutil.copytree("data/base", "data/pickles")
    os.rename("data/pickles/vae/diffusion_pytorch_model.safetensors", "data/pickles/vae/diffusion_pytorch_model.bin")
    with refused("pickle-weights", "data/pickles/vae: ", "diffusion_pytorch_model.bin"):
        workspace.run("cache_latents", "--set", "model.pretrained=data/pickles")


def test_latents_that_are_not_finite(workspace: Workspace) -> None:
    workspace.run("prepare")
    shutil.copytree("data/base", "data/broken")
    path = Path("data/broken/vae/diffusion_pytorch_model.safetensors")
    tensors = load_tensors(path)
    save_tensors(path, tensors | {"quant_conv.bias": torch.full_like(tensors["quant_conv.bias"], torch.nan)})
    with refused("encoding-not-finite", "params.yaml model.dtype: float32", "latents"):
        workspace.run("cache_latents", "--set", "model.pretrained=data/broken")


def test_captions_are_counted(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[1]["text"] = "many words " * 20
    rows[2]["text"] = rows[3]["text"]
    write_rows(Path("data/raw"), rows)
    workspace.run("prepare")
    lines = workspace.run("cache_latents")
    assert "captions    7 distinct; training draws from 1 per image" in lines
    assert_line("\n".join(lines), "text-too-long", "1 caption ", "20 tokens")
    assert any(line.endswith("tokens: " + ("many words " * 20)[:79] + "…") for line in lines)
    facts = read_json(Path("reports/latents/metrics.json"))
    assert facts.pop("captions.max_tokens") > 60 and 3 <= facts.pop("captions.tokens_median") <= 20
    assert facts == {
        "captions.batch_size": 4,
        "captions.num": 7,
        "captions.num_cut": 1,
        "captions.tokens_limit": 20,
        "latents.batch_size": 4,
        "latents.num_masks": 0,
        "latents.num_views": 8,
        "latents.tiling": False,
    }
    before = Path("reports/latents/metrics.json").read_bytes()
    workspace.run("cache_latents")
    assert Path("reports/latents/metrics.json").read_bytes() == before
