"""How much of its rank an adapter uses: the smallest rank that keeps nine tenths of each layer's update."""

from __future__ import annotations

from collections import Counter, defaultdict

from lora_dag.core.console import plural
from lora_dag.pages.markdown import table
from stages.report.inputs import Inputs
from stages.report.tables import last_words

KEPT = 0.9  # of the squared singular values of s B A


def paragraphs(inputs: Inputs) -> list[str]:
    """Layers by kind and by the rank that they use; nothing without singular values.

    Ranks are those of energy.csv: powers of two and what was asked for. What none of them keeps needs the layer's own.
    """
    if not inputs.energy:
        return []
    ranks = sorted({int(row["rank"]) for row in inputs.energy})
    kinds: dict[str, Counter[int]] = defaultdict(Counter)
    for layer, rank in used(inputs.energy).items():
        kinds[last_words(layer)][rank] += 1
    total = sum(kinds.values(), Counter())
    few, most = sum(total[rank] for rank in ranks), f"{ranks[-1]} of {inputs.lineage['lora_config']['r']}"
    head = ("Layers", *(f"rank {rank}" for rank in ranks), "more", "all")
    rows = [cells(f"`{kind}`", kinds[kind], ranks) for kind in sorted(kinds)]
    note = (
        f"Of {plural(total.total(), 'adapted layer')}, "
        f"{few} {'keeps' if few == 1 else 'keep'} {100 * KEPT:.0f} % of their update at rank {most} or less."
        " Layers are counted by the smallest rank that does; an update is measured by its squared singular values."
    )
    return ["### How much of the rank is used", note, table(head, [*rows, cells("all", total, ranks)])]


def used(energy: list[dict[str, str]]) -> dict[str, int]:
    """Layer -> smallest rank that keeps KEPT; 0 where none of the table does."""
    found: dict[str, int] = {}
    for row in sorted(energy, key=lambda row: int(row["rank"])):
        if not found.setdefault(row["layer"], 0) and float(row["energy"]) >= KEPT:
            found[row["layer"]] = int(row["rank"])
    return found


def cells(label: str, counts: Counter[int], ranks: list[int]) -> tuple[str, ...]:
    return label, *(str(counts[rank]) for rank in (*ranks, 0)), str(counts.total())
