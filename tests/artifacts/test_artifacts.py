"""Artifacts that were edited by hand, cut off or written by another version are one line, not a traceback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dag.artifacts import latent_cache
from lora_dag.artifacts.adapter import Adapter
from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
from lora_dag.artifacts.manifest import Manifest, natural_key
from lora_dag.core.console import UserError
from tests.helpers.caches import write_cache
from tests.helpers.errors import refused
from tests.helpers.workspace import Workspace, make_image

STAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "data/prepared/manifest.jsonl": ("prepare", Manifest.load),
    "data/latents/manifest.json": ("cache_latents", LatentCache),
    "data/adapter/adapter.json": ("train", Adapter.load),
}


@pytest.mark.parametrize("text", ["{}", "[]", "", "{", "null", '{"items": [{"file_name": "a.png"}]}'])
@pytest.mark.parametrize("name", STAGES)
def test_content_of_another_shape_names_the_stage_that_writes_it(tmp_path: Path, name: str, text: str) -> None:
    stage, load = STAGES[name]
    path = tmp_path / Path(name).name
    path.write_text(text)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{path.name}: (edited by hand|invalid JSON)") as caught:
        load(tmp_path)
    assert f"stages.{stage}" in str(caught.value) or "dvc repro" in str(caught.value)


def test_a_cache_without_a_caption_that_training_needs_is_refused_at_once(workspace: Workspace) -> None:
    workspace.run("prepare")
    workspace.run("cache_latents")
    path = Path("data/latents/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["captions"][""]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="edited by hand"):
        LatentCache(path.parent)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda m: m["items"][2].update(loss_weight="x"), r"items\.2\.loss_weight: Input should be a valid number"),
        (lambda m: m["items"][2].update(loss_weight=float("nan")), r"items\.2\.loss_weight: .*finite number"),
        (lambda m: m["items"][2].update(loss_weight=0), r"items\.2\.loss_weight: .*greater than 0"),
        (lambda m: m["items"][2].update(repeats=0), r"items\.2\.repeats: .*greater than or equal to 1"),
        (lambda m: m["items"][2].update(views=[]), r"items\.2\.views: .*at least 1 item"),
        (lambda m: m["items"][2].update(other=float("nan")), r"items\.2\.other: Unexpected keyword"),
        (lambda m: m.update(items=[]), r"items: .*at least 1 item"),
        (lambda m: m.update(base=None), r"base: Input should be an object"),
        (lambda m: m.update(captions=[]), r"captions: Input should be an object"),
        (
            lambda m: m["shards"].update({"../../params.yaml": "0" * 64}),
            r"shards\.\.\./\.\./params\.yaml\.\[key\]: .*pattern",
        ),
        (lambda m: m["shards"].update({"text/0.safetensors": 3}), r"shards\.text/0\.safetensors: .*valid string"),
    ],
)
def test_a_cache_edited_by_hand_says_where(tmp_path: Path, edit: Callable[[Any], None], expected: str) -> None:
    path = a_cache(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=rf"manifest\.json: edited by hand or of another version \({expected}"
    ) as caught:
        LatentCache(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("Run `python -m stages.cache_latents` again.")


def test_a_shard_that_is_none_is_damaged_also_if_its_digest_was_edited(tmp_path: Path) -> None:
    path = a_cache(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    name = min(manifest["shards"])
    (tmp_path / name).write_bytes(b"nothing")
    manifest["shards"][name] = hashlib.sha256(b"nothing").hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"{name}: missing or damaged\. Run `python -m stages\.cache_latents` again"):
        LatentCache(tmp_path)


def a_cache(folder: Path) -> Path:
    items = [CachedItem(f"{i}.png", "train", "", ("",), "c", (f"v{i}",)) for i in range(3)]
    write_cache(folder, items, {f"v{i}": torch.zeros(4, 2, 2) for i in range(3)}, {"": torch.zeros(3, 8)})
    return folder


@pytest.mark.parametrize("field", ["captions", "views", "masks"])
def test_a_cache_without_an_entry_that_an_item_names_is_refused_at_once(workspace: Workspace, field: str) -> None:
    argv = ("--set", "dataset.mask=alpha")
    translucent = make_image(3)
    translucent.putalpha(100)
    translucent.save("data/raw/03.png")  # the fourth item; opaque ones need no mask
    workspace.run("prepare", *argv)
    workspace.run("cache_latents", *argv)
    path = Path("data/latents/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["items"][3][field][0] = "another"
    path.write_text(json.dumps(manifest))
    with refused("artifact-damaged", "another", "`python -m stages.cache_latents`"):
        LatentCache(path.parent)


def test_a_cache_keeps_what_training_asks_for(tmp_path: Path) -> None:
    item = CachedItem("a.png", "train", "one", ("one", "two"), "c", ("v1", "v2"), ("m1", "m2"), 3, 0.5, True)
    captions = {"": "t0", "one": "t1", "two": "t2"}
    entries = {
        "images": {"mean": torch.zeros(4, 2, 2), "std": torch.ones(4, 2, 2)},
        "masks": {"mask": torch.full((1, 2, 2), 0.25)},
        "text": {"prompt_embeds": torch.zeros(3, 8)},
    }

    def load(kind: str, key: str) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in entries[kind].items()}

    latent_cache.write(tmp_path, [item], captions, {}, ["prompt_embeds"], load)
    cache = LatentCache(tmp_path)
    assert cache.items == [item]
    assert torch.equal(cache.mask("m2"), torch.full((1, 2, 2), 0.25))
    assert all(cache.prompt(caption)["prompt_embeds"].shape == (3, 8) for caption in captions)


def test_conditioning_by_view_is_kept_beside_the_view_and_missed_at_once(tmp_path: Path) -> None:
    item = CachedItem("a.png", "train", "", ("",), "c", ("v1", "v2"))
    ids = {"v1": torch.arange(6.0), "v2": torch.arange(6.0) + 1}

    def load(kind: str, key: str) -> dict[str, torch.Tensor]:
        if kind == "text":
            return {"prompt_embeds": torch.zeros(3, 8)}
        return {"mean": torch.zeros(4, 2, 2), "std": torch.ones(4, 2, 2), "add_time_ids": ids[key].clone()}

    latent_cache.write(tmp_path, [item], {"": "t0"}, {}, ["prompt_embeds"], load, ["add_time_ids"])
    cache = LatentCache(tmp_path)
    assert set(cache.prompt("")) == {"prompt_embeds"}
    assert torch.equal(cache.prompt("", "v2")["add_time_ids"], ids["v2"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"view_conditioning": ["other"]}))
    with pytest.raises(UserError, match="Run `python -m stages.cache_latents` again."):
        LatentCache(tmp_path)


def test_shards_are_named_by_their_owners(tmp_path: Path) -> None:
    """An entry that two images share stands with the first by name."""
    rows = [CachedItem(f"{i}.png", "train", "same", ("same",), "c", ("v0" if i < 2 else f"v{i}",)) for i in range(5)]
    owners = latent_cache.owners(rows, {"": "t0", "same": "t1"})
    assert owners["images"] == {"v0": "0.png", "v2": "2.png", "v3": "3.png", "v4": "4.png"}
    assert owners["text"] == {"t0": "", "t1": "0.png"}
    assert owners["masks"] == {}


def test_prepared_without_its_second_file_is_refused(workspace: Workspace) -> None:
    workspace.run("prepare")
    Path("data/prepared/dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json: no such file\. Run `python -m stages\.prepare`"):
        Manifest.load(Path("data/prepared"))


def test_numbers_in_names_compare_as_numbers() -> None:
    names = ["a.parquet::10", "a.parquet::9", "b/2.png", "a", "b/10.png", "10.png", "9.png", "b/2x.png"]
    assert sorted(names, key=natural_key) == [
        *("9.png", "10.png", "a", "a.parquet::9", "a.parquet::10"),
        *("b/2.png", "b/2x.png", "b/10.png"),
    ]
