"""leaderboard.png: the effect of each swept key on the held-out loss; contact.png: one prompt, drawn by every run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.artifacts.metrics import is_number
from lora_dag.commands.compare.revision_report import shared_prompts
from lora_dag.commands.compare.sheets import cut_cells
from lora_dag.commands.leaderboard.board import SEED, SOURCE, Board, format_value, planned_value, runs_of, swept_keys
from lora_dag.commands.leaderboard.page import heading
from lora_dag.commands.leaderboard.ranking import SettingResult
from lora_dag.core.console import plural
from lora_dag.core.files import atomic
from lora_dag.pages.plots import INK, LOOK, style
from lora_dag.sweeps.grid import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from PIL import Image

COLORS = ("#0969da", "#9a6700", "#1a7f37", "#cf222e", "#8250df", "#57606a")
"""Colors of the tables, repeated after the last."""
DPI = 110
MAX_KEYS = 8
MAX_ROWS = 40
SHEET_BYTES = 1_000_000
SHEET_PIXELS = 2_000_000  # of its cells together: more would take fewer colors
MIN_CELL = 32
SHORT_NAME = 7  # letters


def draw_effects(board: Board, path: Path) -> str:
    """Draw loss against size, then a panel for each swept key: a dot per run, a bar over the seeds of a setting.

    Returns:
        Text about omitted keys.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = finished(board)
    swept = [key for key in swept_keys(runs_of(board.tables)) if key not in (SEED, SOURCE)]
    keys = swept[:MAX_KEYS]
    columns = min(3, 1 + len(keys))
    rows = -(-(1 + len(keys)) // columns)
    with mpl.rc_context(LOOK | {"text.parse_math": False}):  # a dollar sign is one
        figure, grid = plt.subplots(
            rows, columns, figsize=(4.4 * columns, 3.8 * rows + 0.5), layout="constrained", squeeze=False, sharey=True
        )
        panels = list(grid.flat)
        draw_sizes(panels[0], board, runs)
        for panel, key in zip(panels[1:], keys, strict=False):
            draw_key(panel, board, runs, key)
        for index, panel in enumerate(panels):
            panel.set_visible(index <= len(keys))
            style(panel, "held-out loss against the base's, %" if index % columns == 0 else "")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, fit_labels(labels, 900), loc="outside upper left", ncols=columns, frameon=False)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        plt.close(figure)
    return (
        f"Without {', '.join(swept[MAX_KEYS:])}: at most {plural(MAX_KEYS, 'key is', 'keys are')} drawn."
        if swept[MAX_KEYS:]
        else ""
    )


def finished(board: Board) -> pd.DataFrame:
    """Return the finished runs with ``percent``: the change of the loss in percent of the base loss."""
    runs = board.runs[board.runs["state"] == "finished"]
    return runs.assign(percent=100 * runs["change"] / runs["loss_base"])


def draw_sizes(panel: Axes, board: Board, runs: pd.DataFrame) -> None:
    """Draw settings by file size; the Pareto front is a line."""
    for index, (number, own) in enumerate(runs.groupby("table")):
        color, settings = COLORS[index % len(COLORS)], board.settings.loc[number]
        for rank, seeds in own.groupby("rank"):
            if settings["megabytes"].notna()[rank]:
                draw_seeds(panel, settings["megabytes"][rank], seeds["percent"], color)
        means = settings.assign(percent=own.groupby("rank")["percent"].mean()).dropna(subset="megabytes")
        points = means[means["front"].str.contains("size")].sort_values(["megabytes", "percent"])
        label = heading(board.tables[index], board.tables)
        (line,) = panel.plot(points["megabytes"], points["percent"], "o-", color=color, linewidth=1, label=label)
        line.set(markersize=9, markerfacecolor="none")
    panel.locator_params(axis="x", nbins=5)
    panel.set_xlabel("MB; ringed and joined: the Pareto front", color=INK)


