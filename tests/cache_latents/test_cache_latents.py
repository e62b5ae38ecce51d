"""Encoded and reused entries, counted at the encoders."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Manifest
from lora_dag.core import progress
from lora_dag.core.tensors import load_tensors, save_tensors
from lora_dag.images import decode
from lora_dag.images.read import image_reader
from stages.cache_latents import context, encoding, latents
from tests.helpers.encodings import LATENTS, Calls, changed_shards, encode, from_empty_store
from tests.helpers.images import see_through
from tests.helpers.workspace import Workspace, make_image, read_rows, write_rows


def test_second_run_encodes_nothing_and_gives_the_same_bytes(cached: Workspace, calls: Calls) -> None:
    first = cached.tree("data/latents")
    shutil.rmtree(LATENTS)
    assert encode(cached) == ("images      encoded 0, reused 8", "captions    encoded 0, reused 9")
    assert calls.loaded == [] and calls.take() == (0, 0)
    assert cached.tree("data/latents") == first


def test_one_edited_image_is_one_encode_in_one_shard(cached: Workspace, calls: Calls) -> None:
    before = cached.tree("data/latents")
    make_image(50).save("data/raw/05.png")
    assert encode(cached) == ("images      encoded 1, reused 7", "captions    encoded 0, reused 9")
    assert calls.loaded == ["load_vae"] and calls.take() == (1, 0)
    after = cached.tree("data/latents")
    shard = hashlib.sha256(b"05.png").hexdigest()[0]
    assert changed_shards(before, after) == [f"images/{shard}.safetensors"]
    assert after == from_empty_store(cached)


def test_one_edited_image_in_bfloat16(workspace: Workspace, calls: Calls) -> None:
    encode(workspace, "model.dtype=bfloat16")
    calls.take()
    make_image(50).save("data/raw/05.png")
    assert encode(workspace, "model.dtype=bfloat16")[0] == "images      encoded 1, reused 7"
    assert calls.take() == (1, 0)
    assert workspace.tree("data/latents") == from_empty_store(workspace, "model.dtype=bfloat16")


def test_one_edited_caption_is_one_text_encode_in_one_shard(cached: Workspace, calls: Calls) -> None:
    before = cached.tree("data/latents")
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = "green circle"
    write_rows(Path("data/raw"), rows)
    assert encode(cached) == ("images      encoded 0, reused 8", "captions    encoded 1, reused 8")
    assert calls.loaded == ["load_text"] and calls.take() == (0, 1)
    assert "thing 2" not in LatentCache(LATENTS).manifest["captions"]
    after = cached.tree("data/latents")
    shard = hashlib.sha256(b"02.png").hexdigest()[0]
    assert changed_shards(before, after) == [f"text/{shard}.safetensors"]
    assert after == from_empty_store(cached)


def test_renamed_image_is_no_encode(cached: Workspace, calls: Calls) -> None:
    os.rename("data/raw/02.png", "data/raw/zz.png")
    rows = read_rows(Path("data/raw"))
    rows[2]["file_name"] = "zz.png"
    write_rows(Path("data/raw"), rows)
    assert encode(cached)[0] == "images      encoded 0, reused 8"
    assert calls.take() == (0, 0)


def test_moved_dataset_is_no_encode(cached: Workspace, calls: Calls) -> None:
    os.rename("data/raw", "data/moved")
    assert encode(cached, "dataset.source=data/moved")[0] == "images      encoded 0, reused 8"
    assert calls.take() == (0, 0)


def test_another_dataset_encodes_only_new_images(cached: Workspace, calls: Calls) -> None:
    """Six of its eight images under other names, with captions beside them."""
    Path("data/other").mkdir()
    for index in range(2, 10):
        make_image(index).save(f"data/other/new-{index}.png")
        Path(f"data/other/new-{index}.txt").write_text(f"thing {index}\n")
    assert encode(cached, "dataset.source=data/other") == (
        "images      encoded 2, reused 6",
        "captions    encoded 2, reused 7",
    )
    assert calls.take() == (2, 2)


def test_equal_images_are_encoded_once(workspace: Workspace, calls: Calls) -> None:
    shutil.copy("data/raw/00.png", "data/raw/twin.png")
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": "twin.png", "text": "x"}])
    assert encode(workspace)[0] == "images      encoded 8, reused 1"
    assert calls.take() == (8, 9)


@pytest.mark.parametrize(
    ("changes", "num_images", "num_captions"),
    [
        (("dataset.resolution=40",), 8, 0),
        (('dataset.background="#000000"',), 0, 0),  # the images are opaque
        (("dataset.image_interpolation_mode=bicubic",), 8, 0),
        (("model.dtype=bfloat16",), 8, 8),
        (("cache.batch_size=3",), 8, 8),
        (("cache.tiling=true",), 8, 0),
        (("dataset.seed=5",), 0, 0),
        (("dataset.mask=alpha",), 0, 0),
        (("cache.num_variants=3",), 0, 0),  # all of them are the same center crop
        (("lora.rank=4", "train.learning_rate=1e-4", "runtime.log_every_n_steps=3"), 0, 0),
    ],
)
def test_number_of_entries_that_a_change_encodes(
    cached: Workspace, calls: Calls, changes: tuple[str, ...], num_images: int, num_captions: int
) -> None:
    first, second = encode(cached, *changes)
    assert calls.take() == (num_images, num_captions)
    num_texts = num_captions + (num_captions > 0)  # the empty caption too
    assert first == f"images      encoded {num_images}, reused {8 - num_images}"
    assert second == f"captions    encoded {num_texts}, reused {9 - num_texts}"
    encode(cached)
    assert calls.take() == (0, 0)  # and back again


def test_another_background_encodes_the_images_that_let_it_through(cached: Workspace, calls: Calls) -> None:
    see_through(make_image(5)).save("data/raw/05.png")
    encode(cached)
    before = {item.file_name: item for item in LatentCache(LATENTS).items}
    assert calls.take() == (1, 0)
    encode(cached, 'dataset.background="#000000"')
    assert calls.take() == (1, 0)
    differ = [item for item in LatentCache(LATENTS).items if before[item.file_name].views != item.views]
    assert [item.file_name for item in differ] == ["05.png"]
    assert differ[0].content != before["05.png"].content


def test_another_version_of_the_preprocessing_encodes_all_images(
    cached: Workspace, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
    encode(cached)
    assert calls.take() == (8, 0)


def test_another_crop_encodes_the_images_that_it_moves(cached: Workspace, calls: Calls) -> None:
    """Square images have one crop only."""
    make_image(9, width=80, height=48).save("data/raw/wide.png")
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": "wide.png", "text": "wide"}])
    encode(cached)
    assert calls.take() == (1, 1)
    encode(cached, "dataset.crop=random")
    assert calls.take() == (1, 0)


def test_more_variants_encode_the_new_ones(cached: Workspace, calls: Calls) -> None:
    """Only training images have more views; held-out images have one."""
    items = Manifest.load(Path("data/prepared")).items
    num_train = sum(item.split == "train" for item in items)
    assert 0 < num_train < 8
    assert encode(cached, "dataset.flip=true", "cache.num_variants=2")[0].startswith(
        f"images      encoded {num_train}, "
    )
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


def test_progress_is_logged_where_there_is_no_terminal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.run("prepare")
    monkeypatch.setattr(progress, "SECONDS", 0)
    lines = [line for line in workspace.run("cache_latents") if line.startswith("latents ")]
    assert [line.split()[1:4] for line in lines] == [["4", "of", "8"], ["8", "of", "8"]]


def test_images_are_read_in_the_order_of_rows(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is numeric. Batches follow it, which determines the last bits of entries."""
    shutil.rmtree("data/raw")
    Path("data/raw").mkdir()
    for index in range(12):
        make_image(index, 64 if index % 3 else 48).save(f"data/raw/{index}.png")
    write_rows(Path("data/raw"), [{"file_name": f"{i}.png", "text": f"thing {i}"} for i in range(12)])
    workspace.run("prepare")
    read: list[str] = []
    for module in (encoding, latents):
        monkeypatch.setattr(module, "NUM_READERS", 1)
    original = image_reader("data/raw")
    monkeypatch.setattr(context, "image_reader", lambda source: lambda name: read.append(name) or original(name))
    workspace.run("cache_latents")
    assert read == [f"{index}.png" for index in range(12)]
    names = [item.file_name for item in LatentCache(LATENTS).items]
    assert names == sorted(names)  # what is written does not depend on it
