"""A run's folder in the state directory: what was at work there, and whether its checkpoints may be used."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import UserError, log
from lora_dag.core.files import read_json, write_json
from stages.train.checkpoints import Checkpoints

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = "inputs.json"  # everything that decides the run's bytes
PROGRESS = "progress.json"
"""``codes``: digest of the code at each start since the run began. ``ended_at``: step of its last end, else null."""


def begin_run(folder: Path, code: str, num_steps: int) -> None:
    """Drop the checkpoints of a run that other code has ended: only what was broken off is worth to go on from.

    So an edited loss trains from the start, and a run that an error in a message broke off continues when it is mended.

    Args:
        code: digest of the code that runs, taken before this code was imported.
        num_steps: where a checkpoint stands at that step, no step is left for the code of now.
    """
    path = folder / PROGRESS
    before = read_json(path) if path.exists() else {}
    newest = Checkpoints(folder / "checkpoints").newest_step
    codes, ended_at = (before.get("codes", []), before.get("ended_at", 0)) if newest else ([], None)
    if codes and codes[-1] == code:
        return
    if newest >= min(num_steps, num_steps if ended_at is None else ended_at):
        log.info("starts over: the code of train has changed since this run ended")
        for name in ("checkpoints", "snapshots"):
            shutil.rmtree(folder / name, ignore_errors=True)
        codes, ended_at = [], None
    elif codes:
        log.warning(
            "warning: other code of train began this run, of the same RESULTS; if an edit changes what training gives, "
            "stop, and raise RESULTS in stages/train/__init__.py"
        )
    write_json(path, {"codes": [*codes, code], "ended_at": ended_at})


def end_run(folder: Path, step: int) -> None:
    """After the last step, for ``begin_run``: the code stays that of the start, whatever the disk holds by now."""
    write_json(folder / PROGRESS, read_json(folder / PROGRESS) | {"ended_at": step})


def codes_of(folder: Path) -> list[str]:
    """Digests of the code that made the run's steps: more than one, where it went on under edited code."""
    return list(dict.fromkeys(read_json(folder / PROGRESS)["codes"]))


def log_start_over(folder: Path, inputs: dict[str, Any]) -> None:
    """Say why a run of fewer or more steps, which is there, is no beginning of this one."""

    def but_steps(run: dict[str, Any]) -> dict[str, Any]:
        return run | {"train": {name: value for name, value in run["train"].items() if name != "num_steps"}}

    for path in sorted(folder.parent.glob(f"*/{INPUTS}")):
        with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):  # damaged, or of another version
            other = read_json(path)
            if path.parent != folder and "num_steps" in inputs["train"] and but_steps(other) == but_steps(inputs):
                schedule, steps = inputs["train"]["lr_scheduler"], other["train"]["num_steps"]
                line = "starts over: the %s schedule of %d steps has other rates; lr_scheduler constant would go on"
                log.info(line, schedule, steps)
