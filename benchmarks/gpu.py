"""Measure the speed on a GPU with Stable Diffusion 1.5 and XL of full size and random weights.

The table has images/s, memory, and the share of the GPU's own matrix speed.

Run: ``python -m benchmarks.gpu [--script train_text_to_image_lora.py] [--sdxl-script train_text_to_image_lora_sdxl.py]
[--write]``. Nothing is downloaded; 64 GiB of disk are enough. ``--dry`` runs the code on a CPU with thin models.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmarks import flops, readme
from benchmarks.bases import DRY_SD15, DRY_SDXL, SD15, SDXL, Base
from benchmarks.players import Failed, Turn, Variant, in_turns
from benchmarks.side_by_side import PACKAGES, stage
from benchmarks.workplace import Workplace

BATCH_SIZES = (1, 4, 16, 32)
WARM_UP, ROUNDS, NUM_STEPS = 10, 5, 10
SHAPE = 8192
"""RevisionReport of the square matrices whose product is timed."""
EAGER, COMPILED, SCRIPT = "ours", "ours, compiled", "the script"


@dataclass(frozen=True)
class Row:
    base: Base
    batch_size: int
    what: str
    seconds: float | None
    """Median time of a step over the turns; None if it does not fit into memory."""
    peak_bytes: int


def main() -> None:
    args = parse()
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA GPU here; --dry goes the same way on a CPU with thin models")
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    bases = (DRY_SD15, DRY_SDXL) if args.dry else (SD15, SDXL)
    rate = matmul_rate(args)
    try:
        rows = [
            row
            for base, script in zip(bases, (args.script, args.sdxl_script), strict=True)
            for row in measure(args, base, script)
        ]
    except Failed as error:
        raise SystemExit(f"error: {error}") from None
    text = table(args, rows, rate)
    print(text)
    if args.write:
        readme.write("gpu", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="train_text_to_image_lora.py of diffusers, to compare with")
    parser.add_argument("--sdxl-script", type=Path, help="train_text_to_image_lora_sdxl.py")
    parser.add_argument("--script-python", default=sys.executable, help="interpreter that has torchvision")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    parser.add_argument("--dry", action="store_true", help="thin models on this CPU: no measurement")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    return parser.parse_args()


def measure(args: argparse.Namespace, base: Base, script: Path | None) -> list[Row]:
    """Build base, images and cache once, then measure each side at each batch size."""
    with tempfile.TemporaryDirectory() as name:
        workplace = Workplace(Path(name), base, num_images=2 * max(args.batch_sizes) + 8)
        workplace.create(dtype(args), dtype(args))
        for stage_name in ("prepare", "cache_latents"):
            workplace.cpu_seconds(*stage(stage_name))
        return [row for size in args.batch_sizes for row in sides(args, workplace, script, size)]


def sides(args: argparse.Namespace, workplace: Workplace, script: Path | None, batch_size: int) -> list[Row]:
    """Measure the sides one after another. Two at once would halve the memory of each.

    Raises:
        Failed: a side ended for another reason than memory.
    """
    rounds, num_steps, warm_up = (1, 1, 1) if args.dry else (ROUNDS, NUM_STEPS, WARM_UP)
    total = warm_up + rounds * num_steps + 1
    variants = [workplace.ours(EAGER, total, batch_size)]
    if not args.no_compile:
        variants.append(workplace.ours(COMPILED, total, batch_size, "train.compile=true"))
    if script:
        variants.append(workplace.script(SCRIPT, script, total, batch_size, dtype(args), python=args.script_python))

    def row(variant: Variant) -> Row:
        try:
            turns = in_turns([variant], workplace.folder, warm_up, rounds, num_steps)[variant.name]
        except Failed as error:
            if "out of memory" not in str(error):
                raise
            return Row(workplace.base, batch_size, variant.name, None, 0)
        if variant.name == COMPILED and not turns[-1].num_graphs:
            raise Failed("train.compile compiled nothing")
        return Row(workplace.base, batch_size, variant.name, step_seconds(turns, num_steps), turns[-1].peak_bytes)

    return [row(variant) for variant in variants]


def dtype(args: argparse.Namespace) -> str:
    return "float32" if args.dry else "bfloat16"


def step_seconds(turns: list[Turn], num_steps: int) -> float:
    return statistics.median(turn.wall for turn in turns) / num_steps


def matmul_rate(args: argparse.Namespace) -> float:
    """Return the FLOPs per second of a product of bfloat16 matrices of random numbers. Zeros would be faster."""
    side = 64 if args.dry else SHAPE
    where = "cpu" if args.dry else "cuda"
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b})
    return 2 * side**3 / timer.blocked_autorange(min_run_time=0.01 if args.dry else 2).median


# The table


def table(args: argparse.Namespace, rows: list[Row], rate: float) -> str:
    where = "a CPU, thin models: no measurement" if args.dry else torch.cuda.get_device_name()
    lines = [
        f"{readme.command('benchmarks.gpu', sys.argv[1:])} on {where}, {readme.versions(*PACKAGES)}; "
        f"a product of bfloat16 matrices runs at {rate / 1e12:.0f} TFLOP/s, which the ceiling is made of:",
        "",
        "| base | batch | step | times the script | images/s | of the ceiling | peak memory |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    per_image = {base.name: flops.count(base, base.rank).step for base in {row.base for row in rows}}
    return "\n".join([*lines, *(line(row, rows, rate / per_image[row.base.name]) for row in rows)]) + "\n"


def line(row: Row, rows: list[Row], ceiling: float) -> str:
    start = f"| {row.base.name}, {row.base.resolution} px | {row.batch_size} | {row.what}"
    if row.seconds is None:
        return f"{start} | | out of memory | | |"
    peers = [peer for peer in rows if (peer.base, peer.batch_size) == (row.base, row.batch_size)]
    script = next((peer.seconds for peer in peers if peer.what == SCRIPT), None)
    ratio = f"{script / row.seconds:.2f}" if script else ""
    images = row.batch_size / row.seconds
    return f"{start} | {ratio} | {images:.1f} | {100 * images / ceiling:.0f} % | {row.peak_bytes / 2**30:.1f} GiB |"


if __name__ == "__main__":
    main()
