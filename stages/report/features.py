"""What an image-text model said of the samples; without one, that there was none."""

from __future__ import annotations

from lora_dag.pages.findings import number
from lora_dag.pages.markdown import plain, signed, table
from stages.report.inputs import Inputs, Metrics

LABELS = {
    "clip_score": "CLIP score of sample and prompt, 0 to 100, higher is better",
    "cosine": "Cosine of sample and prompt, -1 to 1, higher is better",
    "cmmd": "CMMD to the held-out pictures, lower is better",
    "feature_kid": "KID of these features to the held-out pictures, lower is better",
}
NONE = "Fit to the prompts (CLIP score) and distances to the held-out pictures (CMMD, KID): no feature model."


def summary(inputs: Inputs) -> str:
    """A row per metric, with its interval; several lines of markdown."""
    if not (model := inputs.lineage.get("feature_model")):
        return NONE
    m = inputs.measured
    rows = [row(label, m, f"samples.{name}") for name, label in LABELS.items() if f"samples.{name}" in m]
    prompts, heldout = len(inputs.lineage["validate"]["prompts"]), inputs.lineage["table"]["num_pictures"]["heldout"]
    note = (
        f"Distances are unbiased, so they may fall below zero. {prompts} prompts and {heldout} held-out pictures are"
        " few: read the change, for which base and adapter share them and the noise. Only figures of one feature model"
        " compare."
    )
    return table((f"Features of {model}", "base", "adapter", "change"), rows) + f"\n\n{note}"


def row(label: str, m: Metrics, name: str) -> tuple[str, ...]:
    before, after, change, low, high = (
        number(m, name + end) for end in ("_base", "", "_change", "_change_low", "_change_high")
    )
    known = f" [{signed(low, '.3g')}, {signed(high, '.3g')}]" if low == low else ""
    return label, *(plain(value, ".4g") for value in (before, after)), signed(change, ".3g") + known
