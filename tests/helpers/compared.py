"""Revisions of a small repository, with reports but no pipeline behind them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dag.artifacts import image_table, metrics
from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.files import write_text
from lora_dag.evaluation import heldout_table
from lora_dag.evaluation.heldout_table import Score
from lora_dag.pages.sheets import save_png, sheet
from tests.helpers import command

PROMPTS = ["red apple", "blue boat"]
COLORS = {"base": "#cc2222", 8: "#22cc22", 16: "#2222cc"}
SCORES = Path("reports/validate/heldout.csv")
IMAGE_TABLE = Path("reports/dataset/images.csv")


def scores_of(gain: float, images: Sequence[str] = "01234567") -> list[Score]:
    """Two rows for each image of each split; the base's loss is 0.5, the adapter's lower by ``gain`` and a little."""
    return [
        Score(f"{split}-{name}-{t}", f"{name}.png", split, t, 0.5, 0.5 - gain - 0.001 * ord(name[0]) + 0.048)
        for split in ("heldout", "train")
        for name in images
        for t in (100, 900)
    ]


def write_revision(
    rank: int,
    gain: float,
    seed: int = 0,
    table: str = "0123456789abcdef",
    prompts: list[str] = PROMPTS,
    images: Sequence[str] = "01234567",
) -> None:
    """params.yaml and reports/ of an adapter of ``rank`` that is better than the base by ``gain``, in this folder."""
    text = f"lora:\n  rank: {rank}\n  alpha: null\ntrain:\n  seed: {seed}\nreport:\n  title: Rank {rank}\n"
    write_text(Path("params.yaml"), text)
    scores_to_csv(scores_of(gain, images), table)
    metrics.save(Path("reports/train/metrics.json"), {"train.num_trainable_parameters": 100 * rank})
    settings = {"prompts": prompts, "scales": [0.5, 1.0], "seed": 0, "num_timesteps": 2}
    lineage = {
        "base": {"unet": "a", "vae": "v", "scheduler": "s"},
        "dataset": {"content": "c"},
        "latents": "d",
        "model": {"dtype": "float32"},
        "sheet": {"cell": 64, "image": [64, 64]},
        "validate": settings,
    }
    save_lineage(Path("reports/validate/lineage.json"), lineage)
    columns = (COLORS["base"], "#888888", COLORS[rank])
    rows = [[Image.new("RGB", (64, 64), color) for color in columns] for _ in prompts]
    save_png(Path("reports/samples.png"), sheet(rows, prompts, ["base", "adapter x 0.5", "adapter"], 64))


def scores_to_csv(scores: Sequence[Score], table: str) -> None:
    write_text(SCORES, heldout_table.scores_to_csv(scores))
    measured = heldout_table.loss_metrics(scores, 1000, seed=0)
    metrics.save(Path("reports/metrics.json"), measured | {"val.table": table, "val.best_step": 4})


def change_lineage(**changes: Any) -> None:
    path = Path("reports/validate/lineage.json")
    save_lineage(path, load_lineage(path) | changes)


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    git("add", "-A")
    git("commit", "-q", "-m", message)
    return git("rev-parse", "HEAD")


@dataclass
class Repository:
    """main: rank 8 (tag start: without reports); experiment clear-newt: rank 16; workspace: as main."""

    run: Callable[..., str]

    def experiment(self, name: str, rank: int, gain: float, seed: int = 0) -> None:
        """An experiment of HEAD."""
        head = git("rev-parse", "HEAD")
        write_revision(rank, gain, seed)
        made = commit(name)
        git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", made)
        git("reset", "-q", "--hard", head)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    write_text(Path("params.yaml"), "lora:\n  rank: 8\n")
    commit("Start")
    git("tag", "start")
    write_revision(rank=8, gain=0.1)
    commit("Report rank 8")

    def run(*arguments: str) -> str:
        shutil.rmtree(tmp_path / "compare", ignore_errors=True)
        command.run("compare", *arguments)
        (page,) = tmp_path.glob("compare/*/compare.md")
        return page.read_text(encoding="utf-8")

    made = Repository(run)
    made.experiment("clear-newt", rank=16, gain=0.15)
    return made


def write_images(captions: dict[str, str], split: str = "train") -> None:
    """images.csv of red squares, named by their captions' keys."""
    rows = [
        {"file_name": f"{name}.png", "split": split, "captions": caption, "sha256": f"{ord(name):064x}"}
        for name, caption in captions.items()
    ]
    image_table.save(IMAGE_TABLE, rows)
