"""A wrong step in one stage moves the values of that stage, and of no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dag.adapters import adapter_set, lora
from lora_dag.adapters.adapter_tensors import AdapterTensors
from lora_dag.diffusion.objectives import VPrediction
from lora_dag.images import decode
from stages.prepare import split
from stages.report import page
from stages.train import loss, noising
from stages.validate import heldout_loss, sheets
from stages.validate.score_snapshots import ScoresAndSamples
from tests.golden import record
from tests.golden.__main__ import run
from tests.golden.runs import RUNS

Patch = pytest.MonkeyPatch
FIRST = {name: "plain" if name in ("prepare", "report") else "sd" for name in RUNS}
BUT_VALIDATE = set(FIRST) - {"validate"}
"""Which of the six takes most of the time."""


def change(patch: Patch, owner: Any, name: str, of: Callable[..., Any]) -> None:
    """``of`` gets the original function before its arguments."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **options: of(original, *args, **options))


def loss_factor(patch: Patch) -> None:
    change(patch, loss, "masked_mean", lambda original, *args: 1.001 * original(*args))


def target(patch: Patch) -> None:
    change(patch, VPrediction, "target", lambda original, *args: 1.001 * original(*args))


def noise(patch: Patch) -> None:
    change(patch, noising, "draw_noise", lambda original, *args: tuple(-drawn for drawn in original(*args)))


def init(patch: Patch) -> None:
    for owner in (lora, adapter_set.lora):
        change(patch, owner, "keyed_init", lambda original, module, config, seed, *a: original(module, config, 7, *a))


def filter_of_resize(patch: Patch) -> None:
    patch.setitem(decode.FILTERS, "lanczos", Image.Resampling.BILINEAR)


def split_draw(patch: Patch) -> None:
    change(patch, split, "draw", lambda original, *args: 1 - original(*args))


def export_scaling(patch: Patch) -> None:
    """The product of B and A is the same, so that every reader's answer is."""

    def folded(original: Any, part: AdapterTensors) -> AdapterTensors:
        found = original(part)
        weights = {name: t * 2 if "lora_A" in name else t / 2 for name, t in found.weights.items()}
        return dataclasses.replace(found, weights=weights)

    change(patch, AdapterTensors, "folded", folded)


def heldout_noise(patch: Patch) -> None:
    change(patch, heldout_loss, "row_noise", lambda original, *args: -original(*args))


def exchanged_columns(patch: Patch) -> None:
    """On samples.png the adapter's images are below the name of the base, and the base's below the adapter's."""

    def draw(original: Any, reports: Path, scored: ScoresAndSamples, *args: Any) -> Any:
        (base, *other_seeds), after = scored.images[0], scored.scaled[1.0]
        images = scored.images | {0: [after, *other_seeds]}
        return original(reports, dataclasses.replace(scored, images=images, scaled={1.0: base}), *args)

    change(patch, sheets, "write_sheets", draw)


def verdict(patch: Patch) -> None:
    change(patch, page, "headline", lambda original, inputs: original(inputs).replace("fell", "sank"))


@pytest.mark.parametrize(
    ("mutation", "red", "looked_at"),
    [
        (loss_factor, {"train"}, BUT_VALIDATE),
        (target, {"train", "validate"}, set(FIRST)),
        (noise, {"train"}, set(FIRST)),
        (init, {"train"}, BUT_VALIDATE),
        (filter_of_resize, {"prepare", "cache_latents"}, BUT_VALIDATE),
        (split_draw, {"prepare"}, BUT_VALIDATE),
        (export_scaling, {"export"}, BUT_VALIDATE),
        (heldout_noise, {"validate"}, {"train", "validate"}),
        (exchanged_columns, {"validate"}, {"train", "validate"}),
        (verdict, {"report"}, {"export", "report"}),
    ],
)
def test_a_change_is_red_in_its_stage_alone(
    mutation: Callable[[Patch], None],
    red: set[str],
    looked_at: set[str],
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    mutation(monkeypatch)
    found = {}
    for stage in looked_at:
        (tmp_path / stage).mkdir()
        values = run(stage, FIRST[stage], tmp_path / stage, bases)
        found[stage] = record.moved(record.read(stage)["runs"][FIRST[stage]], values)
    assert {stage for stage, lines in found.items() if lines} == red, found
