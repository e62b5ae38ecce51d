"""Compare our trainer with diffusers' text_to_image LoRA script, in turns: same base, images, batch, rank and rate.

Run: ``python -m benchmarks.side_by_side --script train_text_to_image_lora.py [--write]``; works in a temporary folder,
on the CPU, one thread per process. On a busy machine pin it: ``taskset -c 1 python -m benchmarks.side_by_side ...``.
The script comes from a checkout of diffusers and is run as it is; it needs torchvision, which this project does not:
``--script-python`` names an interpreter that has it and otherwise the same packages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import flops, parity, readme
from benchmarks.bases import QUARTER, TINY, Base
from benchmarks.players import Failed, Turn, Variant, in_turns, paired, spread
from benchmarks.workplace import Workplace

BASES = {base.name: base for base in (TINY, QUARTER)}
WARM_UP = 3  # steps
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")

REFERENCE, CLIPPED, REFERENCE_BF16 = "the script", "the script, made to clip", "the script, bf16"
OURS, OURS_BF16 = "ours", "ours, bf16"


@dataclass(frozen=True)
class Results:
    turns: dict[str, list[Turn]]
    prepare: float
    """CPU seconds of ``stages.prepare``, cold."""
    cache: float
    """CPU seconds of ``stages.cache_latents``, cold,"""
    recache: float
    """and with everything in the store: start-up, and writing data/latents."""
    cold: list[tuple[float, float]]
    """CPU seconds to one epoch's steps from nothing: the script, ours with its cache."""
    parity: tuple[float, float] | None
    """Largest difference of a loss; of the adapters, relative to their way."""


def main() -> None:
    args = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both sides take a GPU where they find one
    with tempfile.TemporaryDirectory() as name:
        try:
            results = measure(args, Path(name))
        except Failed as error:
            raise SystemExit(f"error: {error}") from None
    text = table(args, results)
    print(text)
    if args.write:
        readme.write(f"side_by_side {args.base}", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="train_text_to_image_lora.py of diffusers")
    parser.add_argument("--script-python", default=sys.executable, help="interpreter that has torchvision")
    parser.add_argument("--base", choices=BASES, default=TINY.name)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=3, help="of a turn")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-images", type=int, default=400)
    parser.add_argument("--cold-runs", type=int, default=3, help="pairs of whole trainings; 0 for none")
    parser.add_argument("--parity-steps", type=int, default=20, help="with the same draws; 0 for none")
    parser.add_argument("--only-fp32", action="store_true", help="only the script and ours, in float32")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"--script {args.script}: no such file")
    return args


def measure(args: argparse.Namespace, folder: Path) -> Results:
    workplace = Workplace(folder, BASES[args.base], args.num_images)
    workplace.create("float32", "float32")
    prepare, cache, recache = (workplace.cpu_seconds(*stage(name)) for name in ("prepare", *("cache_latents",) * 2))
    return Results(
        in_turns(variants(args, workplace), folder, WARM_UP, args.rounds, args.num_steps),
        prepare,
        cache,
        recache,
        [cold(args, folder / f"cold{index}") for index in range(args.cold_runs)],
        compare(args, workplace) if args.parity_steps else None,
    )


def variants(args: argparse.Namespace, workplace: Workplace) -> list[Variant]:
    num_steps = WARM_UP + args.rounds * args.num_steps + 1  # no side comes to its end

    def script(name: str, dtype: str, *options: str) -> Variant:
        options = ("--parts", *options)
        return workplace.script(
            name, args.script, num_steps, args.batch_size, dtype, options=options, python=args.script_python
        )

    def ours(name: str, *settings: str) -> Variant:
        return workplace.ours(name, num_steps, args.batch_size, *settings, options=("--parts",))

    found = [script(REFERENCE, "float32"), ours(OURS)]
    if not args.only_fp32:
        found += [script(CLIPPED, "float32", "--clip"), script(REFERENCE_BF16, "bfloat16")]
        found += [ours(OURS_BF16, "model.dtype=bfloat16")]
    return found


