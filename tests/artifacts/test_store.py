from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from lora_dag.artifacts.store import Store
from lora_dag.core.tensors import save_tensors
from tests.helpers.errors import refused


def test_an_entry_is_whole_or_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensors = {"mean": torch.arange(4.0), "std": torch.ones(2, dtype=torch.bfloat16)}
    assert not store.has("latents", "ab12") and store.load("latents", "ab12") is None
    store.save("latents", "ab12", tensors)
    assert store.path("latents", "ab12") == tmp_path / "latents" / "ab" / "ab12.safetensors"
    assert store.has("latents", "ab12") and not store.has("text", "ab12")
    found = store.load("latents", "ab12")
    assert found is not None and found.made_by == ""
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


def test_an_entry_says_what_made_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("latents", "ab12", {"mean": torch.arange(4.0)}, '{"torch": "2.13.0"}')
    found = store.load("latents", "ab12")
    assert found is not None and found.made_by == '{"torch": "2.13.0"}'
    path = store.path("latents", "ab12")
    path.write_bytes(path.read_bytes().replace(b"2.13.0", b"2.12.0"))
    assert store.load("latents", "ab12") is None  # the checksum is over that too


def test_an_entry_under_another_name_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for index, key in enumerate(("ab12", "ab34")):
        store.save("latents", key, {"mean": torch.full((4,), float(index))})
    first, second = (store.path("latents", key) for key in ("ab12", "ab34"))
    blobs = first.read_bytes(), second.read_bytes()
    second.write_bytes(blobs[0]), first.write_bytes(blobs[1])
    assert store.load("latents", "ab12") is None and store.load("latents", "ab34") is None
    other = store.path("text", "ab12")
    other.parent.mkdir(parents=True)
    other.write_bytes(blobs[0])
    assert store.load("text", "ab12") is None


def test_entries_of_the_first_version_are_read(tmp_path: Path) -> None:
    """Their checksum is over what made them and the tensors alone."""
    store, values = Store(tmp_path), torch.arange(4.0)
    checksum = hashlib.sha256(b"{}mean torch.float32 (4,)\n" + values.numpy().tobytes()).hexdigest()
    save_tensors(store.path("latents", "ab12"), {"mean": values}, {"made_by": "{}", "sha256": checksum})
    found = store.load("latents", "ab12")
    assert found is not None and found.made_by == "{}" and torch.equal(found.tensors["mean"], values)


def test_no_bit_of_a_header_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("latents", "ab12", {"mean": torch.arange(4.0), "std": torch.ones(2)}, '{"torch": "2.13.0"}')
    path = store.path("latents", "ab12")
    blob = path.read_bytes()
    for bit in range(8 * (len(blob) - 24)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        store.has("latents", "ab12")
        found = store.load("latents", "ab12")
        assert found is None or set(found.tensors) == {"mean", "std"}


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"mean":{"dtype":"F32","data_offsets":[0.4096]}}', b"[]", b"{}"])
def test_a_header_of_another_shape_is_damage(tmp_path: Path, header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    path = store.path("latents", "ab12")
    path.parent.mkdir(parents=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert not store.has("latents", "ab12") and store.load("latents", "ab12") is None
    assert f"{path}: damaged. " in caplog.text


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
    at_work = refused("store-in-use")
    with store.in_use(), Store(tmp_path).in_use(), at_work, store.exclusive():
        pass
    with store.exclusive():
        pass
