"""The runs of a sweep side by side: which setting is better, beyond the noise of pictures and seeds, and what it costs.

In: runs/, as `snakemake` left it; the plan is that of params.yaml's section sweep.
Out: reports/sweep/{leaderboard.md,leaderboard.csv,leaderboard.png,contact.png}. Training times are measured, so neither
git nor DVC tracks the folder; the same runs give the same bytes.
Run: `lora-dag leaderboard [--set 'sweep.grid={lora.rank: [4, 8]}']`; `snakemake` does, after its last job.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_dag.commands.leaderboard.board import make_board, write_csv
from lora_dag.commands.leaderboard.page import heading, headline, write_page
from lora_dag.commands.leaderboard.pictures import draw_contact, draw_effects
from lora_dag.commands.leaderboard.ranking import rank
from lora_dag.commands.leaderboard.results import read_results
from lora_dag.core import params
from lora_dag.core.console import UserError, add_settings, log, plural
from lora_dag.core.files import replaced, write_text
from lora_dag.sweeps import grid

OUT = Path("reports/sweep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def main(args: argparse.Namespace) -> None:
    runs = grid.plan(params.overridden(args.params, args.overrides), args.params)
    if not any(Path(f"runs/{each.places['prepare']}").is_dir() for each in runs):
        raise UserError(
            f"runs/: none of the sweep's {plural(len(runs), 'run')} ({args.params}) has begun; run `snakemake` first"
        )
    write_board(runs, OUT)


def write_board(runs: list[grid.Run], out: Path) -> None:
    """Rank what is finished, list what is not, and write all of it, or nothing."""
    tables, unfinished = rank(read_results(runs))
    board = make_board(tables, unfinished)
    with replaced(out) as folder:
        pictures = {}
        if tables:
            for name, draw in (("leaderboard.png", draw_effects), ("contact.png", draw_contact)):
                pictures[folder / name] = draw(board, folder / name)
        write_text(folder / "leaderboard.csv", write_csv(board))
        write_text(folder / "leaderboard.md", write_page(board, pictures, folder))
    for each in tables:
        log.info("%s", heading(each, tables))
        log.info("  %s", headline(each).replace("**", ""))
    for result in unfinished:
        log.info("not finished: %s (%s)", result.run.name, result.reason)
    log.info("wrote       %s/leaderboard.md, leaderboard.csv%s", out, "".join(f", {path.name}" for path in pictures))
