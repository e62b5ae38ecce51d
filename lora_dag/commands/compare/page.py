"""The comparison as Markdown, without HTML: verdicts first, then what differs, figures, dataset, pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_dag.artifacts.metrics import is_number
from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.compare.dataset_changes import changes_between
from lora_dag.commands.compare.settings import SEED, changed_inputs, differing, unexplained, went_in
from lora_dag.commands.compare.sides import Side, shared_prompts
from lora_dag.commands.compare.verdict import Verdict
from lora_dag.core.console import plural
from lora_dag.core.files import from_json, sha256_file
from lora_dag.evaluation.metrics import DETAILS, METRICS, arrow, find, key_of
from lora_dag.pages import findings
from lora_dag.pages.markdown import MINUS, code, codes, facts, image, numbered, signed, table

MEASURED = {
    "train": (Path("reports/train/run.json"), Path("reports/train/metrics.json")),
    "validate": (Path("reports/validate/run.json"), Path("reports/metrics.json")),
}
"""What a stage took, and the figures that it is of; of the workspace alone, since neither git nor DVC has it."""
ORDER = {name: index for index, name in enumerate(METRICS)}
MAX_VALUE = 300  # characters of a parameter


def write_page(sides: Sequence[Side], verdicts: Sequence[Verdict], pictures: Mapping[str, Path], folder: Path) -> str:
    """The whole page.

    Args:
        sides: two or more; the first is what the others are compared with.
        verdicts: one for each of the others.
        pictures: ``samples``, and ``dataset NAME`` for the others, where there is such a file; ``draw_pictures``
            makes them, and a page can go without.
        folder: that links are relative to.
    """
    first, *others = sides
    sections = [
        f"# {' and '.join(side.name for side in others)} against {first.name}",
        *(paragraph(first, side, verdict) for side, verdict in zip(others, verdicts, strict=True)),
        "## What differs",
        differences(sides),
        "## Metrics",
        metrics_table(sides, verdicts),
        *measured_cost(sides),
        *dataset_section(sides, pictures, folder),
        *samples_section(sides, pictures, folder),
    ]
    return "\n\n".join(sections) + "\n"


# The verdict


def paragraph(a: Side, b: Side, verdict: Verdict) -> str:
    """``rank-16 (lora.rank 16) against main (lora.rank 8): better, −3.1 % [−4.0, −2.2].`` and what bears it."""
    left, right = names(b, a)
    inputs = [] if verdict.word == "not comparable" else unexplained(a, b)
    of_b, of_a = crossed_by(b), crossed_by(a)
    but = f", but {'; '.join(of_b)}" if verdict.word == "better" and of_b else ""
    told = {"Both": of_b} if of_b == of_a else {b.name: [] if but else of_b, a.name: of_a}
    more = [f"{name}: {'; '.join(clauses)}." for name, clauses in told.items() if clauses]
    more += [f"More than parameters differs: {', '.join(inputs)}."] if inputs else []
    more += [] if verdict.word in ("not comparable", "equal") else confounds(b, a)
    return f"{' '.join([f'**{left} against {right}: {verdict}{but}.**', *more])}{basis(a, b, verdict)}"


def crossed_by(side: Side) -> list[str]:
    """Clauses: what the adapter does beyond its controls, the base's and chance's."""
    overfits = findings.overfits(side.metrics, side.lineage.get("num_steps", 0))
    return [*filter(None, [overfits]), *findings.crossed(side.metrics, side.lineage)]


def names(one: Side, other: Side) -> tuple[str, str]:
    """Each side by the one parameter that tells them apart, where that is so, or by its name."""
    keys = differing(one, other)
    if len(keys) != 1 or unexplained(one, other):
        return one.name, other.name
    left, right = show_params((one.params, other.params), keys[0])
    return f"{one.name} ({show_name(keys[0])} {left})", f"{other.name} ({show_name(keys[0])} {right})"


def basis(a: Side, b: Side, verdict: Verdict) -> str:
    """What the interval is of."""
    if verdict.word in ("not comparable", "equal"):
        return ""
    n, (of_a, of_b) = verdict.num_pictures, verdict.num_each
    pictures = plural(n, "held-out picture") + (
        f" that both have (of {of_a} and {of_b})" if (n, n) != (of_a, of_b) else ""
    )
    losses = f" Held-out loss {verdict.loss:.4f} → {verdict.loss + verdict.change.mean:.4f}"
    if verdict.same_setting and not verdict.df:
        return f"{losses}. Both report the same setting and seed: another machine, or files edited by hand."
    cannot = ""
    if n < findings.FEW_PICTURES and verdict.word == "within noise":
        cannot = f" {findings.cannot_tell(n, b.lineage, is_named=b.params.get('dataset.heldout_split') is not None)}."
    seeds = with_seeds(verdict) if verdict.df else without_seeds(a, b)
    return f"{cannot}{losses}; 95 % interval over {pictures} ({findings.BOOTSTRAP}){seeds}"


def with_seeds(verdict: Verdict) -> str:
    sd = f"{100 * verdict.seed_sd / verdict.loss:.2g} %"
    if verdict.same_setting:
        return f" and training seeds. They differ in {SEED} alone: this is what a seed does (standard deviation {sd})."
    of_a, of_b = (", ".join(runs) for runs in verdict.runs)
    return f" and training seeds: mean of {of_b} against mean of {of_a}; standard deviation between seeds {sd}."


def without_seeds(a: Side, b: Side) -> str:
    return (
        ". **Seed noise is not in the interval**: no setting was run under a second seed. "
        f"`dvc exp run -S {SEED}={other_seed(a, b)}` repeats one."
    )


def other_seed(a: Side, b: Side) -> int:
    return 1 + max((seed for side in (a, b) if isinstance(seed := side.params.get(SEED), int)), default=0)


# Parameters and inputs


def differences(sides: Sequence[Side]) -> str:
    """Parameters, and digests of inputs; a column for each revision."""
    first, *others = sides
    keys = sorted({key for side in others for key in differing(first, side)})
    inputs = dict.fromkeys(name for side in others for name in changed_inputs(first, side))
    params = [side.params for side in sides]
    rows = [[show_name(key), *show_params(params, key)] for key in keys]
    rows += [[show_name(name), *(code(str(went_in(side).get(name))) for side in sides)] for name in inputs]
    return table(("", *(side.name for side in sides)), rows) if rows else "None."


def show_name(name: str) -> str:
    """Of a metric or a parameter; one that no stage has is code, where no page takes it for markup."""
    return name if re.fullmatch(r"[\w.' -]+", name) else code(name, MAX_VALUE)


def show_params(params: Sequence[Mapping[str, object]], key: str) -> list[str]:
    """A parameter of each; texts and lists as code, where no page takes them for markup."""
    values = [each.get(key) for each in params]
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    shown = [
        text if is_plain(value) else span
        for value, text, span in zip(values, texts, codes(texts, MAX_VALUE), strict=True)
    ]
    return [text if key in each else "not set" for text, each in zip(shown, params, strict=True)]


def is_plain(value: object) -> bool:
    return value is None or isinstance(value, int | float)


# Metrics


def metrics_table(sides: Sequence[Side], verdicts: Sequence[Verdict]) -> str:
    """Numbers that moved, in the order of METRICS; whatever is equal in all is counted.

    The held-out loss is marked as better or worse only where it agrees with a verdict on the whole tables; where there
    is none to compare, what the held-out pictures gave stands side by side without a difference.
    """
    first, *others = sides
    keys = {key for side in sides for key in side.metrics if not key.endswith(DETAILS)}
    numbers = sorted(key for key in keys if any(is_number(side.metrics.get(key)) for side in sides))
    moved = [key for key in numbers if len({json.dumps(side.metrics.get(key)) for side in sides}) > 1]
    moved.sort(key=lambda key: ORDER.get(key_of(key) or "", len(ORDER)))
    if not moved:
        return f"All {len(numbers)} are equal." if len(numbers) != 1 else "It is equal."
    marks = [mark_of(first, side, verdict) for side, verdict in zip(others, verdicts, strict=True)]
    marked = list(zip(others, marks, strict=True))
    rows = [
        [
            f"{show_name(key)} {arrow(key)}".strip(),
            show_number(first.metrics.get(key)),
            *(cell(key, first, side, mark) for side, mark in marked),
        ]
        for key in moved
    ]
    legend = " ↓ lower is better, ↑ higher is better." if any(map(arrow, moved)) else ""
    legend += f" ✓ better, ✗ worse than {first.name}." if any(marks) else ""
    head = ("Metric", *(side.name for side in sides))
    return f"{table(head, rows)}\n\n{plural(len(numbers) - len(moved), 'other is', 'others are')} equal.{legend}"


def mark_of(a: Side, b: Side, verdict: Verdict) -> str | None:
    """Empty where the reports' own means do not show what the verdict is of; None where they do not compare."""
    if verdict.word == "not comparable":
        return None
    same_table = a.metrics.get("val.table") == b.metrics.get("val.table")
    return {"better": " ✓", "worse": " ✗"}.get(verdict.word, "") if same_table else ""


