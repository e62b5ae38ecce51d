"""Provenance of the metrics and samples; the stage `report` and the command `compare` read it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL
from lora_dag.core.files import sha256_json

if TYPE_CHECKING:
    from stages.validate.inputs import Inputs

DIGEST_DIGITS = 12  # enough to distinguish files by eye


def provenance(inputs: Inputs) -> dict[str, Any]:
    """Return the content of lineage.json, with digests of DIGEST_DIGITS digits."""
    cache, adapter, eval_set = inputs.cache, inputs.adapter, inputs.eval_set
    counts = Counter(item.split for item in cache.items)
    content = sha256_json(sorted([item.split, item.content, item.caption] for item in cache.items))
    record = {
        "adapter": adapter.files[FINAL][:DIGEST_DIGITS],
        "base": {name: digest[:DIGEST_DIGITS] for name, digest in inputs.base_digests.items()},
        "dataset": {"train": counts["train"], "heldout": counts["heldout"], "content": content[:DIGEST_DIGITS]},
        "latents": cache.digest[:DIGEST_DIGITS],
        "lora_config": adapter.lora_config,
        "model": inputs.base.model.model_dump() | {"pretrained": inputs.base.label},  # no path of this machine
        "num_steps": adapter.num_steps,
        "table": {
            "num_images": dict(Counter(row.image.split for row in eval_set.rows if row.stratum == 0)),
            "num_rows": len(eval_set.rows),
            "num_train_timesteps": eval_set.num_train_timesteps,
            "prediction_type": eval_set.prediction_type,
        },
        "validate": inputs.settings.model_dump(),
    }
    return record | ({"text_lora": adapter.text_lora} if adapter.text_lora else {})
