"""Tables of the pages: metrics, settings, checks of the exports, inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_dag.artifacts.adapter import algorithm
from lora_dag.core.console import plural
from lora_dag.evaluation.metrics import DETAILS, METRICS, metrics_of_table, undocumented_names
from lora_dag.formats import load_format
from lora_dag.pages.findings import BOOTSTRAP, number
from lora_dag.pages.markdown import bullets, code, decimals, interval, plain, signed, table
from stages.report.inputs import Inputs, Metrics


def results(inputs: Inputs) -> str:
    """Return tables of base against adapter: losses with intervals, then metrics of the samples."""
    m = inputs.measured
    rows = [
        compared(metric.label, m, name)
        for name, metric in metrics_of_table("losses").items()
        if m.get(name) is not None
    ]
    parts = [table(("Losses, lower is better", "base", "adapter", "change"), rows)]
    if measures := samples_rows(inputs):
        parts.append(table(("Samples", "base", "adapter", "dataset"), measures))
    if others := [name for name in undocumented_names(m) if not name.endswith(DETAILS)]:
        rows = [(code(name), *(short(number(m, name + ending)) for ending in ("_base", ""))) for name in others]
        parts.append(table(("Other metrics", "base", "adapter"), rows))
    return "\n\n".join(parts)


def notes(inputs: Inputs) -> str:
    """Return bullets that explain the losses and, if they were measured, the distances between images."""
    neighbors = inputs.lineage.get("neighbors", {})
    limit = neighbors.get("threshold")
    return bullets([*loss_notes(inputs), *(copies_notes(neighbors, limit) if limit else ())])


def compared(label: str, m: Metrics, name: str) -> tuple[str, ...]:
    """Return a row. The metric ``NAME_change`` is used if it exists: it was computed before rounding."""
    before, after, change = number(m, f"{name}_base"), number(m, name), number(m, f"{name}_change")
    change = change if change == change else after - before
    spec = decimals(before, after, least=4)
    return label, plain(before, spec), plain(after, spec), with_bounds(change, m, f"{name}_change")


def with_bounds(value: float, m: Metrics, name: str) -> str:
    """Return a difference and its interval, if there is one."""
    low, high = number(m, f"{name}_low"), number(m, f"{name}_high")
    spec = decimals(value, low, high, least=4)
    return signed(value, spec) + (f" {interval(low, high, spec)}" if low == low else "")


def samples_rows(inputs: Inputs) -> list[tuple[str, ...]]:
    """Return rows of sample metrics, with the same metric of the dataset's images where it exists."""
    m, of_dataset = inputs.measured, inputs.dataset | inputs.lineage.get("neighbors", {})
    found = {name: metric for name, metric in metrics_of_table("samples").items() if m.get(name) is not None}
    return [
        (
            ", ".join(filter(None, (metric.label or code(name), metric.unit))),
            *(short(number(m, name + ending)) for ending in ("_base", "")),
            short(number(of_dataset, metric.dataset)),
        )
        for name, metric in found.items()
    ]


def short(value: float) -> str:
    return f"{value:.3g}" if value == value else ""


def copies_notes(neighbors: Mapping[str, Any], limit: float) -> list[str]:
    """Return sentences that explain the distances and the share of copies."""
    by_chance = "One in twenty held-out images is that near by chance, so a share of about 0.05 is no sign of copying."
    if neighbors["num_heldout"] < 20:
        count = plural(neighbors["num_heldout"], "held-out image is", "held-out images are")
        by_chance = f"{count} too few to estimate the share by chance."
    far = neighbors.get("far_threshold")
    views = plural(neighbors["num_training_views"], "training view")
    lines = [
        f"Distances are between {neighbors['space']}. The column of the dataset has the median of held-out images.",
        f"A sample nearer than {limit:.3g} to one of {views} counts as a copy. {by_chance}",
    ]
    if far:
        lines.append(f"A sample farther than {far:.3g} from all of them counts as unlike them.")
    return lines


