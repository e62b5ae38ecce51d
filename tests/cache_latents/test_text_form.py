"""Embeddings on the disk: in the encoder's dtype; entries and caches of earlier versions, which held float32."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from typing import Any

import pytest
import torch

from lora_dag.artifacts import packing
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.store import Store
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, sha256_file, write_json
from lora_dag.core.tensors import load_tensors, save_tensors
from tests.helpers import forked
from tests.helpers.encodings import LATENTS, Calls, encode, words
from tests.helpers.workspace import Workspace

HALF = ("model.dtype=bfloat16",)
ENCODES_NOTHING = "captions    encoded 0, reused 9"
CONVERTED = "captions    9 entries of an earlier version converted; `lora-dag gc` deletes the earlier ones"


@pytest.fixture
def half(workspace: Workspace, calls: Calls) -> Workspace:
    """Return a workspace whose captions are encoded in bfloat16."""
    encode(workspace, *HALF)
    calls.take()
    return workspace


def first_key(caption: str, dtype: str = "bfloat16") -> str:
    """Return the key of a caption as the first version made it."""
    base = LatentCache(LATENTS).base
    fields = {
        "caption": caption,
        "text": {name: base[name] for name in ("tokenizer", "text_encoder")},
        "family": "sd",
        "dtype": dtype,
        "device": "cpu",
        "batch_size": 4,
        "format": 1,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def to_first_form(workspace: Workspace) -> Store:
    """Replace the store's embeddings by those of the first version: float32 in full length, under its keys."""
    store, captions = Store(), LatentCache(LATENTS).manifest["captions"]
    for caption, key in captions.items():
        entry = store.load("text", key)
        assert entry is not None and packing.SHAPE not in "".join(entry.tensors)
        tensors = {name: tensor.float() for name, tensor in entry.tensors.items()}
        store.save("text", first_key(caption), tensors, entry.made_by)
        store.path("text", key).unlink()
    return store


def run(workspace: Workspace) -> list[str]:
    return workspace.run("cache_latents", *words(HALF))


def test_embeddings_are_kept_in_the_encoders_dtype(half: Workspace) -> None:
    cache = LatentCache(LATENTS)
    for key in cache.manifest["captions"].values():
        entry = Store().load("text", key)
        assert entry is not None and entry.tensors["prompt_embeds"].dtype == torch.bfloat16
        assert cache.tensors[f"{key}.prompt_embeds"].dtype == torch.bfloat16
    assert cache.prompt("")["prompt_embeds"].dtype == torch.float32
    assert cache.latents(cache.items[0].views[0])[0].dtype == torch.float32


def test_float32_keeps_keys_and_bytes_of_earlier_versions(cached: Workspace) -> None:
    manifest = read_json(LATENTS / "manifest.json")
    assert "text_form" not in manifest
    for caption, key in manifest["captions"].items():
        assert key == first_key(caption, "float32")
        entry = Store().load("text", key)
        assert entry is not None and [*entry.tensors] == ["prompt_embeds"]
        assert entry.tensors["prompt_embeds"].dtype == torch.float32


def test_entries_of_an_earlier_version_are_converted_once(half: Workspace, calls: Calls) -> None:
    before, store = half.tree("data/latents"), to_first_form(half)
    earlier = {path for kind, path in store.entries() if kind == "text"}
    assert "a run would encode nothing" in half.run("status", *words(HALF))[-1]
    lines = run(half)
    assert lines.count(CONVERTED) == 1 and ENCODES_NOTHING in lines
    assert calls.take() == (0, 0) and calls.loaded == []
    assert half.tree("data/latents") == before
    lines = run(half)
    assert CONVERTED not in lines and ENCODES_NOTHING in lines
    for path in earlier:
        os.utime(path, (0, 0))  # no run has used them since
    half.run("gc", "--older-than", "30d")
    assert not any(path.exists() for path in earlier)
    assert ENCODES_NOTHING in run(half) and half.tree("data/latents") == before


def test_a_damaged_entry_of_an_earlier_version_is_encoded(half: Workspace, calls: Calls) -> None:
    before, store = half.tree("data/latents"), to_first_form(half)
    path = store.path("text", first_key("thing 3"))
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert half.run("status", *words(HALF))[-1] == "a run would encode 0 views and 1 caption"
    lines = run(half)
    assert CONVERTED.replace("9", "8") in lines and "captions    encoded 1, reused 8" in lines
    assert calls.take() == (0, 1) and half.tree("data/latents") == before


def test_a_killed_conversion_goes_on(half: Workspace, calls: Calls) -> None:
    before, _ = half.tree("data/latents"), to_first_form(half)

    def dies() -> None:
        save, left = Store.save, iter(range(5))

        def saved(*args: Any) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args)

        Store.save = saved  # type: ignore[method-assign]
        run(half)

    assert forked.exit_code(dies) == -signal.SIGKILL
    lines = run(half)
    assert CONVERTED.replace("9", "4") in lines and ENCODES_NOTHING in lines
    assert calls.take() == (0, 0) and half.tree("data/latents") == before


def test_a_cache_of_an_earlier_version_is_read(half: Workspace) -> None:
    """Its embeddings are float32 in full length, and its manifest names no form."""
    found = LatentCache(LATENTS)
    prompts = {caption: found.prompt(caption)["prompt_embeds"] for caption in found.manifest["captions"]}
    manifest = read_json(LATENTS / "manifest.json")
    assert manifest.pop("text_form") == 2
    for path in sorted((LATENTS / "text").iterdir()):
        save_tensors(path, {name: tensor.float() for name, tensor in load_tensors(path).items()})
        manifest["shards"][f"text/{path.name}"] = sha256_file(path)
    write_json(LATENTS / "manifest.json", manifest)
    earlier = LatentCache(LATENTS)
    assert {tensor.dtype for name, tensor in earlier.tensors.items() if "prompt" in name} == {torch.float32}
    for caption, prompt in prompts.items():
        assert torch.equal(earlier.prompt(caption)["prompt_embeds"], prompt)


def test_a_form_of_a_later_version_is_refused(half: Workspace) -> None:
    manifest = read_json(LATENTS / "manifest.json")
    write_json(LATENTS / "manifest.json", manifest | {"text_form": 3})
    with pytest.raises(UserError, match="text_form"):
        LatentCache(LATENTS)
