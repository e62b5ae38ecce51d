"""METRICS: meaning, unit, better direction and place of every number in the reports.

The tables of report and model card, headline.json (and so `dvc exp show`), the marks of `compare`, the columns of
`leaderboard`, the limits of `gate` and docs/metrics.md are made from METRICS. To add a metric, add a module to
stages/validate that measures it, and an entry here.
Run: `python -m lora_dag.evaluation.metrics --write` writes docs/metrics.md. Without --write it prints the page.

A number without an entry is shown by its own name, without unit and direction. An entry without a number, such as the
CLIP score when no feature model is set, is left out of the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from lora_dag.core.console import bare_parser, log, run
from lora_dag.core.files import write_text

PAGE = Path("docs/metrics.md")
Table = Literal["losses", "samples", "features", "training", "export"]


@dataclass(frozen=True)
class Metric:
    """A number that the pipeline measures."""

    label: str
    """Name on report and model card. Empty: the name in metrics.json is shown."""
    table: Table
    """Table of the report that shows the metric. Losses, samples and features are tables of base and adapter."""
    meaning: str
    """One sentence that defines it, and one on how to read it."""
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    """Better direction; None if neither is better by itself."""
    has_base: bool = False
    """Whether ``NAME_base`` is the value of the base model."""
    has_interval: bool = False
    """Whether there is a 95 % interval: ``NAME_low`` and ``NAME_high``.

    With ``has_base`` the interval belongs to ``NAME_change``, adapter minus base.
    """
    headline: tuple[str, ...] = ()
    """Endings of the names that headline.json repeats; "" is the metric itself."""
    decides: bool = False
    """Whether the verdict of `compare` comes from this metric. Only this metric is marked as better or worse."""
    column: str = ""
    """Column in the leaderboard; empty for none."""
    spec: str = ".4g"
    """Format of the values in text and in the leaderboard."""
    dataset: str = ""
    """Name of the same number for the dataset's own images, which the report shows beside the metric."""

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of all names of the metric in a metrics.json."""
        bounds = ("_low", "_high") if self.has_interval else ()
        if self.has_base and bounds:
            return ("", "_base", "_change", *(f"_change{bound}" for bound in bounds))
        return ("", *(("_base",) if self.has_base else ()), *bounds)


METRICS: dict[str, Metric] = {
    "val.loss": Metric(
        "Held-out loss",
        "losses",
        "Mean squared error of the adapter's predictions on held-out images, which training never sees. It is "
        "the main measure of quality: read `_change`, and trust it when its whole interval is below 0.",
        unit="MSE",
        better="lower",
        has_base=True,
        has_interval=True,
        headline=("", "_change", "_change_low", "_change_high"),
        decides=True,
    ),
    "val.loss_low_noise": Metric(
        "Held-out loss at low noise",
        "losses",
        "Held-out loss over the third of the timesteps with the least noise, where the model predicts fine detail.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "val.loss_mid_noise": Metric(
        "Held-out loss at medium noise",
        "losses",
        "Held-out loss over the middle third of the timesteps.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "val.loss_high_noise": Metric(
        "Held-out loss at high noise",
        "losses",
        "Held-out loss over the third of the timesteps with the most noise, where the model predicts layout and color.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "val.train_loss": Metric(
        "Loss on training images",
        "losses",
        "Mean squared error on an equal number of training images and timesteps. When it falls "
        "while the held-out loss rises, the adapter overfits.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "drift.loss": Metric(
        "Drift: loss on images of the base model",
        "losses",
        "Loss on images that the base model generates for `validate.drift_prompts`. A `_change` clearly above 0 means "
        "that the adapter has damaged what the base model could do before.",
        unit="MSE",
        better="lower",
        has_base=True,
        has_interval=True,
        headline=("_change",),
    ),
    "val.overfit_gap": Metric(
        "",
        "training",
        "Change of the held-out loss minus change of the loss on training images. Near 0 there is no "
        "overfitting; above 0 the adapter improved more on training images than on held-out images.",
        unit="MSE",
        better="lower",
        has_interval=True,
        headline=("",),
        column="overfit_gap",
        spec="+.4f",
    ),
    "val.quantization_price": Metric(
        "Price of the quantized base",
        "training",
        "With `model.quantization`: held-out loss of the adapter on the quantized base minus its loss on the base as "
        "it is, on the same rows, as a share of the latter. 0.01 means that the rounding costs 1 % of the loss. Both "
        "have the same adapter: `python -m benchmarks.quantization` also trains on the base as it is.",
        unit="share",
        better="lower",
        has_interval=True,
        headline=("",),
        spec="+.1%",
    ),
    "val.loss_unquantized": Metric(
        "",
        "training",
        "With `model.quantization`: held-out loss of the adapter on the base as it is.",
        unit="MSE",
        better="lower",
    ),
    "val.best_step": Metric(
        "Lowest held-out loss",
        "training",
        "Training step of the snapshot with the lowest held-out loss; 0 is the base model. When it is far below "
        "`train.num_steps`, a shorter training is enough.",
        unit="step",
        headline=("",),
        spec=",.0f",
    ),
    "val.final_minus_best": Metric(
        "",
        "training",
        "Held-out loss of the final adapter minus that loss of the best snapshot. 0 means that the final adapter "
        "is the best; `reports/validate/curve.csv` lists every snapshot.",
        unit="MSE",
        better="lower",
        has_interval=True,
        spec="+.4f",
    ),
    "val.onset_step": Metric(
        "Overfitting starts",
        "training",
        "First snapshot from which on the held-out loss stays above its minimum, beyond its interval, while the "
        "loss on training images is lower than at that minimum. Null when there is no such snapshot.",
        unit="step",
        spec=",.0f",
    ),
    "samples.chroma": Metric(
        "Chroma of the samples",
        "samples",
        "Mean colorfulness of the generated samples; 0 is gray. Compare it with the dataset's own value: the "
        "nearer, the better the style is matched. Needs `validate.ink_measures`.",
        unit="0 to 255",
        has_base=True,
        dataset="chroma",
    ),
    "samples.dark_share": Metric(
        "Near-black pixels of the samples",
        "samples",
        "Fraction of the samples' pixels that are nearly black. Compare it with the dataset's own value: the "
        "nearer, the better the style is matched. Needs `validate.ink_measures`.",
        unit="share",
        has_base=True,
        dataset="dark_share",
    ),
    "samples.copied_share": Metric(
        "Copies of training images",
        "samples",
        "Fraction of samples that are nearer to a training image than 95 % of the held-out images are. About "
        "0.05 is expected by chance (1 / (n + 1) with n < 19 held-out images); a much higher value means that "
        "the adapter copies. `validate.max_copied_share` sets a limit.",
        unit="share",
        better="lower",
        has_base=True,
        headline=("",),
        column="copied_share",
        spec=".0%",
    ),
    "samples.far_share": Metric(
        "Samples unlike the dataset",
        "samples",
        "Fraction of samples that are farther from every training image than 95 % of the held-out images are. "
        "About 0.05 is expected by chance; a much higher value means that the samples do not look like the "
        "dataset, as noise does not.",
        unit="share",
        better="lower",
        has_base=True,
    ),
    "samples.blank_share": Metric(
        "Samples of a single color",
        "samples",
        "Fraction of samples that consist of one color. Anything above 0 is a sign of a broken adapter or of "
        "wrong sampling settings.",
        unit="share",
        better="lower",
        has_base=True,
    ),
    "samples.nearest_distance": Metric(
        "Distance to the nearest training image",
        "samples",
        "Median over the samples of the distance to the nearest training image. Compare it with the same "
        "distance of held-out images: a much smaller value is a sign of copies. The distance is the root mean "
        "square difference of latents, or the distance of features if `validate.feature_model` is set.",
        has_base=True,
        dataset="heldout_median",
    ),
    "samples.diversity": Metric(
        "Distance between samples of one prompt",
        "samples",
        "Mean distance between two samples of the same prompt, in the unit of `samples.nearest_distance`. "
        "Compare it with the base model's value: a much smaller one means that all samples look alike. Null with "
        "one sample per prompt.",
        has_base=True,
        headline=("",),
    ),
    "samples.clip_score": Metric(
        "CLIP score of sample and prompt",
        "features",
        "How well a sample fits its prompt according to a CLIP model: 100 max(cos, 0) of the two embeddings, "
        "mean over prompts (Hessel et al. 2021). Read `_change`.",
        unit="0 to 100",
        better="higher",
        has_base=True,
        has_interval=True,
        headline=("",),
    ),
    "samples.cosine": Metric(
        "Cosine of sample and prompt",
        "features",
        "How well a sample fits its prompt according to a SigLIP model: the cosine of the two embeddings, mean "
        "over prompts. Read `_change`.",
        unit="-1 to 1",
        better="higher",
        has_base=True,
        has_interval=True,
        headline=("",),
    ),
    "samples.cmmd": Metric(
        "CMMD to the held-out images",
        "features",
        "Distance between the samples and the held-out images as two sets of embeddings, with a Gaussian kernel, "
        "σ = 10 (Jayasumana et al. 2024). The estimate is unbiased and can be slightly below 0, so read "
        "`_change`.",
        unit="1000 MMD²",
        better="lower",
        has_base=True,
        has_interval=True,
        headline=("",),
    ),
    "samples.feature_kid": Metric(
        "KID of these features to the held-out images",
        "features",
        "Distance between the samples and the held-out images with KID's cubic kernel (Bińkowski et al. 2018), on the "
        "embeddings of the feature model instead of Inception's. The estimate is unbiased and can be slightly below 0, "
        "so read `_change`.",
        unit="MMD²",
        better="lower",
        has_base=True,
        has_interval=True,
    ),
    "cost.tflop_per_image": Metric(
        "Arithmetic per training image",
        "training",
        "Floating-point operations to train on one image: forward and backward pass of the denoiser, counted by "
        "`torch.utils.flop_counter`. The count is the same on every machine.",
        unit="TFLOP",
        better="lower",
        spec=".3g",
    ),
    "num_heldout": Metric(
        "",
        "training",
        "Number of held-out images in the dataset. Intervals become narrower with more of them.",
        unit="images",
        headline=("",),
        spec=",.0f",
    ),
    "train.num_images": Metric("", "training", "Number of training images.", unit="images", spec=",.0f"),
    "train.num_trainable_parameters": Metric(
        "Trainable parameters",
        "training",
        "Number of trained parameters of the adapter.",
        headline=("",),
        column="parameters",
        spec=",.0f",
    ),
    "train.num_steps": Metric(
        "Optimizer steps",
        "training",
        "Number of optimizer steps; an early stop ends before `train.num_steps` of params.yaml.",
        unit="steps",
        spec=",.0f",
    ),
    "train.images_seen": Metric(
        "Images seen",
        "training",
        "Number of training images over all steps, repetitions included.",
        unit="images",
        spec=",.0f",
    ),
    "train.epochs": Metric("", "training", "Number of passes over the training images.", unit="epochs", spec=".3g"),
    "train.loss_final": Metric(
        "Last training loss",
        "training",
        "Training loss, smoothed over the last steps. It is noisy, because every step has other images, "
        "timesteps and noise: compare `val.loss` instead.",
        unit="MSE",
        headline=("",),
        spec=".4f",
    ),
    "train.grad_norm_max": Metric(
        "",
        "training",
        "Largest gradient norm of any step, before clipping. A value far above the usual ones is a sign of an "
        "unstable training.",
    ),
    "export.megabytes": Metric(
        "Adapter size",
        "training",
        "Size of the adapter's weights in float32.",
        unit="MB",
        better="lower",
        headline=("",),
        column="megabytes",
        spec=".3g",
    ),
    "export.effect": Metric(
        "Largest change of the denoiser's output by the adapter",
        "export",
        "Largest absolute difference between the denoiser's output with and without the adapter. It is the scale "
        "for the differences below.",
        unit="output",
    ),
    "export.*.max_abs_error": Metric(
        "Output of the file loaded by {}: largest difference",
        "export",
        "Largest absolute difference between the denoiser's output with the exported file, loaded back by a "
        "program of that format, and with the trained adapter. It is usually 0; the stage fails above 1e-5 of "
        "the largest output.",
        unit="output",
        better="lower",
    ),
    "export.*.max_abs_error_quantized": Metric(
        "Output of the file loaded by {} into the quantized base: largest difference",
        "export",
        "With `model.quantization`: as `export.*.max_abs_error`, with file and trained adapter both on the quantized "
        "base.",
        unit="output",
        better="lower",
    ),
    "export.quantization_error": Metric(
        "Largest change of the adapted denoiser's output by the quantization of the base",
        "export",
        "With `model.quantization`: largest absolute difference between the outputs of the trained adapter on the "
        "quantized base and on the base as it is. Compare it with `export.effect`.",
        unit="output",
        better="lower",
    ),
    "export.*.unmapped_keys": Metric(
        "",
        "export",
        "Number of keys in the exported file that the loading program ignored. The stage fails above 0.",
        unit="keys",
        better="lower",
    ),
    "export.rank_*.energy_mean": Metric(
        "",
        "export",
        "Fraction of the adapter's squared singular values that remain in the copy of smaller rank, mean over "
        "layers. 1 means that nothing is lost.",
        unit="share",
        better="higher",
    ),
    "export.rank_*.energy_min": Metric(
        "",
        "export",
        "Fraction of the squared singular values that remains in the layer that loses most.",
        unit="share",
        better="higher",
    ),
    "export.rank_*.max_abs_error": Metric(
        "",
        "export",
        "Largest absolute difference between the denoiser's output with the copy of smaller rank and with the "
        "trained adapter.",
        unit="output",
        better="lower",
    ),
    "export.rank_*.relative_error": Metric(
        "",
        "export",
        "`export.rank_*.max_abs_error` divided by `export.effect`: 0.05 means 5 % of the adapter's largest effect.",
        unit="share",
        better="lower",
    ),
}
DATA: Mapping[str, str] = {
    "val.table": "Digest of the evaluation set. Losses of two runs can only be compared if this digest is the same.",
    "train.adapter_digest": "First digits of the adapter's SHA-256.",
    "train.base_digest": "First digits of the digest of the frozen base weights before training.",
    "train.base_unchanged": "Whether the frozen base weights have the same digest after training.",
}
"""Entries of the metrics files that are not numbers, with their meaning."""
DETAILS = ("_base", "_low", "_high")
"""Endings of names that a table shows in the row of their metric."""
NAMES = {name + ending: name for name, metric in METRICS.items() for ending in metric.endings}
"""Name in a metrics.json -> key in METRICS."""
PATTERNS = sorted((name for name in METRICS if "*" in name), key=len, reverse=True)
ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def key_of(name: str) -> str | None:
    """Return the key in METRICS of a name in a metrics.json: ``val.loss`` for ``val.loss_change_low``; None if unknown.

    ``*`` in a key is the name of a format or a rank. If two keys match, the longer one counts.
    """
    return NAMES.get(name) or next((key for key in PATTERNS if fnmatchcase(name, key)), None)


def find(name: str) -> Metric | None:
    """Return the metric of a name in a metrics.json; None if unknown."""
    key = key_of(name)
    return METRICS[key] if key else None


def arrow(name: str) -> str:
    """Return ``↓`` if lower is better, ``↑`` if higher is better, else an empty string."""
    metric = find(name)
    return ARROWS[metric.better if metric else None]


def metrics_of_table(table: Table) -> dict[str, Metric]:
    """Return the metrics that one table of the report shows."""
    return {name: metric for name, metric in METRICS.items() if metric.table == table}


def undocumented_names(names: Iterable[str]) -> list[str]:
    """Return the names of a metrics.json that are neither in METRICS nor in DATA."""
    return [name for name in names if not key_of(name) and name not in DATA]


# docs/metrics.md

INTRODUCTION = """\
# Metrics

