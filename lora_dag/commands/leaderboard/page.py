"""Tables -> leaderboard.md, for people, and leaderboard.csv, a line for each run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.compare.page import crossed_by
from lora_dag.commands.leaderboard.ranking import Standing, Table
from lora_dag.commands.leaderboard.results import Result
from lora_dag.core.console import plural
from lora_dag.core.took import duration
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.pages.findings import BOOTSTRAP, FEW_PICTURES, cannot_tell
from lora_dag.pages.markdown import code, decimals, image, interval, signed, table
from lora_dag.sweeps.grid import Run

if TYPE_CHECKING:
    import numpy as np

SEED = "train.seed"
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
FIELDS = (
    *("table", "rank", "run", "dataset", "seed", "state", "loss", "loss_base", "change", "change_low", "change_high"),
    *("setting_loss", "against_best", "against_best_low", "against_best_high", "verdict", "seed_sd", "overfit_gap"),
    *("copied_share", "parameters", "megabytes", "train_seconds", "front", "differs_too", "reason"),
)


def write_page(
    tables: Sequence[Table], unfinished: Sequence[Result], pictures: Mapping[Path, str], folder: Path
) -> str:
    """The whole page; pictures are linked from ``folder``.

    Args:
        pictures: of each, what was left out of it.
    """
    runs = runs_of(tables)
    keys = swept_keys([*runs, *(result.run for result in unfinished)])
    counts = f"{len(runs)} of {len(runs) + len(unfinished)} runs finished"
    sections = [f"# Leaderboard: {counts}"]
    for each in tables:
        sections += [f"## {heading(each, tables)}", headline(each), standings_table(each), seed_line(each)]
    sections += [ABOUT] if tables else []
    if unfinished:
        rows = [[result.run.name, code(result.reason, 300)] for result in unfinished]
        sections += ["## Not finished", table(("run", "why"), rows, align=":---")]
    for path, left_out in pictures.items():
        sections += [image(path.stem, path, folder), *([left_out] if left_out else [])]
    if tables:
        sections += ["## Runs", runs_table(tables, keys)]
    return "\n\n".join(sections) + "\n"


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Dotted keys that the sweep gives more than one value."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({json.dumps(asked(run, key), sort_keys=True) for run in runs}) > 1]


def asked(run: Run, key: str) -> Any:
    """The run's value; null where it overrides with that, such as ``lora.alpha``, which then is each run's own rank."""
    return None if run.overrides.get(key, ...) is None else run.value(key)


def heading(each: Table, tables: Sequence[Table]) -> str:
    """``data/raw, dataset.resolution 64: 12 held-out pictures``, with the swept values that tell it from the others."""
    keys = [key for key in swept_keys(runs_of(tables)) if key not in (SEED, "dataset.source")]
    own = runs_of([each])
    values = [f"{key} {show(asked(own[0], key))}" for key in keys if key not in swept_keys(own)]
    return f"{', '.join([*each.datasets, *values])}: {plural(each.num_pictures, 'held-out picture')}"


def runs_of(tables: Sequence[Table]) -> list[Run]:
    return [result.run for each in tables for standing in each.standings for result in standing.results]


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


def standings_table(each: Table) -> str:
    """A line for each setting, best first."""
    head = ("setting", "seeds", "held-out loss", "against the best", "verdict")
    cost = ("copied", "parameters", "MB", "training", "front")
    best = each.standings[0]
    return table([*head, *cost], [line(i, row, best) for i, row in enumerate(each.standings, 1)])


def line(number: int, row: Standing, best: Standing) -> list[str]:
    against = ["", "best"]
    if row.against_best is not None:
        against = [percent(row.against_best, best.loss), str(row.verdict)]
    return [
        f"{number}. {row.name}",
        str(len(row.results)),
        percent(row.change, base_loss(row)),
        *against,
        shown(row.mean_of("samples.copied_share"), "{:.0%}"),
        shown(row.mean_of("train.num_trainable_parameters"), "{:,.0f}"),
        shown(row.megabytes, "{:.3g}"),
        "" if row.seconds is None else duration(row.seconds),
        ", ".join(row.fronts),
    ]


def seed_line(each: Table) -> str:
    if not each.df:
        return "**Seed noise is not in these intervals**: no setting has a second seed (`sweep.seeds`)."
    share = f"{100 * each.seed_sd / each.standings[0].loss:.2g} %"
    return f"Between seeds of a setting the loss varies by {share} (standard deviation, {each.df} degrees of freedom)."


def runs_table(tables: Sequence[Table], keys: Sequence[str]) -> str:
    """Every finished run with its overrides."""
    keys = [key for key in keys if key != SEED]
    rows = []
    for each in tables:
        for standing in each.standings:
            for result, losses in zip(standing.results, standing.losses, strict=True):
                values = [show(asked(result.run, key)) for key in keys]
                change = percent(change_of(losses, standing), base_loss(standing))
                rows.append([result.run.name, *values, str(result.seed), change, f"{losses.mean():.4f}"])
                rows[-1] += [signed_or_empty(result.number("val.overfit_gap"))]
                rows[-1] += [shown(result.number("samples.copied_share"), "{:.0%}")]
                rows[-1] += ["" if result.seconds is None else duration(result.seconds)]
    return table(("run", *keys, SEED, "held-out loss", "MSE", "overfit gap", "copied", "training"), rows)


def change_of(losses: np.ndarray, standing: Standing) -> Estimate:
    """Of one run, float64 [pictures]: loss minus the base's, over pictures alone."""
    return bootstrap.estimate(losses - standing.base, seed=0)


