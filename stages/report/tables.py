"""Tables of the pages: what was measured, what decided it, how the exports answered, what went in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_dag.artifacts.adapter import algorithm
from lora_dag.pages.findings import BOOTSTRAP, number
from lora_dag.pages.markdown import decimals, interval, plain, signed, table
from stages.report.inputs import Inputs, Metrics


def results(inputs: Inputs) -> str:
    """Base against adapter: losses with their intervals, then what can be measured of the samples."""
    m = inputs.measured
    labels = {
        "Held-out loss": "val.loss",
        "Held-out loss, little noise": "val.loss_low_noise",
        "Held-out loss, medium noise": "val.loss_mid_noise",
        "Held-out loss, much noise": "val.loss_high_noise",
        "Loss on training pictures": "val.train_loss",
        "Drift: loss on pictures that the base drew": "drift.loss",
    }
    rows = [compared(label, m, name) for label, name in labels.items() if m.get(name) is not None]
    parts = [table(("Losses, lower is better", "base", "adapter", "change"), rows)]
    if measures := samples_rows(inputs):
        parts.append(table(("Samples", "base", "adapter", "dataset"), measures))
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
    dataset, neighbours = inputs.dataset, inputs.lineage.get("neighbours", {})
    labels = {
        "chroma": ("Chroma of the drawing, 0 to 255", number(dataset, "chroma")),
        "dark_share": ("Near-black share of the drawing, 0 to 1", number(dataset, "dark_share")),
        "copied_share": ("Copies of training pictures, share", number({}, "")),
        "far_share": ("Unlike any picture of the dataset, share", number({}, "")),
        "blank_share": ("Of one colour, share", number({}, "")),
        "nearest_distance": ("Distance to the nearest training picture", number(neighbours, "heldout_median")),
        "diversity": ("Distance between pictures of one prompt", number({}, "")),
    }
    rows = []
    for name, (label, goal) in labels.items():
        values = (number(inputs.measured, f"samples.{name}_base"), number(inputs.measured, f"samples.{name}"), goal)
        if values[1] == values[1]:
            rows.append((label, *(f"{value:.3g}" if value == value else "" for value in values)))
    return rows


def copies_note(neighbours: Mapping[str, Any], limit: float) -> str:
    """What the distances and the share of copies mean."""
    by_chance = "one in twenty held-out pictures is that near by chance, so a share about 0.05 is no sign of copying"
    if neighbours["num_heldout"] < 20:
        by_chance = f"{neighbours['num_heldout']} held-out pictures are too few to say how many are by chance"
    far = neighbours.get("far_threshold")
    return (
        f"Distances are between {neighbours['space']}; the dataset's is that of its held-out pictures. A sample nearer "
        f"than {limit:.3g} to one of {neighbours['num_training_views']} training views counts as a copy: {by_chance}."
        + (f" One farther than {far:.3g} from all of them counts as unlike them, likewise." if far else "")
    )


def table_note(inputs: Inputs) -> str:
    asked = inputs.lineage["table"]
    counts, gap = asked["num_pictures"], number(inputs.measured, "val.overfit_gap")
    return (
        f"Losses are mean squared errors of the prediction ({asked['prediction_type']}) over a frozen table of "
        f"{asked['num_rows']} rows: {counts['heldout']} held-out and {counts['train']} training pictures, "
        f"{asked['num_rows'] // sum(counts.values())} timesteps each. Base and adapter answer the same rows under the "
        f"same noise; latents are the VAE's means; intervals are of 95 %, by a {BOOTSTRAP}, over pictures. "
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
        "Trainable parameters": f"{int(number(inputs.train, 'train.num_trainable_parameters')):,}",
        "Optimizer steps": f"{steps:,}",
        "Adapter size": f"{number(inputs.export, 'export.megabytes'):.3g} MB",
        "Images seen": f"{int(number(inputs.train, 'train.images_seen')):,}{epochs(inputs.train)}",
        "Peak learning rate": f"{max(row['learning_rate'] for row in inputs.loss):.3g}",
        "Last training loss": f"{number(inputs.train, 'train.loss_final'):.4f}",
        "Lowest held-out loss": f"at step {inputs.measured['val.best_step']} of {steps}"
        + above_best(inputs.measured)
        + best_hint(inputs),
        **(onset(inputs.measured) if len(inputs.curve) > 2 else {}),
        "Base weights unchanged": "yes" if inputs.train.get("train.base_unchanged") else "NO",
        "Prompts and noise": f"seed {validate['seed']}, adapter at {', '.join(f'{s:g}' for s in validate['scales'])}",
    }
    if (tflop := number(inputs.measured, "cost.tflop_per_image")) == tflop:
        total = tflop * number(inputs.train, "train.images_seen")
        told["Arithmetic per training image"] = f"{tflop:.3g} TFLOP, {total:.3g} in all"
    return told


def onset(m: Metrics) -> dict[str, object]:
    if "val.onset_step" not in m:
        return {}
    step = m["val.onset_step"]
    return {"Overfitting sets in": "at no snapshot" if step is None else f"at step {step}"}


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


def export_facts(export: Metrics) -> Mapping[str, object]:
    """Every ``export.*`` metric but the size, in words where there are some."""
    words = {
        "export.effect": "Largest change that the adapter makes to the denoiser's output",
        "export.diffusers.max_abs_error": "The same output by diffusers' `load_lora_weights`: largest difference",
        "export.peft.max_abs_error": "The same output by PEFT's `from_pretrained`: largest difference",
        "export.comfyui.max_abs_error": "The same output by a reader of ComfyUI's keys: largest difference",
        "export.merged.max_abs_error": "The same output by the merged pipeline: largest difference",
    }
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