def cell(key: str, first: Side, side: Side, mark: str | None) -> str:
    """``0.3465 (−0.05 ✓)``"""
    before, after = first.metrics.get(key), side.metrics.get(key)
    alone = mark is None and key.startswith("val.")
    if alone or not is_number(before) or not is_number(after) or before == after:
        return show_number(after)
    metric = find(key)
    agrees = metric is not None and metric.decides and (after < before) == (mark == " ✓")
    return f"{show_number(after)} ({signed(after - before, '.4g')}{mark if mark and agrees else ''})"


def show_number(value: object) -> str:
    if value is None or is_number(value):
        shown = "" if value is None else f"{value:z.4g}" if isinstance(value, float) else f"{value}"
        return shown.replace("-", MINUS)
    return code(f"{value}", MAX_VALUE)


def measured_cost(sides: Sequence[Side]) -> list[str]:
    """Seconds, speed and memory of the workspace's runs; none of a result that DVC restored."""
    found: dict[str, str] = {}
    for stage, (path, figures) in MEASURED.items() if any(side.commit is None for side in sides) else ():
        try:
            measured, own = from_json(path.read_bytes()), sha256_file(figures)
        except (OSError, ValueError):
            continue
        if not isinstance(measured, dict) or measured.get("of") != own:
            continue
        found |= {f"{stage}: {key.replace('_', ' ')}": show_number(v) for key, v in measured.items() if is_number(v)}
    return ["## Cost", facts("The workspace's last runs, measured on this machine", found)] if found else []


# Dataset


def dataset_section(sides: Sequence[Side], pictures: Mapping[str, Path], folder: Path) -> list[str]:
    """What was done to the first one's pictures to get each of the others'; empty where nothing was."""
    first, *others = sides
    parts = []
    for side in others:
        changes = changes_between(first, side)
        if changes:
            parts += [f"From {first.name} to {side.name}: {changes.summary()}.", changes.markdown()]
            thumbnails = pictures.get(f"dataset {side.name}")
            parts += [image("Thumbnails", thumbnails, folder)] if thumbnails else []
    return ["## Dataset", *parts] if parts else []


def samples_section(sides: Sequence[Side], pictures: Mapping[str, Path], folder: Path) -> list[str]:
    if "samples" in pictures:
        return ["## Samples", image("Samples", pictures["samples"], folder), numbered(shared_prompts(sides))]
    return [] if shared_prompts(sides) else ["## Samples", "The sheets share no prompt."]
