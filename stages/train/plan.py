"""What the log says before a training: pictures, adapter, batches and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.adapters import lora, lycoris, targets
from lora_dag.core.console import log, plural
from stages.train import optimizers

if TYPE_CHECKING:
    from stages.train.run import Run


def log_plan(run: Run, start: int) -> None:
    """What is about to be trained from step ``start`` on."""
    log_pictures(run)
    log_adapter(run)
    params, num_processes = run.params, run.accelerator.num_processes
    shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
    log.info("batch       %d x %d accumulated%s", params.batch_size, params.gradient_accumulation_steps, shared)
    log.info("steps       %d to %d, %.1f epochs", start, params.num_steps, run.num_epochs(params.num_steps))


def log_pictures(run: Run) -> None:
    """How many, in which buckets; warns of buckets that are smaller than a batch."""
    order, batch_size = run.batches.order, run.params.batch_size
    num_pictures = len(run.batches.items)
    repeated = f", {order.num_entries} per epoch" if order.num_entries > num_pictures else ""
    log.info("pictures    %d for training%s", num_pictures, repeated)
    if len(order.buckets) > 1:
        sizes = ", ".join(f"{bucket.name} ({len(bucket.items)})" for bucket in order.buckets)
        log.info("buckets     latents of %s", sizes)
    for bucket in order.buckets:
        if len(bucket.items) < batch_size:
            few = f"bucket {bucket.name}: {plural(len(bucket.items), 'picture')} for batches of {batch_size}"
            log.warning("warning: %s; some come up twice in a batch", few)


def log_adapter(run: Run) -> None:
    """How much is trained, on what, and in how much memory."""
    denoiser, adapter = run.adapter.modules[""], run.adapter
    names = lora.targets(denoiser)
    num, num_base = count_parameters(run, "")
    ranks = sorted({denoiser.get_submodule(name).r[lora.NAME] for name in names})
    log.info(
        "adapter     rank %s, %d layers, %s parameters (%.2f %% of the denoiser's %s)",
        " and ".join(map(str, ranks)),
        len(names),
        f"{num:,}",
        100 * num / num_base,
        f"{num_base:,}",
    )
    if run.init_from:
        log.info("start       %s", run.init_from)
    if run.biases:
        mode = adapter.configs[""]["bias"]
        log.info("biases      %s: %d, as deltas that decay towards zero", mode, len(run.biases))
    for component in run.base.text_encoders:
        num_base += log_text_encoder(run, component)
        names += lora.targets(adapter.modules[component])
    if run.base.text is not None:
        log.info("text        encoders are trained: what the cache holds of them is not used")
    for line in lycoris.plan(denoiser, lora.NAME) + targets.plan(names, num_parameters(adapter.trainable), num_base):
        log.info(line)


def log_text_encoder(run: Run, component: str) -> int:
    """The same of a text encoder; returns the number of its frozen parameters."""
    num, num_base = count_parameters(run, component)
    rate = optimizers.scaled(run.params.text_encoder_lr or run.params.learning_rate, run.params)
    layers, rank = len(lora.targets(run.adapter.modules[component])), run.adapter.configs[component]["r"]
    share = f"{num:,} parameters ({100 * num / num_base:.2f} % of {num_base:,}), learning rate {rate:g}"
    log.info("text        %s: rank %d, %d layers, %s", component, rank, layers, share)
    return num_base


def count_parameters(run: Run, component: str) -> tuple[int, int]:
    """Trained and frozen parameters of a component; "" is the denoiser."""
    trained = num_parameters(run.adapter.of(component, run.adapter.trainable))
    return trained, num_parameters(dict(run.adapter.modules[component].named_parameters())) - trained


def num_parameters(named: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in named.values())
