"""reports/report.md: the verdict, what bears it, and what went in."""

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
from lora_dag.pages.markdown import code, decimals, facts, image, interval, link, numbered, plain, signed
from stages.report import dataset, features, rank_used
from stages.report.inputs import Inputs, Metrics
from stages.report.tables import export_facts, lineage_facts, results, settings_facts, table_note

# The verdict


def headline(inputs: Inputs) -> str:
    return in_words(inputs.measured, inputs.lineage, inputs.has_named_split)


def in_words(measured: Metrics, lineage: Mapping[str, Any], has_named_split: bool = False) -> str:
    """What is better, and in the same breath what crossed its control: no more than the intervals bear."""
    num_heldout = lineage["table"]["num_pictures"]["heldout"]
    overfits = findings.overfits(measured, lineage["num_steps"])
    crossed = [*filter(None, [overfits]), *findings.crossed(measured, lineage)]
    good, outcome = verdict(measured, lineage, bool(crossed), has_named_split)
    if not overfits and good is not None:
        count = plural(num_heldout, "held-out picture is", "held-out pictures are")
        few = f"{count} too few to tell whether it overfits"
        outcome += f"; {'no sign of overfitting' if num_heldout >= findings.FEW_PICTURES else few}"
    return f"{outcome}{(', but ' if good else '; ') if crossed else ''}{'; '.join(crossed)}."


def verdict(
    measured: Metrics, lineage: Mapping[str, Any], is_qualified: bool, has_named_split: bool
) -> tuple[bool | None, str]:
    """Whether the held-out loss is better, None where it cannot be told; and the outcome in plain words.

    Args:
        is_qualified: some other figure crossed its control.
    """
    change, low, high = (number(measured, f"val.loss_change{bound}") for bound in ("", "_low", "_high"))
    base, num_heldout = number(measured, "val.loss_base"), lineage["table"]["num_pictures"]["heldout"]
    share = 100 * change / base if base else math.nan
    percent = f" ({signed(share, decimals(share, least=0))} %)" if base else ""
    spec = decimals(change, low, high, least=4)
    is_few = num_heldout < findings.FEW_PICTURES or low != low
    known = f"{percent}, 95 % interval {interval(low, high, spec)}"
    if high < 0:
        learned = "better than the base on pictures like these" if is_qualified else "the adapter learned the style"
        learned = "better than the base on these few pictures" if is_few else learned
        return True, f"Held-out loss fell by {plain(-change, spec)}{known}: {learned}"
    if low > 0:
        worse = "on pictures that it never saw, the adapter is worse than the base"
        return False, f"Held-out loss rose by {plain(change, spec)}{known}: {worse}"
    moved = f"Held-out loss moved by {signed(change, spec)}{known if low == low else percent}"
    shown = "the " + plural(num_heldout, "held-out picture")
    cannot = f"no difference that {shown} can show"
    return None, f"{moved}: {findings.cannot_tell(num_heldout, lineage, has_named_split) if is_few else cannot}"


# The page


def write_page(title: str, inputs: Inputs, folder: Path, changed: str = "", measured_here: str = "") -> str:
    """Markdown that reads well in a repository's file view; every link is relative to ``folder``.

    Args:
        changed: a paragraph about what differs from the last commit; report.md, a function of its inputs, has none.
        measured_here: a table of time and memory, likewise.
    """
    sections = [
        f"# {title}",
        f"**{headline(inputs)}**",
        run_line(inputs),
        changed,
        image("Samples", inputs.pictures["samples"], folder),
        samples_note(inputs),
        prompts(inputs),
        "## Metrics",
        results(inputs),
        table_note(inputs),
        features.summary(inputs),
        *nearest(inputs, folder),
        "## Progress",
        image("Progress", inputs.pictures["progress"], folder),
        image("Losses", inputs.pictures["loss"], folder),
        "## Dataset",
        *dataset.section(inputs, folder),
        "## Settings and cost",
        facts("What decided the result", settings_facts(inputs)),
        measured_here,
        *rank_used.paragraphs(inputs),
        "## Export",
        *exported_snapshot(inputs),
        facts("Each format, loaded back", export_facts(inputs)),
        f"{link('The model card', folder / model_card.NAME, folder)} says how each is loaded.",
        "## Lineage",
        facts("What went in", lineage_facts(inputs), "SHA-256, first digits"),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def run_line(inputs: Inputs) -> str:
    """What this run is, in a line: algorithm, base, steps, pictures, seed."""
    lora, model, train = inputs.lineage["lora_config"], inputs.lineage["model"], inputs.made.get("train", {})
    of_views = f" at {dataset.sizes(inputs)}" if "x" in dataset.sizes(inputs) else f" in {dataset.sizes(inputs)} sizes"
    seed = f", seed {train['seed']}" if "seed" in train else ""
    return (
        f"{algorithm(lora)} of rank {lora['r']} on {code(model['pretrained'])} ({model['family']}): "
        f"{plural(inputs.lineage['num_steps'], 'step')} over {dataset.to_train_on(inputs)}{of_views}{seed}."
    )


def samples_note(inputs: Inputs) -> str:
    settings = inputs.lineage["validate"]
    how = f"{plural(settings['num_inference_steps'], 'step')}, guidance {settings['guidance_scale']:g}"
    count = plural(len(settings["prompts"]), "prompt")
    return f"{count} from the same noise, drawn by the base and by the adapter ({how})."


def prompts(inputs: Inputs) -> str:
    """Those of the sheet's rows, whole."""
    return numbered(inputs.lineage["validate"]["prompts"])


def nearest(inputs: Inputs, folder: Path) -> list[str]:
    """The samples that are nearest to a training picture; nothing where nobody looked for them."""
    if not {"nearest", "nearest_table"} <= set(inputs.pictures):
        return []
    every = link("nearest.csv", inputs.pictures["nearest_table"], folder)
    return [
        "## Nearest training pictures",
        image("Nearest training pictures", inputs.pictures["nearest"], folder),
        f"The samples that are nearest to a picture of the training set, the nearest first; all of them: {every}.",
    ]


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
