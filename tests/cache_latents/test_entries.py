"""Contents of data/latents, compared with diffusers' and transformers' own models; masks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Manifest
from lora_dag.core.files import read_json
from lora_dag.core.params import ModelParams
from lora_dag.diffusion.objectives import make_objective
from lora_dag.families import sd
from lora_dag.images import decode, masks
from stages.cache_latents import masks as mask_entries
from tests.helpers.encodings import LATENTS, MASKED, Calls, changed_shards, encode, refusal, words
from tests.helpers.workspace import Workspace, make_image


def pixels(manifest: Manifest, name: str, view: int = 0) -> torch.Tensor:
    """Return the pixels of the file, [1, 3, H, W]."""
    item = next(item for item in manifest.items if item.file_name == name)
    shown = manifest.augmentation.views(item, view + 1)[view]
    image = decode.load_view((Path(manifest.source) / name).read_bytes(), item, shown, manifest.preprocessing)
    return torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


# What an entry holds


def test_latents_equal_the_output_of_the_vae(cached: Workspace, tiny_base: Path) -> None:
    from diffusers import AutoencoderKL

    cache = LatentCache(LATENTS)
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae").eval()
    row = cache.items[5]
    with torch.no_grad():
        posterior = vae.encode(pixels(Manifest.load(Path("data/prepared")), row.file_name)).latent_dist
    mean, std = cache.latents(row.views[0])
    torch.testing.assert_close(mean, 0.5 * posterior.mean[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, 0.5 * posterior.std[0], atol=1e-5, rtol=1e-4)
    assert mean.shape == (4, 8, 8)


def test_prompts_equal_the_output_of_the_text_encoder(cached: Workspace, tiny_base: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    cache = LatentCache(LATENTS)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder").eval()
    for caption in ("", "thing 3"):
        tokens = tokenizer(caption, padding="max_length", max_length=20, return_tensors="pt")
        with torch.no_grad():
            expected = encoder(tokens.input_ids).last_hidden_state[0]
        torch.testing.assert_close(cache.prompt(caption)["prompt_embeds"], expected)


def test_cached_loss_equals_uncached_loss(cached: Workspace, tiny_base: Path) -> None:
    """For every image, a sample of the VAE's own posterior equals mean + std * noise."""
    from diffusers import AutoencoderKL

    model = ModelParams(family="sd", pretrained=str(tiny_base), variant=None, dtype="float32", quantization=None)
    device = torch.device("cpu")
    unet, scheduler, text = sd.load_denoiser(model, device), sd.load_scheduler(model), sd.load_text(model, device)
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae").eval()
    cache, manifest = LatentCache(LATENTS), Manifest.load(Path("data/prepared"))

    def loss(latents: torch.Tensor, prompt: torch.Tensor, seed: int) -> torch.Tensor:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        timesteps = torch.tensor([100 * seed + 50])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = sd.predict(unet, noisy, timesteps, {"prompt_embeds": prompt})
        return (predicted - make_objective(scheduler).target(latents, noise, timesteps)).square().mean()

    for seed, row in enumerate(cache.items):
        mean, std = cache.latents(row.views[0])
        drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed + 1000))
        with torch.no_grad():
            posterior = vae.encode(pixels(manifest, row.file_name)).latent_dist
            direct = posterior.sample(generator=torch.Generator().manual_seed(seed + 1000)) * 0.5
            uncached = loss(direct, sd.encode_prompts(text, [row.caption])["prompt_embeds"].clone(), seed)
            found = loss((mean + std * drawn)[None], cache.prompt(row.caption)["prompt_embeds"][None], seed)
        torch.testing.assert_close(found, uncached, rtol=1e-5, atol=1e-6)


def test_content_digest_does_not_depend_on_the_encoder(cached: Workspace) -> None:
    def contents(*changes: str) -> dict[str, str]:
        encode(cached, *changes)
        return {item.file_name: item.content for item in LatentCache(LATENTS).items}

    first = contents()
    assert len(set(first.values())) == 8
    assert contents("model.dtype=bfloat16", "cache.batch_size=3") == first
    assert contents("dataset.flip=true", "cache.num_variants=2") == first  # of the first view alone
    assert contents('dataset.background="#000000"') == first  # nothing lets it through
    assert set(contents("dataset.resolution=40").values()).isdisjoint(first.values())
    make_image(50).save("data/raw/05.png")
    assert {name for name, content in contents().items() if content != first[name]} == {"05.png"}


def test_key_of_the_demo_is_the_one_of_the_first_version(cached: Workspace) -> None:
    """Existing stores stay valid: the inputs of the key have not changed."""
    manifest, cache = Manifest.load(Path("data/prepared")), LatentCache(LATENTS)
    item = manifest.items[0]
    key_fields = {
        "picture": item.sha256,
        "crop": [0, 0, 48, 48],
        "flip": False,
        "size": [32, 32],
        "preprocessing": {"background": "#ffffff", "filter": "lanczos", "version": decode.VERSION},
        "vae": {"vae": cache.base["vae"]},
        "family": "sd",
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 4,
        "format": 1,
    }
    text = json.dumps(key_fields, sort_keys=True, ensure_ascii=False)
    assert cache.items[0].views == (hashlib.sha256(text.encode()).hexdigest(),)


