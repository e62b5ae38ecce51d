"""Table of the metrics of an image-text model, such as the CLIP score; a note if there is no model."""

from __future__ import annotations

from lora_dag.core.console import plural
from lora_dag.evaluation.metrics import Metric, metrics_of_table
from lora_dag.pages.findings import number
from lora_dag.pages.markdown import bullets, code, plain, signed, table
from stages.report.inputs import Inputs, Metrics

NONE = "CLIP score, CMMD and KID were not measured: `validate.feature_model` is not set."


def summary(inputs: Inputs) -> str:
    """Return Markdown with a row per metric and its interval."""
    if not (model := inputs.lineage.get("feature_model")):
        return NONE
    m = inputs.measured
    rows = [row(name, metric, m) for name, metric in metrics_of_table("features").items() if name in m]
    prompts = plural(len(inputs.lineage["validate"]["prompts"]), "prompt")
    heldout = plural(inputs.lineage["table"]["num_images"]["heldout"], "held-out image")
    note = (
        "Distances are unbiased estimates and can be below zero.",
        f"{prompts} and {heldout} are few. The change is more reliable: base and adapter share them and the noise.",
        "Values of different feature models cannot be compared.",
    )
    return table((f"Features of {model}", "base", "adapter", "change"), rows) + f"\n\n{bullets(note)}"


def row(name: str, metric: Metric, m: Metrics) -> tuple[str, ...]:
    before, after, change, low, high = (
        number(m, name + end) for end in ("_base", "", "_change", "_change_low", "_change_high")
    )
    known = f" [{signed(low, '.3g')}, {signed(high, '.3g')}]" if low == low else ""
    better = f"{metric.better} is better" if metric.better else ""
    label = ", ".join(filter(None, (metric.label or code(name), metric.unit, better)))
    return label, *(plain(value, ".4g") for value in (before, after)), signed(change, ".3g") + known
