"""Compare the runs of a sweep: which setting is better beyond the noise of images and seeds, and at what cost.

In: runs/, as written by `snakemake`, and the section sweep of params.yaml.
Out: reports/sweep/: leaderboard.md, leaderboard.csv, leaderboard.png, contact.png. Training times are measured, so
neither git nor DVC tracks the folder; the same runs give the same bytes.
Run: `lora-dag leaderboard [--set 'sweep.grid={lora.rank: [4, 8]}']`; `snakemake` does, after its last job.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_dag.commands.leaderboard.board import make_board, write_csv
from lora_dag.commands.leaderboard.images import draw_contact, draw_effects
from lora_dag.commands.leaderboard.page import heading, headline, write_page
from lora_dag.commands.leaderboard.ranking import rank
from lora_dag.commands.leaderboard.results import read_results
from lora_dag.core import params
from lora_dag.core.console import Problem, UserError, add_settings, log, plural
from lora_dag.core.files import replaced, write_text
from lora_dag.sweeps import grid

OUT = Path("reports/sweep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def main(args: argparse.Namespace) -> None:
    runs = grid.plan(params.read_with_overrides(args.params, args.overrides), args.params, args.overrides)
    if not any(Path(f"runs/{each.stage_folders['prepare']}").is_dir() for each in runs):
        text = f"runs/: the sweep in {args.params} has {plural(len(runs), 'run')}, and none has started."
        raise UserError(Problem("sweep-not-started", f"{text} Run `snakemake` first."))
    write_board(runs, OUT)


def write_board(runs: list[grid.Run], out: Path) -> None:
    """Rank finished runs, list the others, and write all files or none."""
    tables, unfinished = rank(read_results(runs))
    board = make_board(tables, unfinished)
    with replaced(out) as folder:
        images = {}
        if tables:
            for name, draw in (("leaderboard.png", draw_effects), ("contact.png", draw_contact)):
                images[folder / name] = draw(board, folder / name)
        write_text(folder / "leaderboard.csv", write_csv(board))
        write_text(folder / "leaderboard.md", write_page(board, images, folder))
    for each in tables:
        log.info("%s", heading(each, tables))
        log.info("  %s", headline(each).replace("**", ""))
    for result in unfinished:
        log.info("not finished: %s (%s)", result.run.name, result.reason)
    log.info("wrote       %s/leaderboard.md, leaderboard.csv%s", out, "".join(f", {path.name}" for path in images))
