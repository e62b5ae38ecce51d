"""What is encoded and what is reused, counted at the encoders; and what data/latents holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.artifacts.latent_cache import LatentCache
from stages.artifacts.manifest import Manifest
from stages.artifacts.store import Store
from stages.cache_latents import __main__ as cache_latents
from stages.cache_latents import encoding, entries
from stages.core import objectives, pictures
from stages.core.console import UserError
from stages.core.containers import PictureFiles
from stages.core.files import load_tensors, read_json, save_tensors, writing
from stages.core.params import ModelParams
from stages.families import sd
from tests.conftest import Workspace, picture, read_rows, write_rows
from tests.images import see_through

LATENTS = Path("data/latents")


def words(changes: tuple[str, ...]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def encode(workspace: Workspace, *changes: str) -> tuple[str, str]:
    """prepare and cache_latents; the lines about pictures and captions."""
    workspace.run("prepare", *words(changes))
    lines = workspace.run("cache_latents", *words(changes))
    return lines[-1], lines[-2]


class Calls:
    """What reached the encoders, without the padding of batches: distinct pictures and distinct captions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures: set[bytes] = set()
        self.captions: set[str] = set()
        self.loaded: list[str] = []
        encode_images, encode_prompts = sd.encode_images, sd.encode_prompts

        def images(vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.pictures |= {value.numpy().tobytes() for value in pixel_values if value.any()}
            return encode_images(vae, pixel_values)

        def prompts(text: Any, captions: list[str]) -> dict[str, torch.Tensor]:
            self.captions |= set(captions) - {""}
            return encode_prompts(text, captions)

        monkeypatch.setattr(sd, "encode_images", images)
        monkeypatch.setattr(sd, "encode_prompts", prompts)
        for name in ("load_vae", "load_text"):
            monkeypatch.setattr(sd, name, self._counted(name, getattr(sd, name)))

    def _counted(self, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any) -> Any:
            self.loaded.append(name)
            return load(*args)

        return loaded

    def take(self) -> tuple[int, int]:
        """Pictures and captions since the last call."""
        found = len(self.pictures), len(self.captions)
        self.pictures.clear(), self.captions.clear(), self.loaded.clear()
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def cached(workspace: Workspace, calls: Calls) -> Workspace:
    assert encode(workspace) == ("encoded 8, reused 0", "captions: encoded 9, reused 0")
    assert calls.take() == (8, 8)  # and the empty caption
    return workspace


def from_empty_store(workspace: Workspace, *changes: str) -> dict[str, bytes]:
    """data/latents made anew with nothing to reuse."""
    shutil.rmtree(".state")
    shutil.rmtree(LATENTS)
    workspace.run("cache_latents", *words(changes))
    return workspace.tree("data/latents")


def pixels(manifest: Manifest, name: str, view: int = 0) -> torch.Tensor:
    """[1, 3, H, W], straight from the file."""
    item = next(item for item in manifest.items if item.file_name == name)
    shown = manifest.augmentation.views(item, view + 1)[view]
    image = pictures.load_view((Path(manifest.source) / name).read_bytes(), item, shown, manifest.preprocessing)
    return torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


# What an entry holds


def test_latents_are_what_the_vae_gives(cached: Workspace, tiny_base: Path) -> None:
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


def test_prompts_are_what_the_text_encoder_gives(cached: Workspace, tiny_base: Path) -> None:
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
    """Of every picture: the posterior of diffusers' own VAE, sampled by its own method, against mean + std * noise."""
    from diffusers import AutoencoderKL

    model = ModelParams(family="sd", pretrained=str(tiny_base), variant=None, dtype="float32")
    device = torch.device("cpu")
    unet, scheduler, text = sd.load_denoiser(model, device), sd.load_scheduler(model), sd.load_text(model, device)
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae").eval()
    cache, manifest = LatentCache(LATENTS), Manifest.load(Path("data/prepared"))

    def loss(latents: torch.Tensor, prompt: torch.Tensor, seed: int) -> torch.Tensor:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        timesteps = torch.tensor([100 * seed + 50])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = sd.predict(unet, noisy, timesteps, {"prompt_embeds": prompt})
        return (predicted - objectives.target(scheduler, latents, noise, timesteps)).square().mean()

    for seed, row in enumerate(cache.items):
        mean, std = cache.latents(row.views[0])
        drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed + 1000))
        with torch.no_grad():
            posterior = vae.encode(pixels(manifest, row.file_name)).latent_dist
            direct = posterior.sample(generator=torch.Generator().manual_seed(seed + 1000)) * 0.5
            uncached = loss(direct, sd.encode_prompts(text, [row.caption])["prompt_embeds"].clone(), seed)
            found = loss((mean + std * drawn)[None], cache.prompt(row.caption)["prompt_embeds"][None], seed)
        torch.testing.assert_close(found, uncached, rtol=1e-5, atol=1e-6)


