"""What the figures and pictures came from; `report` and `compare` read it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL
from lora_dag.core.files import sha256_json

if TYPE_CHECKING:
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.bases.resolve import Base
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams

DIGEST_DIGITS = 12  # enough to tell files apart by eye


def provenance(
    settings: ValidateParams,
    origin: Base,
    base: dict[str, str],
    cache: LatentCache,
    adapter: Adapter,
    eval_set: EvalSet,
) -> dict[str, Any]:
    """lineage.json's content; digests are short."""
    counts = Counter(item.split for item in cache.items)
    shown = sha256_json(sorted([item.split, item.content, item.caption] for item in cache.items))
    found = {
        "adapter": adapter.files[FINAL][:DIGEST_DIGITS],
        "base": {component: digest[:DIGEST_DIGITS] for component, digest in base.items()},
        "dataset": {"train": counts["train"], "heldout": counts["heldout"], "content": shown[:DIGEST_DIGITS]},
        "latents": cache.digest[:DIGEST_DIGITS],
        "lora_config": adapter.lora_config,
        "model": origin.model.model_dump() | {"pretrained": origin.label},  # no path of this machine
        "num_steps": adapter.num_steps,
        "table": {
            "num_pictures": dict(Counter(row.picture.split for row in eval_set.rows if row.stratum == 0)),
            "num_rows": len(eval_set.rows),
            "num_train_timesteps": eval_set.num_train_timesteps,
            "prediction_type": eval_set.prediction_type,
        },
        "validate": settings.model_dump(),
    }
    return found | ({"text_lora": adapter.text_lora} if adapter.text_lora else {})
