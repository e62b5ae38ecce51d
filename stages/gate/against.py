"""The comparison with another revision, by ``stages.compare``: its page, and the paired change of the held-out loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from stages.compare import WORKSPACE, Side, paired_difference, read_side, resolve, write_page
from stages.core.evaluation import Estimate

__all__ = ["Comparison", "compare", "resolve"]

HERE = "this branch"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """This folder's run against a revision's."""

    page: str
    """Markdown."""
    change: Estimate | str
    """Of the held-out loss, as a share of the revision's, with its 95 % interval; or why there is none."""
    moved_gates: dict[str, tuple[Any, Any]]
    """Gates that were set otherwise there: key -> value there, value here."""


def compare(revision: str) -> Comparison:
    """This folder's params.yaml and reports/ against a revision's.

    Raises:
        UserError: one of the two has no reports, or they are damaged.
    """
    there, here = read_side(revision), dataclasses.replace(read_side(WORKSPACE), name=HERE)
    return Comparison(write_page(there, here), change(there, here), moved_gates(there, here))


def change(there: Side, here: Side) -> Estimate | str:
    paired = paired_difference(there, here)
    if paired is None:
        return f"not comparable with {there.name}: the held-out table differs"
    loss = there.metrics["val.loss"]
    return Estimate(*(value / loss for value in dataclasses.astuple(paired)))


def moved_gates(there: Side, here: Side) -> dict[str, tuple[Any, Any]]:
    """None where the revision had no gates."""
    keys = [key for key in there.params if key.startswith("report.gates.")]
    values = {key: (there.params[key], here.params.get(key)) for key in keys}
    return {key: (before, now) for key, (before, now) in values.items() if before != now}