def test_content_names_a_picture_whatever_encodes_it(cached: Workspace) -> None:
    def contents(*changes: str) -> dict[str, str]:
        encode(cached, *changes)
        return {item.file_name: item.content for item in LatentCache(LATENTS).items}

    first = contents()
    assert len(set(first.values())) == 8
    assert contents("model.dtype=bfloat16", "cache.batch_size=3") == first
    assert contents("dataset.flip=true", "cache.num_variants=2") == first  # of the first view alone
    assert contents('dataset.background="#000000"') == first  # nothing lets it through
    assert set(contents("dataset.resolution=40").values()).isdisjoint(first.values())
    picture(50).save("data/raw/05.png")
    assert {name for name, content in contents().items() if content != first[name]} == {"05.png"}


def test_key_of_the_demo_is_the_one_of_the_first_version(cached: Workspace) -> None:
    """Stores that people have stay valid: what a plain picture's key is made of has not changed."""
    manifest, cache = Manifest.load(Path("data/prepared")), LatentCache(LATENTS)
    item = manifest.items[0]
    ingredients = {
        "picture": item.sha256,
        "crop": [0, 0, 48, 48],
        "flip": False,
        "size": [32, 32],
        "preprocessing": {"background": "#ffffff", "filter": "lanczos", "version": pictures.VERSION},
        "vae": {"vae": cache.base["vae"]},
        "family": "sd",
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 4,
        "format": 1,
    }
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=False)
    assert cache.items[0].views == (hashlib.sha256(text.encode()).hexdigest(),)


# What is encoded


def test_second_run_encodes_nothing_and_gives_the_same_bytes(cached: Workspace, calls: Calls) -> None:
    first = cached.tree("data/latents")
    shutil.rmtree(LATENTS)
    assert encode(cached) == ("encoded 0, reused 8", "captions: encoded 0, reused 9")
    assert calls.loaded == [] and calls.take() == (0, 0)
    assert cached.tree("data/latents") == first


