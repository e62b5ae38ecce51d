"""Plot reports/loss.png: losses on the held-out table, the training loss, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.pages.plots import INK, LOOK, style
from stages.report.inputs import Inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAINT = "#8c959f"
TRAIN, HELDOUT, PROBE = "#9a6700", "#0969da", "#cf222e"
SMOOTHED_SHARE = 0.05  # share of the steps that the smoothed training loss averages


def plot_losses(inputs: Inputs, path: Path) -> None:
    """Plot losses on the held-out table, the training loss below them, and the learning rate at the bottom."""
    import io

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    from lora_dag.pages.sheets import MAX_BYTES, save_png

    with mpl.rc_context(LOOK):
        figure, (above, below, rate) = plt.subplots(
            3, 1, figsize=(9, 6.4), sharex=True, layout="constrained", height_ratios=[3, 2, 1]
        )
        steps = [row["step"] for row in inputs.curve]
        for column, color, label in (("heldout", HELDOUT, "held-out"), ("train_probe", PROBE, "training images")):
            above.plot(steps, [row[column] for row in inputs.curve], "o-", color=color, label=label, markersize=4)
        style(above, "loss on the fixed table")
        above.legend(frameon=False)
        plot_training(below, inputs.loss)
        rate.plot([r["step"] for r in inputs.loss], [r["learning_rate"] for r in inputs.loss], color=FAINT)
        style(rate, "learning rate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_xlabel("step", color=INK)
        last = max(steps[-1], inputs.loss[-1]["step"])
        rate.set_xlim(-0.01 * last, 1.01 * last)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
    with Image.open(buffer) as image:
        save_png(path, image.convert("RGB"), MAX_BYTES["loss"])


def plot_training(axes: Axes, loss: list[dict[str, float]]) -> None:
    steps, values = [row["step"] for row in loss], [row["loss"] for row in loss]
    window = max(1, round(len(values) * SMOOTHED_SHARE))
    axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, window), color=TRAIN, label=f"mean of the last {window}")
    style(axes, "training loss")
    axes.legend(frameon=False)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return means of the last ``window`` values; of fewer values at the start."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]