Every number in `reports/metrics.json`, `reports/train/metrics.json` and `reports/export/metrics.json`: its meaning,
its unit, and how to read it.

**Where to look first:** `val.loss_change` (did the adapter learn?), `val.overfit_gap` (does it overfit?),
`samples.copied_share` (does it copy?) and `drift.loss_change` (what did the base model lose?).

- The *evaluation set* is a fixed list of rows: a held-out or training image, a timestep, and the noise to add. Base and
  adapter are scored on the same rows, so their losses can be compared row by row.
- The endings after a name, such as `_base`, are further numbers of the same metric: `val.loss_base`.
- `NAME_base` is the value of the base model without the adapter, `NAME` the value with the adapter, and `NAME_change`
  is adapter minus base. A change has the direction of its metric: `lower` means that a change below 0 is good.
- `_low` and `_high` are the bounds of a 95 % interval. If 0 lies between the bounds of a change, the change is within
  noise. An interval is missing if there is only one image.
- **Bold** is the name on the report and the model card.
- *headline*: the number is also in `reports/headline.json`, which `dvc exp show`, `dvc metrics diff` and VS Code read.
- *leaderboard*: the number has a column in the leaderboard of a sweep.
- A metric with an entry under *better* can have a limit in `report.gates.limits` of params.yaml.
- Units: MSE is the mean squared error of the denoiser's prediction. A share is a fraction between 0 and 1. An output is
  a value of the denoiser's output, which has a standard deviation of about 1.

