"""A folder with params.yaml, a tiny base and small images, where stages and commands run offline in this process."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from lora_dag.core import console

REPOSITORY = Path(__file__).resolve().parents[2]
Images = Callable[..., Path]
"""The fixture ``images``."""
TINY: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "dataset": {"resolution": 32, "heldout_fraction": 0.25, "near_duplicate_bits": None},
    "cache": {"batch_size": 4},
    "lora": {"rank": 2, "alpha": 2},
    "train": {
        "num_steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 1,
        "checkpoint_every_n_steps": 2,
        "snapshot_every_n_steps": 2,
    },
    "validate": {
        "num_timesteps": 2,
        "max_images": 4,
        "batch_size": 4,
        "prompts": ["red apple", "blue boat"],
        "num_inference_steps": 2,
        "num_seeds": 2,
        "scales": [1.0],
        "drift_prompts": ["red apple", "green circle"],
    },
    "export": {"name": "ink-icons", "prompt": "red apple, ink icon", "datasets": None},
    "report": {"title": "Ink icons"},
    "runtime": {"device": "cpu", "num_threads": 1, "num_processes": 1, "num_machines": 1, "log_every_n_steps": 1},
}


@dataclass
class Workspace:
    """A folder with params.yaml, data/base and data/raw, which is the current directory."""

    path: Path
    call: Callable[..., list[str]]

    def run(self, stage: str, *argv: str) -> list[str]:
        """The ``main`` of a stage or a command in this process; its log lines."""
        return self.call(stage, *argv)

    def process(self, stage: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``python -m stages.NAME`` as a person would start it, or a command of ``lora-dag``."""
        words = [f"stages.{stage}"] if is_stage(stage) else ["tests.helpers.command", stage]
        return subprocess.run(
            [sys.executable, "-m", *words, *argv], cwd=self.path, capture_output=True, text=True, **options
        )

    def tree(self, folder: str) -> dict[str, bytes]:
        """Every file below a folder: relative name -> bytes."""
        root = self.path / folder
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run_stage(stage: str, *argv: str) -> None:
    """``python -m stages.STAGE ARGV`` in this process."""
    forget_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage, *argv])
        importlib.import_module(f"stages.{stage}.__main__").main()


def is_stage(name: str) -> bool:
    return (REPOSITORY / "stages" / name).is_dir()


def forget_precision() -> None:
    """Accelerate keeps the precision of its first use for the whole process; a stage has a process of its own."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


def outcome(workspace: Workspace, stage: str, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the stage is refused with; empty where it came to its end."""
    capsys.readouterr()
    try:
        console.run(lambda: workspace.run(stage, *argv) and None)
    except SystemExit as ended:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert ended.code == 2 and len(lines) == 1, lines
        return lines[0]
    return ""


def write_params(path: Path, changes: dict[str, dict[str, Any]]) -> None:
    """The repository's params.yaml with some values changed."""
    yaml = YAML()
    tree = yaml.load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for section, values in changes.items():
        tree[section].update(values)
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def make_image(index: int, width: int = 48, height: int | None = None) -> Image.Image:
    """A colored ramp with a disc, another one for each index."""
    height = height or width
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 37 * index % 256)], axis=-1)
    center = (13 * index % width, 7 * index % height)
    array[(x - center[0]) ** 2 + (y - center[1]) ** 2 < (width // 4) ** 2] = (20 * index % 256, 0, 90)
    return Image.fromarray(array.astype(np.uint8))


def write_rows(folder: Path, rows: list[Any]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
