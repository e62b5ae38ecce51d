"""Start block of the log: images, adapter, batches and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.adapters import lora, lycoris, targets
from lora_dag.adapters.adapter_set import DENOISER_KEY
from lora_dag.core.console import log, plural, warn
from stages.train import optimizers

if TYPE_CHECKING:
    from stages.train.run import Run


def log_plan(run: Run, start: int) -> None:
    """Log the plan of the run from step ``start`` on."""
    log_images(run)
    log_adapter(run)
    log_batches(run)
    num_steps, num_epochs = run.params.num_steps, run.num_epochs(run.params.num_steps)
    log.info("steps       %d to %d (%.1f epochs)", start, num_steps, num_epochs)


def log_images(run: Run) -> None:
    """Log the number of images and the buckets; warn of buckets that are smaller than a batch."""
    order, batch_size = run.batches.order, run.params.batch_size
    num_images = len(run.batches.items)
    repeated = f", {order.num_entries} per epoch with repeats" if order.num_entries > num_images else ""
    log.info("images      %d for training%s", num_images, repeated)
    if len(order.buckets) > 1:
        sizes = ", ".join(f"{bucket.name} ({len(bucket.items)})" for bucket in order.buckets)
        log.info("buckets     latent sizes %s", sizes)
    for bucket in order.buckets:
        if len(bucket.items) < batch_size:
            images = plural(len(bucket.items), "image")
            text = f"bucket {bucket.name} has {images} for batches of {batch_size}. Some images are twice in a batch."
            warn("bucket-small", text)


def log_batches(run: Run) -> None:
    """Log the images per step, and their share between accumulation and processes."""
    params, num_processes = run.params, run.accelerator.num_processes
    accumulation = params.gradient_accumulation_steps
    accumulated = f" ({params.batch_size} x {accumulation} accumulated)" if accumulation > 1 else ""
    shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
    log.info("batch       %s per step%s%s", plural(run.images_per_step, "image"), accumulated, shared)


def log_adapter(run: Run) -> None:
    """Log size, layers and memory of the adapter."""
    denoiser, adapter = run.adapter.modules[DENOISER_KEY], run.adapter
    names = lora.target_names(denoiser)
    num, num_base = count_parameters(run, DENOISER_KEY)
    ranks = " and ".join(map(str, sorted({denoiser.get_submodule(name).r[lora.NAME] for name in names})))
    size = f"{num:,} parameters ({100 * num / num_base:.2f} % of the denoiser's {num_base:,})"
    log.info("adapter     rank %s, %d layers, %s", ranks, len(names), size)
    if run.init_from_summary:
        log.info("start       %s", run.init_from_summary)
    if run.biases:
        mode = adapter.configs[DENOISER_KEY]["bias"]
        log.info("biases      %s: %d, trained as deltas", mode, len(run.biases))
    for component in run.base.text_encoders:
        num_base += log_text_encoder(run, component)
        names += lora.target_names(adapter.modules[component])
    if run.base.text is not None:
        log.info("text        trained encoders run in every step; their cached embeddings are not used")
    for line in lycoris.plan_lines(denoiser, lora.NAME) + targets.plan_lines(
        names, num_parameters(adapter.trainable), num_base
    ):
        log.info(line)


def log_text_encoder(run: Run, component: str) -> int:
    """Log size and layers of a text encoder's adapter; return the number of its frozen parameters."""
    num, num_base = count_parameters(run, component)
    rate = optimizers.scaled_rate(run.params.text_encoder_lr or run.params.learning_rate, run.params)
    layers, rank = len(lora.target_names(run.adapter.modules[component])), run.adapter.configs[component]["r"]
    share = f"{num:,} parameters ({100 * num / num_base:.2f} % of {num_base:,}), learning rate {rate:g}"
    log.info("text        %s: rank %d, %d layers, %s", component, rank, layers, share)
    return num_base


def count_parameters(run: Run, component: str) -> tuple[int, int]:
    """Return the numbers of trained and frozen parameters of a component."""
    trained = num_parameters(run.adapter.part(component, run.adapter.trainable))
    return trained, num_parameters(dict(run.adapter.modules[component].named_parameters())) - trained


def num_parameters(parameters: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())