def show(value: object) -> str:
    return f"{value}" if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def base_loss(row: Standing) -> float:
    return float(row.base.mean())


def percent(change: Estimate, of: float) -> str:
    """``−3.1 % [−4.0, −2.2]``; without bounds where one picture has none."""
    mean, low, high = (100 * value / of for value in (change.mean, change.low, change.high))
    spec = decimals(mean, low, high, least=1)
    return f"{signed(mean, spec)} %" + ("" if math.isnan(low) else f" {interval(low, high, spec)}")


def shown(value: float | None, spec: str) -> str:
    return "" if value is None else spec.format(value)


def signed_or_empty(value: float | None) -> str:
    return "" if value is None else signed(value)


def write_csv(tables: Sequence[Table], unfinished: Sequence[Result]) -> str:
    """Every run; losses in MSE, six significant digits."""
    runs = [*runs_of(tables), *(result.run for result in unfinished)]
    keys = [key for key in swept_keys(runs) if key not in (SEED, "dataset.source")]
    lines = []
    for number, each in enumerate(tables, 1):
        for rank, standing in enumerate(each.standings, 1):
            for index, result in enumerate(standing.results):
                lines.append({"table": number, "rank": rank} | of_run(result, keys) | of_result(each, standing, index))
    lines += [of_run(result, keys) | {"state": "not finished", "reason": result.reason} for result in unfinished]
    fields = [*FIELDS, *keys]
    return heldout_table.write_csv(fields, [[digits(each.get(field)) for field in fields] for each in lines])


def of_run(result: Result, keys: Sequence[str]) -> dict[str, object]:
    overrides = {key: show(asked(result.run, key)) for key in keys}
    return {"run": result.run.name, "dataset": result.run.value("dataset.source"), "seed": result.seed} | overrides


def of_result(each: Table, standing: Standing, index: int) -> dict[str, object]:
    result, losses = standing.results[index], standing.losses[index]
    change = change_of(losses, standing)
    best = standing.against_best or Estimate(0.0, 0.0, 0.0)
    return {
        "state": "finished",
        "loss": float(losses.mean()),
        "loss_base": base_loss(standing),
        "change": change.mean,
        "change_low": change.low,
        "change_high": change.high,
        "setting_loss": standing.loss,
        "against_best": best.mean,
        "against_best_low": best.low,
        "against_best_high": best.high,
        "verdict": standing.verdict or "best",
        "seed_sd": each.seed_sd,
        "overfit_gap": result.number("val.overfit_gap"),
        "copied_share": result.number("samples.copied_share"),
        "parameters": result.number("train.num_trainable_parameters"),
        "megabytes": result.number("export.megabytes"),
        "train_seconds": result.seconds,
        "front": " ".join(standing.fronts),
        "differs_too": re.sub(r"\*\*|`", "", " ".join(confounds(result.done, each.standings[0].results[0].done))),
    }


def digits(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value