Intervals of losses and scores come from a percentile bootstrap over whole images (Efron & Tibshirani 1993, ch. 13),
stretched to the width of Student's t (Hesterberg 2015). Intervals of CMMD and KID come from a jackknife over prompts
and images.

This page is generated from `lora_dag/evaluation/metrics.py`. Do not edit it: run
`python -m lora_dag.evaluation.metrics --write`.
"""
TITLES: Mapping[Table, str] = {
    "losses": "Losses",
    "samples": "Generated samples",
    "features": "Fit to prompts and images, with `validate.feature_model`",
    "training": "Training and cost",
    "export": "Exported files",
}


def page() -> str:
    """Return the Markdown of docs/metrics.md."""
    head = ("metric", "unit", "better", "also in", "meaning")
    parts = [INTRODUCTION]
    for table, title in TITLES.items():
        rows = [table_row(name, metric) for name, metric in metrics_of_table(table).items()]
        parts.append(f"## {title}\n\n{table_markdown(head, rows)}\n")
    data = [(f"`{name}`", meaning) for name, meaning in DATA.items()]
    parts.append(f"## Entries that are not numbers\n\n{table_markdown(('name', 'meaning'), data)}\n")
    return "\n".join(parts)


def table_row(name: str, metric: Metric) -> tuple[str, ...]:
    """Return the cells of a metric in the page's tables."""
    names = ", ".join(f"`{text}`" for text in (name, *metric.endings[1:]))
    also_in = [name for name, value in (("headline", metric.headline), ("leaderboard", metric.column)) if value]
    label = metric.label.format("the format's reader")
    return (
        names,
        metric.unit,
        metric.better or "",
        ", ".join(also_in),
        f"**{label}.** {metric.meaning}" if label else metric.meaning,
    )


def table_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} (default: print it)")
    if parser.parse_args().write:
        write_text(PAGE, page())
        log.info("wrote       %s", PAGE)
    else:
        log.info("%s", page())


if __name__ == "__main__":
    run(main)
