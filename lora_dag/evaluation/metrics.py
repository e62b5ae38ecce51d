"""METRICS: what each number of the reports means, its unit, which way is better, and where pages show it.

The tables of report and model card, headline.json (and so `dvc exp show`), the marks of `compare`, the columns of
`leaderboard`, the limits of `gate` and docs/metrics.md are made from these rows. A new metric is the module of
stages/validate that measures it, and one row here.
Run: `python -m lora_dag.evaluation.metrics --write` writes docs/metrics.md; without --write it prints the page.

Two rules for what does not match: a number without a row is shown by its own name, without unit and direction; a row
without a number, such as that of a feature model that nobody set, is left out.
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
    """Its name on report and model card; empty: the name that the files have."""
    table: Table
    """The table of the report that has its row. Losses, samples and features are tables of base and adapter."""
    meaning: str
    """One plain sentence."""
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    """None: neither is better by itself."""
    has_base: bool = False
    """``NAME_base`` is the same figure of the base model."""
    has_interval: bool = False
    """It has a 95 % interval: ``NAME_low`` and ``NAME_high``.

    Where the base has the figure too, the interval is that of ``NAME_change``, adapter minus base.
    """
    headline: tuple[str, ...] = ()
    """Endings of the names that headline.json repeats; "" is the metric itself."""
    decides: bool = False
    """The verdict of `compare` is of this metric, which alone is marked as better or worse."""
    column: str = ""
    """Its column in the leaderboard; empty: none."""
    spec: str = ".4g"
    """Format of its values in text and in the leaderboard."""
    dataset: str = ""
    """Name of the same figure of the dataset's own pictures, which the report shows beside it."""

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of all of its names in a metrics.json."""
        bounds = ("_low", "_high") if self.has_interval else ()
        if self.has_base and bounds:
            return ("", "_base", "_change", *(f"_change{bound}" for bound in bounds))
        return ("", *(("_base",) if self.has_base else ()), *bounds)


METRICS: dict[str, Metric] = {
    "val.loss": Metric(
        "Held-out loss",
        "losses",
        "Loss of the adapter on pictures that it was never trained on, over the frozen table.",
        unit="MSE",
        better="lower",
        has_base=True,
        has_interval=True,
        headline=("", "_change", "_change_low", "_change_high"),
        decides=True,
    ),
    "val.loss_low_noise": Metric(
        "Held-out loss, little noise",
        "losses",
        "Held-out loss over the third of the timesteps with the least noise.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "val.loss_mid_noise": Metric(
        "Held-out loss, medium noise",
        "losses",
        "Held-out loss over the middle third of the timesteps.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "val.loss_high_noise": Metric(
        "Held-out loss, much noise",
        "losses",
        "Held-out loss over the third of the timesteps with the most noise.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "val.train_loss": Metric(
        "Loss on training pictures",
        "losses",
        "Loss on as many training pictures, measured in the same way.",
        unit="MSE",
        better="lower",
        has_base=True,
    ),
    "drift.loss": Metric(
        "Drift: loss on pictures that the base drew",
        "losses",
        "Loss on pictures that the base draws for `validate.drift_prompts`; a rise is what the base forgot.",
        unit="MSE",
        better="lower",
        has_base=True,
        has_interval=True,
        headline=("_change",),
    ),
    "val.overfit_gap": Metric(
        "",
        "training",
        "How much more the loss fell on training pictures than on held-out ones; near 0 without overfitting.",
        unit="MSE",
        better="lower",
        has_interval=True,
        headline=("",),
        column="overfit_gap",
        spec="+.4f",
    ),
    "val.best_step": Metric(
        "Lowest held-out loss",
        "training",
        "Step of the snapshot with the lowest held-out loss; 0 is the base.",
        unit="step",
        headline=("",),
        spec=",.0f",
    ),
    "val.final_minus_best": Metric(
        "",
        "training",
        "Held-out loss of the last snapshot minus that of the best one; `reports/validate/curve.csv` has it of all.",
        unit="MSE",
        better="lower",
        has_interval=True,
        spec="+.4f",
    ),
    "val.onset_step": Metric(
        "Overfitting sets in",
        "training",
        "First snapshot after which held-out loss stays above its lowest value, beyond the interval, while the loss on "
        "training pictures has fallen further; null where there is none.",
        unit="step",
        spec=",.0f",
    ),
    "samples.chroma": Metric(
        "Chroma of the drawing",
        "samples",
        "Mean colorfulness of the samples (`validate.ink_measures`), best near the dataset's.",
        unit="0 to 255",
        has_base=True,
        dataset="chroma",
    ),
    "samples.dark_share": Metric(
        "Near-black share of the drawing",
        "samples",
        "Share of near-black pixels of the samples (`validate.ink_measures`), best near the dataset's.",
        unit="0 to 1",
        has_base=True,
        dataset="dark_share",
    ),
    "samples.copied_share": Metric(
        "Copies of training pictures",
        "samples",
        "Share of samples nearer to a training picture than 95 % of the held-out pictures are: 0.05 is expected by "
        "chance, 1 / (n + 1) with n < 19 held-out pictures; `validate.max_copied_share` can fail the stage.",
        unit="share",
        better="lower",
        has_base=True,
        headline=("",),
        column="copied_share",
        spec=".0%",
    ),
    "samples.far_share": Metric(
        "Unlike any picture of the dataset",
        "samples",
        "Share of samples farther from all training pictures than 95 % of the held-out pictures are, as noise is.",
        unit="share",
        better="lower",
        has_base=True,
    ),
    "samples.blank_share": Metric(
        "Of one colour",
        "samples",
        "Share of samples that have one color only.",
        unit="share",
        better="lower",
        has_base=True,
    ),
    "samples.nearest_distance": Metric(
        "Distance to the nearest training picture",
        "samples",
        "Median over samples, best near that of the held-out pictures; a root mean square of latents, or a distance of "
        "features where `validate.feature_model` is set.",
        has_base=True,
        dataset="heldout_median",
    ),
    "samples.diversity": Metric(
        "Distance between pictures of one prompt",
        "samples",
        "Mean distance of two samples of one prompt, measured as `samples.nearest_distance` is; the base's is the "
        "control.",
        has_base=True,
        headline=("",),
    ),
    "samples.clip_score": Metric(
        "CLIP score of sample and prompt",
        "features",
        "Fit of sample and prompt: 100 max(cos, 0) (Hessel et al. 2021), by a CLIP model.",
        unit="0 to 100",
        better="higher",
        has_base=True,
        has_interval=True,
        headline=("",),
    ),
    "samples.cosine": Metric(
        "Cosine of sample and prompt",
        "features",
        "Fit of sample and prompt: the cosine itself, by a SigLIP model.",
        unit="-1 to 1",
        better="higher",
        has_base=True,
        has_interval=True,
        headline=("",),
    ),
    "samples.cmmd": Metric(
        "CMMD to the held-out pictures",
        "features",
        "Distance of the samples to the held-out pictures: Gaussian kernel, σ = 10 (Jayasumana et al. 2024).",
        unit="1000 MMD²",
        better="lower",
        has_base=True,
        has_interval=True,
        headline=("",),
    ),
    "samples.feature_kid": Metric(
        "KID of these features to the held-out pictures",
        "features",
        "The same distance by KID's cubic kernel (Bińkowski et al. 2018), on these features and not on Inception's.",
        unit="MMD²",
        better="lower",
        has_base=True,
        has_interval=True,
    ),
    "cost.tflop_per_image": Metric(
        "Arithmetic per training image",
        "training",
        "Operations of the denoiser, forward and backward, for one training image (`torch.utils.flop_counter`).",
        unit="TFLOP",
        better="lower",
        spec=".3g",
    ),
    "num_heldout": Metric(
        "",
        "training",
        "Held-out pictures of the dataset, which no training sees.",
        unit="pictures",
        headline=("",),
        spec=",.0f",
    ),
    "train.num_pictures": Metric("", "training", "Pictures that training draws from.", unit="pictures", spec=",.0f"),
    "train.num_trainable_parameters": Metric(
        "Trainable parameters",
        "training",
        "Parameters of the adapter.",
        headline=("",),
        column="parameters",
        spec=",.0f",
    ),
    "train.num_steps": Metric(
        "Optimizer steps",
        "training",
        "Steps of the optimizer; fewer than `train.num_steps` after an early stop.",
        unit="steps",
        spec=",.0f",
    ),
    "train.images_seen": Metric(
        "Images seen", "training", "Training images over all steps, repeats included.", unit="images", spec=",.0f"
    ),
    "train.epochs": Metric("", "training", "How often training went through its pictures.", unit="epochs", spec=".3g"),
    "train.loss_final": Metric(
        "Last training loss",
        "training",
        "Training loss, smoothed over the last steps; noisy, so compare held-out losses instead.",
        unit="MSE",
        headline=("",),
        spec=".4f",
    ),
    "train.grad_norm_max": Metric("", "training", "The largest norm of the gradient at any step, before clipping."),
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
        "Largest change that the adapter makes to the denoiser's output",
        "export",
        "Largest difference between the denoiser's output with and without the adapter.",
        unit="output",
    ),
    "export.*.max_abs_error": Metric(
        "The same output by {}: largest difference",
        "export",
        "Largest difference between the denoiser's output with the exported file, loaded back, and with the adapter "
        "in memory.",
        unit="output",
        better="lower",
    ),
    "export.*.unmapped_keys": Metric(
        "",
        "export",
        "Keys of the exported file that its reader did not take.",
        unit="keys",
        better="lower",
    ),
    "export.rank_*.energy_mean": Metric(
        "",
        "export",
        "Share of the squared singular values that a copy of a smaller rank keeps, mean over layers.",
        unit="share",
        better="higher",
    ),
    "export.rank_*.energy_min": Metric(
        "",
        "export",
        "The same share of the layer that keeps least.",
        unit="share",
        better="higher",
    ),
    "export.rank_*.max_abs_error": Metric(
        "",
        "export",
        "Largest difference between the denoiser's output with a copy of a smaller rank and with the adapter.",
        unit="output",
        better="lower",
    ),
    "export.rank_*.relative_error": Metric(
        "",
        "export",
        "The same difference as a share of `export.effect`.",
        unit="share",
        better="lower",
    ),
}
DATA: Mapping[str, str] = {
    "val.table": "Digest of the frozen table; losses of another table are of other rows.",
    "train.adapter_digest": "First digits of the adapter's SHA-256.",
    "train.base_digest": "First digits of the digest of the frozen base weights, before training.",
    "train.base_unchanged": "Whether the frozen base weights have the same digest after training.",
}
"""What the files hold beside numbers."""
DETAILS = ("_base", "_low", "_high")
"""Endings of names that a table shows in the row of their metric."""
NAMES = {name + ending: name for name, metric in METRICS.items() for ending in metric.endings}
"""Name in a metrics.json -> key of its row."""
PATTERNS = sorted((name for name in METRICS if "*" in name), key=len, reverse=True)
ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def key_of(name: str) -> str | None:
    """Key of the row of a name in a metrics.json: ``val.loss`` of ``val.loss_change_low``; None where it has none.

    ``*`` in a key is a format, or a rank; of two keys that match, the longer one counts.
    """
    return NAMES.get(name) or next((key for key in PATTERNS if fnmatchcase(name, key)), None)


def find(name: str) -> Metric | None:
    """The row of a name in a metrics.json."""
    key = key_of(name)
    return METRICS[key] if key else None


def arrow(name: str) -> str:
    """``↓`` where lower is better, ``↑`` where higher is; empty where neither is, or the name has no row."""
    metric = find(name)
    return ARROWS[metric.better if metric else None]


def of_table(table: Table) -> dict[str, Metric]:
    return {name: metric for name, metric in METRICS.items() if metric.table == table}


def without_row(names: Iterable[str]) -> list[str]:
    """Names of a metrics.json that are neither in METRICS nor in DATA."""
    return [name for name in names if not key_of(name) and name not in DATA]


# docs/metrics.md

INTRODUCTION = """\
# Metrics