def draw_key(panel: Axes, board: Board, runs: pd.DataFrame, key: str) -> None:
    """Draw values of one key in order; a line joins the means over settings that were run with every value."""
    plans = runs_of(board.tables)
    values = {canonical(planned_value(run, key)): planned_value(run, key) for run in plans}
    order = sorted(
        values, key=lambda text: (not is_number(values[text]), values[text] if is_number(values[text]) else 0)
    )
    place = [order.index(canonical(planned_value(run, key))) for run in plans]
    runs = runs.assign(place=place, rest=[other_settings(run, key) for run in plans])
    for index, (_, own) in enumerate(runs.groupby("table")):
        color, aside = COLORS[index % len(COLORS)], 0.12 * (index - (len(board.tables) - 1) / 2)
        for _, seeds in own.groupby("rank"):
            draw_seeds(panel, seeds["place"].iloc[0] + aside, seeds["percent"], color)
        means = own.pivot_table(index="rest", columns="place", values="percent").dropna().mean()
        panel.plot(means.index + aside, means, "-", color=color, linewidth=1)
    shown = [format_value(values[text]) for text in order]
    panel.set_xticks(range(len(order)), fit_labels(shown if len({*shown}) == len(order) else order, 200))  # "4" and 4
    panel.set_xlim(-0.5, len(order) - 0.5)
    panel.set_xlabel(key, color=INK)


def fit_labels(texts: Sequence[str], width: int) -> list[str]:
    """Return labels of a plot: at most two lines of ``width`` pixels, never two alike."""
    from lora_dag.core.labels import distinct
    from lora_dag.pages.lettering import Lettering

    letters = Lettering(round(10 * DPI / 72))
    return ["\n".join(lines) for lines in distinct(texts, lambda text: letters.wrap(text, width, 2), tuple)]


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def other_settings(run: Run, key: str) -> str:
    """Return the run's overrides without one key and the seed."""
    return canonical({name: value for name, value in run.overrides.items() if name not in (key, SEED)})


def draw_seeds(panel: Axes, x: float, percent: pd.Series, color: str) -> None:
    """A dot for each run, and a line from the lowest to the highest."""
    panel.plot([x] * len(percent), percent, "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
    panel.plot([x, x], [percent.min(), percent.max()], "-", color=color, linewidth=3, alpha=0.25)


def draw_contact(board: Board, path: Path) -> str:
    """Draw the first common prompt, else each run's first: a row per setting with its base and each seed.

    Returns:
        Text about omitted settings.
    """
    from lora_dag.pages.sheets import save_png, sheet

    tables = board.tables
    most = max(1, MAX_ROWS // len(tables))
    ranking = [(number, each) for table in tables for number, each in enumerate(table.ranking[:most], 1)]
    keys = [key for key in swept_keys(runs_of(tables)) if key != SEED]
    shared = shared_prompts([result.done for _, each in ranking for result in each.results])
    seeds = sorted({result.seed for _, each in ranking for result in each.results})
    rows: list[list[Image.Image | None]] = []
    for _, each in ranking:
        cells = {result.seed: cut_cells(result.done) for result in each.results}
        prompt = shared[0] if shared else each.results[0].done.prompts[0]
        base = next(iter(cells.values()))[prompt][0]
        rows.append([base, *(cells[seed][prompt][1] if seed in cells else None for seed in seeds)])
    labels = [", ".join(short_label(each, key) for key in keys) for _, each in ranking]
    heads = [f"({number}) " for number, _ in ranking]
    columns = ["base", *(f"seed {seed}" for seed in seeds)]
    title = f"{shared[0] if shared else 'The first prompt of each'} ({', '.join(keys) or 'one setting'})"
    side = math.isqrt(SHEET_PIXELS // (len(rows) * len(columns)))
    cell = max(MIN_CELL, min(side, *(row[0].width for row in rows if row[0])))
    save_png(path, sheet(rows, labels, columns, cell, title, row_heads=heads), max_bytes=SHEET_BYTES)
    left = sum(len(table.ranking[most:]) for table in tables)
    return f"Without {left} settings: the best {most} of each table are drawn." if left else ""


def short_label(standing: SettingResult, key: str) -> str:
    """Return ``rank 16``; for a long key only the value."""
    name, value = key.partition(".")[2], format_value(planned_value(standing.results[0].run, key)).removeprefix("data/")
    return f"{name} {value}" if len(name) <= SHORT_NAME else value.replace('"', "")
