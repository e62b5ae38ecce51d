from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.artifacts.store import Store
from stages.core.console import UserError


def test_an_entry_is_whole_or_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensors = {"mean": torch.arange(4.0), "std": torch.ones(2, dtype=torch.bfloat16)}
    assert not store.has("latents", "ab12") and store.load("latents", "ab12") is None
    store.save("latents", "ab12", tensors)
    assert store.path("latents", "ab12") == tmp_path / "latents" / "ab" / "ab12.safetensors"
    assert store.has("latents", "ab12") and not store.has("text", "ab12")
    found = store.load("latents", "ab12")
    assert found is not None
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_what_was_cut_off_is_seen_without_reading_it(tmp_path: Path, length: int) -> None:
    store = Store(tmp_path)
    store.save("latents", "ab12", {"mean": torch.arange(400.0)})
    path = store.path("latents", "ab12")
    path.write_bytes(path.read_bytes()[:length])
    assert not store.has("latents", "ab12")


def test_what_was_changed_is_seen_on_reading(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("latents", "ab12", {"mean": torch.arange(400.0)})
    path = store.path("latents", "ab12")
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert store.has("latents", "ab12") and store.load("latents", "ab12") is None


def test_many_runs_share_a_store_and_none_while_it_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    at_work = pytest.raises(UserError, match="a run of cache_latents is at work here; wait for its end")
    with store.in_use(), Store(tmp_path).in_use(), at_work, store.alone():
        pass
    with store.alone():
        pass
