"""Count layers by the smallest rank that keeps nine tenths of the layer's update."""

from __future__ import annotations

from collections import Counter, defaultdict

from lora_dag.core.console import plural
from lora_dag.pages.markdown import table
from stages.report.inputs import Inputs
from stages.report.tables import last_words

KEPT = 0.9  # share of the squared singular values of s B A


def paragraphs(inputs: Inputs) -> list[str]:
    """Return a table of layers by kind and by the rank they need; empty without singular values.

    The ranks are the ranks of energy.csv: powers of two and ``export.resized_ranks``. Column "more" counts layers that
    need a higher rank.
    """
    if not inputs.energy:
        return []
    ranks = sorted({int(row["rank"]) for row in inputs.energy})
    kinds: dict[str, Counter[int]] = defaultdict(Counter)
    for layer, rank in smallest_ranks(inputs.energy).items():
        kinds[last_words(layer)][rank] += 1
    total = sum(kinds.values(), Counter())
    num_enough, most = sum(total[rank] for rank in ranks), f"{ranks[-1]} of {inputs.lineage['lora_config']['r']}"
    head = ("Layers", *(f"rank {rank}" for rank in ranks), "more", "all")
    rows = [cells(f"`{kind}`", kinds[kind], ranks) for kind in sorted(kinds)]
    note = (
        f"{num_enough} of {plural(total.total(), 'adapted layer')} {'keeps' if num_enough == 1 else 'keep'} "
        f"{100 * KEPT:.0f} % of the update (sum of squared singular values) at rank {most} or less. "
        "Each layer is counted at the smallest such rank."
    )
    return ["### Rank usage", note, table(head, [*rows, cells("all", total, ranks)])]


def smallest_ranks(energy: list[dict[str, str]]) -> dict[str, int]:
    """Return layer -> smallest rank that keeps KEPT; 0 if no rank of the table does."""
    ranks: dict[str, int] = {}
    for row in sorted(energy, key=lambda row: int(row["rank"])):
        if not ranks.setdefault(row["layer"], 0) and float(row["energy"]) >= KEPT:
            ranks[row["layer"]] = int(row["rank"])
    return ranks


def cells(label: str, counts: Counter[int], ranks: list[int]) -> tuple[str, ...]:
    return label, *(str(counts[rank]) for rank in (*ranks, 0)), str(counts.total())
