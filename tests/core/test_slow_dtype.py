"""A dtype that is slow on this CPU speaks up, by measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from lora_dag.core import device, slow_dtype
from lora_dag.core.params import ModelParams
from lora_dag.core.slow_dtype import Times, warn_if_slow, widths
from tests.helpers.errors import assert_line
from tests.helpers.workspace import REPOSITORY, Workspace

CPU = torch.device("cpu")
FAST = {"convolution": 0.002, "matrix product": 0.001}


def model(dtype: str = "bfloat16", pretrained: Path | str = "data/base") -> ModelParams:
    return ModelParams(family="sd", pretrained=str(pretrained), variant=None, dtype=dtype, quantization=None)


def logged(convolution: float, product: float, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines of a probe that receives fixed times for bfloat16."""
    caplog.clear()
    slow = {"convolution": convolution, "matrix product": product}
    warn_if_slow(CPU, model(), lambda _: {"float32": FAST, "bfloat16": slow})
    return caplog.messages


def test_a_slow_dtype_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    values = ("params.yaml model.dtype", "bfloat16", "model.dtype=float32")
    for times, ratios in (
        ((0.074, 0.016), ("convolution 37 times", "matrix product 16 times")),
        ((0.472, 0.001), ("convolution 236 times", "matrix product 1.0 times")),
        ((0.0036, 0.00101), ("convolution 1.8 times", "matrix product 1.0 times")),
    ):
        (line,) = logged(*times, caplog)
        assert_line(line, "slow-dtype", *values, *ratios)


def test_up_to_half_as_much_again_is_not_slow(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(0.003, 0.0015, caplog) == [] and logged(0.001, 0.0005, caplog) == []


def test_nothing_is_measured_in_float32_or_on_a_gpu() -> None:
    def never(_: ModelParams) -> Times:
        raise AssertionError

    warn_if_slow(CPU, model("float32"), never)
    warn_if_slow(torch.device("cuda"), model("float16"), never)


@pytest.fixture
def any_precision(encoded: Workspace) -> Iterator[None]:
    """accelerate takes one for a whole process, and ``encoded`` may have trained."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_stage_that_computes_in_it_says_so(
    encoded: Workspace, monkeypatch: pytest.MonkeyPatch, any_precision: None
) -> None:
    slow = {"float32": FAST, "bfloat16": {"convolution": 0.074, "matrix product": 0.016}}
    monkeypatch.setattr(slow_dtype, "times", lambda _: slow)
    argv = ("--set", "model.dtype=bfloat16")
    for stage in ("check", "cache_latents", "train", "validate"):
        lines = encoded.run(stage, *argv)
        found = [line for line in lines if line.endswith("[slow-dtype]")]
        assert len(found) == 1, stage
    assert not any("[slow-dtype]" in line for line in encoded.run("check"))


@pytest.mark.parametrize(
    ("vae", "denoiser", "folder", "expected"),
    [
        ([16, 48, 96], {"block_out_channels": [64, 128, 192]}, "unet", (96, 192)),
        ([128, 512], {"num_attention_heads": 24, "attention_head_dim": 128}, "transformer", (256, 640)),
        ([8, 16], {"dim": 32, "n_heads": 2}, "transformer", (16, 32)),
    ],
)
def test_the_probe_is_as_wide_as_the_model(
    tmp_path: Path, vae: list[int], denoiser: dict[str, object], folder: str, expected: tuple[int, int]
) -> None:
    for name, config in (("vae", {"block_out_channels": vae}), (folder, denoiser)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert widths(model(pretrained=tmp_path)) == expected


def test_every_family_has_widths(bases: dict[str, Path]) -> None:
    for folder in bases.values():
        assert all(8 <= width <= 64 for width in widths(model(pretrained=folder)))


MEASURE = """
import json, time, torch
from lora_dag.core import slow_dtype
from lora_dag.core.params import ModelParams
torch.set_num_threads(1)
slow_dtype.widths = lambda model: (256, 640)
began = time.thread_time()
found = slow_dtype.times(ModelParams(family="sd", pretrained="-", variant=None, dtype="bfloat16", quantization=None))
print(json.dumps([time.thread_time() - began, found]))
"""


@pytest.mark.parametrize("hidden", [{}, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_a_real_probe_takes_less_than_a_second(hidden: dict[str, str]) -> None:
    """Of the widest layers, with this CPU's units for bfloat16 and without; CPU time, whatever else runs here."""
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | hidden, capture_output=True, text=True, check=True)
    seconds, found = json.loads(done.stdout)
    assert seconds < 1
    assert found.keys() == {"float32", "bfloat16"}
    assert all(0 < taken < 0.5 for by_name in found.values() for taken in by_name.values())
    if hidden and "avx2" in Path("/proc/cpuinfo").read_text():
        assert sum(found["bfloat16"].values()) > slow_dtype.TOO_SLOW * sum(found["float32"].values())


def test_the_probe_moves_no_random_number(tiny_base: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    began = time.monotonic()
    device.log_device(CPU, model(pretrained=tiny_base))
    assert time.monotonic() - began < 10
    assert torch.equal(torch.rand(1), expected)
