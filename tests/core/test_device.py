"""Values that lora_dag.core.device reads from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.helpers.workspace import REPOSITORY

FAULTS = """
import resource
from lora_dag.core import device
{call}
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    del block
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


SETUP = """
from types import SimpleNamespace
device.setup(SimpleNamespace(device="cpu", num_threads=1), SimpleNamespace(dtype="float32"))
"""
TRIM = """
from pathlib import Path
from lora_dag.core import device
def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 10**6
blocks = [bytearray(100_000) for _ in range(2000)]
above = bytearray(100_000)
full = megabytes()
del blocks
kept = megabytes()
device.return_freed_memory()
print(full - kept, full - megabytes())
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")


def python(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True).stdout


@glibc
def test_only_training_keeps_freed_memory_for_its_next_step() -> None:
    def faults(call: str) -> int:
        """Page faults of taking 64 MiB a second time."""
        return int(python(FAULTS.format(call=call)))

    assert faults("device.keep_freed_memory()") < 10 < faults(SETUP)


@glibc
def test_freed_memory_below_used_memory_is_returned() -> None:
    at_free, at_trim = map(int, python(TRIM).split())
    assert at_free < 100 and at_trim > 180


def test_new_tensors_are_not_filled() -> None:
    """With NaN everywhere, every load of a model would write it twice."""
    assert python(FILLED) == "False\n"


FILLED = f"from lora_dag.core import device\n{SETUP}\nimport torch; print(bool(torch.empty(2**22).isnan().any()))"
