"""Figures that committed files determine, computed again: a metric that is not what its own table gives is refused.

Digests tell that dvc.lock and reports/ agree, not that a run wrote them: whoever edits both passes. What is computed
here is all that follows without data, weights and torch. A table that was invented as a whole needs a rerun.
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

from lora_dag.artifacts import lineage, metrics, picture_table
from lora_dag.artifacts.metrics import Value, tidy
from lora_dag.commands.compare.sides import DAMAGED, LINEAGE, METRICS_FILE, PICTURES, SCORES
from lora_dag.commands.gate import lock
from lora_dag.core.console import UserError
from lora_dag.core.params import read_yaml
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import Score
from stages.train.progress import smoothed_loss
from stages.validate import curve

CURVE, NEAREST = "reports/validate/curve.csv", "reports/validate/nearest.csv"
LOSSES, TRAIN = "reports/train/loss.csv", "reports/train/metrics.json"
DATASET, HEADLINE = "reports/dataset/metrics.json", "reports/headline.json"
EXPORT, MADE = "reports/export/metrics.json", "reports/export/lineage.json"
SIX_DIGITS = 2e-5  # a value and what it follows from are both rounded to six digits
CHECKED = (
    f"{SCORES}, {CURVE} and {NEAREST} give the `val.*` figures, the shares of copies and their distances",
    f"{LOSSES} gives the training's",
    f"{PICTURES} gives the number of pictures, and has those that were asked about, in the same split",
    f"{LINEAGE}, {MADE} and {TRAIN} name one adapter, one base and one set of latents",
)


def problems() -> list[str]:
    """One line per figure that is not what the files beside it determine.

    Reads the current folder. A file that is missing determines nothing: dvc.lock names it.
    """
    reports, found = Reports(), []
    for check in (owned, heldout, asked, steps, copies, training, dataset, headline, origin, formats):
        try:
            found += list(check(reports))
        except FileNotFoundError:
            continue
        except UserError as error:
            found += error.problems
        except (OSError, ArithmeticError, LookupError, *DAMAGED) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(f"reports/: what `{check.__name__}` needs is not as its stage wrote it ({what})")
    return list(dict.fromkeys(found))


class Reports:
    """Files of the current folder, read when they are needed."""

    @cached_property
    def scores(self) -> list[Score]:
        return heldout_table.read_scores(read(SCORES))

    @cached_property
    def pictures(self) -> list[picture_table.Row]:
        return picture_table.parse(read(PICTURES))

    @cached_property
    def lineage(self) -> dict[str, Any]:
        return lineage.load(Path(LINEAGE))

    @cached_property
    def params(self) -> dict[str, Any]:
        return read_yaml(Path("params.yaml"))


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def differing(path: str, source: str, determined: Mapping[str, Value]) -> Iterator[str]:
    """Metrics of a file that ``source`` gives otherwise; one that the file does not have claims nothing."""
    claimed = metrics.load(Path(path))
    for name, value in determined.items():
        if name in claimed and not same(claimed[name], tidy(value)):
            yield f"{path} {name}: {claimed[name]}, and {source} gives {tidy(value)}: edited by hand"


def same(claimed: object, value: object) -> bool:
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in (claimed, value)):
        return claimed == value
    return math.isclose(claimed, value, rel_tol=SIX_DIGITS, abs_tol=1e-9)  # type: ignore[arg-type]


def owned(reports: Reports) -> Iterator[str]:
    """Each file that the gate reads is an output of a stage: without one, dvc.lock has no digest of it."""
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
        PICTURES,
        LINEAGE,
        MADE,
    ):
        if Path(path).exists() and path not in outputs:
            yield f"dvc.yaml: no stage has {path} among its outputs, so that dvc.lock has no digest of it; restore it"


def heldout(reports: Reports) -> Iterator[str]:
    """heldout.csv has the very losses that the stage's figures are of."""
    seed, timesteps = reports.params["validate"]["seed"], reports.lineage["table"]["num_train_timesteps"]
    yield from differing(METRICS_FILE, SCORES, heldout_table.metrics(reports.scores, timesteps, seed))


def asked(reports: Reports) -> Iterator[str]:
    """heldout.csv asks of every held-out picture, or of as many as the setting allows, once in each part of the noise.

    No picture with a worse loss is left out of it, and none is in it that training has seen.
    """
    settings, timesteps = reports.params["validate"], reports.lineage["table"]["num_train_timesteps"]
    of_split = {split: {row["file_name"] for row in reports.pictures if row["split"] == split} for split in SPLITS}
    here = {split: {score.file_name for score in reports.scores if score.split == split} for split in SPLITS}
    for split in SPLITS:
        if strange := sorted(here[split] - of_split[split]):
            yield f"{SCORES} {strange[0]}: {split}, and {PICTURES} does not have it there"
    expected = min(settings["max_pictures"], len(of_split["heldout"]))
    if len(here["heldout"]) != expected:
        yield f"{SCORES}: {len(here['heldout'])} held-out pictures, and {PICTURES} gives {expected}"
    rows: dict[tuple[str, str], list[int]] = {}
    for score in reports.scores:
        rows.setdefault((score.split, score.file_name), []).append(score.timestep)
    num = settings["num_timesteps"]
    edges = [math.ceil(part * timesteps / num) for part in range(num + 1)]
    for (_, name), found in rows.items():
        if len(found) != num or not all(low <= t < high for t, (low, high) in zip(found, pairwise(edges), strict=True)):
            yield f"{SCORES} {name}: timesteps {found}, and validate.num_timesteps {num} asks one in each part"
    for name, count in Counter(score.row for score in reports.scores).items():
        if count > 1:
            yield f"{SCORES}: {count} rows are called '{name}', and each has a name of its own"