def cold(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Measure whole processes with imports over one epoch: the script, and our prepare, cache_latents and train."""
    workplace = Workplace(folder, BASES[args.base], args.num_images)
    workplace.create("float32", "float32")
    num_steps = args.num_images // args.batch_size
    script = workplace.script(REFERENCE, args.script, num_steps, args.batch_size, "float32", python=args.script_python)
    ours = workplace.ours(OURS, num_steps, args.batch_size)
    theirs = workplace.cpu_seconds(script.python, *script.command)
    own = [*map(stage, ("prepare", "cache_latents")), (sys.executable, "-m", *ours.command)]
    return theirs, sum(workplace.cpu_seconds(*command) for command in own)


def stage(name: str) -> tuple[str, str, str]:
    return sys.executable, "-m", f"stages.{name}"


def compare(args: argparse.Namespace, workplace: Workplace) -> tuple[float, float]:
    """Run both trainings from the same adapter with the same draws. Ours does not clip, because the script does not."""
    num_steps, folder = args.parity_steps, workplace.folder
    record, own = folder / "ours.safetensors", folder / "script.safetensors"
    ours = workplace.ours(
        "parity ours", num_steps, args.batch_size, "train.max_grad_norm=1e9", options=("--record", str(record))
    )
    options = ("--record", str(own), "--replay", str(record))
    script = workplace.script(
        "parity script", args.script, num_steps, args.batch_size, "float32", options, args.script_python
    )
    for variant in (ours, script):
        in_turns([variant], folder, num_steps, rounds=0, num_steps=0)
    return parity.differences(record, own)


# The table


def table(args: argparse.Namespace, results: Results) -> str:
    base, turns = BASES[args.base], results.turns
    images = args.batch_size * args.num_steps
    lines = [
        f"{readme.command('benchmarks.side_by_side', sys.argv[1:])} on {readme.machine()}, "
        f"{readme.versions(*PACKAGES)}; the script's sha256 begins with {digest(args.script)}. "
        f"Base `{base.name}`, {base.resolution} px, batch {args.batch_size}, rank {base.rank}, one thread; "
        f"{args.rounds} rounds of {args.num_steps} steps in shuffled order, after {WARM_UP} steps of warm-up:",
        "",
        "| steady | times the script's images per CPU second | images per CPU second |",
        "|---|---:|---:|",
        *(
            f"| {name} | {spread(paired(turns[REFERENCE], own))} | {spread([images / turn.cpu for turn in own], 1)} |"
            for name, own in turns.items()
        ),
        "",
        *parts_table(turns, args.num_steps),
        f"| VAE encode over denoiser forward | {proportions(base, turns)} |" + " |" * (len(turns) - 1),
        "",
        "| from cold | |",
        "|---|---|",
        *cold_rows(args, results),
    ]
    if results.parity:
        loss, adapter = results.parity
        apart = f"by {adapter:.1g} of the way they went" if adapter else "in no bit"
        lines += [
            f"| the same adapter, images, noise and timesteps, {args.parity_steps} steps | losses differ by at most "
            f"{loss:.1g}, the trained adapters {apart} |"
        ]
    return "\n".join(lines) + "\n"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def parts_table(turns: dict[str, list[Turn]], num_steps: int) -> list[str]:
    """Return the CPU milliseconds of a step by part, as medians over turns, and the denoiser's share of them."""
    totals = {name: [1000 * turn.cpu / num_steps for turn in own] for name, own in turns.items()}
    parts = list(dict.fromkeys(part for own in turns.values() for turn in own for part in turn.parts))
    rows = {
        part: {name: [1000 * turn.parts.get(part, 0.0) / num_steps for turn in own] for name, own in turns.items()}
        for part in parts
    }
    rows["everything else"] = {
        name: [total - sum(rows[part][name][index] for part in parts) for index, total in enumerate(totals[name])]
        for name in turns
    }
    rows["a step"] = totals
    lines = [f"| CPU ms per step | {' | '.join(turns)} |", "|---|" + "---:|" * len(turns)]
    for part, by_name in rows.items():
        lines.append(f"| {part} | {' | '.join(f'{statistics.median(values):.1f}' for values in by_name.values())} |")
    shares = [spread([100 * share(turn) for turn in own], 1) for own in turns.values()]
    return [*lines, f"| denoiser forward and backward, % | {' | '.join(shares)} |"]


def proportions(base: Base, turns: dict[str, list[Turn]]) -> str:
    """Return VAE encode over denoiser forward, in FLOPs and in the script's time. SD 1.5 has 1.39 in FLOPs."""
    counted = flops.count(base, base.rank)
    seconds = [turn.parts["VAE encode"] / turn.parts["denoiser forward"] for turn in turns[REFERENCE]]
    return f"{counted.encode / counted.forward:.2f} in FLOPs, {spread(seconds)} in time"


def share(turn: Turn) -> float:
    return (turn.parts["denoiser forward"] + turn.parts["backward"]) / turn.cpu


def cold_rows(args: argparse.Namespace, results: Results) -> list[str]:
    num = args.num_images
    each = f"{1000 * results.cache / num:.1f} ms per image"
    rows = [
        f"| `prepare`, {num} images | {results.prepare:.1f} CPU seconds |",
        f"| `cache_latents`, once | {results.cache:.1f} CPU seconds, {each}; {results.recache:.1f} from the store |",
    ]
    if results.cold:
        ratios = [theirs / own for theirs, own in results.cold]
        seconds = [statistics.median(side) for side in zip(*results.cold, strict=True)]
        rows += [
            f"| {num // args.batch_size} steps (one epoch) from nothing, whole processes with their imports, "
            f"{args.cold_runs} pairs | {spread(ratios)} times as fast: {seconds[0]:.0f} CPU seconds for the script, "
            f"{seconds[1]:.0f} for prepare, cache_latents and train |",
            f"| even with the script, by the steps above | after {break_even(args, results):.1f} epochs |",
        ]
    return rows


def break_even(args: argparse.Namespace, results: Results) -> float:
    """Return the epochs after which ours, with its cache, has used no more CPU time than the script."""
    behind = statistics.median(own - theirs for theirs, own in results.cold)
    step = {
        name: statistics.median(turn.cpu for turn in results.turns[name]) / args.num_steps for name in (REFERENCE, OURS)
    }
    return max(0.0, 1 + behind / ((step[REFERENCE] - step[OURS]) * (args.num_images // args.batch_size)))


if __name__ == "__main__":
    main()
