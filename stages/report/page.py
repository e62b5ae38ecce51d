"""reports/report.md: the verdict, what bears it, and what went in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.artifacts import model_card
from stages.artifacts.adapter import algorithm
from stages.core.markdown import facts, image, interval, link, signed, table
from stages.report import dataset
from stages.report.inputs import Inputs, Metrics, number

# The verdict

FEW_PICTURES = 10  # held out; below it an interval is so wide that "no sign" would say nothing


def headline(inputs: Inputs) -> str:
    lineage = inputs.lineage
    return verdict(inputs.measured, lineage["num_steps"], lineage["table"]["num_pictures"]["heldout"])


def verdict(measured: Metrics, num_steps: int, num_heldout: int) -> str:
    """The outcome in plain words: no more than the intervals bear."""
    change, low, high = (number(measured, f"val.loss_change{bound}") for bound in ("", "_low", "_high"))
    base = number(measured, "val.loss_base")
    percent = f" ({signed(100 * change / base, '.0f')} %)" if base else ""
    if measured["val.loss_change_low"] is None:
        return f"Held-out loss moved by {signed(change)}{percent}, but one held-out picture cannot tell more."
    known = f"{percent}, 95 % interval {interval(low, high)}"
    if high < 0:
        learned = f"the adapter learned the style; {overfitting(measured, num_steps, num_heldout)}"
        return f"Held-out loss fell by {-change:.4f}{known}: {learned}."
    if low > 0:
        return (
            f"Held-out loss rose by {change:.4f}{known}: on pictures that it never saw, "
            f"the adapter is worse than the base; {overfitting(measured, num_steps, num_heldout)}."
        )
    return f"Held-out loss moved by {signed(change)}{known}: no difference that the held-out pictures can show."


def overfitting(measured: Metrics, num_steps: int, num_heldout: int) -> str:
    """Whether the training pictures gained more than the held-out ones, and whether that did harm.

    A gap alone is weak evidence: pictures that the base finds harder have more to gain.
    """
    gap, low, high = (number(measured, f"val.overfit_gap{bound}") for bound in ("", "_low", "_high"))
    if measured["val.overfit_gap_low"] is None or low <= 0:
        few = f"{num_heldout} held-out pictures are too few to tell whether it overfits"
        return "no sign of overfitting" if num_heldout >= FEW_PICTURES else few
    gained = f"training pictures gained {gap:.4f} more {interval(low, high)}"
    best = measured["val.best_step"]
    if best == num_steps:
        return f"{gained}, but held-out loss was still at its lowest in the end"
    return f"it overfits: {gained}, and held-out loss was lowest at step {best}, not at {num_steps}"


# The page


def write_page(title: str, inputs: Inputs, folder: Path) -> str:
    """Markdown that reads well in a repository's file view; every link is relative to ``folder``."""
    sections = [
        f"# {title}",
        f"**{headline(inputs)}**",
        image("Samples", inputs.pictures["samples"], folder),
        samples_note(inputs),
        "## Figures",
        results(inputs),
        table_note(inputs),
        "## Progress",
        image("Progress", inputs.pictures["progress"], folder),
        image("Losses", inputs.pictures["loss"], folder),
        "## Dataset",
        *dataset.section(inputs, folder),
        "## Settings and cost",
        facts("What decided the result", settings_facts(inputs)),
        "## Export",
        *exported_snapshot(inputs),
        facts("Each format, loaded back", export_facts(inputs.export)),
        f"{link('The model card', folder / model_card.NAME, folder)} says how each is loaded.",
        "## Lineage",
        facts("What went in", lineage_facts(inputs), "SHA-256, first digits"),
    ]
    return "\n\n".join(sections) + "\n"


def samples_note(inputs: Inputs) -> str:
    settings = inputs.lineage["validate"]
    how = f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}"
    return f"{len(settings['prompts'])} prompts from the same noise, drawn by the base and by the adapter ({how})."


def results(inputs: Inputs) -> str:
    """Base against adapter; pixel measures beside the training pictures' own."""
    m = inputs.measured
    labels = {
        "Held-out loss": "val.loss",
        "Held-out loss, little noise": "val.loss_low_noise",
        "Held-out loss, medium noise": "val.loss_mid_noise",
        "Held-out loss, much noise": "val.loss_high_noise",
        "Loss on training pictures": "val.train_loss",
    }
    rows = [compared(label, m, name) for label, name in labels.items() if m[name] is not None]
    lines = table(("Losses, lower is better", "base", "adapter", "change"), rows)
    if "samples.chroma" not in m:
        return lines
    measures = [
        pixel_row("Chroma of the drawing, 0 to 255", inputs, "chroma"),
        pixel_row("Near-black share of the drawing, 0 to 1", inputs, "dark_share"),
    ]
    return lines + "\n\n" + table(("Samples", "base", "adapter", "training pictures"), measures)