def changed_shards(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    names = (before.keys() | after.keys()) - {"manifest.json"}
    return sorted(name for name in names if before.get(name) != after.get(name))


def test_one_edited_picture_is_one_encode_in_one_shard(cached: Workspace, calls: Calls) -> None:
    before = cached.tree("data/latents")
    picture(50).save("data/raw/05.png")
    assert encode(cached) == ("encoded 1, reused 7", "captions: encoded 0, reused 9")
    assert calls.loaded == ["load_vae"] and calls.take() == (1, 0)
    after = cached.tree("data/latents")
    shard = hashlib.sha256(b"05.png").hexdigest()[0]
    assert changed_shards(before, after) == [f"images/{shard}.safetensors"]
    assert after == from_empty_store(cached)


def test_one_edited_picture_in_bfloat16(workspace: Workspace, calls: Calls) -> None:
    encode(workspace, "model.dtype=bfloat16")
    calls.take()
    picture(50).save("data/raw/05.png")
    assert encode(workspace, "model.dtype=bfloat16")[0] == "encoded 1, reused 7"
    assert calls.take() == (1, 0)
    assert workspace.tree("data/latents") == from_empty_store(workspace, "model.dtype=bfloat16")


def test_one_edited_caption_is_one_text_encode_in_one_shard(cached: Workspace, calls: Calls) -> None:
    before = cached.tree("data/latents")
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = "green circle"
    write_rows(Path("data/raw"), rows)
    assert encode(cached) == ("encoded 0, reused 8", "captions: encoded 1, reused 8")
    assert calls.loaded == ["load_text"] and calls.take() == (0, 1)
    assert "thing 2" not in LatentCache(LATENTS).manifest["captions"]
    after = cached.tree("data/latents")
    shard = hashlib.sha256(b"02.png").hexdigest()[0]
    assert changed_shards(before, after) == [f"text/{shard}.safetensors"]
    assert after == from_empty_store(cached)


def test_renamed_picture_is_no_encode(cached: Workspace, calls: Calls) -> None:
    os.rename("data/raw/02.png", "data/raw/zz.png")
    rows = read_rows(Path("data/raw"))
    rows[2]["file_name"] = "zz.png"
    write_rows(Path("data/raw"), rows)
    assert encode(cached)[0] == "encoded 0, reused 8"
    assert calls.take() == (0, 0)


def test_moved_dataset_is_no_encode(cached: Workspace, calls: Calls) -> None:
    os.rename("data/raw", "data/moved")
    assert encode(cached, "dataset.source=data/moved")[0] == "encoded 0, reused 8"
    assert calls.take() == (0, 0)


def test_equal_pictures_are_encoded_once(workspace: Workspace, calls: Calls) -> None:
    shutil.copy("data/raw/00.png", "data/raw/twin.png")
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": "twin.png", "text": "x"}])
    assert encode(workspace)[0] == "encoded 8, reused 1"
    assert calls.take() == (8, 9)


@pytest.mark.parametrize(
    ("changes", "num_pictures", "num_captions"),
    [
        (("dataset.resolution=40",), 8, 0),
        (('dataset.background="#000000"',), 0, 0),  # the pictures are opaque
        (("dataset.image_interpolation_mode=bicubic",), 8, 0),
        (("model.dtype=bfloat16",), 8, 8),
        (("cache.batch_size=3",), 8, 8),
        (("cache.tiling=true",), 8, 0),
        (("dataset.seed=5",), 0, 0),
        (("dataset.mask=alpha",), 0, 0),
        (("cache.num_variants=3",), 0, 0),  # all of them are the same centre crop
        (("lora.rank=4", "train.learning_rate=1e-4", "runtime.log_every_n_steps=3"), 0, 0),
    ],
)
def test_what_a_change_encodes(
    cached: Workspace, calls: Calls, changes: tuple[str, ...], num_pictures: int, num_captions: int
) -> None:
    first, second = encode(cached, *changes)
    assert calls.take() == (num_pictures, num_captions)
    num_texts = num_captions + (num_captions > 0)  # the empty caption too
    assert first == f"encoded {num_pictures}, reused {8 - num_pictures}"
    assert second == f"captions: encoded {num_texts}, reused {9 - num_texts}"
    encode(cached)
    assert calls.take() == (0, 0)  # and back again


def test_another_background_encodes_the_pictures_that_let_it_through(cached: Workspace, calls: Calls) -> None:
    see_through(picture(5)).save("data/raw/05.png")
    encode(cached)
    before = {item.file_name: item for item in LatentCache(LATENTS).items}
    assert calls.take() == (1, 0)
    encode(cached, 'dataset.background="#000000"')
    assert calls.take() == (1, 0)
    differ = [item for item in LatentCache(LATENTS).items if before[item.file_name].views != item.views]
    assert [item.file_name for item in differ] == ["05.png"]
    assert differ[0].content != before["05.png"].content


def test_another_version_of_the_preprocessing_encodes_all_pictures(
    cached: Workspace, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "VERSION", pictures.VERSION + 1)
    encode(cached)
    assert calls.take() == (8, 0)


def test_another_crop_encodes_the_pictures_that_it_moves(cached: Workspace, calls: Calls) -> None:
    """Square pictures have one crop only."""
    picture(9, width=80, height=48).save("data/raw/wide.png")
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": "wide.png", "text": "wide"}])
    encode(cached)
    assert calls.take() == (1, 1)
    encode(cached, "dataset.crop=random")
    assert calls.take() == (1, 0)


def test_more_variants_encode_the_new_ones(cached: Workspace, calls: Calls) -> None:
    """Of training pictures: evidence looks at the first view of the held-out ones alone."""
    items = Manifest.load(Path("data/prepared")).items
    num_train = sum(item.split == "train" for item in items)
    assert 0 < num_train < 8
    assert encode(cached, "dataset.flip=true", "cache.num_variants=2")[0].startswith(f"encoded {num_train}, ")
    assert calls.take() == (num_train, 0)
    cache = LatentCache(LATENTS)
    assert {len(item.views) for item in cache.split("train")} == {2}
    assert {len(item.views) for item in cache.split("heldout")} == {1}


@pytest.mark.parametrize(
    ("component", "file", "expected"),
    [
        ("vae", "diffusion_pytorch_model", (8, 0)),
        ("text_encoder", "model", (0, 8)),
        ("unet", "diffusion_pytorch_model", (0, 0)),
    ],
)
def test_other_base(cached: Workspace, calls: Calls, component: str, file: str, expected: tuple[int, int]) -> None:
    shutil.copytree("data/base", "data/other")
    path = Path("data/other") / component / f"{file}.safetensors"
    tensors = load_tensors(path)
    name = sorted(tensors)[0]
    save_tensors(path, tensors | {name: tensors[name] + 0.1}, {"format": "pt"})
    encode(cached, "model.pretrained=data/other")
    assert calls.take() == expected
    base = LatentCache(LATENTS).base
    assert sorted(base) == ["text_encoder", "tokenizer", "vae"]


def test_every_caption_of_a_list_is_encoded(workspace: Workspace, calls: Calls) -> None:
    rows = read_rows(Path("data/raw"))
    for index, row in enumerate(rows):
        row["text"] = [f"thing {index}", f"object {index}"]
    write_rows(Path("data/raw"), rows)
    encode(workspace)
    cache = LatentCache(LATENTS)
    num_train = len(cache.split("train"))
    assert calls.take() == (8, 8 + num_train)
    assert all(len(item.captions) == (2 if item.split == "train" else 1) for item in cache.items)
    assert set(cache.manifest["captions"]) == {"", *(caption for item in cache.items for caption in item.captions)}


# Masks


@pytest.fixture
def masked(workspace: Workspace) -> Workspace:
    """Masks whose left part, three quarters of a latent pixel beyond the first two, is white."""
    folder = Path("data/raw/masks")
    folder.mkdir()
    for index in range(8):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 11, 32))
        mask.save(folder / f"{index:02}.png")
        picture(index, 32).save(f"data/raw/{index:02}.png")
    return workspace


