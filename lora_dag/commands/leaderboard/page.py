"""The board -> leaderboard.md, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.compare.page import crossed_by
from lora_dag.commands.compare.verdict import percent
from lora_dag.commands.leaderboard.board import MEASURED, SEED, SOURCE, Board, asked, runs_of, show, swept_keys
from lora_dag.commands.leaderboard.ranking import Standing, Table
from lora_dag.core.console import plural
from lora_dag.core.took import duration
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.evaluation.metrics import METRICS
from lora_dag.pages.findings import BOOTSTRAP, FEW_PICTURES, cannot_tell
from lora_dag.pages.markdown import code, image, plain, signed, table

if TYPE_CHECKING:
    import pandas as pd

ABOUT = (
    "Held-out loss: of the adapter at the end of its training, what it differs from the base's, in percent of that, so "
    "below 0 is better. Against the best: what it differs from the best setting's, in percent of that, paired picture "
    f"by picture. Intervals are of 95 %, over held-out pictures ({BOOTSTRAP}) and, where some setting has several "
    "seeds, over those; of a single run, over pictures alone. Each is for its own line: of twenty settings as good as "
    "the best, one is expected to stand as worse. The best was picked by these same pictures, so one within noise of "
    "it may be as good. `front`: no setting of the table is better in one of loss and size, or loss and time (to two "
    "digits), and as good in the other. In the plots a dot is a run, a bar the seeds of a setting, and a line the mean "
    "of the settings that were run with every value of the key."
)


def write_page(board: Board, pictures: Mapping[Path, str], folder: Path) -> str:
    """The whole page; pictures are linked from ``folder``.

    Args:
        pictures: of each, what was left out of it.
    """
    tables, unfinished = board.tables, board.unfinished
    sections = [f"# Leaderboard: {len(board.runs) - len(unfinished)} of {len(board.runs)} runs finished"]
    for number, each in enumerate(tables, 1):
        settings = standings_table(each, board.settings.loc[number])
        sections += [f"## {heading(each, tables)}", headline(each), settings, seed_line(each)]
    sections += [ABOUT] if tables else []
    if unfinished:
        rows = [[result.run.name, code(result.reason, 300)] for result in unfinished]
        sections += ["## Not finished", table(("run", "why"), rows, align=":---")]
    for path, left_out in pictures.items():
        sections += [image(path.stem, path, folder), *([left_out] if left_out else [])]
    if tables:
        sections += ["## Runs", runs_table(board)]
    return "\n\n".join(sections) + "\n"


def heading(each: Table, tables: Sequence[Table]) -> str:
    """``data/raw, dataset.resolution 64: 12 held-out pictures``, with the swept values that tell it from the others."""
    keys = [key for key in swept_keys(runs_of(tables)) if key not in (SEED, SOURCE)]
    own = runs_of([each])
    values = [f"{key} {show(asked(own[0], key))}" for key in keys if key not in swept_keys(own)]
    return f"{', '.join([*each.datasets, *values])}: {plural(each.num_pictures, 'held-out picture')}"


def headline(each: Table) -> str:
    """The best, how many others cannot be told from it, and what differs beside what was swept."""
    best, *others = each.standings
    crossed = next(filter(None, (crossed_by(result.done) for result in best.results)), [])
    but = f", but {'; '.join(crossed)}" if crossed else ""
    against = f"{percent(best.change, base_loss(best))} against the base{but}"
    few = each.num_pictures < FEW_PICTURES and any(other.verdict == "within noise" for other in others)
    if not others:
        return f"**{best.name}** alone: {against}."
    near = sum(other.verdict != "worse" for other in others)
    told = (
        "all others are worse beyond noise"
        if not near
        else f"{near} of {plural(len(others), 'other')} within noise of it"
    )
    verdict = f"Best: **{best.name}**, {against}; {told}."
    done = best.results[0].done
    has_named_split = done.params["dataset.heldout_split"] is not None
    verdict += f" {cannot_tell(each.num_pictures, done.lineage, has_named_split)}." if few else ""
    return " ".join([verdict, *confounds(*(standing.results[0].done for standing in each.standings))])


def standings_table(each: Table, settings: pd.DataFrame) -> str:
    """A line for each setting, best first.

    Args:
        settings: of this table, by rank.
    """
    head = ("setting", "seeds", "held-out loss", "against the best", "verdict", *heads(), "front")
    best = each.standings[0]
    rows = []
    for standing, (rank, costs) in zip(each.standings, settings.iterrows(), strict=True):
        change = standing.against_best
        against = ("", "best") if change is None else (percent(change, best.loss), str(standing.verdict))
        own = (f"{rank}. {standing.name}", str(len(standing.results)), percent(standing.change, base_loss(standing)))
        rows.append((*own, *against, *measured(costs), costs["front"].replace(" ", ", ")))
    return table(head, rows)


def heads() -> list[str]:
    return [*(column.replace("_", " ") for column in MEASURED), "training"]


def measured(row: pd.Series) -> list[str]:
    """A cell for each of ``heads``, empty where nothing was measured."""
    cells = [shown(row[column], METRICS[name].spec) for column, name in MEASURED.items()]
    return [*cells, "" if math.isnan(row["train_seconds"]) else duration(row["train_seconds"])]


def shown(value: float, spec: str) -> str:
    if math.isnan(value):
        return ""
    return signed(value, spec.removeprefix("+")) if spec.startswith("+") else plain(value, spec)


def seed_line(each: Table) -> str:
    if not each.df:
        return "**Seed noise is not in these intervals**: no setting has a second seed (`sweep.seeds`)."
    share = f"{100 * each.seed_sd / each.standings[0].loss:.2g} %"
    return f"Between seeds of a setting the loss varies by {share} (standard deviation, {each.df} degrees of freedom)."


def runs_table(board: Board) -> str:
    """Every finished run with its overrides."""
    rows = []
    for _, run in board.runs[board.runs["state"] == "finished"].iterrows():
        change = Estimate(run["change"], run["change_low"], run["change_high"])
        own = (percent(change, run["loss_base"]), f"{run['loss']:.4f}")
        rows.append([run["run"], *run[board.keys], str(run["seed"]), *own, *measured(run)])
    return table(("run", *board.keys, SEED, "held-out loss", "MSE", *heads()), rows)


def base_loss(row: Standing) -> float:
    return float(row.base.mean())
