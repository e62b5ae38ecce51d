"""Compute metrics again from the committed tables: a metric that differs from its own table is a problem.

Digests show that dvc.lock and reports/ agree. They do not show that a run wrote both: a person can edit both. This
module computes all metrics that need no data, no weights and no torch. Only a rerun can find a table that was invented
as a whole.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lora_dag.artifacts import image_table, lineage, metrics
from lora_dag.artifacts.metrics import Value, rounded
from lora_dag.commands.compare.revision_report import DAMAGED, IMAGES, LINEAGE, METRICS_FILE, SCORES
from lora_dag.commands.gate import lock
from lora_dag.core.console import Problem, UserError
from lora_dag.core.labels import as_yaml
from lora_dag.core.params import read_yaml
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import Score
from stages.train.progress import smoothed_loss
from stages.validate import curve

CURVE, NEAREST = "reports/validate/curve.csv", "reports/validate/nearest.csv"
LOSSES, TRAIN = "reports/train/loss.csv", "reports/train/metrics.json"
DATASET, HEADLINE = "reports/dataset/metrics.json", "reports/headline.json"
EXPORT, MADE = "reports/export/metrics.json", "reports/export/lineage.json"
UNDO = "Restore the files of reports/ with `git checkout`, or run `dvc repro`."
SPLITS = ("heldout", "train")
SIX_DIGITS = 2e-5  # a metric and its table are both rounded to six digits
CHECKED = (
    f"The `val.*` metrics, the shares of copies and their distances follow from {SCORES}, {CURVE} and {NEAREST}.",
    f"The training metrics follow from {LOSSES}.",
    f"The number of images follows from {IMAGES}, and each image of the held-out table has the same split there.",
    f"{LINEAGE}, {MADE} and {TRAIN} name the same adapter, base model and latents.",
)


def problems() -> list[Problem]:
    """Return one problem per metric in the current folder that differs from the table it is computed from.

    Missing files are skipped here: gate/lock.py reports them.
    """
    reports = Reports()
    found: list[Problem] = []
    for check in CHECKS:
        try:
            found += list(check(reports))
        except FileNotFoundError:
            continue
        except UserError as error:
            found += error.problems
        except (OSError, ArithmeticError, LookupError, *DAMAGED) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"reports/: {check.__name__} cannot read its files ({what}). Restore reports/ with `git checkout`."
            found.append(Problem("report-unreadable", text))
    return list(dict.fromkeys(found))


class Reports:
    """Reports of the current folder, read on first use."""

    @cached_property
    def scores(self) -> list[Score]:
        return heldout_table.scores_from_csv(read(SCORES))

    @cached_property
    def images(self) -> list[image_table.Row]:
        return image_table.parse(read(IMAGES))

    @cached_property
    def lineage(self) -> dict[str, Any]:
        return lineage.load(Path(LINEAGE))

    @cached_property
    def params(self) -> dict[str, Any]:
        return read_yaml(Path("params.yaml"))


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def differing(path: str, source: str, computed: Mapping[str, Value]) -> Iterator[Problem]:
    """Yield metrics of a file that differ from the values computed from ``source``; absent metrics are skipped."""
    claimed = metrics.load(Path(path))
    for name, value in computed.items():
        if name in claimed and not same(claimed[name], rounded(value)):
            text = f"{path} {name}: got {as_yaml(claimed[name])}, but {source} gives {rounded(value)}. {UNDO}"
            yield Problem("metric-edited", text)


def same(claimed: object, value: object) -> bool:
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in (claimed, value)):
        return claimed == value
    return math.isclose(claimed, value, rel_tol=SIX_DIGITS, abs_tol=1e-9)  # type: ignore[arg-type]


def check_outputs(reports: Reports) -> Iterator[Problem]:
    """Check that each file the gate reads is an output of a stage: otherwise dvc.lock has no digest of it."""
    pipeline = lock.Pipeline.read()
    outputs = {path for stage in pipeline.stages.values() for path in stage.outs}
    for path in (
        METRICS_FILE,
        TRAIN,
        EXPORT,
        DATASET,
        HEADLINE,
        SCORES,
        CURVE,
        NEAREST,
        LOSSES,
        IMAGES,
        LINEAGE,
        MADE,
    ):
        if Path(path).exists() and path not in outputs:
            text = f"dvc.yaml: {path} is not an output of any stage, so dvc.lock has no digest of it. Add it again."
            yield Problem("report-untracked", text)


def check_heldout(reports: Reports) -> Iterator[Problem]:
    """Check the ``val.*`` metrics against the losses of heldout.csv."""
    seed, timesteps = reports.params["validate"]["seed"], reports.lineage["table"]["num_train_timesteps"]
    yield from differing(METRICS_FILE, SCORES, heldout_table.loss_metrics(reports.scores, timesteps, seed))


def check_heldout_images(reports: Reports) -> Iterator[Problem]:
    """Check that heldout.csv has every held-out image (up to ``max_images``), once in each part of the noise.

    So no image with a high loss can be left out, and no training image can be called held out.
    """
    settings, timesteps = reports.params["validate"], reports.lineage["table"]["num_train_timesteps"]
    of_split = {split: {row["file_name"] for row in reports.images if row["split"] == split} for split in SPLITS}
    here = {split: {score.file_name for score in reports.scores if score.split == split} for split in SPLITS}
    for split in SPLITS:
        if strange := sorted(here[split] - of_split[split]):
            yield Problem("split-edited", f"{SCORES} {strange[0]}: got {split}, but {IMAGES} differs. {UNDO}")
    expected = min(settings["max_images"], len(of_split["heldout"]))
    if len(here["heldout"]) != expected:
        text = f"{SCORES}: got {len(here['heldout'])} held-out images, but {IMAGES} gives {expected}. {UNDO}"
        yield Problem("heldout-count-edited", text)
    rows: dict[tuple[str, str], list[int]] = {}
    for score in reports.scores:
        rows.setdefault((score.split, score.file_name), []).append(score.timestep)
    num = settings["num_timesteps"]
    edges = [math.ceil(part * timesteps / num) for part in range(num + 1)]
    for (_, name), found in rows.items():
        parts = list(pairwise(edges))
        if len(found) != num or not all(low <= t < high for t, (low, high) in zip(found, parts, strict=True)):
            text = f"{SCORES} {name}: got timesteps {found}, but validate.num_timesteps {num} needs one in each part."
            yield Problem("timesteps-edited", f"{text} {UNDO}")
    for name, count in Counter(score.row for score in reports.scores).items():
        if count > 1:
            yield Problem("row-duplicated", f"{SCORES}: {count} rows have the name '{name}'. {UNDO}")


def check_curve(reports: Reports) -> Iterator[Problem]:
    """Check that curve.csv begins with the base's losses, ends with the adapter's, and has the best snapshot."""
    points, measured = curve.from_csv(read(CURVE)), heldout_table.loss_metrics(reports.scores, 1, 0)
    yield from differing(METRICS_FILE, CURVE, curve.metrics(points))
    yield from differing(TRAIN, CURVE, {"train.num_steps": points[-1].step})
    ends = {"val.loss_base": points[0].heldout, "val.train_loss_base": points[0].train_probe}
    ends |= {"val.loss": points[-1].heldout, "val.train_loss": points[-1].train_probe}
    for name, value in ends.items():
        if not same(rounded(value), rounded(measured[name])):
            text = f"{CURVE} {name}: got {value:g}, but {SCORES} gives {rounded(measured[name])}. {UNDO}"
            yield Problem("metric-edited", text)


def check_copies(reports: Reports) -> Iterator[Problem]:
    """Check the metrics of copies against the distances of nearest.csv and the thresholds of lineage.json."""
    rows = list(csv.DictReader(io.StringIO(read(NEAREST))))
    settings, scale = reports.params["validate"], reports.lineage["neighbors"]
    drawn = Counter((row["prompt"], int(row["seed"])) for row in rows)
    wanted = Counter((prompt, seed) for seed in range(settings["num_seeds"]) for prompt in settings["prompts"])
    if drawn != wanted:
        text = f"{NEAREST}: its {len(rows)} rows are not the {wanted.total()} of validate.prompts and num_seeds. {UNDO}"
        yield Problem("samples-edited", text)
    threshold = math.nan if scale["threshold"] is None else float(scale["threshold"])
    far = scale["far_threshold"]
    for prefix, suffix in (("", ""), ("base_", "_base")):
        distances, flags = ([float(row[f"{prefix}{name}"]) for row in rows] for name in ("distance", "copied"))
        for distance, flag in zip(distances, flags, strict=True):
            if (distance < threshold) != flag and not math.isclose(distance, threshold, rel_tol=SIX_DIGITS):
                text = (
                    f"{NEAREST}: got {prefix}copied {flag:g} at distance {distance:g}, but {LINEAGE} has the threshold"
                )
                yield Problem("copied-flag-edited", f"{text} {threshold:g}. {UNDO}")
        share = math.nan if math.isnan(threshold) else bootstrap.mean(flags)
        middle = float(np.median(distances)) if distances else math.nan
        found = {f"samples.copied_share{suffix}": share, f"samples.nearest_distance{suffix}": middle}
        if far is not None and not any(math.isclose(distance, far, rel_tol=SIX_DIGITS) for distance in distances):
            found[f"samples.far_share{suffix}"] = bootstrap.mean(distance > far for distance in distances)
        yield from differing(METRICS_FILE, NEAREST, found)


def check_training(reports: Reports) -> Iterator[Problem]:
    """Check the training metrics against loss.csv.

    It has every step of a run of up to 2,000 steps, and every second or third step of a longer run.
    """
    settings, rows = reports.params["train"], list(csv.DictReader(io.StringIO(read(LOSSES))))
    history = [(float(row["loss"]), float(row["learning_rate"]), float(row["grad_norm"])) for row in rows]
    numbers = [int(row["step"]) for row in rows]
    if numbers[0] != 1:
        return
    norms = [norm for _, _, norm in history if math.isfinite(norm)]
    computed = {
        "train.num_steps": numbers[-1],
        "train.images_seen": numbers[-1] * settings["batch_size"] * settings["gradient_accumulation_steps"],
        "train.loss_final": smoothed_loss(history),
        "train.grad_norm_max": max(norms, default=0.0),
    }
    yield from differing(TRAIN, LOSSES, computed)


def check_dataset(reports: Reports) -> Iterator[Problem]:
    """Check the counts of images against images.csv, which has every image."""
    splits = Counter(row["split"] for row in reports.images)
    found = {
        "num_images": len(reports.images) - splits[image_table.LEFT_OUT],
        "num_train": splits["train"],
        "num_heldout": splits["heldout"],
        "num_left_out": splits[image_table.LEFT_OUT],
    }
    yield from differing(DATASET, IMAGES, found)


def check_headline(reports: Reports) -> Iterator[Problem]:
    """Check that headline.json repeats the metrics of the stages."""
    measured: dict[str, Value] = {}
    for path in (DATASET, TRAIN, METRICS_FILE, EXPORT):
        measured |= metrics.load(Path(path))
    known = {name: measured[name] for name in metrics.load(Path(HEADLINE)) if name in measured}
    yield from differing(HEADLINE, "metrics.json of the stages", known)


def check_digests(reports: Reports) -> Iterator[Problem]:
    """Check that the trained, the evaluated and the exported adapter are the same, and so base and latents."""
    made, train = lineage.load(Path(MADE)), metrics.load(Path(TRAIN))
    names = {
        "the adapter": (reports.lineage["adapter"], made["adapter"], str(train["train.adapter_digest"])),
        "the latents": (reports.lineage["latents"], made["latents"]),
    }
    names |= {
        f"the base's {component}": (reports.lineage["base"].get(component, ""), digest)
        for component, digest in made["base"].items()
    }
    for component, digests in names.items():
        if not agree(digests):
            text = f"{LINEAGE}: the digest of {component} ({digests[0]}) differs from {MADE} or {TRAIN}. {UNDO}"
            yield Problem("digests-differ", text)


def agree(digests: Sequence[str]) -> bool:
    """Return whether all are the first digits of one digest: each file keeps a different number of digits."""
    longest = max(digests, key=len)
    return all(digest and longest.startswith(digest) for digest in digests)


def check_formats(reports: Reports) -> Iterator[Problem]:
    """Check that every exported format was loaded back and measured."""
    measured = metrics.load(Path(EXPORT))
    for name in reports.params["export"]["formats"]:
        if f"export.{name}.max_abs_error" not in measured:
            text = f"{EXPORT}: export.{name}.max_abs_error is missing, but export.formats lists {name}. {UNDO}"
            yield Problem("export-unmeasured", text)


CHECKS = (
    check_outputs,
    check_heldout,
    check_heldout_images,
    check_curve,
    check_copies,
    check_training,
    check_dataset,
    check_headline,
    check_digests,
    check_formats,
)
