"""The evaluation set: rows of (image, timestep, noise), their losses in heldout.csv, and the ``val.*`` metrics.

Only NumPy is imported, so that `compare` starts fast. A row depends only on the seed and its image, so adding images
does not change other rows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lora_dag.core.files import sha256_json
from lora_dag.core.seeding import key
from lora_dag.evaluation.bootstrap import by_image, difference, estimate, mean

BANDS = ("low", "mid", "high")  # thirds of the training timesteps, by noise
FIELDS = ("row", "file_name", "split", "timestep", "base", "adapter")


@dataclass(frozen=True)
class EvalImage:
    """An image that can be in the evaluation set."""

    content: str
    """Digest of the decoded image. It keys the timesteps and the noise; the encoder's settings do not change it."""
    file_name: str
    split: str
    """train or heldout"""
    caption: str
    view: str
    """Key of its first view's latents."""
    mask: str | None = None
    """Key of the mask of that view; None if the loss covers the whole image."""


@dataclass(frozen=True)
class Row:
    """One prediction that is scored: an image at a timestep with a fixed noise."""

    image: EvalImage
    stratum: int
    """Number of the timestep's stratum. It keys the noise together with the seed and the image's content."""
    timestep: int


@dataclass(frozen=True)
class Score:
    """One row of reports/validate/heldout.csv: the losses of base and adapter."""

    row: str
    """Digest from ``row_digests``. Losses of two runs are paired if it is the same. Empty in tables of old versions."""
    file_name: str
    split: str
    timestep: int
    base: float
    adapter: float


# The table


def choose_images(images: Iterable[EvalImage], max_images: int) -> list[EvalImage]:
    """Return at most ``max_images`` held-out images, and then an equal number of training images (the train probe).

    Images are chosen by content: names and order of the files do not matter.
    """
    by_content = sorted(images, key=lambda image: (image.content, image.caption, image.file_name))
    heldout = [image for image in by_content if image.split == "heldout"][:max_images]
    probe = [image for image in by_content if image.split == "train"][: len(heldout)]
    return heldout + probe


def make_rows(images: Iterable[EvalImage], num_strata: int, num_train_timesteps: int, seed: int) -> list[Row]:
    """Return ``num_strata`` rows per image, in the order of ``images``."""
    return [
        Row(image, stratum, timestep)
        for image in images
        for stratum, timestep in enumerate(stratified_timesteps(seed, image.content, num_strata, num_train_timesteps))
    ]


def stratified_timesteps(seed: int, content: str, num_strata: int, num_train_timesteps: int) -> list[int]:
    """Draw one timestep from each of ``num_strata`` equal parts of 0 ... num_train_timesteps - 1, ascending.

    Raises:
        ValueError: there are more strata than timesteps.
    """
    if num_strata > num_train_timesteps:
        raise ValueError(f"{num_strata} strata of {num_train_timesteps} timesteps")
    edges = [math.ceil(stratum * num_train_timesteps / num_strata) for stratum in range(num_strata + 1)]
    return [
        low + key(seed, "timestep", content, stratum) % (high - low)
        for stratum, (low, high) in enumerate(pairwise(edges))
    ]


def table_digest(rows: Sequence[Row], seed: int, components: Mapping[str, str]) -> str:
    """Return the digest of rows, captions, seed, VAE and scheduler, 16 hex digits. Losses with equal digests compare.

    Args:
        components: digest of each component of the base that determines the targets.
    """
    contents = [[row.image.split, row.image.content, row.image.caption, row.stratum, row.timestep] for row in rows]
    return sha256_json({"rows": contents, "seed": seed, "components": dict(components)})[:16]


def row_digests(rows: Sequence[Row], seed: int, components: Mapping[str, str]) -> list[str]:
    """Return a digest per row, 12 hex digits, independent of the other rows. Arguments as for ``table_digest``."""
    contents = [[row.image.content, row.image.caption, row.stratum, row.timestep] for row in rows]
    return [sha256_json({"row": row, "seed": seed, "components": dict(components)})[:12] for row in contents]


def scores_to_csv(scores: Iterable[Score]) -> str:
    """Return CSV text, losses with six significant digits."""
    lines = [(s.row, s.file_name, s.split, s.timestep, f"{s.base:.6g}", f"{s.adapter:.6g}") for s in scores]
    return csv_text(FIELDS, lines)


def scores_from_csv(text: str) -> list[Score]:
    """Read the text that ``scores_to_csv`` returns."""
    lines = csv.DictReader(io.StringIO(text))
    return [
        Score(
            row=line.get("row") or "",
            file_name=line["file_name"],
            split=line["split"],
            timestep=int(line["timestep"]),
            base=float(line["base"]),
            adapter=float(line["adapter"]),
        )
        for line in lines
    ]


def csv_text(fields: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return CSV text with a header line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    return buffer.getvalue()


# Metrics


def loss_metrics(scores: Sequence[Score], num_train_timesteps: int, seed: int) -> dict[str, float]:
    """Return the ``val.*`` metrics. A change is adapter minus base: below zero is better."""
    split = {name: [s for s in scores if s.split == name] for name in ("heldout", "train")}
    heldout, probe = (mean_change(split[name]) for name in ("heldout", "train"))
    change, gap = estimate(heldout, seed), difference(heldout, probe, seed)
    result = {
        "val.loss": mean(s.adapter for s in split["heldout"]),
        "val.loss_base": mean(s.base for s in split["heldout"]),
        **change.named("val.loss_change"),
        "val.train_loss": mean(s.adapter for s in split["train"]),
        "val.train_loss_base": mean(s.base for s in split["train"]),
        **gap.named("val.overfit_gap"),
    }
    for index, band in enumerate(BANDS):
        inside = [s for s in split["heldout"] if s.timestep * len(BANDS) // num_train_timesteps == index]
        result[f"val.loss_{band}_noise"] = mean(s.adapter for s in inside)
        result[f"val.loss_{band}_noise_base"] = mean(s.base for s in inside)
    return result


def mean_change(scores: Iterable[Score]) -> np.ndarray:
    """Return adapter minus base, averaged over each image's timesteps: float64 [images]."""
    return by_image((s.file_name, s.adapter - s.base) for s in scores)
