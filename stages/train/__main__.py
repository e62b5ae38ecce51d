"""Latents and prompt embeddings -> a LoRA adapter.

In: data/latents, the base's denoiser and scheduler.  Out: data/adapter, reports/train/{loss.csv,metrics.json}.
Run: ``python -m stages.train [--set lora.rank=16]``; killed, the same command goes on and gives the same bytes.
"""

from __future__ import annotations

from stages.core.console import UserError, parser, run
from stages.core.params import ModelParams, load
from stages.families.base import load_family
from stages.train.params import LoraParams, TrainParams, text_problems


def main() -> None:
    args = parser(__doc__, ("latents", "adapter", "train_reports")).parse_args()
    config = load(args.params, args.overrides)
    model = config.section(ModelParams)
    family = load_family(model.family)
    if found := text_problems(config.section(LoraParams), config.section(TrainParams), family):
        raise UserError(*found)

    from stages.artifacts.latent_cache import LatentCache
    from stages.core.base_files import digests, require_base, require_same_base
    from stages.core.files import lock
    from stages.train import outputs
    from stages.train.trainer import Trainer

    require_base(model, family)
    base = digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    require_same_base(cache.base, base, args.latents)
    trainer = Trainer(config, family, cache, base)
    with lock(trainer.folder):
        trainer.train()
        outputs.save(trainer, args.adapter, args.train_reports)


if __name__ == "__main__":
    run(main)
