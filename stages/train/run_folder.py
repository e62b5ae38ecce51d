"""Run folder in the state directory: record of the code that ran, and whether its checkpoints can be used."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import UserError, log, warn
from lora_dag.core.files import read_json, write_json
from stages.train.checkpoints import Checkpoints

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = "inputs.json"  # all inputs that determine the result
PROGRESS = "progress.json"
"""``codes``: digest of the code at each start of the run. ``ended_at``: step where it last finished, else null."""


def begin_run(folder: Path, code: str, num_steps: int) -> None:
    """Delete the checkpoints of a run that finished with other code; keep the checkpoints of an interrupted run.

    So an edited loss trains from step 0, and a run that stopped at an error in a message resumes after the fix.

    Args:
        code: digest of the running code, computed before this code was imported.
        num_steps: steps of the run; after a checkpoint of that step the current code would train nothing.
    """
    path = folder / PROGRESS
    before = read_json(path) if path.exists() else {}
    newest = Checkpoints(folder / "checkpoints").newest_step
    codes, ended_at = (before.get("codes", []), before.get("ended_at", 0)) if newest else ([], None)
    if codes and codes[-1] == code:
        return
    if newest >= min(num_steps, num_steps if ended_at is None else ended_at):
        log.info("restart     from step 0: the code of train has changed since this run finished")
        for name in ("checkpoints", "snapshots"):
            shutil.rmtree(folder / name, ignore_errors=True)
        codes, ended_at = [], None
    elif codes:
        warn(
            "code-changed",
            "the code of train has changed since this run started. If the edit changes results, stop and raise RESULTS "
            "in stages/train/__init__.py.",
        )
    write_json(path, {"codes": [*codes, code], "ended_at": ended_at})


def end_run(folder: Path, step: int) -> None:
    """Record the last step for ``begin_run``. The code digest stays the one of the start."""
    write_json(folder / PROGRESS, read_json(folder / PROGRESS) | {"ended_at": step})


def code_digests(folder: Path) -> list[str]:
    """Return the digests of the code that ran; several if the run was resumed with edited code."""
    return list(dict.fromkeys(read_json(folder / PROGRESS)["codes"]))


def log_start_over(folder: Path, inputs: dict[str, Any]) -> None:
    """Log the reason why a run that differs only in num_steps cannot be resumed."""

    def without_steps(run: dict[str, Any]) -> dict[str, Any]:
        return run | {"train": {name: value for name, value in run["train"].items() if name != "num_steps"}}

    for path in sorted(folder.parent.glob(f"*/{INPUTS}")):
        with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):  # damaged, or from another version
            other = read_json(path)
            if (
                path.parent != folder
                and "num_steps" in inputs["train"]
                and without_steps(other) == without_steps(inputs)
            ):
                schedule, steps = inputs["train"]["lr_scheduler"], other["train"]["num_steps"]
                reason = f"the {schedule} schedule of the finished run over {steps} steps has different learning rates"
                log.info("restart     from step 0: %s. Use lr_scheduler: constant to extend runs.", reason)