def loss_notes(inputs: Inputs) -> tuple[str, ...]:
    """Return sentences that explain the losses."""
    of_table = inputs.lineage["table"]
    counts, gap = of_table["num_images"], number(inputs.measured, "val.overfit_gap")
    timesteps = plural(of_table["num_rows"] // sum(counts.values()), "timestep")
    return (
        f"Losses are mean squared errors of the prediction ({of_table['prediction_type']}) over a fixed table of "
        f"{plural(of_table['num_rows'], 'row')}: {counts['heldout']} held-out and "
        f"{plural(counts['train'], 'training image')}, {timesteps} each.",
        "Base and adapter have the same rows and the same noise. Latents are the means of the VAE.",
        f"Intervals are 95 % intervals over images ({BOOTSTRAP}).",
        f"Training images gained {with_bounds(gap, inputs.measured, 'val.overfit_gap')} more than held-out images.",
    )


def quantized(model: Mapping[str, Any]) -> str:
    """Return the quantization of the recorded section ``model``; empty without one."""
    return f", {model['quantization']} in the blocks" if model.get("quantization") else ""


def price(model: Mapping[str, Any], m: Metrics) -> dict[str, object]:
    """Return the price of the quantization, ``int8: +0.3 % [+0.1, +0.5]``, if it was measured."""
    name = "val.quantization_price"
    if name not in m:
        return {}
    values = [100 * number(m, f"{name}{bound}") for bound in ("", "_low", "_high")]
    spec = decimals(*values, least=1)
    bounds = f" {interval(values[1], values[2], spec)}" if values[1] == values[1] else ""
    text = f"{model['quantization']}: {signed(values[0], spec)} %{bounds} of the held-out loss"
    return {METRICS[name].label: f"{text}, with this adapter on the base as it is"}


def settings_facts(inputs: Inputs) -> dict[str, object]:
    """Return the main settings, as the stages recorded them."""
    lora, model, validate = (inputs.lineage[name] for name in ("lora_config", "model", "validate"))
    steps = int(number(inputs.train, "train.num_steps"))
    text = "".join(f", attention of {component}" for component in inputs.lineage.get("text_lora", {}))
    facts: dict[str, object] = {
        "Base": f"{model['pretrained']}, family {model['family']}, {model['dtype']}" + quantized(model),
        **price(model, inputs.measured),
        algorithm(lora): f"rank {lora['r']}, alpha {lora['lora_alpha']:g}, dropout {lora.get('lora_dropout', 0):g}",
        "Adapted layers": ", ".join(f"`{name}`" for name in target_modules(lora["target_modules"])) + text,
        **fact("train.num_trainable_parameters", inputs.train),
        **fact("train.num_steps", inputs.train),
        **fact("export.megabytes", inputs.export, " MB"),
        **fact("train.images_seen", inputs.train, epochs(inputs.train)),
        "Peak learning rate": f"{max(row['learning_rate'] for row in inputs.loss):.3g}",
        **fact("train.loss_final", inputs.train),
        METRICS["val.best_step"].label: f"at step {inputs.measured['val.best_step']} of {steps}"
        + above_best(inputs.measured)
        + best_hint(inputs),
        **(onset(inputs.measured) if len(inputs.curve) > 2 else {}),
        "Base weights unchanged": "yes" if inputs.train.get("train.base_unchanged") else "NO",
        "Samples": f"seed {validate['seed']}, adapter at {', '.join(f'{s:g}' for s in validate['scales'])}",
    }
    if (tflop := number(inputs.measured, "cost.tflop_per_image")) == tflop:
        total = tflop * number(inputs.train, "train.images_seen")
        facts |= fact("cost.tflop_per_image", inputs.measured, f" TFLOP, {total:.3g} in all")
    return facts


def fact(name: str, values: Metrics, more: str = "") -> dict[str, str]:
    """Return a metric under its label, in its own format."""
    metric = METRICS[name]
    return {metric.label: plain(number(values, name), metric.spec) + more}


def onset(m: Metrics) -> dict[str, object]:
    if "val.onset_step" not in m:
        return {}
    step = m["val.onset_step"]
    return {METRICS["val.onset_step"].label: "at no snapshot" if step is None else f"at step {step}"}


def best_hint(inputs: Inputs) -> str:
    """Return how to export the best snapshot, unless it is the base, the last step, or exported already."""
    best, num_steps = inputs.measured["val.best_step"], inputs.lineage["num_steps"]
    return "" if best in (0, num_steps, inputs.made.get("step")) else f". `export.step={best}` exports it"


def above_best(m: Metrics) -> str:
    """Return how much worse the last step is than the best snapshot; "" if it is the best."""
    change = number(m, "val.final_minus_best")
    return f". The last step has {with_bounds(change, m, 'val.final_minus_best')}" if change > 0 else ""


def epochs(train: Metrics) -> str:
    value = number(train, "train.epochs")
    return f" ({value:.3g} epochs)" if value == value else ""


def target_modules(names: Sequence[str] | str) -> list[str]:
    """Return the endings, each once: PEFT's config can list layers by full name. A regex stays unchanged."""
    return [names] if isinstance(names, str) else sorted({last_words(name) for name in names})


def last_words(name: str) -> str:
    """Return ``conv1`` for ``down_blocks.0.resnets.0.conv1``; short names such as ``to_out.0`` stay."""
    words = name.split(".")
    return name if len(words) < 4 else ".".join(words[-2:]) if words[-1].isdigit() else words[-1]


def export_facts(inputs: Inputs) -> Mapping[str, object]:
    """Return all ``export.*`` metrics except for the size, under their labels."""
    export, error = inputs.export, METRICS["export.*.max_abs_error"].label
    labels = {"export.effect": METRICS["export.effect"].label}
    quantized_error = METRICS["export.*.max_abs_error_quantized"].label
    for name in inputs.made["export"]["formats"]:
        labels[f"export.{name}.max_abs_error"] = error.format(load_format(name).READER)
        labels[f"export.{name}.max_abs_error_quantized"] = quantized_error.format(load_format(name).READER)
    labels["export.quantization_error"] = METRICS["export.quantization_error"].label
    names = [*(name for name in labels if name in export), *sorted(set(export) - {*labels, "export.megabytes"})]
    values = [export[name] for name in names]
    return {
        labels.get(name, f"`{name}`"): f"{value:.3g}" if isinstance(value, float) else value
        for name, value in zip(names, values, strict=True)
    }


def lineage_facts(inputs: Inputs) -> Mapping[str, object]:
    base = {f"Base: {component}": f"`{digest}`" for component, digest in inputs.lineage["base"].items()}
    return base | {
        "Latents and prompt embeddings": f"`{inputs.lineage['latents']}`",
        "Adapter": f"`{inputs.lineage['adapter']}`",
        "Held-out table": f"`{inputs.measured['val.table']}`",
    }
