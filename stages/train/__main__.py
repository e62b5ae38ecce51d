"""Latents and prompt embeddings -> a LoRA adapter.

In: data/latents, the base's denoiser and scheduler.  Out: data/adapter, reports/train/{loss.csv,metrics.json}.
Run: ``python -m stages.train [--set lora.rank=16]``; killed, the same command goes on and gives the same bytes.
Several processes: ``runtime.num_processes``, or ``accelerate launch -m stages.train``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from stages.core.console import log, parser, run
from stages.core.params import Config, ModelParams, RuntimeParams, load


def main() -> None:
    args = parser(__doc__, ("latents", "adapter", "train_reports")).parse_args()
    config = load(args.params, args.overrides)

    from stages.train import processes

    with processes.sharing(config.section(RuntimeParams).num_processes, sys.argv[1:]):
        train(args, config)


def train(args: argparse.Namespace, config: Config) -> None:
    """As one of the processes; the first writes and speaks for all."""
    from stages.artifacts.latent_cache import LatentCache
    from stages.core.base_files import digests, require_base, require_same_base
    from stages.core.files import lock
    from stages.families.base import load_family
    from stages.train import outputs, processes
    from stages.train.trainer import Trainer

    is_first = processes.rank() == 0
    if not is_first:
        log.setLevel("WARNING")
    model = config.section(ModelParams)
    family = load_family(model.family)
    require_base(model, family)
    base = digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    require_same_base(cache.base, base, args.latents)
    trainer = Trainer(config, family, cache, base)
    with lock(trainer.folder) if is_first else contextlib.nullcontext():
        trainer.train()
        if is_first:
            outputs.save(trainer, args.adapter, args.train_reports)


if __name__ == "__main__":
    run(main)
