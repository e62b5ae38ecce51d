"""A checkout as a run leaves it, without one: reports planted, and dvc.lock pinning them, code and parameters."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from lora_dag.artifacts import image_table, metrics
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.clone import PROJECT
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_json, write_text
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import Score
from lora_dag.pipeline.code import dvc_md5, is_code
from stages.validate import curve, neighbors
from tests.helpers import command
from tests.helpers.checkout import RESULTS, Checkout
from tests.helpers.workspace import REPOSITORY

PROMPTS = ["red apple", "blue boat"]
NUM_IMAGES, THRESHOLD, FAR = 8, 0.3, 0.8
Clone = Callable[[str], Path]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository with honest branches: main (rank 2), rank-4 (better), worse; and two better ones that hold out
    other images: overlapping has half of main's, disjoint none.
    """
    folder = tmp_path_factory.mktemp("published")
    (folder / "base").mkdir()
    (folder / "base/model_index.json").write_text("{}")
    checkout = Checkout(folder / "checkout", folder / "base")
    for name in ("requirements.lock", "pyproject.toml"):
        (checkout.path / name).write_bytes((REPOSITORY / name).read_bytes())
    shutil.copytree(REPOSITORY / ".github", checkout.path / ".github")
    checkout.set(validate__max_images=NUM_IMAGES, export__formats=["diffusers", "peft"])
    commit_run(checkout, 0.5)
    for branch, loss, rank, first in (
        ("rank-4", 0.4, 4, 0),
        ("worse", 0.6, 2, 0),
        ("overlapping", 0.4, 2, NUM_IMAGES // 2),
        ("disjoint", 0.4, 2, NUM_IMAGES),
    ):
        checkout.git("switch", "--quiet", "--create", branch, "main")
        checkout.set(lora__rank=rank)
        commit_run(checkout, loss, first)
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


def commit_run(checkout: Checkout, loss: float, first: int = 0) -> None:
    plant(checkout.path, loss, first)
    write_lock(checkout.path)
    checkout.commit(f"Held-out loss {loss}")


def plant(root: Path, loss: float, first: int = 0) -> None:
    """Every report that dvc.yaml lists, of an adapter whose held-out loss is about ``loss`` (the base's is 1).

    Args:
        first: number of the first held-out image.
    """
    for stage in read(root / "dvc.yaml")["stages"].values():
        for path in (path for path, cached in outputs(stage).items() if not cached):
            write_text(root / path, f"{path}\n")
    reports, params = root / "reports", read(root / "params.yaml")
    names = {"heldout": [f"h{first + i}.png" for i in range(NUM_IMAGES)]}
    names["train"] = [f"t{i}.png" for i in range(NUM_IMAGES)]
    plant_dataset(reports, names)
    measured = plant_losses(reports, names, loss, params["train"]["num_steps"])
    measured |= {"val.table": sha256_json(names)[:16], "drift.loss_change": 0.1, "drift.loss_change_low": 0.05}
    metrics.save(reports / "metrics.json", measured | plant_nearest(reports, params["validate"]["num_seeds"]))
    plant_training(reports, params["train"])
    exported = {f"export.{name}.max_abs_error": 1e-7 for name in params["export"]["formats"]}
    metrics.save(reports / "export/metrics.json", exported | {"export.rank_1.max_abs_error": 0.5})
    made = {"adapter": "ada97e5" + 57 * "0", "base": {"unet": "ba5e" + 60 * "0"}, "latents": "1a7e" + 60 * "0"}
    save_lineage(reports / "export/lineage.json", made)
    lineage = {
        "adapter": made["adapter"][:12],
        "base": {"unet": made["base"]["unet"][:12]},
        "dataset": {"content": sha256_json(names)[:12]},
        "latents": made["latents"][:12],
        "lora_config": {"exclude_modules": []},
        "model": {"dtype": "float32"},
        "neighbors": {"threshold": THRESHOLD, "far_threshold": FAR},
        "sheet": {"cell": 64, "image": [64, 64]},
        "table": {"num_train_timesteps": 1000},
        "validate": {"prompts": PROMPTS, "scales": [1.0], "seed": 0},
    }
    save_lineage(reports / "validate/lineage.json", lineage)
    few = ("val.loss", "val.loss_change", "val.best_step")
    metrics.save(reports / "headline.json", {name: measured[name] for name in few})
    for name in ("samples", "progress"):
        Image.new("RGB", (64, 64), (round(255 * loss), 0, 0)).save(reports / f"{name}.png")


def plant_dataset(reports: Path, names: dict[str, list[str]]) -> None:
    rows = [
        {"file_name": name, "split": split, "captions": "apple", "sha256": sha256_json(name)}
        for split in names
        for name in names[split]
    ]
    image_table.save(reports / "dataset/images.csv", rows)
    counts = {"num_images": len(rows), "num_train": NUM_IMAGES, "num_heldout": NUM_IMAGES, "num_left_out": 0}
    metrics.save(reports / "dataset/metrics.json", dict(counts))


def plant_losses(reports: Path, names: dict[str, list[str]], loss: float, num_steps: int) -> dict[str, Any]:
    """heldout.csv and curve.csv; their metrics."""
    scores = [
        Score(f"{name}-{t}", name, split, t, 1.0, round(loss + 0.001 * (index * t % 7), 6))
        for split in names
        for index, name in enumerate(names[split])
        for t in (100, 900)
    ]
    of = {
        split: [
            bootstrap.by_image((s.file_name, getattr(s, side)) for s in scores if s.split == split)
            for side in ("base", "adapter")
        ]
        for split in names
    }
    heldout, probe = (dict(zip((0, num_steps), of[split], strict=True)) for split in ("heldout", "train"))
    points = curve.make_curve(heldout, probe, seed=0)
    write_text(reports / "validate/heldout.csv", heldout_table.scores_to_csv(scores))
    write_text(reports / "validate/curve.csv", curve.to_csv(points))
    return {**heldout_table.loss_metrics(scores, 1000, seed=0), **curve.metrics(points)}


def plant_nearest(reports: Path, num_seeds: int) -> dict[str, Any]:
    """nearest.csv and its metrics: one sample of the adapter is a copy."""
    asked = [(prompt, seed) for seed in range(num_seeds) for prompt in PROMPTS]
    near = [round(0.2 + 0.25 * index, 6) for index in range(len(asked))]
    lines = [
        (*key, f"{distance:.6g}", "t0.png", int(distance < THRESHOLD), "0.9", "t1.png", 0)
        for key, distance in zip(asked, near, strict=True)
    ]
    write_text(reports / "validate/nearest.csv", heldout_table.csv_text(neighbors.FIELDS, lines))
    found = {"samples.copied_share": 1 / len(near), "samples.nearest_distance": float(np.median(near))}
    found["samples.far_share"] = float(np.mean([distance > FAR for distance in near]))
    return found | {"samples.copied_share_base": 0.0, "samples.nearest_distance_base": 0.9}


def plant_training(reports: Path, params: dict[str, Any]) -> None:
    num = params["num_steps"]
    rows = [f"{step},{1 / step:.6g},0.001,{0.1 * step:.6g}" for step in range(1, num + 1)]
    write_text(reports / "train/loss.csv", "\n".join(["step,loss,learning_rate,grad_norm", *rows]) + "\n")
    found = {
        "train.num_steps": num,
        "train.images_seen": num * params["batch_size"] * params["gradient_accumulation_steps"],
        "train.loss_final": float(np.mean([1 / step for step in range(1, num + 1)])),
        "train.grad_norm_max": 0.1 * num,
        "train.adapter_digest": "ada97e5" + 9 * "0",
    }
    metrics.save(reports / "train/metrics.json", found)


def write_lock(root: Path) -> None:
    """dvc.lock as a run of every stage leaves it: the digests of the files here, and invented ones of data."""
    params = read(root / "params.yaml")
    stages = {}
    for name, stage in read(root / "dvc.yaml")["stages"].items():
        deps = [re.sub(r"\$\{(\w+)\.(\w+)\}", lambda key: params[key[1]][key[2]], path) for path in stage["deps"]]
        stages[name] = {
            "cmd": stage["cmd"],
            "deps": [pin(root, path.removeprefix(PROJECT)) | {"path": path} for path in sorted(deps)],
            "params": {
                "params.yaml": {key: value(params, key) for key in stage["params"] if isinstance(key, str)},
                f"stages/{name}/__init__.py": {"RESULTS": RESULTS},
            },
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
        digest = dvc_md5(file) if file.is_dir() and is_code(path) else digest
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


def edit(path: str, old: str, new: str) -> None:
    """Replace a text in a file of the current folder."""
    text = Path(path).read_text(encoding="utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")


def gate_problems(*arguments: str) -> list[Problem]:
    """Return the problems with which `lora-dag gate` fails; empty if it passes."""
    try:
        command.run("gate", *arguments)
    except UserError as error:
        return list(error.problems)
    return []
