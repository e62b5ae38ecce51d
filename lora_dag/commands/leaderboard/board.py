"""Tables -> two DataFrames: a row for each run, which is leaderboard.csv, and a row for each setting."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.leaderboard.ranking import Standing, Table, front
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
    """Swept keys but the seed's."""
    runs: pd.DataFrame
    """FIELDS and ``keys``: the runs of the best setting of the first table first, those without a result last."""
    settings: pd.DataFrame
    """By table and rank, from 1: MEASURED and train_seconds, means over seeds, NaN where a run lacks one; and front."""


def make_board(tables: Sequence[Table], unfinished: Sequence[Result]) -> Board:
    import pandas as pd

    swept = swept_keys([*runs_of(tables), *(result.run for result in unfinished)])
    keys = [key for key in swept if key != SEED]
    lines = [
        {"table": number, "rank": rank} | of_run(result, keys) | of_result(each, standing, index)
        for number, each in enumerate(tables, 1)
        for rank, standing in enumerate(each.standings, 1)
        for index, result in enumerate(standing.results)
    ]
    lines += [of_run(result, keys) | {"state": "not finished", "reason": result.reason} for result in unfinished]
    runs = pd.DataFrame(lines, columns=[*(field for field in FIELDS if field != "front"), *keys])
    runs = runs.astype({"table": "Int64", "rank": "Int64"} | dict.fromkeys(NUMBERS, "float64"))
    settings = mean_costs(runs)
    settings["front"] = fronts(settings)
    runs = runs.join(settings["front"], on=["table", "rank"])
    return Board(tables, unfinished, keys, runs[[*FIELDS, *keys]], settings.drop(columns="setting_loss"))


def of_run(result: Result, keys: Sequence[str]) -> dict[str, object]:
    overrides = {key: show(asked(result.run, key)) for key in keys}
    return {"run": result.run.name, "dataset": result.run.value(SOURCE), "seed": result.seed} | overrides


def of_result(each: Table, standing: Standing, index: int) -> dict[str, object]:
    """Losses are in MSE; the change of one run is over pictures alone."""
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
        "differs_too": re.sub(r"\*\*|`", "", " ".join(confounds(result.done, each.standings[0].results[0].done))),
    }


def mean_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """By table and rank: means over the setting's runs, NaN where one of them lacks the number."""
    groups = runs.groupby(["table", "rank"])[["setting_loss", *MEASURED, "train_seconds"]]
    return groups.mean().where(groups.count().eq(groups.size(), axis="index"))


def fronts(settings: pd.DataFrame) -> pd.Series:
    """``size time``: the Pareto fronts of loss against size and time (two digits), where known of all of a table."""
    found = settings["setting_loss"].map(lambda loss: "")
    times = settings["train_seconds"].map(lambda seconds: float(f"{seconds:.2g}"))
    for name, costs in (("size", settings["megabytes"]), ("time", times)):
        for _, known in costs.groupby("table"):
            if known.notna().all():
                best = known.index[front(known.tolist(), settings.loc[known.index, "setting_loss"].tolist())]
                found[best] = (found[best] + f" {name}").str.strip()
    return found


def write_csv(board: Board) -> str:
    """Every run; six significant digits."""
    columns = [column for column in board.runs if column != SOURCE]  # which is `dataset`
    return board.runs.to_csv(columns=columns, index=False, float_format="%.6g", lineterminator="\n")


# Runs


def runs_of(tables: Sequence[Table]) -> list[Run]:
    return [result.run for each in tables for standing in each.standings for result in standing.results]


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Dotted keys that the sweep gives more than one value."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({json.dumps(asked(run, key), sort_keys=True) for run in runs}) > 1]


def asked(run: Run, key: str) -> Any:
    """The run's value; null where it overrides with that, such as ``lora.alpha``, which then is each run's own rank."""
    return None if run.overrides.get(key, ...) is None else run.value(key)


def show(value: object) -> str:
    return f"{value}" if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
