"""Latents and prompt embeddings -> a LoRA adapter.

In: data/latents, the base's denoiser and scheduler.  Out: data/adapter, reports/train/{loss.csv,metrics.json}.
Run: ``python -m stages.train [--set lora.rank=16]``; killed, the same command goes on and gives the same bytes.
"""

from __future__ import annotations

from stages.core import pin
from stages.core.console import UserError, parser, run
from stages.core.params import ModelParams, load
from stages.families.base import load_family
from stages.train.params import LoraParams, TrainParams, text_problems


def main() -> None:
    args = parser(__doc__, ("latents", "adapter", "train_reports")).parse_args()
    config = load(args.params, args.overrides)
    model, lora = config.section(ModelParams), config.section(LoraParams)
    family = load_family(model.family)
    found = text_problems(lora, config.section(TrainParams), family)
    if lora.init_from:
        found += pin.problems(lora.init_from.path, lora.init_from.sha256)
    if found:
        raise UserError(*found)

    from stages.artifacts.latent_cache import LatentCache
    from stages.core import bases
    from stages.core.base_files import digests, require_same_base
    from stages.core.files import lock
    from stages.train import outputs
    from stages.train.trainer import Trainer

    model = bases.resolve(model, family).model
    base = digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    require_same_base(cache.base, base, args.latents)
    trainer = Trainer(config.replaced(model), family, cache, base)
    with lock(trainer.folder):
        trainer.train()
        outputs.save(trainer, args.adapter, args.train_reports)


if __name__ == "__main__":
    run(main)
