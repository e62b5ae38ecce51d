"""Changes of params.yaml, and the stages that each reruns."""

from __future__ import annotations

from typing import Any

from tests.helpers.stubbed import ALL

AFTER_TRAIN = {"train", "validate", "export", "report"}
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"train__seed": 1}, AFTER_TRAIN),
    ({"validate__seed": 1}, {"validate", "report"}),
    ({"export__seed": 1}, {"export", "report"}),
    ({"export__license": "mit"}, {"export", "report"}),
    ({"export__push_to_hub": {"repo_id": "someone/icons", "private": True}}, {"report"}),
    ({"report__title": "Another"}, {"report"}),
    ({"dataset__heldout_fraction": 0.4}, ALL),
    ({"model__dtype": "bfloat16"}, ALL - {"prepare"}),
    ({"runtime__log_every_n_steps": 2}, set()),
]
