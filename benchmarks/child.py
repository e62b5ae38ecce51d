"""One training of a comparison: it runs a few steps on command, reports their time, and waits for the next command.

Run by benchmarks/players.py: ``python -m benchmarks.child --channel FD --warm-up 3 -- stages.train --params ...``, or a
script's path in place of the module. Neither training is changed. Both end a step in ``AdamW.zero_grad``, where a
subclass counts and stops. A timed method is wrapped in the class that defines it.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib
import importlib.metadata
import json
import resource
import runpy
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import parity

Hook = Callable[[torch.optim.Optimizer], None]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
PARTS = {
    "denoiser forward": ("diffusers:UNet2DConditionModel", "forward"),
    "backward": ("accelerate:Accelerator", "backward"),
    "VAE encode": ("diffusers:AutoencoderKL", "encode"),
    "text encoder": ("transformers:CLIPTextModel", "forward"),
    "optimizer step": ("torch.optim:AdamW", "step"),
    "images from files": ("torch.utils.data.dataloader:_SingleProcessDataLoaderIter", "__next__"),
    "batch from the cache": ("stages.train.batches:Batches", "batch"),
}
"""Part of a step -> the method that does it."""


def main() -> None:
    args = parse()
    turns = Turns(socket.socket(fileno=args.channel).makefile("rw"), args.warm_up)
    at_start: list[Hook] = []
    at_step: list[Hook] = [turns.step_done]
    if args.replay:
        at_start.append(parity.replay(args.replay))
    if args.record:
        recorder = parity.record(args.record, draws=not args.replay)
        at_start.append(recorder.start)
        at_step.insert(0, recorder.step_done)
    torch.optim.AdamW = hooked_adamw(at_start, at_step)  # type: ignore[misc]
    if args.parts:
        for part, (owner, method) in PARTS.items():
            turns.time(part, attribute(owner), method)
    start(args.command, args.clip)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="file descriptor of a socket to the parent")
    parser.add_argument("--warm-up", type=int, required=True, help="steps before the first pause")
    parser.add_argument("--parts", action="store_true", help="time what a step is made of")
    parser.add_argument("--clip", action="store_true", help="make the script's clipping happen")
    parser.add_argument("--record", type=Path, help="write draws and losses to this file")
    parser.add_argument("--replay", type=Path, help="draw what stands in this file")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    args.command = args.command[1:]  # after --
    return args


def start(command: list[str], clip: bool) -> None:
    """Run a module by its name or a script by its path, as Python itself does.

    Args:
        clip: the diffusers script passes ``filter(...)`` to AdamW, which leaves nothing to clip; a list does.
    """
    sys.argv = command
    if command[0].endswith(".py"):
        as_list = {"filter": lambda function, values: list(builtins.filter(function, values))}
        runpy.run_path(command[0], init_globals=as_list if clip else None, run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


class Turns:
    """Steps of this process's training, in turns whose length the parent process sets."""

    def __init__(self, channel: TextIO, warm_up: int) -> None:
        self.channel = channel
        self.num_steps, self.turn_ends = 0, warm_up
        self.parts: dict[str, float] = defaultdict(float)
        self.begin(warm_up)

    def begin(self, num_steps: int) -> None:
        self.parts.clear()
        self.turn_ends = self.num_steps + num_steps
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def step_done(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue at the end of a step, or report and wait. CPU seconds include all threads."""
        self.num_steps += 1
        if self.num_steps < self.turn_ends:
            return
        synchronize()
        report = {
            "wall": time.perf_counter() - self.wall,
            "cpu": time.process_time() - self.cpu,
            "parts": self.parts,
            "peak_bytes": peak_bytes(),
            "num_graphs": num_graphs(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        print(json.dumps(report), file=self.channel, flush=True)
        self.begin(int(self.channel.readline() or 10**9))  # the parent is gone or has seen enough: run to the end

    def time(self, part: str, owner: Any, method: str) -> None:
        """Add the CPU seconds of a method's calls to a part."""
        original: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.parts[part] += time.process_time() - start

        setattr(owner, method, timed)


def hooked_adamw(at_start: list[Hook], at_step: list[Hook]) -> type[torch.optim.AdamW]:
    """Return an AdamW class that calls these functions after its construction and at the end of each step."""

    class AdamW(torch.optim.AdamW):
        @functools.wraps(torch.optim.AdamW.__init__)  # our trainer reads its signature
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for hook in at_start:
                hook(self)

        def zero_grad(self, set_to_none: bool = True) -> None:
            for hook in at_step:
                hook(self)
            super().zero_grad(set_to_none)

    return AdamW


def attribute(dotted: str) -> Any:
    """Return the object that ``module:Name`` names."""
    module, name = dotted.split(":")
    return getattr(importlib.import_module(module), name)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def num_graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # loaded by whoever compiles
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


if __name__ == "__main__":
    main()
