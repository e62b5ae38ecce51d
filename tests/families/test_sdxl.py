"""Features of SDXL: micro-conditioning of every view, a VAE in float32, zeros for a dropped caption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Item, Manifest, View
from lora_dag.bases import component_files
from lora_dag.core import params, seeding
from lora_dag.core.device import autocast
from lora_dag.core.params import ModelParams
from lora_dag.diffusion.sampling import Sampling, draw
from lora_dag.families import sdxl
from stages.cache_latents.latents import geometry
from stages.train.batches import Batches
from stages.train.build import build
from stages.train.noising import make_timesteps
from stages.train.run import Run
from tests.helpers.settings import train_params
from tests.helpers.workspace import Workspace, make_image, write_rows

CPU = torch.device("cpu")


def item(**fields: object) -> Item:
    known = {"source_width": 80, "source_height": 60, "width": 32, "height": 32}
    return Item("a.png", "0", "", ("",), "train", **known | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View((10, 0, 70, 60), False), ((60, 80), (0, 5), (32, 32))),  # 60 pixels become 32
        (View((0, 0, 60, 60), False), ((60, 80), (0, 0), (32, 32))),
        (View((0, 0, 60, 60), True), ((60, 80), (0, 11), (32, 32))),  # 20 pixels to its left once it is mirrored
        (View((20, 0, 80, 60), True), ((60, 80), (0, 0), (32, 32))),
    ],
)
def test_geometry_counts_in_the_scaled_and_mirrored_image(view: View, expected: object) -> None:
    assert geometry(item(), view) == expected


def test_geometry_puts_heights_first() -> None:
    tall = item(source_width=40, source_height=100, width=16, height=32)
    assert geometry(tall, View((0, 15, 40, 95), False)) == ((100, 40), (6, 0), (32, 16))


@pytest.fixture
def prepared(workspace: Workspace, bases: dict[str, Path]) -> Workspace:
    """Prepare three wide images for the tiny SDXL, each with three random crops, mirrored and not."""
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases["sdxl"])
    for path in Path("data/raw").glob("0[3-9].png"):
        path.unlink()
    for index in range(3):
        make_image(index, 64, 40).save(f"data/raw/{index:02}.png")
    write_rows(Path("data/raw"), [{"file_name": f"{index:02}.png", "text": f"thing {index}"} for index in range(3)])
    changes = ("dataset.crop=random", "dataset.flip=true", "cache.num_variants=6", "dataset.heldout_fraction=0.34")
    overrides = [word for change in ("model.family=sdxl", *changes) for word in ("--set", change)]
    workspace.run("prepare", *overrides)
    workspace.run("cache_latents", *overrides)
    return workspace


def test_every_view_carries_the_time_ids_of_the_pipeline(prepared: Workspace, bases: dict[str, Path]) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"])
    cache, manifest = LatentCache(Path("data/latents")), Manifest.load(Path("data/prepared"))
    sources = {source.file_name: source for source in manifest.items}
    seen = set()
    for row in cache.items:
        views = manifest.augmentation.views(sources[row.file_name], len(row.views))
        for key, view in zip(row.views, views, strict=True):
            size, crop, target = geometry(sources[row.file_name], view)
            expected = pipe._get_add_time_ids(size, crop, target, torch.float32, text_encoder_projection_dim=32)
            found = cache.prompt("", key)["add_time_ids"]
            assert torch.equal(found[None], expected)
            assert found.tolist()[:2] == [40, 64] and found.tolist()[4:] == [32, 32]
            seen.add(found[3].item())
    assert len(seen) > 2  # random crops, so other lefts


def test_a_batch_has_the_time_ids_of_the_views_it_drew(prepared: Workspace) -> None:
    cache = LatentCache(Path("data/latents"))
    items = cache.split("train")
    settings = train_params("batch_size=2", "prompt_dropout=0.5")
    batches = Batches(cache, items, settings, make_timesteps(settings, DDPMScheduler(1000)), CPU)
    known = {tuple(cache.prompt("", key)["add_time_ids"].tolist()) for row in items for key in row.views}
    drawn = {tuple(ids) for step in range(20) for ids in batches.batch(step, 0).prompt["add_time_ids"].tolist()}
    assert drawn <= known and len(drawn) > 3


def test_time_ids_are_no_part_of_the_store(prepared: Workspace) -> None:
    """They follow from the inputs of the key, so that nothing is encoded for them."""
    from lora_dag.core.tensors import load_tensors

    for path in Path(".state/store/latents").rglob("*.safetensors"):
        assert set(load_tensors(path)) == {"mean", "std"}
    assert json.loads(Path("data/latents/manifest.json").read_text())["view_conditioning"] == ["add_time_ids"]


def test_the_vae_is_float32_for_every_model_dtype(bases: dict[str, Path]) -> None:
    model = ModelParams(family="sdxl", pretrained=str(bases["sdxl"]), variant=None, dtype="bfloat16", quantization=None)
    assert sdxl.vae_dtype(model) == "float32"
    pipe = sdxl.load_pipeline(model, CPU)
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"]).vae.decode(latents).sample
    with torch.no_grad(), autocast(CPU, model):
        assert torch.equal(pipe.vae.decode(latents, return_dict=False)[0], exact)
        drawn = pipe("red apple", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3)


# What guidance leads away from


@pytest.fixture(params=[True, False], ids=["zeros", "empty"])
def forces_zeros(request: pytest.FixtureRequest, workspace: Workspace, bases: dict[str, Path]) -> bool:
    """Write ``force_zeros_for_empty_prompt`` into the index of data/base."""
    Path("data/base").unlink()
    pipe = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"], force_zeros_for_empty_prompt=request.param)
    pipe.save_pretrained("data/base")
    return request.param


def model_params() -> ModelParams:
    return ModelParams(family="sdxl", pretrained="data/base", variant=None, dtype="float32", quantization=None)


@torch.no_grad()
def test_a_dropped_caption_equals_the_negative_input_of_the_pipeline(workspace: Workspace, forces_zeros: bool) -> None:
    overrides = ("--set", "model.family=sdxl", "--set", "train.prompt_dropout=1", "--set", "train.num_steps=2")
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage, *overrides)
    run = make_run(overrides)
    given = run.batches.batch(0, 0).prompt
    pipe = StableDiffusionXLPipeline.from_pretrained("data/base")
    _, negative, _, pooled = pipe.encode_prompt(["red apple", "blue boat"], do_classifier_free_guidance=True)
    torch.testing.assert_close(given["prompt_embeds"], negative)
    torch.testing.assert_close(given["pooled_prompt_embeds"], pooled)
    assert given["add_time_ids"].all(0).tolist() == [True, True, False, False, True, True]
    assert bool(negative.any()) != forces_zeros


@torch.no_grad()
def test_dropped_captions_stay_it_where_text_encoders_are_trained(workspace: Workspace, forces_zeros: bool) -> None:
    """Half of a batch is dropped; trained encoders encode only the other captions, and the empty one if it is used."""
    changes = ("model.family=sdxl", "train.prompt_dropout=0.5", "train.batch_size=6", "lora.train_text_encoder=true")
    overrides = tuple(word for change in changes for word in ("--set", change))
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage, *overrides)
    run = make_run(overrides)
    batch = run.batches.batch(0, 0)
    for parameter in run.adapter.text_trainable.values():
        parameter.data += 0.3
    found, encoded = run.prompt(batch), sdxl.encode_prompts(run.base.text, batch.captions)
    assert {caption != "" for caption in batch.captions} == {True, False}
    for name, tensor in encoded.items():
        assert not torch.allclose(tensor, batch.prompt[name], atol=0.1)
        for index, caption in enumerate(batch.captions):
            dropped = forces_zeros and not caption
            assert torch.equal(found[name][index], torch.zeros_like(tensor[index]) if dropped else tensor[index])
    assert torch.equal(found["add_time_ids"], batch.prompt["add_time_ids"])


def make_run(overrides: tuple[str, ...]) -> Run:
    config = params.load(Path("params.yaml"), overrides[1::2])
    base = component_files.digests(model_params(), sdxl.COMPONENTS)
    return build(config, sdxl, LatentCache(Path("data/latents")), base)


def test_a_run_of_the_other_kind_is_another_run(workspace: Workspace, bases: dict[str, Path]) -> None:
    Path("data/base").unlink()
    shutil.copytree(bases["sdxl"], "data/base")
    overrides = ("--set", "model.family=sdxl")
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage, *overrides)
    index = Path("data/base/model_index.json")
    found = [make_run(overrides).identity.digest]
    for value in (False, True):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": value}))
        found.append(make_run(overrides).identity.digest)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("negative_prompt", ["", "blue boat"])
def test_images_are_drawn_as_the_pipeline_draws_without_a_negative_prompt(
    forces_zeros: bool, negative_prompt: str
) -> None:
    size = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    asked = Sampling(prompts=["red apple"], negative_prompt=negative_prompt, seed=0, batch_size=2, **size)
    (found,) = draw(sdxl.load_pipeline(model_params(), CPU), asked, model_params())
    pipe = StableDiffusionXLPipeline.from_pretrained("data/base", add_watermarker=False)
    generator = seeding.generator(0, "sample", "red apple")
    (expected,) = pipe("red apple", negative_prompt=negative_prompt or None, generator=generator, **size).images
    assert np.array_equal(np.asarray(found), np.asarray(expected))
