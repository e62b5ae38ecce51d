"""reports/report.md: the verdict, what bears it, and what went in."""

from __future__ import annotations

from pathlib import Path

from stages.artifacts import model_card
from stages.artifacts.adapter import algorithm
from stages.core.markdown import code, facts, image, interval, link, signed
from stages.report import dataset, features, rank_used
from stages.report.inputs import Inputs, Metrics, number
from stages.report.tables import export_facts, lineage_facts, results, settings_facts, table_note

# The verdict

FEW_PICTURES = 10  # held out; below it "no sign" would say nothing, and a bootstrap interval is too narrow


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
        enough = num_heldout >= FEW_PICTURES
        learned = "the adapter learned the style" if enough else "better than the base on these few pictures"
        return (
            f"Held-out loss fell by {-change:.4f}{known}: {learned}; {overfitting(measured, num_steps, num_heldout)}."
        )
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
        facts("Each format, loaded back", export_facts(inputs.export)),
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
        f"{inputs.lineage['num_steps']:,} steps over {inputs.dataset.get('num_train')} pictures{of_views}{seed}."
    )


def samples_note(inputs: Inputs) -> str:
    settings = inputs.lineage["validate"]
    how = f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}"
    return f"{len(settings['prompts'])} prompts from the same noise, drawn by the base and by the adapter ({how})."


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