# Masks


def test_masks_are_means_over_latent_pixels(masked: Workspace) -> None:
    encode(masked, *MASKED)
    cache = LatentCache(LATENTS)
    for item in cache.items:
        assert len(item.masks) == len(item.views) == 1
        weights = cache.mask(item.masks[0])
        assert weights.shape == (1, 8, 8) and weights.dtype == torch.float32
        row = torch.tensor([1, 1, 0.2 + 0.8 * 0.75, 0.2, 0.2, 0.2, 0.2, 0.2])
        torch.testing.assert_close(weights, row.expand(1, 8, 8))
    assert read_json(Path("reports/latents/metrics.json"))["latents.num_masks"] == 8


def test_one_edited_mask_encodes_nothing(masked: Workspace, calls: Calls) -> None:
    encode(masked, *MASKED)
    before, calls_before = masked.tree("data/latents"), calls.take()
    contents = {item.file_name: item.content for item in LatentCache(LATENTS).items}
    Image.new("L", (32, 32), 255).save("data/raw/masks/03.png")
    assert encode(masked, *MASKED)[0] == "images      encoded 0, reused 8"
    assert calls_before == (8, 8) and calls.take() == (0, 0)
    shard = hashlib.sha256(b"03.png").hexdigest()[0]
    assert changed_shards(before, masked.tree("data/latents")) == [f"masks/{shard}.safetensors"]
    cache = LatentCache(LATENTS)
    assert [item.file_name for item in cache.items if item.content != contents[item.file_name]] == ["03.png"]
    assert torch.equal(cache.mask(cache.items[3].masks[0]), torch.ones(1, 8, 8))


def test_another_unmasked_weight_makes_the_masks_again(masked: Workspace, calls: Calls) -> None:
    encode(masked, *MASKED)
    first = {item.content for item in LatentCache(LATENTS).items}
    calls.take()
    encode(masked, "dataset.mask=masks", "dataset.unmasked_weight=0.5")
    assert calls.take() == (0, 0)
    cache = LatentCache(LATENTS)
    assert {float(cache.mask(item.masks[0]).min()) for item in cache.items} == {0.5}
    assert first.isdisjoint(item.content for item in cache.items)


def test_a_mirrored_view_has_a_mirrored_mask(masked: Workspace) -> None:
    encode(masked, *MASKED, "dataset.flip=true", "cache.num_variants=2")
    cache = LatentCache(LATENTS)
    item = cache.split("train")[0]
    plain, mirrored = (cache.mask(key) for key in item.masks)
    assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)


def test_a_mask_is_decoded_once_for_all_of_its_views(masked: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def decode(blob: bytes, kind: Any) -> Image.Image:
        decoded.append(blob)
        return masks.decode_mask(blob, kind)

    monkeypatch.setattr(mask_entries, "decode_mask", decode)
    encode(masked, *MASKED, "dataset.flip=true", "cache.num_variants=2")
    assert read_json(Path("reports/latents/metrics.json"))["latents.num_masks"] > 8
    assert len(decoded) == 8


def test_masks_that_hide_all_of_a_view_are_refused_before_anything_is_encoded(masked: Workspace, calls: Calls) -> None:
    """White is the left third of wide images, which random crops can miss."""
    for index in (2, 3):
        mask = Image.new("L", (96, 32))
        mask.paste(255, (0, 0, 30, 32))
        mask.save(f"data/raw/masks/{index:02}.png")
        make_image(index, 96, 32).save(f"data/raw/{index:02}.png")
    changes = ("dataset.mask=masks", "dataset.crop=random", "cache.num_variants=8")
    masked.run("prepare", *words(changes))
    manifest = Manifest.load(Path("data/prepared"))
    expected = {}
    for item in (item for item in manifest.items if item.file_name in ("02.png", "03.png")):
        views = manifest.augmentation.views(item, 8 if item.split == "train" else 1)
        black = [str(number) for number, view in enumerate(views, 1) if view.crop[0] >= 30]
        if black:
            views_of = f"view{'s' if len(black) > 1 else ''} {', '.join(black)} of {len(views)}"
            expected[f"data/raw/{item.file_name}: "] = views_of
    assert expected
    for _ in range(2):  # it is not remembered as done
        problems = refusal(masked, *changes)
        assert [problem.code for problem in problems] == ["mask-hides-all"] * len(expected)
        for problem, (place, views_of) in zip(problems, expected.items(), strict=True):
            assert problem.startswith(place) and views_of in problem
            assert "dataset.crop: center" in problem and "dataset.unmasked_weight above 0" in problem
    assert calls.loaded == []
    encode(masked, *changes, "dataset.unmasked_weight=0.1")
    assert LatentCache(LATENTS).items
