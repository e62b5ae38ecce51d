"""What an image-text model said of the samples; without one, that there was none."""

from __future__ import annotations

from lora_dag.core.console import plural
from lora_dag.evaluation.metrics import Metric, of_table
from lora_dag.pages.findings import number
from lora_dag.pages.markdown import code, plain, signed, table
from stages.report.inputs import Inputs, Metrics

NONE = "Fit to the prompts (CLIP score) and distances to the held-out pictures (CMMD, KID): no feature model."


def summary(inputs: Inputs) -> str:
    """A row per metric, with its interval; several lines of markdown."""
    if not (model := inputs.lineage.get("feature_model")):
        return NONE
    m = inputs.measured
    rows = [row(name, metric, m) for name, metric in of_table("features").items() if name in m]
    prompts = plural(len(inputs.lineage["validate"]["prompts"]), "prompt")
    heldout = plural(inputs.lineage["table"]["num_pictures"]["heldout"], "held-out picture")
    note = (
        f"Distances are unbiased, so they may fall below zero. {prompts} and {heldout} are"
        " few: read the change, for which base and adapter share them and the noise. Only figures of one feature model"
        " compare."
    )
    return table((f"Features of {model}", "base", "adapter", "change"), rows) + f"\n\n{note}"


def row(name: str, metric: Metric, m: Metrics) -> tuple[str, ...]:
    before, after, change, low, high = (
        number(m, name + end) for end in ("_base", "", "_change", "_change_low", "_change_high")
    )
    known = f" [{signed(low, '.3g')}, {signed(high, '.3g')}]" if low == low else ""
    better = f"{metric.better} is better" if metric.better else ""
    label = ", ".join(filter(None, (metric.label or code(name), metric.unit, better)))
    return label, *(plain(value, ".4g") for value in (before, after)), signed(change, ".3g") + known