MASKED = ("dataset.mask=masks", "dataset.unmasked_weight=0.2")


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
    assert encode(masked, *MASKED)[0] == "encoded 0, reused 8"
    assert calls_before == (8, 8) and calls.take() == (0, 0)
    shard = hashlib.sha256(b"03.png").hexdigest()[0]
    assert changed_shards(before, masked.tree("data/latents")) == [f"masks/{shard}.safetensors"]
    cache = LatentCache(LATENTS)
    assert [item.file_name for item in cache.items if item.content != contents[item.file_name]] == ["03.png"]
    assert torch.equal(cache.mask(cache.items[3].masks[0]), torch.ones(1, 8, 8))


def test_another_weight_of_the_unmasked_makes_the_masks_anew(masked: Workspace, calls: Calls) -> None:
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
        return pictures.decode_mask(blob, kind)

    monkeypatch.setattr(entries, "decode_mask", decode)
    encode(masked, *MASKED, "dataset.flip=true", "cache.num_variants=2")
    assert read_json(Path("reports/latents/metrics.json"))["latents.num_masks"] > 8
    assert len(decoded) == 8


def test_masks_that_hide_all_of_a_view_are_refused_before_anything_is_encoded(masked: Workspace, calls: Calls) -> None:
    """White is the left third of wide pictures, which random crops can miss."""
    for index in (2, 3):
        mask = Image.new("L", (96, 32))
        mask.paste(255, (0, 0, 30, 32))
        mask.save(f"data/raw/masks/{index:02}.png")
        picture(index, 96, 32).save(f"data/raw/{index:02}.png")
    changes = ("dataset.mask=masks", "dataset.crop=random", "cache.num_variants=8")
    masked.run("prepare", *words(changes))
    manifest = Manifest.load(Path("data/prepared"))
    expected = []
    for item in (item for item in manifest.items if item.file_name in ("02.png", "03.png")):
        views = manifest.augmentation.views(item, 8 if item.split == "train" else 1)
        black = [str(number) for number, view in enumerate(views, 1) if view.crop[0] >= 30]
        if black:
            expected.append(
                f"data/raw/{item.file_name}: its mask hides all of view{'s' if len(black) > 1 else ''} "
                f"{', '.join(black)} of {len(views)}, so no loss is left; set dataset.crop to center, "
                "set dataset.unmasked_weight above 0, or mend the mask"
            )
    assert expected
    for _ in range(2):  # it is not remembered as done
        assert refusal(masked, *changes) == tuple(expected)
    assert calls.loaded == []
    encode(masked, *changes, "dataset.unmasked_weight=0.1")
    assert LatentCache(LATENTS).items


