"""Measure the price of a quantized base: the same training on the base as it is and on each quantization of it.

Held-out losses are paired by row, and the interval is over images. For the demo's base and, with --tiny, for the tiny
random base of each family that the tests use.
Run: ``python -m benchmarks.quantization [--tiny] [--steps 100] [--set section.key=value] [--write]``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks import readme
from lora_dag.core.params import FAMILIES, Quantization
from lora_dag.evaluation import bootstrap
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.evaluation.heldout_table import Score, scores_from_csv

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = get_args(Quantization)
LOSSES_ALONE = (
    *("validate.prompts=[icon]", "validate.num_inference_steps=1", "validate.num_seeds=1", "validate.scales=[1.0]"),
    *("validate.drift_prompts=[]", "validate.ink_measures=false", "validate.unquantized_loss=false"),
)


@dataclass(frozen=True)
class Price:
    """Changes of the held-out loss by the quantization, as shares of the loss of the unquantized training."""

    base: str
    kind: str
    quantized: Estimate
    """Trained and measured on the quantized base."""
    exported: Estimate
    """Trained on the quantized base, measured on the base as it is, where an export is used."""
    learned: float
    """Change of the held-out loss by the unquantized training, as a share of the base's loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="also measure the tiny random base of each family")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    settings = [f"train.num_steps={args.steps}", f"train.snapshot_every_n_steps={args.steps}", *args.set]
    prices = measure("demo", REPOSITORY / "data/base", settings)
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            for name in FAMILIES:
                tiny = ["dataset.resolution=32", "train.batch_size=4", f"model.family={name}"]
                prices += measure(f"tiny {name}", tiny_base(name, Path(folder) / name), [*settings, *tiny])
    text = table(prices)
    print(text)
    if args.write:
        readme.write("quantization", text)


def tiny_base(name: str, folder: Path) -> Path:
    from tests.helpers import families

    return families.save(name, folder)


def measure(label: str, base: Path, settings: list[str]) -> list[Price]:
    """Train on the base as it is and on each quantization, and score each adapter."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        (folder / "data/raw").symlink_to(REPOSITORY / "data/raw")
        (folder / "data/base").symlink_to(base)
        (folder / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
        run(folder, "prepare", settings)
        run(folder, "cache_latents", settings)
        run(folder, "train", settings)
        plain = scores(folder, settings, "null")
        loss, base_loss = (bootstrap.mean(getattr(s, name) for s in plain) for name in ("adapter", "base"))
        prices = []
        for kind in KINDS:
            run(folder, "train", [*settings, f"model.quantization={kind}"])
            quantized, exported = (change(plain, scores(folder, settings, where)) for where in (kind, "null"))
            prices.append(Price(label, kind, quantized, exported, loss / base_loss - 1))
        return prices


def scores(folder: Path, settings: list[str], quantization: str) -> list[Score]:
    """Return the held-out rows of the folder's adapter on the base with a quantization, or null."""
    run(folder, "validate", [*settings, *LOSSES_ALONE, f"model.quantization={quantization}"])
    rows = scores_from_csv((folder / "reports/validate/heldout.csv").read_text(encoding="utf-8"))
    return [row for row in rows if row.split == "heldout"]


def change(plain: list[Score], other: list[Score]) -> Estimate:
    """Return the mean change of the adapter's loss, as a share of the plain mean, with its interval over images."""
    pairs = list(zip(plain, other, strict=True))
    assert all(one.row == two.row for one, two in pairs)
    changes = bootstrap.by_image((one.file_name, two.adapter - one.adapter) for one, two in pairs)
    return bootstrap.estimate(changes / np.mean([one.adapter for one in plain]), seed=0)


def run(folder: Path, stage: str, settings: list[str]) -> None:
    """Run a stage in the folder.

    Raises:
        SystemExit: it failed; the message holds what it printed.
    """
    words = [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "LORA_STATE_DIR": str(folder / ".state")}
    command = [sys.executable, "-m", f"stages.{stage}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    print("\n".join(done.stdout.splitlines()[-6:]), file=sys.stderr, flush=True)


def table(prices: list[Price]) -> str:
    """Return Markdown with a row per base and quantization."""
    lines = [
        f"{readme.command('benchmarks.quantization', sys.argv[1:])} on {readme.machine()}, "
        f"{readme.versions('torch', 'diffusers', 'peft')}:",
        "",
        "| base | held-out loss changed by training | quantization | on the quantized base | on the base as it is |",
        "|---|---:|---|---:|---:|",
        *(
            f"| {price.base} | {100 * price.learned:+.1f} % | {price.kind} | {percent(price.quantized)} "
            f"| {percent(price.exported)} |"
            for price in prices
        ),
    ]
    return "\n".join(lines) + "\n"


def percent(share: Estimate) -> str:
    return f"{100 * share.mean:+.2f} % [{100 * share.low:+.2f}, {100 * share.high:+.2f}]"


if __name__ == "__main__":
    main()
