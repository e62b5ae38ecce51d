"""Train several adapters on one frozen base in one process, and the same adapters one by one: gradients and CPU time.

Run: ``taskset -c 1 python -m benchmarks.together [--write]``; one thread, on the CPU. ``--dry`` takes seconds.
One pass holds the batches of all adapters: the frozen layers see them joined, each adapter's product its own rows. What
is timed is forward and backward; each adapter's optimizer step costs the same either way.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch.nn.functional import linear

from benchmarks import readme
from benchmarks.bases import CLIP_TOKENS, TINY
from benchmarks.players import spread
from lora_dag.core.device import keep_freed_memory

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("torch", "diffusers", "peft")
ONE_BY_ONE, TOGETHER, APART = "one by one", "together", "together, products one by one"
WARM_UP = 2  # rounds
NAME = "default"

Forward = Callable[[torch.Tensor], torch.Tensor]
MakeForward = Callable[[Any], Forward]


@dataclass(frozen=True)
class Row:
    dtype: str
    batch_size: int
    """Images per batch, for each adapter."""
    what: str
    ratios: list[float]
    """How many times as long the adapters take one by one, round by round."""
    milliseconds: list[float]
    """CPU time of forward and backward for all adapters."""
    difference: float
    """Largest of an adapter's gradients to those one by one, relative to their norm."""
    is_equal: bool
    """In every bit."""


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [row for dtype, size in product(DTYPES, args.batch_sizes) for row in measure(args, dtype, size)]
    text = table(args, rows)
    print(text)
    if args.write:
        readme.write("together", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-adapters", type=int, default=4)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="of each adapter")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="two adapters of one image, one round")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    if args.dry:
        args.num_adapters, args.batch_sizes, args.rounds = 2, [1], 1
    return args


def measure(args: argparse.Namespace, dtype: str, batch_size: int) -> list[Row]:
    """Run the three ways in turns, in shuffled order. Ratios are taken within a round."""
    pack = Pack(DTYPES[dtype], args.num_adapters, batch_size)
    ways = {ONE_BY_ONE: pack.one_by_one, TOGETHER: pack.together, APART: pack.apart}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients: dict[str, torch.Tensor] = {}
    order = random.Random(0)
    for index in range(WARM_UP + args.rounds):
        for name in order.sample(list(ways), len(ways)):
            took, gradients[name] = ways[name]()
            if index >= WARM_UP:
                seconds[name].append(took)
    reference = gradients[ONE_BY_ONE]  # [K, parameters]
    return [
        Row(
            dtype,
            batch_size,
            name,
            [alone / own for alone, own in zip(seconds[ONE_BY_ONE], seconds[name], strict=True)],
            [1000 * value for value in seconds[name]],
            float(((gradients[name] - reference).norm(dim=1) / reference.norm(dim=1)).max()),
            torch.equal(gradients[name], reference),
        )
        for name in ways
    ]


# The adapters


class Pack:
    """K adapters and their batches on one UNet.

    Each adapter's parameters exist twice: as slices of ``lora_A`` [K, r, in] and ``lora_B`` [K, out, r], and in PEFT's
    own layers while it is trained alone.
    """

    def __init__(self, dtype: torch.dtype, num_adapters: int, batch_size: int) -> None:
        self.dtype, self.num_adapters, self.batch_size = dtype, num_adapters, batch_size
        self.unet: Any = TINY.modules()["unet"].to(dtype).eval().requires_grad_(False)
        if dtype != torch.float32:
            self.unet.set_attn_processor(AttnProcessor())  # as lora_dag/families/sd.py does on a CPU
        rank = TINY.rank
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), NAME)
        self.layers = [module for module in self.unet.modules() if isinstance(module, Linear)]
        self.frozen = [m for m in self.unet.modules() if isinstance(m, torch.nn.Conv2d) or type(m) is torch.nn.Linear]
        self.frozen = [module for module in self.frozen if not module.weight.requires_grad]
        torch.manual_seed(1)
        for layer in self.layers:
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            a.data, b.data = a.data.float(), b.data.float()
            layer.pack = torch.nn.ParameterList(
                [torch.randn(num_adapters, *a.shape) / rank, torch.randn(num_adapters, *b.shape) / 50]
            )
        side, count = TINY.resolution // TINY.vae_scale_factor, num_adapters * batch_size
        self.noisy_latents, self.target = torch.randn(2, count, 4, side, side)
        self.timesteps = torch.randint(0, 1000, (count,))
        self.prompt_embeds = torch.randn(count, CLIP_TOKENS, self.unet.config.cross_attention_dim)

    def one_by_one(self) -> tuple[float, torch.Tensor]:
        """Run a pass for each adapter with PEFT's own layers; return CPU seconds and gradients, float32 [K,
        parameters].
        """
        seconds, found = 0.0, []
        for index in range(self.num_adapters):
            for layer in self.layers:
                for own, packed in zip(peft_parameters(layer), layer.pack, strict=True):
                    own.data.copy_(packed.data[index])
                    own.grad = None
            rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
            start = time.process_time()
            self.errors(rows).mean().backward()
            seconds += time.process_time() - start
            gradients = [parameter.grad for layer in self.layers for parameter in peft_parameters(layer)]
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return seconds, torch.stack(found)

    def together(self, make_forward: MakeForward | None = None) -> tuple[float, torch.Tensor]:
        """Run one pass for all adapters; return CPU seconds and gradients."""
        parameters = [parameter for layer in self.layers for parameter in layer.pack]
        for parameter in parameters:
            parameter.grad = None
        with replaced(self.layers, make_forward or self.packed_forward):
            start = time.process_time()
            self.errors(slice(None)).reshape(self.num_adapters, -1).mean(1).sum().backward()
            seconds = time.process_time() - start
        return seconds, torch.cat([parameter.grad.flatten(1) for parameter in parameters], dim=1)

    def apart(self) -> tuple[float, torch.Tensor]:
        """Run one pass in which each matrix product and convolution gets the rows of one adapter at a time."""
        with replaced(self.frozen, self.forward_by_adapter):
            return self.together(self.packed_forward_by_adapter)

    def errors(self, rows: slice) -> torch.Tensor:
        """Return squared errors, float32 [B, C, h, w]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32):
            asked = self.noisy_latents[rows], self.timesteps[rows], self.prompt_embeds[rows]
            return (self.unet(*asked).sample.float() - self.target[rows]).square()

    def packed_forward(self, layer: Any) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            a, b = layer.pack
            own = x.reshape(self.num_adapters, -1, x.shape[-1])  # [K, rows, in]
            result = layer.base_layer(x)
            return result + (own.to(a.dtype) @ a.mT @ b.mT).view_as(result)

        return forward

    def packed_forward_by_adapter(self, layer: Any) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            result = layer.base_layer(x)  # first, as in PEFT: gradients of x are added up in the order of the calls
            parts = zip(x.to(layer.pack[0].dtype).chunk(self.num_adapters), *layer.pack, strict=True)
            return result + torch.cat([linear(linear(own, a), b) for own, a, b in parts])

        return forward

    def forward_by_adapter(self, module: torch.nn.Module) -> Forward:
        forward = module.forward
        return lambda x: torch.cat([forward(own) for own in x.chunk(self.num_adapters)])


def peft_parameters(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


@contextlib.contextmanager
def replaced(modules: list[Any], make: MakeForward) -> Iterator[None]:
    """Replace the forward of every module inside the context."""
    for module in modules:
        module.forward = make(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


# The table


def table(args: argparse.Namespace, rows: list[Row]) -> str:
    lines = [
        f"{readme.command('benchmarks.together', sys.argv[1:])} on {readme.machine()}, {readme.versions(*PACKAGES)}. "
        f"Base `{TINY.name}`, {TINY.resolution} px, rank {TINY.rank}, {args.num_adapters} adapters, one thread; "
        f"{args.rounds} rounds in shuffled order, after {WARM_UP} of warm-up:",
        "",
        "| | batch of each | times as fast as one by one | CPU ms for all | gradients differ by | equal bytes |",
        "|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join([*lines, *map(line, rows)]) + "\n"


def line(row: Row) -> str:
    equal = "yes" if row.is_equal else "no"
    figures = f"{spread(row.ratios)} | {spread(row.milliseconds, 0)} | {row.difference:.1g} | {equal}"
    return f"| {row.what}, {row.dtype} | {row.batch_size} | {figures} |"


if __name__ == "__main__":
    main()