# Killed, damaged, unreadable

KILL = """
import os, signal, sys
from stages.artifacts import store, latent_cache
from stages.cache_latents.__main__ import main
owner, name, left = {owner}, {name!r}, {left}
real = getattr(owner, name)
def dying(*args, **kwargs):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(*args, **kwargs)
setattr(owner, name, dying)
sys.argv = ["cache_latents"]
main()
"""


@pytest.mark.parametrize(
    ("owner", "name", "left", "missing"),
    [
        ("store.Store", "save", 0, (8, 8)),
        ("store.Store", "save", 5, (3, 8)),
        ("store.Store", "save", 11, (0, 6)),  # 8 pictures, the empty caption and two others
        ("latent_cache", "save_tensors", 2, (0, 0)),
        ("latent_cache", "write_json", 0, (0, 0)),
    ],
)
def test_after_a_kill_only_what_is_missing_is_encoded(
    workspace: Workspace, calls: Calls, owner: str, name: str, left: int, missing: tuple[int, int]
) -> None:
    workspace.run("prepare")
    code = KILL.format(owner=owner, name=name, left=left)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with pytest.raises(UserError, match="data/latents/manifest.json: no such file; run `python -m stages.cache_latent"):
        LatentCache(LATENTS)
    workspace.run("cache_latents")
    assert calls.take() == missing
    assert workspace.tree("data/latents") == from_empty_store(workspace)


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("damage", ["length", "header", "data", "cut", "empty"])
def test_damaged_entry_is_made_again(cached: Workspace, calls: Calls, kind: str, damage: str) -> None:
    before = cached.tree("data/latents")
    empty = LatentCache(LATENTS).manifest["captions"][""]
    entry = next(path for path in sorted(Path(f".state/store/{kind}").rglob("*.safetensors")) if path.stem != empty)
    blob = bytearray(entry.read_bytes())
    if damage in ("cut", "empty"):
        entry.write_bytes(blob[: len(blob) // 2 if damage == "cut" else 0])
    else:
        blob[{"length": 3, "header": 40, "data": -5}[damage]] ^= 0xFF
        entry.write_bytes(blob)
    lines = cached.run("cache_latents")
    assert lines.count(f"warning: {entry.resolve()} is damaged and is made again") == 1
    assert calls.take() == ((1, 0) if kind == "latents" else (0, 1))
    assert lines[-1 if kind == "latents" else -2].removeprefix("captions: ").startswith("encoded 1, ")
    assert cached.tree("data/latents") == before


def test_swapped_entries_are_made_again(cached: Workspace, calls: Calls) -> None:
    before = cached.tree("data/latents")
    first, second = sorted(Path(".state/store/latents").rglob("*.safetensors"))[:2]
    aside = first.rename("aside")
    second.rename(first)
    aside.rename(second)
    lines = cached.run("cache_latents")
    for path in (first, second):
        assert f"warning: {path.resolve()} is damaged and is made again" in lines
    assert calls.take() == (2, 0)
    assert cached.tree("data/latents") == before


def test_a_second_run_on_the_same_folder_is_refused(cached: Workspace) -> None:
    before = cached.tree("data/latents")
    with writing(LATENTS), pytest.raises(UserError, match=rf"data/latents: process {os.getpid()} is at work"):
        cached.run("cache_latents")
    assert cached.tree("data/latents") == before
    with writing(Path("runs/latents")):
        cached.run("cache_latents")


def test_a_folder_in_place_of_the_notes_is_a_warning(cached: Workspace) -> None:
    path = Path(".state/store/last.json")
    path.unlink()
    path.mkdir()
    Path("reports/latents/metrics.json").unlink()
    lines = cached.run("cache_latents")
    assert f"warning: {path.resolve()}: Is a directory; --status will not know what this run did" in lines
    assert Path("reports/latents/metrics.json").exists() and lines[-1] == "encoded 0, reused 8"


def test_a_folder_in_place_of_an_entry_is_named(cached: Workspace) -> None:
    entry = sorted(Path(".state/store/latents").rglob("*.safetensors"))[0]
    entry.unlink()
    entry.mkdir()
    done = cached.process("cache_latents")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {entry.resolve()}: Is a directory; remove or rename the folder that stands in the place of a file"
    )


def test_damaged_entries_share_a_batch(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached.tree("data/latents")
    for entry in sorted(Path(".state/store/latents").rglob("*.safetensors"))[:3]:
        entry.write_bytes(entry.read_bytes()[:-1] + b"\x07")
    sizes: list[int] = []
    encode_images = sd.encode_images
    monkeypatch.setattr(sd, "encode_images", lambda vae, x: sizes.append(len(x)) or encode_images(vae, x))
    assert cached.run("cache_latents")[-1] == "encoded 3, reused 5"
    assert sizes == [4]
    assert cached.tree("data/latents") == before


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_shard_is_refused_and_filled_again(cached: Workspace, calls: Calls, cut: bool) -> None:
    before = cached.tree("data/latents")
    shard = sorted(LATENTS.rglob("*.safetensors"))[0]
    blob = bytearray(shard.read_bytes())
    blob[-1] ^= 1
    shard.write_bytes(blob[:-8] if cut else blob)
    with pytest.raises(UserError, match=f"{shard}: missing or damaged; run `python -m stages.cache_latents` again"):
        LatentCache(LATENTS)
    cached.run("cache_latents")
    assert calls.take() == (0, 0)
    assert cached.tree("data/latents") == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664)])
