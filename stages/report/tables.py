"""Tables of the pages: what was measured, what decided it, how the exports answered, what went in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_dag.artifacts.adapter import algorithm
from lora_dag.core.console import plural
from lora_dag.evaluation.metrics import DETAILS, METRICS, of_table, without_row
from lora_dag.formats import load_format
from lora_dag.pages.findings import BOOTSTRAP, number
from lora_dag.pages.markdown import code, decimals, interval, plain, signed, table
from stages.report.inputs import Inputs, Metrics


def results(inputs: Inputs) -> str:
    """Base against adapter: losses with their intervals, then what can be measured of the samples."""
    m = inputs.measured
    rows = [compared(metric.label, m, name) for name, metric in of_table("losses").items() if m.get(name) is not None]
    parts = [table(("Losses, lower is better", "base", "adapter", "change"), rows)]
    if measures := samples_rows(inputs):
        parts.append(table(("Samples", "base", "adapter", "dataset"), measures))
    if others := [name for name in without_row(m) if not name.endswith(DETAILS)]:
        rows = [(code(name), *(short(number(m, name + ending)) for ending in ("_base", ""))) for name in others]
        parts.append(table(("Other figures", "base", "adapter"), rows))
    if limit := inputs.lineage.get("neighbours", {}).get("threshold"):
        parts.append(copies_note(inputs.lineage["neighbours"], limit))
    return "\n\n".join(parts)


def compared(label: str, m: Metrics, name: str) -> tuple[str, ...]:
    """The change is the metric of that name where there is one: it was taken before anything was rounded."""
    before, after, change = number(m, f"{name}_base"), number(m, name), number(m, f"{name}_change")
    change = change if change == change else after - before
    spec = decimals(before, after, least=4)
    return label, plain(before, spec), plain(after, spec), with_bounds(change, m, f"{name}_change")


def with_bounds(value: float, m: Metrics, name: str) -> str:
    """A difference and, where that metric has one, its interval."""
    low, high = number(m, f"{name}_low"), number(m, f"{name}_high")
    spec = decimals(value, low, high, least=4)
    return signed(value, spec) + (f" {interval(low, high, spec)}" if low == low else "")


def samples_rows(inputs: Inputs) -> list[tuple[str, ...]]:
    """What was measured of the samples, beside the same of the dataset's pictures where that has a meaning."""
    m, of_dataset = inputs.measured, inputs.dataset | inputs.lineage.get("neighbours", {})
    found = {name: metric for name, metric in of_table("samples").items() if m.get(name) is not None}
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


def copies_note(neighbours: Mapping[str, Any], limit: float) -> str:
    """What the distances and the share of copies mean."""
    by_chance = "one in twenty held-out pictures is that near by chance, so a share about 0.05 is no sign of copying"
    if neighbours["num_heldout"] < 20:
        count = plural(neighbours["num_heldout"], "held-out picture is", "held-out pictures are")
        by_chance = f"{count} too few to say how many are by chance"
    far = neighbours.get("far_threshold")
    return (
        f"Distances are between {neighbours['space']}; the dataset's is that of its held-out pictures. A sample nearer "
        f"than {limit:.3g} to one of {plural(neighbours['num_training_views'], 'training view')} counts as a copy: "
        f"{by_chance}."
        + (f" One farther than {far:.3g} from all of them counts as unlike them, likewise." if far else "")
    )


def table_note(inputs: Inputs) -> str:
    asked = inputs.lineage["table"]
    counts, gap = asked["num_pictures"], number(inputs.measured, "val.overfit_gap")
    return (
        f"Losses are mean squared errors of the prediction ({asked['prediction_type']}) over a frozen table of "
        f"{plural(asked['num_rows'], 'row')}: {counts['heldout']} held-out and "
        f"{plural(counts['train'], 'training picture')}, "
        f"{plural(asked['num_rows'] // sum(counts.values()), 'timestep')} each. "
        "Base and adapter answer the same rows under the same noise; latents are the VAE's means; "
        f"intervals are of 95 %, by a {BOOTSTRAP}, over pictures. "
        f"Training pictures gained {with_bounds(gap, inputs.measured, 'val.overfit_gap')} more than held-out ones."
    )