Every number of `reports/metrics.json`, `reports/train/metrics.json` and `reports/export/metrics.json`. Do not edit
this page: `python -m lora_dag.evaluation.metrics --write` makes it from `lora_dag/evaluation/metrics.py`.

- **Bold** is the name on report and model card.
- `_base` is the same figure of the base model. `_change` is adapter minus base. `_low` and `_high` are the bounds of a
  95 % interval over pictures: a percentile bootstrap of whole pictures (Efron & Tibshirani 1993, ch. 13), stretched to
  Student's width (Hesterberg 2015); for CMMD and KID, a jackknife over prompts and pictures.
- *headline*: the number is in `reports/headline.json`, and so in `dvc exp show`, `dvc metrics diff` and VS Code.
- *leaderboard*: the number has a column in the leaderboard of a sweep.
- A metric with a better direction can have a limit in `report.gates.limits` of params.yaml.
"""
TITLES: Mapping[Table, str] = {
    "losses": "Losses on the frozen table",
    "samples": "Samples",
    "features": "Features of the samples, with `validate.feature_model`",
    "training": "Training and cost",
    "export": "Exported files",
}


def page() -> str:
    """Markdown of docs/metrics.md."""
    head = ("metric", "unit", "better", "also in", "meaning")
    parts = [INTRODUCTION]
    for table, title in TITLES.items():
        rows = [row(name, metric) for name, metric in of_table(table).items()]
        parts.append(f"## {title}\n\n{lines(head, rows)}\n")
    data = [(f"`{name}`", meaning) for name, meaning in DATA.items()]
    parts.append(f"## Beside numbers\n\n{lines(('name', 'meaning'), data)}\n")
    return "\n".join(parts)


def row(name: str, metric: Metric) -> tuple[str, ...]:
    names = ", ".join(f"`{text}`" for text in (name, *metric.endings[1:]))
    places = [place for place, found in (("headline", metric.headline), ("leaderboard", metric.column)) if found]
    label = f"**{metric.label.format('the format')}.** " if metric.label else ""
    return names, metric.unit, metric.better or "", ", ".join(places), label + metric.meaning


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
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
