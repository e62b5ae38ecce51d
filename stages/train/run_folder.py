"""A run's folder in the state directory: what was at work there, and whether its checkpoints may be used."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

from lora_dag.core.code import code_digest
from lora_dag.core.console import UserError, log
from lora_dag.core.files import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = "inputs.json"  # everything that decides the run's bytes
PROGRESS = "progress.json"  # what code was at work there, and whether the run has ended


def begin_run(folder: Path) -> None:
    """Drop the checkpoints of a run that other code has ended: only what was broken off is worth to go on from.

    So an edited loss trains from the start, and a run that an error in a message broke off continues when it is mended.
    """
    path, code = folder / PROGRESS, code_digest("train")
    before = read_json(path) if path.exists() else {"code": code, "ended": False}
    if before["code"] != code and before["ended"]:
        log.info("starts over: the code of train has changed since this run ended")
        for name in ("checkpoints", "snapshots"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif before["code"] != code:
        log.warning(
            "warning: other code of train began this run, of the same RESULTS; if an edit changes what training gives, "
            "stop, and raise RESULTS in stages/train/__init__.py"
        )
    write_json(path, {"code": code, "ended": False})


def end_run(folder: Path) -> None:
    """After the last step, for ``begin_run``."""
    write_json(folder / PROGRESS, {"code": code_digest("train"), "ended": True})


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
