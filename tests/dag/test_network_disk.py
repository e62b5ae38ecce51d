"""The state directory on a network disk: ``LORA_TEST_DISK=/mnt/a:/mnt/b``, one folder as two clients see it.

Two mounts on one machine do, such as by sshfs, which carries no locks from one to the other.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkout import Checkout

DISK = os.environ.get("LORA_TEST_DISK", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(":" not in DISK, reason="LORA_TEST_DISK names no two mounts of one folder"),
]
LONG = [
    word
    for change in ("num_steps=300", "checkpoint_every_n_steps=10", "snapshot_every_n_steps=100")
    for word in ("--set", f"train.{change}")
]


class Node:
    """A machine: the checkout, and its own way to the shared folder."""

    def __init__(self, checkout: Checkout, state: str) -> None:
        self.path = checkout.path
        self.environment = checkout.environment | {"LORA_STATE_DIR": state}

    def encode(self, out: str) -> subprocess.Popen[str]:
        return self.start("cache_latents", "--latents", out, "--latents-reports", f"{out}-reports")

    def train(self, out: str, *words: str) -> subprocess.Popen[str]:
        return self.start("train", *LONG, *words, "--adapter", out, "--train-reports", f"{out}-reports")

    def start(self, stage: str, *words: str) -> subprocess.Popen[str]:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, "-m", f"stages.{stage}", *words]
        return subprocess.Popen(command, cwd=self.path, env=self.environment, text=True, **both)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Checkout:
    """Encoded on a disk of its own."""
    made = Checkout(tmp_path_factory.mktemp("disk") / "checkout", tiny_base)
    made.dvc("repro", "cache_latents")
    return made


@pytest.fixture(scope="module")
def nodes(checkout: Checkout) -> Iterator[list[Node]]:
    here, there = DISK.split(":")
    with tempfile.TemporaryDirectory(dir=here) as state:
        yield [Node(checkout, state), Node(checkout, f"{there}/{Path(state).name}")]


def undisturbed(checkout: Checkout, *words: str) -> str:
    """sha256 of the adapter of a training on a disk of its own."""
    checkout.python("-m", "stages.train", *LONG, *words, "--adapter", "out/whole", "--train-reports", "out/r")
    return checkout.adapter("out/whole")


def test_two_machines_encode_the_same_images_at_once(checkout: Checkout, nodes: list[Node]) -> None:
    processes = [node.encode(f"out/{index}") for index, node in enumerate(nodes)]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        print(*re.findall(r"^.*encoded \d.*$", output, re.MULTILINE), sep="\n")
    expected = files(checkout.path / "data/latents")
    assert files(checkout.path / "out/0") == files(checkout.path / "out/1") == expected


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_training_resumes_on_the_other_machine(checkout: Checkout, nodes: list[Node]) -> None:
    process = nodes[0].train("out/killed")
    wait_for_step(process, 25)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output, _ = nodes[1].train("out/killed").communicate()
    assert re.search(r"^resumed from step [2-9]0$", output, re.MULTILINE), output
    assert checkout.adapter("out/killed") == undisturbed(checkout)


def test_only_one_of_two_machines_continues_the_same_training(checkout: Checkout, nodes: list[Node]) -> None:
    """The second is refused where the disk carries locks; else the first gives way, or has ended before it noticed."""
    seed = ("--set", "train.seed=1")
    first = nodes[0].train("out/first", *seed)
    wait_for_step(first, 25)
    second = nodes[1].train("out/second", *seed)
    outputs = {"out/second": second.communicate()[0], "out/first": first.communicate()[0]}
    ended = [name for name, process in (("out/first", first), ("out/second", second)) if process.returncode == 0]
    assert ended
    for name, output in outputs.items():
        print(name, re.sub(r"^step .*\n", "", output, flags=re.MULTILINE))
        if name in ended:
            assert checkout.adapter(name) == undisturbed(checkout, *seed)
        else:
            assert re.search(r"^error: \S+: (process \d+ |the snapshot of step )", output, re.MULTILINE), output
            assert "Traceback" not in output and not (checkout.path / name).exists()


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout
    for line in process.stdout:
        if (found := re.match(r"step +(\d+)", line)) and int(found[1]) >= step:
            return
    raise AssertionError("training ended before its time")
