"""Latents and prompt embeddings -> a LoRA adapter.

In: data/latents, the base's denoiser and scheduler.  Out: data/adapter, reports/train/{loss.csv,metrics.json}.
Run: ``python -m stages.train [--set lora.rank=16]``. After a stop or kill the same command resumes, bit-identically.
Several processes: ``runtime.num_processes``, or ``torchrun -m stages.train`` on one or more machines.
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
from lora_dag.core.stage_start import log_stage_start
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.code import stage_digest
from stages.train import launch
from stages.train.params import TrainParams, cross_problems


def main() -> None:
    args = parser(__doc__, ("latents", "adapter", "train_reports")).parse_args()
    config = load(args.params, args.overrides)
    code = stage_digest("train", config.section(ModelParams).family)  # before the stage's other modules are imported
    lora = config.section(LoraParams)
    problems = cross_problems(lora, config.section(TrainParams), load_family(config.section(ModelParams).family))
    if lora.init_from:
        pin = lora.init_from
        problems += init_from_pin.problems(pin.path, pin.sha256, lora.setting("init_from"))
    if problems:
        raise UserError(*problems)
    launch.require_even_split(config.section(TrainParams), config.section(RuntimeParams).num_processes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(launch.other_processes(config.section(RuntimeParams), sys.argv[1:]))
        if launch.rank() == 0:
            stack.enter_context(writing(args.adapter))
        train(args, config, code)


def train(args: argparse.Namespace, config: Config, code: str) -> None:
    """Train in one of the processes; only the first one writes results and logs."""
    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.bases import resolve
    from lora_dag.bases.component_files import digests, require_same_base
    from lora_dag.core.locks import lock
    from stages.train import loop, results
    from stages.train.build import build

    is_first = launch.rank() == 0
    if not is_first:
        log.setLevel("WARNING")
    log_stage_start("train", config, args)
    family = load_family(config.section(ModelParams).family)
    model = resolve.resolve(config.section(ModelParams), family).model
    base_digests = digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    require_same_base(cache.base, base_digests, args.latents)
    training = build(config.replaced(model), family, cache, base_digests)
    with lock(training.identity.folder) if is_first else contextlib.nullcontext():
        try:
            speed = loop.train(training, code)
            if is_first:
                results.save(training, speed, args.adapter, args.train_reports)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(training.checkpoints.describe_newest()) from None


if __name__ == "__main__":
    run(main, kept="checkpoints of earlier runs are kept")