def settings_facts(inputs: Inputs) -> dict[str, object]:
    """What decided the result, read from what the stages recorded."""
    lora, model, validate = (inputs.lineage[name] for name in ("lora_config", "model", "validate"))
    steps = int(number(inputs.train, "train.num_steps"))
    text = "".join(f", attention of {component}" for component in inputs.lineage.get("text_lora", {}))
    told: dict[str, object] = {
        "Base": f"{model['pretrained']}, family {model['family']}, {model['dtype']}",
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
        "Prompts and noise": f"seed {validate['seed']}, adapter at {', '.join(f'{s:g}' for s in validate['scales'])}",
    }
    if (tflop := number(inputs.measured, "cost.tflop_per_image")) == tflop:
        total = tflop * number(inputs.train, "train.images_seen")
        told |= fact("cost.tflop_per_image", inputs.measured, f" TFLOP, {total:.3g} in all")
    return told


def fact(name: str, values: Metrics, more: str = "") -> dict[str, str]:
    """A metric by its label, in its own format."""
    metric = METRICS[name]
    return {metric.label: plain(number(values, name), metric.spec) + more}


def onset(m: Metrics) -> dict[str, object]:
    if "val.onset_step" not in m:
        return {}
    step = m["val.onset_step"]
    return {METRICS["val.onset_step"].label: "at no snapshot" if step is None else f"at step {step}"}


def best_hint(inputs: Inputs) -> str:
    """How to export the best snapshot, where it is neither the base, nor the end, nor exported."""
    best, num_steps = inputs.measured["val.best_step"], inputs.lineage["num_steps"]
    return "" if best in (0, num_steps, inputs.made.get("step")) else f"; `export.step={best}` exports it"


def above_best(m: Metrics) -> str:
    """By how much the end is worse than the best snapshot; nothing where the end is the best."""
    change = number(m, "val.final_minus_best")
    return f"; the end is {with_bounds(change, m, 'val.final_minus_best')} from it" if change > 0 else ""


def epochs(train: Metrics) -> str:
    value = number(train, "train.epochs")
    return f" ({value:.3g} epochs)" if value == value else ""


def target_modules(names: Sequence[str] | str) -> list[str]:
    """The endings, once each: PEFT's config may list every layer by its full name. A regex stays what it is."""
    return [names] if isinstance(names, str) else sorted({last_words(name) for name in names})


def last_words(name: str) -> str:
    """``down_blocks.0.resnets.0.conv1`` -> ``conv1``; what a person wrote, such as ``to_out.0``, stays."""
    words = name.split(".")
    return name if len(words) < 4 else ".".join(words[-2:]) if words[-1].isdigit() else words[-1]


def export_facts(inputs: Inputs) -> Mapping[str, object]:
    """Every ``export.*`` metric but the size, in words where there are some."""
    export, error = inputs.export, METRICS["export.*.max_abs_error"].label
    words = {"export.effect": METRICS["export.effect"].label}
    for name in inputs.made["export"]["formats"]:
        words[f"export.{name}.max_abs_error"] = error.format(load_format(name).READER)
    names = [*(name for name in words if name in export), *sorted(set(export) - {*words, "export.megabytes"})]
    values = [export[name] for name in names]
    return {
        words.get(name, f"`{name}`"): f"{value:.3g}" if isinstance(value, float) else value
        for name, value in zip(names, values, strict=True)
    }


def lineage_facts(inputs: Inputs) -> Mapping[str, object]:
    base = {f"Base: {component}": f"`{digest}`" for component, digest in inputs.lineage["base"].items()}
    return base | {
        "Latents and prompt embeddings": f"`{inputs.lineage['latents']}`",
        "Adapter": f"`{inputs.lineage['adapter']}`",
        "Table of held-out rows": f"`{inputs.measured['val.table']}`",
    }