def test_files_can_be_read_by_the_group(workspace: Workspace, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        encode(workspace)
    finally:
        os.umask(before)
    written = [path for folder in (LATENTS, Path(".state")) for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8 + 9 + 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}


def test_stale_shards_are_removed(cached: Workspace) -> None:
    (LATENTS / "images/zz.safetensors").write_bytes(b"stale")
    (LATENTS / "old").mkdir()
    (LATENTS / "old/x").write_bytes(b"stale")
    cached.run("cache_latents")
    assert set(cached.tree("data/latents")) == {"manifest.json", *read_json(LATENTS / "manifest.json")["shards"]}
    assert not (LATENTS / "old").exists()


# Refused, warned of, counted


def refusal(workspace: Workspace, *changes: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        workspace.run("cache_latents", *words(changes))
    assert not LATENTS.exists()
    return caught.value.problems


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
    assert "warning: 1 captions have more than 20 tokens; the rest is not read:" in lines
    assert any(line.endswith("tokens: " + ("many words " * 20)[:77] + "...") for line in lines)
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


def test_progress_is_logged_where_there_is_no_terminal(workspace: Workspace) -> None:
    workspace.run("prepare")
    lines = [line for line in workspace.run("cache_latents") if line.startswith("latents ")]
    assert [line.split()[1:4] for line in lines] == [["4", "/", "8"], ["8", "/", "8"]]


# Versions, and the order of reading


class Machine:
    """Where this runs, as far as entries record it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes: dict[str, str | int] = {}
        environment = cache_latents.environment
        monkeypatch.setattr(cache_latents, "environment", lambda device: environment(device) | self.changes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def mixtures(lines: list[str]) -> list[str]:
    return [line for line in lines if "the last bits may differ" in line]


def test_entries_of_several_environments_are_warned_of(workspace: Workspace, machine: Machine) -> None:
    machine.changes = {"torch": "1.0"}
    encode(workspace)
    machine.changes = {"torch": "1.1"}
    assert mixtures(workspace.run("cache_latents")) == []  # all of one
    picture(50).save("data/raw/05.png")
    workspace.run("prepare")
    expected = [
        "warning: 7 latents were made with torch 1.0, 1 with torch 1.1: the last bits may differ from those of a fresh "
        f"run; delete {Path('.state/store/latents').resolve()} to make them all anew"
    ]
    assert mixtures(workspace.run("cache_latents")) == expected
    assert mixtures(workspace.run("cache_latents", "--status")) == expected
    shutil.rmtree(".state/store/latents")
    assert mixtures(workspace.run("cache_latents")) == []


def test_what_cannot_move_a_bit_is_no_mixture(workspace: Workspace, machine: Machine) -> None:
    encode(workspace)
    machine.changes = {"peft": "0.0.1", "python": "3.0"}
    picture(50).save("data/raw/05.png")
    workspace.run("prepare")
    assert mixtures(workspace.run("cache_latents")) == []


def test_entries_that_do_not_record_what_made_them_are_no_mixture(workspace: Workspace, machine: Machine) -> None:
    encode(workspace)
    store = Store()
    for kind, path in store.entries():
        entry = store.load(kind, path.stem)
        assert entry is not None and entry.made_by
        store.save(kind, path.stem, entry.tensors)
    machine.changes = {"torch": "1.1"}
    picture(50).save("data/raw/05.png")
    workspace.run("prepare")
    assert mixtures(workspace.run("cache_latents")) == []


def test_pictures_are_read_in_the_order_of_rows(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers, not of digits: rows of a Parquet file are read in groups."""
    shutil.rmtree("data/raw")
    Path("data/raw").mkdir()
    for index in range(12):
        picture(index, 64 if index % 3 else 48).save(f"data/raw/{index}.png")
    write_rows(Path("data/raw"), [{"file_name": f"{i}.png", "text": f"thing {i}"} for i in range(12)])
    workspace.run("prepare")
    read: list[str] = []
    for module in (encoding, entries):
        monkeypatch.setattr(module, "NUM_READERS", 1)
    original = PictureFiles.read
    monkeypatch.setattr(PictureFiles, "read", lambda self, name: read.append(name) or original(self, name))
    workspace.run("cache_latents")
    assert read == [f"{index}.png" for index in range(12)]
    names = [item.file_name for item in LatentCache(LATENTS).items]
    assert names == sorted(names)  # what is written does not depend on it
