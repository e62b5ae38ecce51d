"""A checkout as a run leaves it, without one: reports planted, and dvc.lock pinning them, code and parameters."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML

from stages.artifacts import metrics, picture_table
from stages.artifacts.lineage import save as save_lineage
from stages.core import evaluation
from stages.core.evaluation import Score
from stages.core.files import write_text
from tests.checkout import Checkout
from tests.conftest import REPOSITORY

PROMPTS = ["red apple", "blue boat"]
Clone = Callable[[str], Path]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository with honest branches: main (rank 2), rank-4 (better), worse."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "base").mkdir()
    (folder / "base/model_index.json").write_text("{}")
    checkout = Checkout(folder / "checkout", folder / "base")
    for name in ("requirements.lock", "pyproject.toml"):
        (checkout.path / name).write_bytes((REPOSITORY / name).read_bytes())
    commit_run(checkout, 0.5)
    for branch, loss, rank in (("rank-4", 0.4, 4), ("worse", 0.6, 2)):
        checkout.git("switch", "--quiet", "--create", branch, "main")
        checkout.set(lora__rank=rank)
        commit_run(checkout, loss)
    checkout.git("clone", "--quiet", "--bare", ".", str(folder / "remote.git"))
    return folder / "remote.git"


@pytest.fixture
def clone(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """``clone(branch)``: a fresh clone without data, which becomes the current folder."""

    def make(branch: str) -> Path:
        git("clone", "--quiet", "--branch", branch, str(published), str(tmp_path / "clone"))
        monkeypatch.chdir(tmp_path / "clone")
        return tmp_path / "clone"

    return make


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit_run(checkout: Checkout, loss: float) -> None:
    plant(checkout.path, loss)
    write_lock(checkout.path)
    checkout.commit(f"Held-out loss {loss}")


def plant(root: Path, loss: float, table: str = "0123456789abcdef") -> None:
    """Every report that dvc.yaml lists, of an adapter whose held-out loss is about ``loss`` (the base's is 1)."""
    for stage in read(root / "dvc.yaml")["stages"].values():
        for path in (path for path, cached in outputs(stage).items() if not cached):
            write_text(root / path, f"{path}\n")
    reports = root / "reports"
    scores = [
        Score(f"{split}-{index}-{t}", f"{index}.png", split, t, 1.0, loss + 0.001 * (index * t % 7))
        for split in ("heldout", "train")
        for index in range(8)
        for t in (100, 900)
    ]
    write_text(reports / "validate/heldout.csv", evaluation.write_scores(scores))
    measured = evaluation.metrics(scores, 1000, seed=0)
    metrics.save(reports / "metrics.json", measured | {"val.table": table, "val.best_step": 4})
    metrics.save(reports / "train/metrics.json", {"train.num_steps": 4})
    exported = {f"export.{name}.max_abs_error": 1e-7 for name in ("diffusers", "peft")}
    metrics.save(reports / "export/metrics.json", exported | {"export.rank_1.max_abs_error": 0.5})
    lineage = {
        "base": {"unet": "a"},
        "dataset": {"content": "c"},
        "latents": "d",
        "lora_config": {"exclude_modules": []},
        "model": {"dtype": "float32"},
        "sheet": {"cell": 64, "picture": [64, 64]},
        "validate": {"prompts": PROMPTS, "scales": [1.0], "seed": 0},
    }
    save_lineage(reports / "validate/lineage.json", lineage)
    few = ("val.loss", "val.loss_change", "val.best_step")
    metrics.save(reports / "headline.json", {name: measured.get(name, 4) for name in few})
    row = {"file_name": "0.png", "split": "train", "captions": "apple", "sha256": "0" * 64}
    picture_table.save(reports / "dataset/pictures.csv", [row])
    for name in ("samples", "progress"):
        Image.new("RGB", (64, 64), (round(255 * loss), 0, 0)).save(reports / f"{name}.png")


def write_lock(root: Path) -> None:
    """dvc.lock as a run of every stage leaves it: the digests of the files here, and invented ones of data."""
    params = read(root / "params.yaml")
    stages = {}
    for name, stage in read(root / "dvc.yaml")["stages"].items():
        deps = [re.sub(r"\$\{(\w+)\.(\w+)\}", lambda key: params[key[1]][key[2]], path) for path in stage["deps"]]
        stages[name] = {
            "cmd": stage["cmd"],
            "deps": [pin(root, path) for path in sorted(deps)],
            "params": {"params.yaml": {key: value(params, key) for key in sorted(stage["params"])}},
            "outs": [pin(root, path) for path in sorted(outputs(stage))],
        }
    with (root / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)


def pin(root: Path, path: str) -> dict[str, Any]:
    file, pointer = root / path, root / f"{path}.dvc"
    if pointer.exists():
        digest = read(pointer)["outs"][0]["md5"]
    else:
        digest = hashlib.md5(file.read_bytes() if file.is_file() else path.encode()).hexdigest()
        digest += "" if file.is_file() else ".dir"
    return {"path": path, "hash": "md5", "md5": digest, "size": 1}


def outputs(stage: dict[str, Any]) -> dict[str, bool]:
    """Path -> whether DVC caches it."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    pairs = [next(iter(entry.items())) if isinstance(entry, dict) else (entry, {}) for entry in entries]
    return {path: options.get("cache", True) for path, options in pairs}


def value(params: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return params[section][name] if name else params[section]


def read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path)