def compared(label: str, m: Metrics, name: str) -> tuple[str, ...]:
    before, after = number(m, f"{name}_base"), number(m, name)
    return label, f"{before:.4f}", f"{after:.4f}", signed(after - before) + bounds(m, f"{name}_change")


def bounds(m: Metrics, name: str) -> str:
    """A metric's interval, where it has one."""
    low, high = number(m, f"{name}_low"), number(m, f"{name}_high")
    return f" {interval(low, high)}" if low == low else ""


def pixel_row(label: str, inputs: Inputs, name: str) -> tuple[str, ...]:
    goal = number(inputs.dataset, name)
    values = (number(inputs.measured, f"samples.{name}_base"), number(inputs.measured, f"samples.{name}"), goal)
    return label, *(f"{value:.3g}" if value == value else "" for value in values)


def table_note(inputs: Inputs) -> str:
    asked = inputs.lineage["table"]
    counts = asked["num_pictures"]
    return (
        f"Losses are mean squared errors of the prediction ({asked['prediction_type']}) over a frozen table of "
        f"{asked['num_rows']} rows: {counts['heldout']} held-out and {counts['train']} training pictures, "
        f"{asked['num_rows'] // sum(counts.values())} timesteps each. Base and adapter answer the same rows under the "
        "same noise; latents are the VAE's means; the interval is a 95 % bootstrap over pictures. "
        f"Training pictures gained {signed(number(inputs.measured, 'val.overfit_gap'))}"
        f"{bounds(inputs.measured, 'val.overfit_gap')} more than held-out ones."
    )


def settings_facts(inputs: Inputs) -> dict[str, object]:
    """What decided the result, read from what the stages recorded."""
    lora, model, validate = (inputs.lineage[name] for name in ("lora_config", "model", "validate"))
    steps = int(number(inputs.train, "train.num_steps"))
    text = "".join(f", attention of {component}" for component in inputs.lineage.get("text_lora", {}))
    return {
        "Base": f"{model['pretrained']}, family {model['family']}, {model['dtype']}",
        algorithm(lora): f"rank {lora['r']}, alpha {lora['lora_alpha']:g}, dropout {lora.get('lora_dropout', 0):g}",
        "Adapted layers": ", ".join(f"`{name}`" for name in target_modules(lora["target_modules"])) + text,
        "Trainable parameters": f"{int(number(inputs.train, 'train.num_trainable_parameters')):,}",
        "Optimizer steps": f"{steps:,}",
        "Adapter size": f"{number(inputs.export, 'export.megabytes'):.3g} MB",
        "Images seen": f"{int(number(inputs.train, 'train.images_seen')):,}{epochs(inputs.train)}",
        "Peak learning rate": f"{max(row['learning_rate'] for row in inputs.loss):.3g}",
        "Last training loss": f"{number(inputs.train, 'train.loss_final'):.4f}",
        "Lowest held-out loss": f"at step {inputs.measured['val.best_step']} of {steps}{best_hint(inputs)}",
        "Base weights unchanged": "yes" if inputs.train.get("train.base_unchanged") else "NO",
        "Prompts and noise": f"seed {validate['seed']}, adapter at {', '.join(f'{s:g}' for s in validate['scales'])}",
    }


def best_hint(inputs: Inputs) -> str:
    """How to export the best snapshot, where it is neither the base, nor the end, nor exported."""
    best, num_steps = inputs.measured["val.best_step"], inputs.lineage["num_steps"]
    return "" if best in (0, num_steps, inputs.made.get("step")) else f"; `export.step={best}` exports it"


def exported_snapshot(inputs: Inputs) -> list[str]:
    """Said where the files hold a snapshot: the figures of both pages are of the adapter at the end."""
    if (step := inputs.made.get("step")) is None:
        return []
    heldout = {int(row["step"]): f"{row['heldout']:.4f}" for row in inputs.curve}
    end = inputs.made["num_steps"]
    losses = f": held-out loss {heldout[step]}, {heldout[end]} at the end" if {step, end} <= heldout.keys() else ""
    return [
        f"The files hold the snapshot of step {step} of {end}{losses}. "
        "All other held-out figures, and the samples, are of the end."
    ]


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
