from __future__ import annotations

from pathlib import Path

import torch

from lora_dag.core.tensors import load_tensors, save_tensors


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
