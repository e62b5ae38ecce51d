"""The table of docs/models.md: memory of a training step of well-known models, counted from their configs.

Run: ``python -m tests.memory_table --write`` (some minutes; nothing is downloaded)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from lora_dag.commands.forecast import Forecast, TrainStep
from lora_dag.core import params, quiet
from lora_dag.families.protocol import load_family
from tests.true_sizes import TRUE_SIZES, TrueSize, save_configs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- python -m tests.memory_table --write -->\n", "<!-- end of the table -->"
NUM_TOKENS = 128
"""Tokens of the caption, where the denoiser drops the padding."""
CHECKPOINTED = ["train.gradient_checkpointing=true"]
COLUMNS = {
    "as it is": [],
    "with gradient checkpointing": CHECKPOINTED,
    "and int8": [*CHECKPOINTED, "model.quantization=int8"],
    "and nf4": [*CHECKPOINTED, "model.quantization=nf4"],
}
"""Column -> settings."""


def step(size: TrueSize, folder: Path, changes: list[str]) -> TrainStep:
    """Return the counts of a step: bfloat16, rank 16 on attention, batch 1."""
    words = [f"model.family={size.family}", f"model.pretrained={folder}", "model.dtype=bfloat16", "train.batch_size=1"]
    words += ["train.loss_weighting=uniform", "train.snr_gamma=null", "lora.rank=16", "lora.alpha=16", *changes]
    path = ROOT / "params.yaml"
    config = params.load(path, words)
    side = size.resolution
    with quiet.without_warnings():
        return Forecast(config, load_family(size.family), (side, side), NUM_TOKENS, torch.device("cpu")).train()


def rows(names: list[str]) -> list[str]:
    """Return the head and a row for each model."""
    lines = [
        "| model, pixels | parameters | " + " | ".join(COLUMNS) + " | arithmetic per image |",
        "| --- | --- | " + "--- | " * len(COLUMNS) + "--- |",
    ]
    for name in names:
        size = TRUE_SIZES[name]
        with tempfile.TemporaryDirectory() as folder:
            save_configs(size, Path(folder))
            steps = [step(size, Path(folder), changes) for changes in COLUMNS.values()]
        cells = [f"{each.peak / 1e9:.1f} GB" for each in steps]
        head = f"| {size.label}, {size.resolution} | {size.num_parameters / 1e9:.2f} B | "
        lines.append(head + " | ".join(cells) + f" | {steps[0].flops / 1e12:.1f} TFLOP |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(rows([*TRUE_SIZES])) + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
