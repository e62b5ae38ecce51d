"""Board -> leaderboard.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.compare.page import concerns_of
from lora_dag.commands.compare.verdict import percent
from lora_dag.commands.leaderboard.board import (
    MEASURED,
    SEED,
    SOURCE,
    Board,
    format_value,
    planned_value,
    runs_of,
    swept_keys,
)
from lora_dag.commands.leaderboard.ranking import SettingResult, Table
from lora_dag.core.console import plural
from lora_dag.core.time_estimate import duration
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.evaluation.metrics import METRICS
from lora_dag.pages.findings import BOOTSTRAP, FEW_IMAGES, too_few_images
from lora_dag.pages.markdown import code, image, plain, signed, table

if TYPE_CHECKING:
    import pandas as pd

ABOUT = f"""\
- **Held-out loss**: change of the final adapter's loss against the base model, in percent. Below 0 is better.
- **Against the best**: change against the best setting, in percent, paired image by image.
- **Intervals**: 95 % confidence intervals over held-out images ({BOOTSTRAP}), and over seeds if a setting has several.
  Each is for its own line: of twenty settings as good as the best, one is expected to be called worse. The best setting
  was chosen with the same images, so a setting within noise of it may be as good.
- **Front**: no setting of the table is better in loss and as good in size (or time, to two digits), or vice versa.
- **Plots**: a dot is a run, a bar the seeds of a setting, a line the mean of settings run with every value."""


def write_page(board: Board, images: Mapping[Path, str], folder: Path) -> str:
    """Return the whole page, with links to images relative to ``folder``.

    Args:
        images: path -> text about omitted parts.
    """
    tables, unfinished = board.tables, board.unfinished
    sections = [f"# Leaderboard: {len(board.runs) - len(unfinished)} of {len(board.runs)} runs finished"]
    for number, each in enumerate(tables, 1):
        settings = settings_table(each, board.settings.loc[number])
        sections += [f"## {heading(each, tables)}", headline(each), settings, seed_line(each)]
    sections += [ABOUT] if tables else []
    if unfinished:
        rows = [[result.run.name, code(result.reason, 300)] for result in unfinished]
        sections += ["## Not finished", table(("run", "reason"), rows, align=":---")]
    for path, left_out in images.items():
        sections += [image(path.stem, path, folder), *([left_out] if left_out else [])]
    if tables:
        sections += ["## Runs", runs_table(board)]
    return "\n\n".join(sections) + "\n"


def heading(each: Table, tables: Sequence[Table]) -> str:
    """Return ``data/raw, dataset.resolution 64: 12 held-out images``, with the swept values that identify a table."""
    keys = [key for key in swept_keys(runs_of(tables)) if key not in (SEED, SOURCE)]
    own = runs_of([each])
    values = [f"{key} {format_value(planned_value(own[0], key))}" for key in keys if key not in swept_keys(own)]
    return f"{', '.join([*each.datasets, *values])}: {plural(each.num_images, 'held-out image')}"


def headline(each: Table) -> str:
    """Return the best setting, how many others are within noise, and further differences of the runs."""
    best, *others = each.ranking
    concerns = next(filter(None, (concerns_of(result.done) for result in best.results)), [])
    but = f", but {'; '.join(concerns)}" if concerns else ""
    against = f"{percent(best.change, base_loss(best))} against the base{but}"
    is_small = each.num_images < FEW_IMAGES and any(other.verdict == "within noise" for other in others)
    if not others:
        return f"**{best.name}** alone: {against}."
    near = sum(other.verdict != "worse" for other in others)
    others_text = (
        "all others are worse beyond noise"
        if not near
        else f"{near} of {plural(len(others), 'other')} within noise of it"
    )
    verdict = f"Best: **{best.name}**, {against}; {others_text}."
    done = best.results[0].done
    has_named_split = done.params["dataset.heldout_split"] is not None
    verdict += f" {too_few_images(each.num_images, done.lineage, has_named_split)}" if is_small else ""
    return " ".join([verdict, *confounds(*(standing.results[0].done for standing in each.ranking))])


def settings_table(each: Table, settings: pd.DataFrame) -> str:
    """Return a line per setting, best first.

    Args:
        settings: costs of the table's settings, by rank.
    """
    head = ("setting", "seeds", "held-out loss", "against the best", "verdict", *heads(), "front")
    best = each.ranking[0]
    rows = []
    for standing, (rank, costs) in zip(each.ranking, settings.iterrows(), strict=True):
        change = standing.against_best
        against = ("", "best") if change is None else (percent(change, best.loss), str(standing.verdict))
        own = (f"{rank}. {standing.name}", str(len(standing.results)), percent(standing.change, base_loss(standing)))
        rows.append((*own, *against, *measured(costs), costs["front"].replace(" ", ", ")))
    return table(head, rows)


def heads() -> list[str]:
    return [*(column.replace("_", " ") for column in MEASURED), "training"]


def measured(row: pd.Series) -> list[str]:
    """Return a cell for each of ``heads``, empty without a measurement."""
    cells = [format_cell(row[column], METRICS[name].spec) for column, name in MEASURED.items()]
    return [*cells, "" if math.isnan(row["train_seconds"]) else duration(row["train_seconds"])]


def format_cell(value: float, spec: str) -> str:
    if math.isnan(value):
        return ""
    return signed(value, spec.removeprefix("+")) if spec.startswith("+") else plain(value, spec)


def seed_line(each: Table) -> str:
    if not each.df:
        return "**Seed noise is not in these intervals**: no setting has a second seed (`sweep.seeds`)."
    share = f"{100 * each.seed_sd / each.ranking[0].loss:.2g} %"
    return f"Between seeds of a setting the loss varies by {share} (standard deviation, {each.df} degrees of freedom)."


def runs_table(board: Board) -> str:
    """Return the table of finished runs with their overrides."""
    rows = []
    for _, run in board.runs[board.runs["state"] == "finished"].iterrows():
        change = Estimate(run["change"], run["change_low"], run["change_high"])
        own = (percent(change, run["loss_base"]), f"{run['loss']:.4f}")
        rows.append([run["run"], *run[board.keys], str(run["seed"]), *own, *measured(run)])
    return table(("run", *board.keys, SEED, "held-out loss", "MSE", *heads()), rows)


def base_loss(row: SettingResult) -> float:
    return float(row.base.mean())
