"""Write reports/report.md: the verdict, its evidence, and the inputs of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dag.artifacts import model_card
from lora_dag.artifacts.adapter import algorithm
from lora_dag.core.console import plural
from lora_dag.pages import findings
from lora_dag.pages.findings import number
from lora_dag.pages.markdown import bullets, code, decimals, facts, image, interval, link, numbered, plain, signed
from stages.report import dataset, feature_metrics, rank_usage
from stages.report.inputs import Inputs, Metrics
from stages.report.tables import export_facts, lineage_facts, notes, results, settings_facts

# The verdict


def headline(inputs: Inputs) -> str:
    return " ".join(verdict_sentences(inputs.measured, inputs.lineage, inputs.has_named_split))


def verdict_sentences(measured: Metrics, lineage: Mapping[str, Any], has_named_split: bool = False) -> list[str]:
    """Return the verdict, its number, and each concern, such as overfitting or copies of training images.

    The sentences claim no more than the intervals show.
    """
    num_heldout = lineage["table"]["num_images"]["heldout"]
    overfitting = findings.overfitting(measured, lineage["num_steps"])
    concerns = [*filter(None, [overfitting]), *findings.concerns(measured, lineage)]
    is_better, sentences = loss_verdict(measured, lineage, bool(concerns), has_named_split)
    if not overfitting and is_better is not None:
        count = plural(num_heldout, "held-out image is", "held-out images are")
        few = f"{count} too few to detect overfitting."
        sentences.append("No sign of overfitting." if num_heldout >= findings.FEW_IMAGES else few)
    if is_better and concerns:
        concerns[0] = f"but {concerns[0]}"
    return sentences + [sentence(concern) for concern in concerns]


def sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."


def loss_verdict(
    measured: Metrics, lineage: Mapping[str, Any], has_concerns: bool, has_named_split: bool
) -> tuple[bool | None, list[str]]:
    """Return whether the held-out loss is better (None: not decided), and the verdict as sentences.

    Args:
        has_concerns: whether another metric is worse than its control.
    """
    change, low, high = (number(measured, f"val.loss_change{bound}") for bound in ("", "_low", "_high"))
    base, num_heldout = number(measured, "val.loss_base"), lineage["table"]["num_images"]["heldout"]
    share = 100 * change / base if base else math.nan
    percent = f" ({signed(share, decimals(share, least=0))} %)" if base else ""
    spec = decimals(change, low, high, least=4)
    is_few = num_heldout < findings.FEW_IMAGES or low != low
    amount = f"{percent}, 95 % interval {interval(low, high, spec)}"
    if high < 0:
        few = " on these few images" if is_few else " on images like these"
        learned = "The adapter learned the style." if not has_concerns and not is_few else ""
        better = learned or f"The adapter is better than the base{few}."
        return True, [better, f"Held-out loss fell by {plain(-change, spec)}{amount}."]
    if low > 0:
        worse = "The adapter is worse than the base on held-out images."
        return False, [worse, f"Held-out loss rose by {plain(change, spec)}{amount}."]
    moved = f"Held-out loss changed by {signed(change, spec)}{amount if low == low else percent}."
    if is_few:
        return None, [moved, findings.too_few_images(num_heldout, lineage, has_named_split)]
    count = plural(num_heldout, "held-out image shows", "held-out images show")
    return None, [f"No difference: {count} no change beyond noise.", moved]


# The page


def write_page(title: str, inputs: Inputs, folder: Path, changed: str = "", measured_here: str = "") -> str:
    """Return Markdown for a repository's file view; links are relative to ``folder``.

    Args:
        changed: a paragraph on differences from the last commit, for report.html only: report.md depends on its inputs
            alone.
        measured_here: a table of time and memory, also for report.html only.
    """
    sentences = verdict_sentences(inputs.measured, inputs.lineage, inputs.has_named_split)
    sections = [
        f"# {title}",
        f"**{sentences[0]}**",
        bullets(sentences[1:]),
        run_line(inputs),
        changed,
        image("Samples", inputs.images["samples"], folder),
        samples_note(inputs),
        prompts(inputs),
        "## Metrics",
        results(inputs),
        notes(inputs),
        feature_metrics.summary(inputs),
        *nearest(inputs, folder),
        "## Progress",
        image("Progress", inputs.images["progress"], folder),
        image("Losses", inputs.images["loss"], folder),
        "## Dataset",
        *dataset.section(inputs, folder),
        "## Settings and cost",
        facts("Setting", settings_facts(inputs)),
        measured_here,
        *rank_usage.paragraphs(inputs),
        "## Export",
        *exported_snapshot(inputs),
        facts("Each exported file, loaded back", export_facts(inputs)),
        f"{link('The model card', folder / model_card.NAME, folder)} shows how to load each file.",
        "## Lineage",
        facts("Input", lineage_facts(inputs), "SHA-256, first digits"),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def run_line(inputs: Inputs) -> str:
    """Return a line on the run: algorithm, base, steps, images, seed."""
    lora, model, train = inputs.lineage["lora_config"], inputs.lineage["model"], inputs.made.get("train", {})
    at_sizes = f" at {dataset.sizes(inputs)}" if "x" in dataset.sizes(inputs) else f" in {dataset.sizes(inputs)} sizes"
    seed = f", seed {train['seed']}" if "seed" in train else ""
    return (
        f"{algorithm(lora)} of rank {lora['r']} on {code(model['pretrained'])} ({model['family']}): "
        f"{plural(inputs.lineage['num_steps'], 'step')} over {dataset.to_train_on(inputs)}{at_sizes}{seed}."
    )


def samples_note(inputs: Inputs) -> str:
    settings = inputs.lineage["validate"]
    how = f"{plural(settings['num_inference_steps'], 'step')}, guidance {settings['guidance_scale']:g}"
    count = plural(len(settings["prompts"]), "prompt")
    return f"{count}, drawn by the base and by the adapter from the same noise ({how})."


def prompts(inputs: Inputs) -> str:
    """Return the whole prompts, numbered as the rows of the sheet."""
    return numbered(inputs.lineage["validate"]["prompts"])


def nearest(inputs: Inputs, folder: Path) -> list[str]:
    """Return the samples nearest to a training image; empty if distances were not measured."""
    if not {"nearest", "nearest_table"} <= set(inputs.images):
        return []
    every = link("nearest.csv", inputs.images["nearest_table"], folder)
    return [
        "## Nearest training images",
        image("Nearest training images", inputs.images["nearest"], folder),
        f"Samples with the smallest distance to a training image, the nearest first. All samples: {every}.",
    ]


def exported_snapshot(inputs: Inputs) -> list[str]:
    """Return a note if the exported files hold a snapshot: the metrics of both pages are of the last step."""
    if (step := inputs.made.get("step")) is None:
        return []
    heldout = {int(row["step"]): f"{row['heldout']:.4f}" for row in inputs.curve}
    end = inputs.made["num_steps"]
    losses = f" (held-out loss {heldout[step]}, and {heldout[end]} at the end)" if {step, end} <= heldout.keys() else ""
    return [
        f"The exported files have the snapshot of step {step} of {end}{losses}. "
        f"All other held-out metrics and the samples are of step {end}."
    ]
