"""What cache_latents refuses, warns of and counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from PIL import Image

from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_tensors, save_tensors
from tests.conftest import Workspace, picture, read_rows, write_rows
from tests.helpers.encodings import MASKED, refusal, words


def test_prepare_first(workspace: Workspace) -> None:
    assert refusal(workspace) == ("data/prepared/manifest.jsonl: no such file; run `python -m stages.prepare` first",)


def test_resolution_must_fit_the_base(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.resolution=36")
    (problem,) = refusal(workspace, "dataset.resolution=36")
    assert problem.startswith(
        "params.yaml dataset.resolution: 36 is no multiple of 8, which data/base needs; use 32 or"
    )


def test_a_flip_that_never_happens_is_refused(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.flip=true")
    (problem,) = refusal(workspace, "dataset.flip=true")
    assert problem.startswith("params.yaml dataset.flip: true with cache.num_variants 1 would freeze")
    assert problem.endswith("set cache.num_variants to 2 or more, or dataset.flip to false")


def test_what_prepare_would_make_otherwise_is_warned_of(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.flip=true")
    (problem,) = refusal(workspace)
    assert problem == (
        "data/prepared was made with dataset.flip true; params.yaml says false; run `python -m stages.prepare` first"
    )
    lines = workspace.run("cache_latents", "--set", "cache.num_variants=2")
    assert lines[0] == f"warning: {problem} to use that"


def test_a_random_crop_that_happens_once_is_warned_of(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.crop=random")
    lines = workspace.run("cache_latents", "--set", "dataset.crop=random")
    start = "warning: params.yaml dataset.crop: random with cache.num_variants 1 is one crop per picture"
    assert any(line.startswith(start) for line in lines)
    lines = workspace.run("cache_latents", *words(("dataset.crop=random", "cache.num_variants=2")))
    assert not any("dataset.crop" in line for line in lines)


def test_views_that_are_all_the_same_are_warned_of(workspace: Workspace) -> None:
    workspace.run("prepare")
    said = "warning: params.yaml cache.num_variants: 2 changes nothing without dataset.crop random or dataset.flip"
    assert said in workspace.run("cache_latents", "--set", "cache.num_variants=2")
    assert said not in workspace.run("cache_latents")


def test_changed_and_missing_pictures_are_all_named(workspace: Workspace) -> None:
    workspace.run("prepare")
    picture(50).save("data/raw/05.png")
    picture(51).save("data/raw/07.png")
    os.remove("data/raw/06.png")
    again = "run `python -m stages.prepare` again"
    problems = refusal(workspace)
    assert problems[0] == f"data/raw/05.png: changed since prepare checked it; {again}"
    assert problems[1].startswith("data/raw: '06.png' is no file any more;")
    assert problems[2] == f"data/raw/07.png: changed since prepare checked it; {again}"
    assert len(problems) == 3


def test_a_changed_mask_is_named(masked: Workspace) -> None:
    masked.run("prepare", *words(MASKED))
    Image.new("L", (32, 32), 255).save("data/raw/masks/03.png")
    (problem,) = refusal(masked, *MASKED)
    assert problem.startswith("data/raw/masks/03.png: changed since prepare checked it;")


def test_base_that_is_no_pipeline(workspace: Workspace) -> None:
    workspace.run("prepare")
    Path("data/empty").mkdir()
    (problem,) = refusal(workspace, "model.pretrained=data/empty")
    assert problem.startswith("params.yaml model.pretrained: 'data/empty' has no model_index.json;")


def test_base_of_pickles_only(workspace: Workspace) -> None:
    workspace.run("prepare")
    shutil.copytree("data/base", "data/pickles")
    os.rename("data/pickles/vae/diffusion_pytorch_model.safetensors", "data/pickles/vae/diffusion_pytorch_model.bin")
    (problem,) = refusal(workspace, "model.pretrained=data/pickles")
    assert problem.startswith("data/pickles/vae: only diffusion_pytorch_model.bin, a pickle, which can run code")


def test_latents_that_are_not_finite(workspace: Workspace) -> None:
    workspace.run("prepare")
    shutil.copytree("data/base", "data/broken")
    path = Path("data/broken/vae/diffusion_pytorch_model.safetensors")
    tensors = load_tensors(path)
    save_tensors(path, tensors | {"quant_conv.bias": torch.full_like(tensors["quant_conv.bias"], torch.nan)})
    assert refusal(workspace, "model.pretrained=data/broken") == (
        "params.yaml model.dtype: float32 gives latents that are not finite; fetch model.pretrained again",
    )


def test_captions_are_counted(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[1]["text"] = "many words " * 20
    rows[2]["text"] = rows[3]["text"]
    write_rows(Path("data/raw"), rows)
    workspace.run("prepare")
    lines = workspace.run("cache_latents")
    assert "captions    7 distinct; training draws from 1 per picture" in lines
    assert "warning: 1 caption has more than 20 tokens; the rest is not read:" in lines
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
