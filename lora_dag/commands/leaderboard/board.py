"""Tables -> two DataFrames: one row per run, which is leaderboard.csv, and one row per setting."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.leaderboard.ranking import SettingResult, Table, front
from lora_dag.commands.leaderboard.results import Result
from lora_dag.evaluation import bootstrap
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.evaluation.metrics import METRICS
from lora_dag.sweeps.grid import Run

if TYPE_CHECKING:
    import pandas as pd

SEED, SOURCE = "train.seed", "dataset.source"
MEASURED = {metric.column: name for name, metric in METRICS.items() if metric.column}
"""Column -> its metric."""
NUMBERS = (
    *("loss", "loss_base", "change", "change_low", "change_high"),
    *("setting_loss", "against_best", "against_best_low", "against_best_high", "seed_sd", *MEASURED, "train_seconds"),
)
FIELDS = (
    *("table", "rank", "run", "dataset", "seed", "state", "loss", "loss_base", "change", "change_low", "change_high"),
    *("setting_loss", "against_best", "against_best_low", "against_best_high", "verdict", "seed_sd"),
    *(*MEASURED, "train_seconds", "front", "differs_too", "reason"),
)


@dataclass(frozen=True)
class Board:
    """All runs of a sweep."""

    tables: Sequence[Table]
    unfinished: Sequence[Result]
    keys: list[str]
    """Swept keys without the seed."""
    runs: pd.DataFrame
    """FIELDS and ``keys``: the runs of the best setting of the first table first, those without a result last."""
    settings: pd.DataFrame
    """Row per table and rank, from 1: front, MEASURED and train_seconds, as means over seeds; NaN if a run has none."""


def make_board(tables: Sequence[Table], unfinished: Sequence[Result]) -> Board:
    import pandas as pd

    swept = swept_keys([*runs_of(tables), *(result.run for result in unfinished)])
    keys = [key for key in swept if key != SEED]
    lines = [
        {"table": number, "rank": rank} | run_columns(result, keys) | result_columns(each, standing, index)
        for number, each in enumerate(tables, 1)
        for rank, standing in enumerate(each.ranking, 1)
        for index, result in enumerate(standing.results)
    ]
    lines += [run_columns(result, keys) | {"state": "not finished", "reason": result.reason} for result in unfinished]
    runs = pd.DataFrame(lines, columns=[*(field for field in FIELDS if field != "front"), *keys])
    runs = runs.astype({"table": "Int64", "rank": "Int64"} | dict.fromkeys(NUMBERS, "float64"))
    settings = mean_costs(runs)
    settings["front"] = fronts(settings)
    runs = runs.join(settings["front"], on=["table", "rank"])
    return Board(tables, unfinished, keys, runs[[*FIELDS, *keys]], settings.drop(columns="setting_loss"))


def run_columns(result: Result, keys: Sequence[str]) -> dict[str, object]:
    overrides = {key: format_value(planned_value(result.run, key)) for key in keys}
    return {"run": result.run.name, "dataset": result.run.value(SOURCE), "seed": result.seed} | overrides


def result_columns(each: Table, standing: SettingResult, index: int) -> dict[str, object]:
    """Return the columns of a result. Losses are MSE; the change of one run is estimated over images only."""
    result, losses = standing.results[index], standing.losses[index]
    change = bootstrap.estimate(losses - standing.base, seed=0)
    best = standing.against_best or Estimate(0.0, 0.0, 0.0)
    return {
        "state": "finished",
        "loss": losses.mean(),
        "loss_base": standing.base.mean(),
        **change.named("change"),
        "setting_loss": standing.loss,
        **best.named("against_best"),
        "verdict": standing.verdict or "best",
        "seed_sd": each.seed_sd,
        **{column: result.number(name) for column, name in MEASURED.items()},
        "train_seconds": result.seconds,
        "differs_too": re.sub(r"\*\*|`", "", " ".join(confounds(result.done, each.ranking[0].results[0].done))),
    }


def mean_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return means over the runs of each setting, by table and rank; NaN if a run lacks the number."""
    groups = runs.groupby(["table", "rank"])[["setting_loss", *MEASURED, "train_seconds"]]
    return groups.mean().where(groups.count().eq(groups.size(), axis="index"))


def fronts(settings: pd.DataFrame) -> pd.Series:
    """Return ``size time``: the Pareto fronts of loss against size and time (two digits), if known for the table."""
    found = settings["setting_loss"].map(lambda loss: "")
    times = settings["train_seconds"].map(lambda seconds: float(f"{seconds:.2g}"))
    for name, costs in (("size", settings["megabytes"]), ("time", times)):
        for _, known in costs.groupby("table"):
            if known.notna().all():
                best = known.index[front(known.tolist(), settings.loc[known.index, "setting_loss"].tolist())]
                found[best] = (found[best] + f" {name}").str.strip()
    return found


def write_csv(board: Board) -> str:
    """Return the CSV of all runs, with six significant digits."""
    columns = [column for column in board.runs if column != SOURCE]  # which is `dataset`
    return board.runs.to_csv(columns=columns, index=False, float_format="%.6g", lineterminator="\n")


# Runs


def runs_of(tables: Sequence[Table]) -> list[Run]:
    return [result.run for each in tables for standing in each.ranking for result in standing.results]


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Return dotted keys with more than one value in the sweep."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({json.dumps(planned_value(run, key), sort_keys=True) for run in runs}) > 1]


def planned_value(run: Run, key: str) -> Any:
    """Return the run's value; null if the override is null, as for ``lora.alpha``, which then is the run's rank."""
    return None if run.overrides.get(key, ...) is None else run.value(key)


def format_value(value: object) -> str:
    return f"{value}" if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
