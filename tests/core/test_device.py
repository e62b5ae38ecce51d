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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    def faults(call: str) -> int:
        """Page faults of taking 64 MiB a second time."""
        done = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], cwd=REPOSITORY, capture_output=True)
        return int(done.stdout)

    kept, given_back = faults("device.keep_freed_memory()"), faults("")
    assert kept < 10 < given_back
