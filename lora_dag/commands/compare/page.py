"""Write the comparison as Markdown: verdicts, differing parameters, metrics, dataset, samples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_dag.artifacts.metrics import is_number
from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.compare.dataset_changes import changes_between
from lora_dag.commands.compare.revision_report import RevisionReport, shared_prompts
from lora_dag.commands.compare.run_inputs import (
    SEED,
    changed_inputs,
    differing_params,
    input_digests,
    unexplained_inputs,
)
from lora_dag.commands.compare.verdict import Verdict
from lora_dag.core.console import plural
from lora_dag.core.files import from_json, sha256_file
from lora_dag.evaluation.metrics import DETAILS, METRICS, arrow, find, key_of
from lora_dag.pages import findings
from lora_dag.pages.markdown import MINUS, bullets, code, codes, facts, image, numbered, signed, table

MEASURED = {
    "train": (Path("reports/train/run.json"), Path("reports/train/metrics.json")),
    "validate": (Path("reports/validate/run.json"), Path("reports/metrics.json")),
}
"""Time and memory of a stage, and the metrics of the same run. Only the workspace has these files."""
ORDER = {name: index for index, name in enumerate(METRICS)}
ONE_COMMIT = " The names belong to one commit: if the results of an experiment are missing, commit them first."
MAX_VALUE = 300  # characters of a parameter


def write_page(
    revisions: Sequence[RevisionReport], verdicts: Sequence[Verdict], images: Mapping[str, Path], folder: Path
) -> str:
    """Return the page as Markdown.

    Args:
        revisions: two or more; all others are compared with the first.
        verdicts: one per revision after the first.
        images: name -> file of ``draw_images``: ``samples`` and ``dataset NAME``; may be empty.
        folder: folder of the page, for relative links.
    """
    first, *others = revisions
    sections = [
        f"# {' and '.join(revision.name for revision in others)} against {first.name}",
        *(paragraph(first, revision, verdict) for revision, verdict in zip(others, verdicts, strict=True)),
        "## What differs",
        differences(revisions),
        "## Metrics",
        metrics_table(revisions, verdicts),
        *measured_cost(revisions),
        *dataset_section(revisions, images, folder),
        *samples_section(revisions, images, folder),
    ]
    return "\n\n".join(sections) + "\n"


# The verdict


def paragraph(a: RevisionReport, b: RevisionReport, verdict: Verdict) -> str:
    """Return the verdict in bold and its evidence as bullets.

    The verdict is like ``rank-16 (lora.rank 16) against main (lora.rank 8): better, −3.1 % [−4.0, −2.2].``
    """
    left, right = names(b, a)
    inputs = [] if verdict.word == "not comparable" else unexplained_inputs(a, b)
    of_b, of_a = concerns_of(b), concerns_of(a)
    but = "".join(f" But {concern}." for concern in of_b) if verdict.word == "better" else ""
    concerns = {"Both": of_b} if of_b == of_a else {b.name: [] if but else of_b, a.name: of_a}
    notes = basis(a, b, verdict)
    notes += [f"**{name}**: {concern}." for name, found in concerns.items() for concern in found]
    notes += [f"**Not only parameters differ**: {', '.join(inputs)}."] if inputs else []
    notes += [] if verdict.word in ("not comparable", "equal") else confounds(b, a)
    return "\n\n".join(filter(None, [f"**{left} against {right}: {verdict}.{but}**", bullets(notes)]))


def concerns_of(revision: RevisionReport) -> list[str]:
    """Return signs of overfitting, and of samples or losses that are worse than the base model and chance."""
    overfitting = findings.overfitting(revision.metrics, revision.lineage.get("num_steps", 0))
    return [*filter(None, [overfitting]), *findings.concerns(revision.metrics, revision.lineage)]


def names(one: RevisionReport, other: RevisionReport) -> tuple[str, str]:
    """Return both names, each with the value of the parameter that differs if there is only one."""
    keys = differing_params(one, other)
    if len(keys) != 1 or unexplained_inputs(one, other):
        return one.name, other.name
    left, right = show_params((one.params, other.params), keys[0])
    return f"{one.name} ({show_name(keys[0])} {left})", f"{other.name} ({show_name(keys[0])} {right})"


def basis(a: RevisionReport, b: RevisionReport, verdict: Verdict) -> list[str]:
    """Return lines on the losses and on the noise that the interval covers."""
    if verdict.word in ("not comparable", "equal"):
        return []
    losses = f"Held-out loss {verdict.loss:.4f} → {verdict.loss + verdict.change.mean:.4f}."
    if verdict.same_setting and not verdict.df:
        return [losses, "Both runs have the same settings and seed: another machine ran one, or files were edited."]
    n, (of_a, of_b) = verdict.num_images, verdict.num_each
    images = (
        plural(n, "held-out image") if (n, n) == (of_a, of_b) else f"{n} shared held-out images, of {of_a} and {of_b}"
    )
    few = []
    if n < findings.FEW_IMAGES and verdict.word == "within noise":
        few = [findings.too_few_images(n, b.lineage, is_named=b.params.get("dataset.heldout_split") is not None)]
    sources = " and training seeds" if verdict.df else ""
    seeds = with_seeds(verdict) if verdict.df else without_seeds(a, b)
    return [*few, f"{losses} The 95 % interval is over {images}{sources} ({findings.BOOTSTRAP}).", seeds]


def with_seeds(verdict: Verdict) -> str:
    sd = f"{100 * verdict.seed_sd / verdict.loss:.2g} %"
    if verdict.same_setting:
        return f"Only {SEED} differs: this is the effect of a seed (standard deviation {sd})."
    of_a, of_b = (", ".join(runs) for runs in verdict.runs)
    return f"Mean of {of_b} against mean of {of_a}. The standard deviation between seeds is {sd}."


def without_seeds(a: RevisionReport, b: RevisionReport) -> str:
    return (
        "**Seed noise is not in the interval**: no setting was run with a second seed. "
        f"`dvc exp run -S {SEED}={other_seed(a, b)}` repeats a run."
    )


def other_seed(a: RevisionReport, b: RevisionReport) -> int:
    return 1 + max((seed for revision in (a, b) if isinstance(seed := revision.params.get(SEED), int)), default=0)


# Parameters and inputs


def differences(revisions: Sequence[RevisionReport]) -> str:
    """Return a table of differing parameters and input digests, with a column per revision."""
    first, *others = revisions
    keys = sorted({key for revision in others for key in differing_params(first, revision)})
    inputs = dict.fromkeys(name for revision in others for name in changed_inputs(first, revision))
    params = [revision.params for revision in revisions]
    commits = {revision.commit for revision in revisions}
    rows = [[show_name(key), *show_params(params, key)] for key in keys]
    rows += [
        [show_name(name), *(code(str(input_digests(revision).get(name))) for revision in revisions)] for name in inputs
    ]
    return (
        table(("Parameter or input", *(revision.name for revision in revisions)), rows)
        if rows
        else f"No parameter and no input differs.{ONE_COMMIT if len(commits) == 1 and None not in commits else ''}"
    )


def show_name(name: str) -> str:
    """Return the name of a metric or parameter; an unusual name as code, so that it is never read as markup."""
    return name if re.fullmatch(r"[\w.' -]+", name) else code(name, MAX_VALUE)


def show_params(params: Sequence[Mapping[str, object]], key: str) -> list[str]:
    """Return the values of a parameter; texts and lists as code, so that they are never read as markup."""
    values = [each.get(key) for each in params]
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    cells = [
        text if is_number_or_null(value) else span
        for value, text, span in zip(values, texts, codes(texts, MAX_VALUE), strict=True)
    ]
    return [text if key in each else "not set" for text, each in zip(cells, params, strict=True)]


def is_number_or_null(value: object) -> bool:
    return value is None or isinstance(value, int | float)


# Metrics


def metrics_table(revisions: Sequence[RevisionReport], verdicts: Sequence[Verdict]) -> str:
    """Return a table of the metrics that differ, in the order of METRICS, and the number of equal ones.

    The held-out loss is marked as better or worse only if it agrees with the verdict on the same held-out table.
    Without a comparison, ``val.*`` metrics are shown without a difference.
    """
    first, *others = revisions
    keys = {key for revision in revisions for key in revision.metrics if not key.endswith(DETAILS)}
    numbers = sorted(key for key in keys if any(is_number(revision.metrics.get(key)) for revision in revisions))
    moved = [key for key in numbers if len({json.dumps(revision.metrics.get(key)) for revision in revisions}) > 1]
    moved.sort(key=lambda key: ORDER.get(key_of(key) or "", len(ORDER)))
    if not moved:
        return f"All {len(numbers)} metrics are equal." if len(numbers) != 1 else "The only metric is equal."
    marks = [verdict_mark(first, revision, verdict) for revision, verdict in zip(others, verdicts, strict=True)]
    marked = list(zip(others, marks, strict=True))
    rows = [
        [
            f"{show_name(key)} {arrow(key)}".strip(),
            show_number(first.metrics.get(key)),
            *(cell(key, first, revision, mark) for revision, mark in marked),
        ]
        for key in moved
    ]
    legend = " ↓ lower is better, ↑ higher is better." if any(map(arrow, moved)) else ""
    legend += f" ✓ better, ✗ worse than {first.name}." if any(marks) else ""
    head = ("Metric", *(revision.name for revision in revisions))
    others_equal = f"{plural(len(numbers) - len(moved), 'other metric is', 'other metrics are')} equal."
    return f"{table(head, rows)}\n\n{others_equal}{legend}"


def verdict_mark(a: RevisionReport, b: RevisionReport, verdict: Verdict) -> str | None:
    """Return the mark of a verdict: empty if the means are of different tables, None without a comparison."""
    if verdict.word == "not comparable":
        return None
    same_table = a.metrics.get("val.table") == b.metrics.get("val.table")
    return {"better": " ✓", "worse": " ✗"}.get(verdict.word, "") if same_table else ""


def cell(key: str, first: RevisionReport, revision: RevisionReport, mark: str | None) -> str:
    """Return a cell like ``0.3465 (−0.05 ✓)``."""
    before, after = first.metrics.get(key), revision.metrics.get(key)
    alone = mark is None and key.startswith("val.")
    if alone or not is_number(before) or not is_number(after) or before == after:
        return show_number(after)
    metric = find(key)
    agrees = metric is not None and metric.decides and (after < before) == (mark == " ✓")
    return f"{show_number(after)} ({signed(after - before, '.4g')}{mark if mark and agrees else ''})"


def show_number(value: object) -> str:
    if value is None or is_number(value):
        text = "" if value is None else f"{value:z.4g}" if isinstance(value, float) else f"{value}"
        return text.replace("-", MINUS)
    return code(f"{value}", MAX_VALUE)


def measured_cost(revisions: Sequence[RevisionReport]) -> list[str]:
    """Return seconds, speed and memory of the workspace's runs; none for results that DVC restored."""
    found: dict[str, str] = {}
    for stage, (path, figures) in MEASURED.items() if any(revision.commit is None for revision in revisions) else ():
        try:
            measured, own = from_json(path.read_bytes()), sha256_file(figures)
        except (OSError, ValueError):
            continue
        if not isinstance(measured, dict) or measured.get("of") != own:
            continue
        found |= {f"{stage}: {key.replace('_', ' ')}": show_number(v) for key, v in measured.items() if is_number(v)}
    return ["## Cost", facts("Last runs of the workspace on this machine", found)] if found else []


# Dataset


def dataset_section(revisions: Sequence[RevisionReport], images: Mapping[str, Path], folder: Path) -> list[str]:
    """Return the changes from the first dataset to each other one; empty without changes."""
    first, *others = revisions
    parts = []
    for revision in others:
        changes = changes_between(first, revision)
        if changes:
            parts += [f"From {first.name} to {revision.name}: {changes.summary()}.", changes.markdown()]
            thumbnails = images.get(f"dataset {revision.name}")
            parts += [image("Thumbnails", thumbnails, folder)] if thumbnails else []
    return ["## Dataset", *parts] if parts else []


def samples_section(revisions: Sequence[RevisionReport], images: Mapping[str, Path], folder: Path) -> list[str]:
    if "samples" in images:
        return ["## Samples", image("Samples", images["samples"], folder), numbered(shared_prompts(revisions))]
    return [] if shared_prompts(revisions) else ["## Samples", "The revisions have no prompt in common."]
