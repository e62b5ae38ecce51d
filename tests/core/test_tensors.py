from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from lora_dag.core.files import sha256_file
from lora_dag.core.tensors import MappedTensors, load_tensors, save_tensors


def test_safetensors_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    # The library hashes metadata keys with a new seed at each call, so a few calls show an unsorted header.
    for number, order in enumerate(["abcdef", "fedcba"] * 4):
        tensors = {name: torch.full((3,), float(ord(name))) for name in order}
        save_tensors(tmp_path / str(number), tensors, {name: name * 2 for name in order})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert torch.equal(load_tensors(tmp_path / "0")["c"], torch.full((3,), 99.0))


def test_metadata_is_readable_by_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.arange(5)[::2]}
    save_tensors(tmp_path / "x", tensors, {"z": "größer", "a": "1"})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"z": "größer", "a": "1"}
        assert torch.equal(file.get_tensor("a"), tensors["a"])
        assert torch.equal(file.get_tensor("b"), tensors["b"])


def mapped(*paths: Path) -> MappedTensors:
    tensors = MappedTensors()
    assert [tensors.add(path) for path in paths] == [sha256_file(path) for path in paths]
    return tensors


def test_mapped_tensors_are_those_saved(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5),
        "b": torch.randn(3, 2),
        "c": torch.randn(7).bfloat16(),
        "d": torch.randn(1).half(),
        "e": torch.zeros(0, 4),
    }
    save_tensors(tmp_path / "x", tensors, {"z": "größer"})
    save_tensors(tmp_path / "y", {"f": torch.ones(3)})
    found = mapped(tmp_path / "x", tmp_path / "y")
    assert [*found] == [*"abcdef"] and len(found) == 6 and "g" not in found
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_a_replaced_file_is_read_as_it_was(tmp_path: Path) -> None:
    path, before = tmp_path / "x", torch.randn(100_000)
    save_tensors(path, {"a": before})
    found = mapped(path)
    save_tensors(path, {"a": torch.zeros(100_000)})
    assert torch.equal(found["a"], before)
    path.unlink()
    assert torch.equal(found["a"], before)


@pytest.mark.parametrize("content", [b"", b"\1", b"\0" * 20, b"\xff" * 100, None])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x"
    save_tensors(path, {"a": torch.zeros(10, dtype=torch.int8)})
    path.write_bytes(path.read_bytes() if content is None else content)  # None: a dtype that no cache has
    with pytest.raises((ValueError, RuntimeError)):
        MappedTensors().add(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four files of 16 MB, read twice in parts of 64 KB, less than 4 MB stay in the memory of the process."""
    monkeypatch.setattr("lora_dag.core.tensors.MAX_MAPPED", 2**20)
    paths = [tmp_path / f"file-{number}" for number in range(4)]
    for number, path in enumerate(paths):
        rows = {f"{number}.{index}": torch.full((2**14,), float(index)) for index in range(256)}
        save_tensors(path, rows)
    found = mapped(*paths)
    assert sum(map(resident, paths)) < 4e6
    first = found["0.7"]
    for _ in range(2):
        for name, tensor in found.items():
            assert float(tensor.sum()) == float(name.split(".")[1]) * 2**14
    assert torch.equal(first, torch.full((2**14,), 7.0))  # also after its pages were given back
    assert sum(map(resident, paths)) < 4e6


def resident(path: Path) -> int:
    """Return the bytes of a mapped file in the memory of this process. Source: proc_pid_smaps(5)."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    (found,) = re.findall(rf"{path}\n(?:.*\n){{1,8}}?Rss: +(\d+) kB", text)
    return 1024 * int(found)