SPLITS = ("heldout", "train")


def steps(reports: Reports) -> Iterator[str]:
    """curve.csv begins with the base's losses, ends with the adapter's, and tells which snapshot is best."""
    points, measured = curve.read(read(CURVE)), heldout_table.metrics(reports.scores, 1, 0)
    yield from differing(METRICS_FILE, CURVE, curve.metrics(points))
    yield from differing(TRAIN, CURVE, {"train.num_steps": points[-1].step})
    ends = {"val.loss_base": points[0].heldout, "val.train_loss_base": points[0].train_probe}
    ends |= {"val.loss": points[-1].heldout, "val.train_loss": points[-1].train_probe}
    for name, value in ends.items():
        if not same(tidy(value), tidy(measured[name])):
            yield f"{CURVE}: {value:g} where {SCORES} gives {tidy(measured[name])} ({name}): edited by hand"


def copies(reports: Reports) -> Iterator[str]:
    """nearest.csv has every sample's distance; both thresholds are the held-out pictures', in lineage.json."""
    rows = list(csv.DictReader(io.StringIO(read(NEAREST))))
    settings, scale = reports.params["validate"], reports.lineage["neighbours"]
    drawn = Counter((row["prompt"], int(row["seed"])) for row in rows)
    wanted = Counter((prompt, seed) for seed in range(settings["num_seeds"]) for prompt in settings["prompts"])
    if drawn != wanted:
        yield f"{NEAREST}: its {len(rows)} rows are not the {wanted.total()} of validate.prompts and num_seeds"
    threshold = math.nan if scale["threshold"] is None else float(scale["threshold"])
    far = scale["far_threshold"]
    for side, suffix in (("", ""), ("base_", "_base")):
        distances, flags = ([float(row[f"{side}{name}"]) for row in rows] for name in ("distance", "copied"))
        for distance, flag in zip(distances, flags, strict=True):
            if (distance < threshold) != flag and not math.isclose(distance, threshold, rel_tol=SIX_DIGITS):
                yield f"{NEAREST}: {side}copied {flag:g} at a distance of {distance:g}; {LINEAGE} has {threshold:g}"
        share = math.nan if math.isnan(threshold) else bootstrap.mean(flags)
        middle = float(np.median(distances)) if distances else math.nan
        found = {f"samples.copied_share{suffix}": share, f"samples.nearest_distance{suffix}": middle}
        if far is not None and not any(math.isclose(distance, far, rel_tol=SIX_DIGITS) for distance in distances):
            found[f"samples.far_share{suffix}"] = bootstrap.mean(distance > far for distance in distances)
        yield from differing(METRICS_FILE, NEAREST, found)


def training(reports: Reports) -> Iterator[str]:
    """loss.csv has every step of a run of up to 2,000, and every second or third of a longer one."""
    settings, rows = reports.params["train"], list(csv.DictReader(io.StringIO(read(LOSSES))))
    history = [(float(row["loss"]), float(row["learning_rate"]), float(row["grad_norm"])) for row in rows]
    numbers = [int(row["step"]) for row in rows]
    if numbers[0] != 1:
        return
    norms = [norm for _, _, norm in history if math.isfinite(norm)]
    determined = {
        "train.num_steps": numbers[-1],
        "train.images_seen": numbers[-1] * settings["batch_size"] * settings["gradient_accumulation_steps"],
        "train.loss_final": smoothed_loss(history),
        "train.grad_norm_max": max(norms, default=0.0),
    }
    yield from differing(TRAIN, LOSSES, determined)


def dataset(reports: Reports) -> Iterator[str]:
    """pictures.csv has every picture."""
    splits = Counter(row["split"] for row in reports.pictures)
    found = {
        "num_pictures": len(reports.pictures) - splits[picture_table.LEFT_OUT],
        "num_train": splits["train"],
        "num_heldout": splits["heldout"],
        "num_left_out": splits[picture_table.LEFT_OUT],
    }
    yield from differing(DATASET, PICTURES, found)


def headline(reports: Reports) -> Iterator[str]:
    """headline.json repeats what the stages measured."""
    measured: dict[str, Value] = {}
    for path in (DATASET, TRAIN, METRICS_FILE, EXPORT):
        measured |= metrics.load(Path(path))
    known = {name: measured[name] for name in metrics.load(Path(HEADLINE)) if name in measured}
    yield from differing(HEADLINE, "the stages' metrics.json", known)


def origin(reports: Reports) -> Iterator[str]:
    """What was trained is what was judged, and what is handed out."""
    made, train = lineage.load(Path(MADE)), metrics.load(Path(TRAIN))
    names = {
        "the adapter": (reports.lineage["adapter"], made["adapter"], str(train["train.adapter_digest"])),
        "the latents": (reports.lineage["latents"], made["latents"]),
    }
    names |= {
        f"the base's {component}": (reports.lineage["base"].get(component, ""), digest)
        for component, digest in made["base"].items()
    }
    for what, digests in names.items():
        if not agree(digests):
            yield f"{LINEAGE}: another digest of {what} ({digests[0]}) than {MADE} or {TRAIN}: not of one run"


def agree(digests: Sequence[str]) -> bool:
    """They are the first digits of one; each file keeps another number of them."""
    longest = max(digests, key=len)
    return all(digest and longest.startswith(digest) for digest in digests)


def formats(reports: Reports) -> Iterator[str]:
    """Each format that is handed out was loaded back, so that a limit is of all of them."""
    measured = metrics.load(Path(EXPORT))
    for name in reports.params["export"]["formats"]:
        if f"export.{name}.max_abs_error" not in measured:
            yield f"{EXPORT}: has no export.{name}.max_abs_error, and export.formats lists {name}"
