"""The frozen table of (picture, timestep, noise) rows, its file heldout.csv, and the ``val.*`` figures of its losses.

NumPy only, so that `compare` starts at once. All randomness is keyed: a row depends on the seed and its picture alone,
so adding pictures leaves the other rows as they were.
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
from lora_dag.evaluation.bootstrap import by_picture, difference, estimate, mean

BANDS = ("low", "mid", "high")  # thirds of the training timesteps, by noise
FIELDS = ("row", "file_name", "split", "timestep", "base", "adapter")


@dataclass(frozen=True)
class Picture:
    """A picture that the table may ask about."""

    content: str
    """Names what it shows, and with it everything here that is drawn: the encoder's settings are no part of it."""
    file_name: str
    split: str
    """train or heldout"""
    caption: str
    view: str
    """Key of its first view's latents."""
    mask: str | None = None
    """Key of that view's mask; None where the loss looks at everything."""


@dataclass(frozen=True)
class Row:
    """One question: predict the target of this picture at this timestep under this noise."""

    picture: Picture
    stratum: int
    """Names the noise: it is keyed by (seed, content, stratum)."""
    timestep: int


@dataclass(frozen=True)
class Score:
    """One answered row of reports/validate/heldout.csv."""

    row: str
    """Names the question, as ``row_names`` does: two runs' losses are paired where it is the same.

    Empty in tables from before rows had names.
    """
    file_name: str
    split: str
    timestep: int
    base: float
    adapter: float


# The table


def choose(pictures: Iterable[Picture], max_pictures: int) -> list[Picture]:
    """The held-out pictures, at most ``max_pictures``, and then as many training pictures (the train probe).

    By content: neither the names nor the order of the files matter.
    """
    by_content = sorted(pictures, key=lambda picture: (picture.content, picture.caption, picture.file_name))
    heldout = [picture for picture in by_content if picture.split == "heldout"][:max_pictures]
    probe = [picture for picture in by_content if picture.split == "train"][: len(heldout)]
    return heldout + probe


def table(pictures: Iterable[Picture], num_strata: int, num_train_timesteps: int, seed: int) -> list[Row]:
    """``num_strata`` rows per picture, in the order of ``pictures``."""
    return [
        Row(picture, stratum, timestep)
        for picture in pictures
        for stratum, timestep in enumerate(strata(seed, picture.content, num_strata, num_train_timesteps))
    ]


def strata(seed: int, content: str, num_strata: int, num_train_timesteps: int) -> list[int]:
    """One timestep from each of ``num_strata`` equal parts of 0 ... num_train_timesteps - 1, ascending.

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


def digest(rows: Sequence[Row], seed: int, components: Mapping[str, str]) -> str:
    """What two runs must share for their losses to be paired: rows, captions, seed, VAE and scheduler. 16 hex digits.

    Args:
        components: digest of each component of the base that decides the targets.
    """
    asked = [[row.picture.split, row.picture.content, row.picture.caption, row.stratum, row.timestep] for row in rows]
    return sha256_json({"rows": asked, "seed": seed, "components": dict(components)})[:16]


def row_names(rows: Sequence[Row], seed: int, components: Mapping[str, str]) -> list[str]:
    """A name per row for what it asks, whatever else is in the table; arguments as for ``digest``. 12 hex digits."""
    asked = [[row.picture.content, row.picture.caption, row.stratum, row.timestep] for row in rows]
    return [sha256_json({"row": row, "seed": seed, "components": dict(components)})[:12] for row in asked]


def write_scores(scores: Iterable[Score]) -> str:
    """CSV text, losses with six significant digits."""
    lines = [(s.row, s.file_name, s.split, s.timestep, f"{s.base:.6g}", f"{s.adapter:.6g}") for s in scores]
    return write_csv(FIELDS, lines)


def read_scores(text: str) -> list[Score]:
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


def write_csv(fields: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    return buffer.getvalue()


# What the losses say


def metrics(scores: Sequence[Score], num_train_timesteps: int, seed: int) -> dict[str, float]:
    """The ``val.*`` figures. A change is adapter minus base, so below zero is better."""
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
    """Adapter minus base, averaged over each picture's timesteps: float64 [pictures]."""
    return by_picture((s.file_name, s.adapter - s.base) for s in scores)
