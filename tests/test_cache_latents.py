from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.artifacts.latent_cache import LatentCache
from stages.artifacts.manifest import Manifest
from stages.artifacts.store import Store
from stages.cache_latents import forward, require_independent
from stages.core.console import UserError
from stages.core.files import load_tensors, save_tensors
from stages.core.params import ModelParams
from stages.core.pictures import load_view
from stages.families import sd
from tests.conftest import Workspace, picture, read_rows, write_rows


def encode(workspace: Workspace, *argv: str) -> tuple[str, str]:
    """prepare and cache_latents; the lines about pictures and captions."""
    workspace.run("prepare", *argv)
    lines = workspace.run("cache_latents", *argv)
    return lines[-1], lines[-2]


@pytest.fixture
def cached(workspace: Workspace) -> Workspace:
    assert encode(workspace) == ("encoded 8, reused 0", "captions: encoded 9, reused 0")
    return workspace


def from_empty_store(workspace: Workspace, *argv: str) -> dict[str, bytes]:
    """data/latents made anew with nothing to reuse."""
    shutil.rmtree(".state")
    shutil.rmtree("data/latents")
    workspace.run("cache_latents", *argv)
    return workspace.tree("data/latents")


def test_latents_are_what_the_vae_gives(cached: Workspace, tiny_base: Path) -> None:
    from diffusers import AutoencoderKL

    cache = LatentCache(Path("data/latents"))
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae").eval()
    manifest = Manifest.load(Path("data/prepared"))
    item = manifest.items[5]
    image = load_view(Path("data/raw") / item.file_name, item, item.views[0], manifest.preprocessing)
    pixel_values = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixel_values).latent_dist
    row = next(row for row in cache.items if row.file_name == item.file_name)
    mean, std = cache.latents(row.views[0])
    torch.testing.assert_close(mean, 0.5 * posterior.mean[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, 0.5 * posterior.std[0], atol=1e-5, rtol=1e-4)
    assert mean.shape == (4, 8, 8)


def test_prompts_are_what_the_text_encoder_gives(cached: Workspace, tiny_base: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    cache = LatentCache(Path("data/latents"))
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder").eval()
    for caption in ("", "thing 3"):
        tokens = tokenizer(caption, padding="max_length", max_length=20, return_tensors="pt")
        with torch.no_grad():
            expected = encoder(tokens.input_ids).last_hidden_state[0]
        torch.testing.assert_close(cache.prompt(caption)["prompt_embeds"], expected)


def test_second_run_encodes_nothing_and_gives_the_same_bytes(cached: Workspace) -> None:
    first = cached.tree("data/latents")
    shutil.rmtree("data/latents")
    assert encode(cached) == ("encoded 0, reused 8", "captions: encoded 0, reused 9")
    assert cached.tree("data/latents") == first


def test_one_edited_picture_is_one_encode_and_the_bytes_of_a_full_one(cached: Workspace) -> None:
    picture(50).save("data/raw/05.png")
    assert encode(cached) == ("encoded 1, reused 7", "captions: encoded 0, reused 9")
    assert cached.tree("data/latents") == from_empty_store(cached)


def test_one_edited_picture_in_bfloat16(workspace: Workspace) -> None:
    argv = ("--set", "model.dtype=bfloat16")
    encode(workspace, *argv)
    picture(50).save("data/raw/05.png")
    assert encode(workspace, *argv)[0] == "encoded 1, reused 7"
    assert workspace.tree("data/latents") == from_empty_store(workspace, *argv)


def test_mirrored_views_count_as_one_picture(workspace: Workspace) -> None:
    argv = ("--set", "dataset.flip=true")
    assert encode(workspace, *argv)[0] == "encoded 8, reused 0"
    picture(50).save("data/raw/05.png")
    assert encode(workspace, *argv)[0] == "encoded 1, reused 7"
    assert len(LatentCache(Path("data/latents")).items[5].views) == 2


def test_one_edited_caption_is_one_text_encode(cached: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = "green circle"
    write_rows(Path("data/raw"), rows)
    assert encode(cached) == ("encoded 0, reused 8", "captions: encoded 1, reused 8")
    assert "thing 2" not in LatentCache(Path("data/latents")).manifest["captions"]
    assert cached.tree("data/latents") == from_empty_store(cached)


def test_renamed_picture_is_no_encode(cached: Workspace) -> None:
    os.rename("data/raw/02.png", "data/raw/zz.png")
    rows = read_rows(Path("data/raw"))
    rows[2]["file_name"] = "zz.png"
    write_rows(Path("data/raw"), rows)
    assert encode(cached)[0] == "encoded 0, reused 8"


def test_moved_dataset_is_no_encode(cached: Workspace) -> None:
    os.rename("data/raw", "data/moved")
    assert encode(cached, "--set", "dataset.source=data/moved")[0] == "encoded 0, reused 8"


def test_content_names_a_picture_whatever_encodes_it(cached: Workspace) -> None:
    def contents(*argv: str) -> dict[str, str]:
        encode(cached, *(word for change in argv for word in ("--set", change)))
        return {item.file_name: item.content for item in LatentCache(Path("data/latents")).items}

    first = contents()
    assert len(set(first.values())) == 8
    assert contents("model.dtype=bfloat16", "cache.batch_size=3") == first
    assert contents("dataset.flip=true") == first  # of the first view alone
    for change in ("dataset.resolution=40", 'dataset.background="#000000"'):
        assert set(contents(change).values()).isdisjoint(first.values())
    picture(50).save("data/raw/05.png")
    assert {name for name, content in contents().items() if content != first[name]} == {"05.png"}


def test_equal_pictures_are_encoded_once(workspace: Workspace) -> None:
    shutil.copy("data/raw/00.png", "data/raw/twin.png")
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": "twin.png", "text": "x"}])
    assert encode(workspace)[0] == "encoded 8, reused 1"


@pytest.mark.parametrize(
    ("argv", "num_pictures", "num_captions"),
    [
        (("dataset.resolution=40",), 8, 0),
        (('dataset.background="#000000"',), 8, 0),
        (("model.dtype=bfloat16",), 8, 9),
        (("cache.batch_size=3",), 8, 9),
        (("dataset.seed=5",), 0, 0),
        (("lora.rank=4", "train.learning_rate=1e-4", "runtime.log_every_n_steps=3"), 0, 0),
    ],
)
def test_what_a_change_encodes(cached: Workspace, argv: tuple[str, ...], num_pictures: int, num_captions: int) -> None:
    counts = encode(cached, *(part for change in argv for part in ("--set", change)))
    assert counts == (
        f"encoded {num_pictures}, reused {8 - num_pictures}",
        f"captions: encoded {num_captions}, reused {9 - num_captions}",
    )


@pytest.mark.parametrize(
    ("component", "file", "expected"),
    [
        ("vae", "diffusion_pytorch_model", ("encoded 8, reused 0", "captions: encoded 0, reused 9")),
        ("text_encoder", "model", ("encoded 0, reused 8", "captions: encoded 9, reused 0")),
        ("unet", "diffusion_pytorch_model", ("encoded 0, reused 8", "captions: encoded 0, reused 9")),
    ],
)
def test_other_base(cached: Workspace, component: str, file: str, expected: tuple[str, str]) -> None:
    shutil.copytree("data/base", "data/other")
    path = Path("data/other") / component / f"{file}.safetensors"
    tensors = load_tensors(path)
    name = sorted(tensors)[0]
    save_tensors(path, tensors | {name: tensors[name] + 0.1}, {"format": "pt"})
    assert encode(cached, "--set", "model.pretrained=data/other") == expected
    base = LatentCache(Path("data/latents")).base
    assert sorted(base) == ["text_encoder", "tokenizer", "vae"]


@pytest.mark.parametrize("offset", [3, 40, -5], ids=["length", "header", "data"])
def test_damaged_entry_is_made_again(cached: Workspace, caplog: pytest.LogCaptureFixture, offset: int) -> None:
    before = cached.tree("data/latents")
    entry = sorted(Path(".state/store/latents").rglob("*.safetensors"))[0]
    blob = bytearray(entry.read_bytes())
    blob[offset] ^= 0xFF
    entry.write_bytes(blob)
    lines = cached.run("cache_latents")
    assert lines[-1] == "encoded 1, reused 7"
    assert f"warning: {entry.resolve()} is damaged and is made again" in lines
    assert cached.tree("data/latents") == before


def test_stale_shards_are_removed(cached: Workspace) -> None:
    Path("data/latents/images/zz.safetensors").write_bytes(b"stale")
    Path("data/latents/old").mkdir()
    Path("data/latents/old/x").write_bytes(b"stale")
    cached.run("cache_latents")
    shards = json.loads(Path("data/latents/manifest.json").read_text())["shards"]
    assert set(cached.tree("data/latents")) == {"manifest.json", *shards}
    assert not Path("data/latents/old").exists()


def test_interrupted_run_leaves_no_readable_cache(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.artifacts.latent_cache.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        cached.run("cache_latents")
    with pytest.raises(UserError, match="data/latents/manifest.json: no such file; run `python -m stages.cache_latent"):
        LatentCache(Path("data/latents"))
    assert not [name for name in cached.tree("data/latents") if "/." in name]


# What an entry is made of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_entry_depends_neither_on_place_nor_on_neighbours(tiny_base: Path, dtype: str) -> None:
    model = ModelParams(family="sd", pretrained=str(tiny_base), variant=None, dtype=dtype)
    encoders = SimpleNamespace(device=torch.device("cpu"), model=model, cache=SimpleNamespace(batch_size=4))
    vae = sd.load_vae(model, torch.device("cpu"))

    def encode(values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"mean": sd.encode_images(vae, torch.stack(values))[0]}

    x, *others = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = forward(encode, [x, *others], encoders)[0]["mean"]
    for place in range(4):
        values = [torch.zeros(3, 32, 32)] * 4
        values[place] = x
        assert torch.equal(forward(encode, values, encoders)[place]["mean"], expected)


def test_a_device_where_neighbours_matter_is_refused() -> None:
    with pytest.raises(UserError, match=r"params.yaml cache.batch_size: with 4 on this device, .*; use 1"):
        require_independent({"mean": torch.ones(2)}, {"mean": torch.ones(2) + 1e-6}, 4)


def test_store_entry_is_whole_or_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensors = {"mean": torch.arange(4.0), "std": torch.ones(2, dtype=torch.bfloat16)}
    store.save("latents", "ab12", tensors)
    assert store.path("latents", "ab12") == tmp_path / "latents" / "ab" / "ab12.safetensors"
    found = store.find("latents", "ab12")
    assert found is not None
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert store.find("text", "ab12") is None


# Refused


def refusal(workspace: Workspace, *argv: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        workspace.run("cache_latents", *argv)
    assert not Path("data/latents").exists()
    return caught.value.problems


def test_prepare_first(workspace: Workspace) -> None:
    assert refusal(workspace) == ("data/prepared/manifest.jsonl: no such file; run `python -m stages.prepare` first",)


def test_resolution_must_fit_the_base(workspace: Workspace) -> None:
    workspace.run("prepare", "--set", "dataset.resolution=36")
    assert refusal(workspace) == (
        "params.yaml dataset.resolution: 36 is no multiple of 8, which data/base needs; use 32 or 40",
    )


def test_changed_and_missing_pictures_are_named(workspace: Workspace) -> None:
    workspace.run("prepare")
    picture(50).save("data/raw/05.png")
    os.remove("data/raw/06.png")
    assert refusal(workspace) == (
        "data/raw/05.png: changed since prepare checked it; run `python -m stages.prepare` again",
        "data/raw/06.png: gone since prepare listed it; run `python -m stages.prepare` again",
    )


def test_base_that_is_no_pipeline(workspace: Workspace) -> None:
    workspace.run("prepare")
    Path("data/empty").mkdir()
    (problem,) = refusal(workspace, "--set", "model.pretrained=data/empty")
    assert problem.startswith("params.yaml model.pretrained: 'data/empty' has no model_index.json;")


def test_base_of_pickles_only(workspace: Workspace) -> None:
    workspace.run("prepare")
    shutil.copytree("data/base", "data/pickles")
    os.rename("data/pickles/vae/diffusion_pytorch_model.safetensors", "data/pickles/vae/diffusion_pytorch_model.bin")
    (problem,) = refusal(workspace, "--set", "model.pretrained=data/pickles")
    assert problem.startswith("data/pickles/vae: only diffusion_pytorch_model.bin, a pickle, which can run code")


def test_latents_that_are_not_finite(workspace: Workspace) -> None:
    workspace.run("prepare")
    shutil.copytree("data/base", "data/broken")
    path = Path("data/broken/vae/diffusion_pytorch_model.safetensors")
    tensors = load_tensors(path)
    save_tensors(path, tensors | {"quant_conv.bias": torch.full_like(tensors["quant_conv.bias"], torch.nan)})
    assert refusal(workspace, "--set", "model.pretrained=data/broken") == (
        "params.yaml model.dtype: float32 gives latents that are not finite; fetch model.pretrained again",
    )


def test_long_captions_are_counted(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[1]["text"] = "many words " * 20
    write_rows(Path("data/raw"), rows)
    workspace.run("prepare")
    lines = workspace.run("cache_latents")
    assert "warning: 1 captions have more than 20 tokens; the rest is not read:" in lines
    assert any(line.endswith("tokens: " + ("many words " * 20)[:77] + "...") for line in lines)


def test_progress_is_logged_where_there_is_no_terminal(workspace: Workspace) -> None:
    workspace.run("prepare")
    lines = [line for line in workspace.run("cache_latents") if line.startswith("latents ")]
    assert [line.split()[1:4] for line in lines] == [["4", "/", "8"], ["8", "/", "8"]]
