"""Features of Z-Image: a chat template around captions, captions of different lengths, guidance from 0."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline

from lora_dag.adapters.targets import PRESETS, adaptable, matched_groups, presets
from lora_dag.artifacts import packing
from lora_dag.bases import component_files
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.families import z_image
from tests.helpers.errors import refused
from tests.helpers.families import stock_of
from tests.helpers.workspace import Workspace

CPU = torch.device("cpu")
CAPTIONS = ["red apple", "green circle, ink icon", "", "thing " * 20]  # 28, 41, 19 and 139 tokens: of 32, 64, 32, 160
COMFYUI = re.compile(
    r"(layers|context_refiner|noise_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
    r"|(layers|noise_refiner)\.\d+\.adaLN_modulation\.0"
    r"|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|all_x_embedder\.2-1|cap_embedder\.1|t_embedder\.mlp\.[02]"
)
"""Layers that ComfyUI takes behind ``transformer.`` (q, k and v as rows of one).

Source: ComfyUI 17358c8, comfy/lora.py ``model_lora_keys_unet`` under Lumina2, comfy/utils.py ``z_image_to_diffusers``.
"""


def params(base: Path) -> ModelParams:
    return ModelParams(family="z_image", pretrained=str(base), variant=None, dtype="float32", quantization=None)


@pytest.fixture
def model(bases: dict[str, Path]) -> ModelParams:
    return params(bases["z_image"])


@pytest.fixture
def pipe(model: ModelParams) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(model.pretrained)


@pytest.fixture
def on_z_image(workspace: Workspace, bases: dict[str, Path]) -> Workspace:
    Path("data/base").unlink()
    shutil.copytree(bases["z_image"], "data/base")
    return workspace


def overrides(*changes: str) -> list[str]:
    return [word for change in ("model.family=z_image", "train.num_steps=2", *changes) for word in ("--set", change)]


# Captions


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 6)], ids=str)  # 16, 12 and 9 patches, padded to 32
def test_captions_of_different_lengths_share_a_batch(
    model: ModelParams, pipe: ZImagePipeline, size: tuple[int, int]
) -> None:
    """The transformer's input is each caption's own tokens, as in the pipeline."""
    noisy = torch.randn(4, 16, *size, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3.0, 250.5, 700.0, 1000.0])
    prompt = z_image.encode_prompts(z_image.load_text(model, CPU), CAPTIONS)
    found = z_image.predict(z_image.load_denoiser(model, CPU), noisy, timesteps, prompt)
    own, _ = pipe.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    assert [len(states) for states in own] == [28, 41, 19, 139]
    expected = pipe.transformer(list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, own).sample
    assert found.shape == noisy.shape
    torch.testing.assert_close(found, -torch.stack(expected).squeeze(2), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_padding_does_not_change_predictions(model: ModelParams) -> None:
    noisy = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = z_image.encode_prompts(z_image.load_text(model, CPU), CAPTIONS)
    assert not prompt["prompt_embeds"][prompt["prompt_embeds_mask"] == 0].any()
    denoiser, timesteps = z_image.load_denoiser(model, CPU), torch.full([4], 500.0)
    expected = z_image.predict(denoiser, noisy, timesteps, prompt)
    prompt["prompt_embeds"] = torch.where(prompt["prompt_embeds_mask"][..., None] == 0, 9.0, prompt["prompt_embeds"])
    assert torch.equal(z_image.predict(denoiser, noisy, timesteps, prompt), expected)


@torch.no_grad()
def test_only_own_tokens_are_on_the_disk(model: ModelParams) -> None:
    prompt = z_image.encode_prompts(z_image.load_text(model, CPU), CAPTIONS)
    for index, length in enumerate([28, 41, 19, 139]):
        packed = packing.pack({name: tensor[index] for name, tensor in prompt.items()}, model.dtype)
        assert packed["prompt_embeds"].shape == (length, 32) and packed["prompt_embeds_mask"].shape == (length,)
        assert packed["prompt_embeds.shape"].tolist() == [512, 32]


@torch.no_grad()
def test_a_caption_that_is_too_long_is_cut_as_the_pipeline_cuts(model: ModelParams, pipe: ZImagePipeline) -> None:
    long = "thing " * 100
    assert z_image.count_tokens(model, [long, ""]) == [619, 19]  # the chat's 19 among them
    assert z_image.max_tokens(model) == 512
    found = z_image.encode_prompts(z_image.load_text(model, CPU), [long])
    expected = stock_of("z_image").encode(pipe, [long])
    assert found["prompt_embeds_mask"].all() and torch.equal(found["prompt_embeds"], expected["prompt_embeds"])


def test_the_chat_template_is_part_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["z_image"], base)
    before = component_files.digests(params(base), z_image.COMPONENTS)
    template = base / "tokenizer/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = component_files.digests(params(base), z_image.COMPONENTS)
    assert {name for name in before if before[name] != after[name]} == {"tokenizer"}


@pytest.mark.parametrize("stage", ["check", "cache_latents"])
def test_a_tokenizer_without_its_template_is_refused(on_z_image: Workspace, stage: str) -> None:
    Path("data/base/tokenizer/chat_template.jinja").unlink()
    on_z_image.run("prepare", *overrides())
    with refused("base-incomplete", "data/base/tokenizer: no chat template", "chat_template.jinja"):
        on_z_image.run(stage, *overrides())


def test_check_prints_the_token_limit(on_z_image: Workspace) -> None:
    assert "captions    up to 512 tokens, 19 of them the model's own" in on_z_image.run("check", *overrides())


def test_sides_are_multiples_of_a_patch_and_have_an_end(on_z_image: Workspace) -> None:
    place = "--set dataset.resolution: got "
    with refused("resolution-too-large", f"{place}260", "data/base", "multiple of 8 up to 256"):
        on_z_image.run("check", *overrides("dataset.resolution=260", "dataset.max_upscale=6"))
    with refused("resolution-not-multiple", f"{place}36", "data/base", "multiples of 8", "Write 32 or 40."):
        on_z_image.run("check", *overrides("dataset.resolution=36"))


# Guidance


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_guidance_starts_at_0(on_z_image: Workspace, scale: float) -> None:
    changes = overrides("validate.negative_prompt=blurry", f"validate.guidance_scale={scale}")
    if scale:
        on_z_image.run("check", *changes)
        return
    with refused("setting-ignored", "--set validate.negative_prompt", "guidance_scale 0.0", "above 0"):
        on_z_image.run("check", *changes)


# Layers and exports


def test_presets_name_its_layers(model: ModelParams) -> None:
    denoiser = z_image.load_denoiser(model, CPU)
    layers, regexes = adaptable(denoiser), presets(denoiser)
    groups = {choice: matched_groups(choice, layers, regexes).values() for choice in PRESETS}
    chosen = {choice: {name for names in found for name in names} for choice, found in groups.items()}
    attention = {name for name in layers if ".attention." in name}
    feed_forward = {name for name in layers if ".feed_forward." in name}
    assert len(attention) == 4 * 4 and len(feed_forward) == 4 * 3  # of two layers and two refiners
    assert chosen["attention"] == attention and chosen["attention+ff"] == attention | feed_forward
    assert chosen["all-linear"] == chosen["all-linear+conv"] == set(layers)
    assert all(COMFYUI.fullmatch(name) for name in layers)


def test_every_layer_through_every_format(on_z_image: Workspace) -> None:
    """diffusers reads ComfyUI's file too, with any prefix."""
    formats = ["diffusers", "peft", "comfyui", "merged"]
    changes = overrides(
        "lora.target_modules=all-linear",
        "lora.alpha=5",
        "train.lr_warmup_steps=0",
        f"export.formats=[{', '.join(formats)}]",
    )
    for stage in ("prepare", "cache_latents", "train", "export"):
        on_z_image.run(stage, *changes)
    metrics = json.loads(Path("reports/export/metrics.json").read_text())
    for name in formats:
        assert metrics[f"export.{name}.max_abs_error"] <= 1e-5 < metrics["export.effect"], name
    file = Path("data/export/comfyui/ink-icons.safetensors")
    assert load_metadata(file)["modelspec.architecture"] == "z-image/lora"
    assert len(load_tensors(file)) == 2 * 37 and all(name.startswith("transformer.") for name in load_tensors(file))
    lines = on_z_image.run("verify", str(file), *changes)
    assert lines[-1].startswith("verified ")

    def drawn(export: Path | dict[str, torch.Tensor] | None) -> torch.Tensor:
        pipe = ZImagePipeline.from_pretrained("data/base")
        pipe.set_progress_bar_config(disable=True)
        if export is not None:
            pipe.load_lora_weights(export)
        options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
        return pipe("red apple", generator=torch.Generator().manual_seed(0), **options).images

    ours = drawn(Path("data/export/diffusers"))
    assert not torch.equal(ours, drawn(None))
    renamed = {name.replace("transformer.", "diffusion_model.", 1): t for name, t in load_tensors(file).items()}
    for tensors in (load_tensors(file), renamed):
        torch.testing.assert_close(drawn(tensors), ours, atol=1e-5, rtol=1e-5)
