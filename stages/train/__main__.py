"""Latents and prompt embeddings -> a LoRA adapter.

In: data/latents, the base's denoiser and scheduler.  Out: data/adapter, reports/train/{loss.csv,metrics.json}.
Run: ``python -m stages.train [--set lora.rank=16]``; killed, the same command resumes and gives the same bytes.
Several processes: ``runtime.num_processes``, or ``torchrun -m stages.train``, on several machines too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from lora_dag.adapters import init_from_pin
from lora_dag.adapters.params import LoraParams
from lora_dag.core.console import UserError, log, parser, run
from lora_dag.core.locks import writing
from lora_dag.core.params import Config, ModelParams, RuntimeParams, load
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.code import stage_digest
from stages.train import launch
from stages.train.params import TrainParams, cross_problems


def main() -> None:
    args = parser(__doc__, ("latents", "adapter", "train_reports")).parse_args()
    config = load(args.params, args.overrides)
    code = stage_digest("train", config.section(ModelParams).family)  # before the rest of it is imported
    lora = config.section(LoraParams)
    found = cross_problems(lora, config.section(TrainParams), load_family(config.section(ModelParams).family))
    if lora.init_from:
        found += init_from_pin.problems(lora.init_from.path, lora.init_from.sha256)
    if found:
        raise UserError(*found)
    launch.require_share(config.section(TrainParams), config.section(RuntimeParams).num_processes)
    with contextlib.ExitStack() as held:
        held.enter_context(launch.sharing(config.section(RuntimeParams), sys.argv[1:]))
        if launch.rank() == 0:
            held.enter_context(writing(args.adapter))
        train(args, config, code)


def train(args: argparse.Namespace, config: Config, code: str) -> None:
    """As one of the processes; the first writes and speaks for all."""
    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.bases import resolve
    from lora_dag.bases.layout import digests, require_same_base
    from lora_dag.core.locks import lock
    from stages.train import loop, results
    from stages.train.build import build

    is_first = launch.rank() == 0
    if not is_first:
        log.setLevel("WARNING")
    family = load_family(config.section(ModelParams).family)
    model = resolve.resolve(config.section(ModelParams), family).model
    base_digests = digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    require_same_base(cache.base, base_digests, args.latents)
    training = build(config.replaced(model), family, cache, base_digests)
    with lock(training.identity.folder) if is_first else contextlib.nullcontext():
        try:
            measured = loop.train(training, code)
            if is_first:
                results.save(training, measured, args.adapter, args.train_reports)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(training.checkpoints.newest()) from None


if __name__ == "__main__":
    run(main, kept="checkpoints of earlier runs are kept")
