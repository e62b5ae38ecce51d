"""The first line of a stage: its number, and the reason by dvc.lock."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest

from lora_dag.core import stage_start
from lora_dag.core.console import PATHS
from lora_dag.core.params import Config, load
from lora_dag.pipeline.code import dvc_md5
from tests.helpers.workspace import REPOSITORY, Workspace

RAW = "da0ab1a9f47940ef4b48f49fd4f12f7c.dir"
PREPARED = "0123456789abcdef0123456789abcdef.dir"


@pytest.fixture
def config(workspace: Workspace) -> Config:
    """The workspace's settings; the folder looks like a project that ran all of prepare and train once."""
    Path("dvc.yaml").touch()
    config = load(Path("params.yaml"))
    lock(config, "8")
    Path("lora_dag/core").mkdir(parents=True)
    return config


def lock(config: Config, rank: str) -> None:
    """Write a dvc.lock with two stages whose last run had this rank."""
    code = Path("stages/train")
    code.mkdir(parents=True, exist_ok=True)
    (code / "a.py").write_text("a = 1\n")
    lora = "".join(
        f"          {key}: {rank if key == 'rank' else json.dumps(value)}\n"
        for key, value in config.tree["lora"].items()
    )
    Path("dvc.lock").write_text(
        f"""schema: '2.0'
stages:
  prepare:
    cmd: python -m stages.prepare
    deps:
    - path: data/raw
      hash: md5
      md5: {RAW}
      size: 1
      nfiles: {sum(path.is_file() for path in Path("data/raw").rglob("*"))}
    params:
      params.yaml:
        dataset.source: data/raw
    outs:
    - path: data/prepared
      hash: md5
      md5: {PREPARED}
      size: 5
      nfiles: 2
  train:
    cmd: python -m stages.train
    deps:
    - path: data/prepared
      hash: md5
      md5: {PREPARED}
      size: 5
      nfiles: 2
    - path: stages/train
      hash: md5
      md5: {dvc_md5(code)}
      size: 6
      nfiles: 1
    params:
      params.yaml:
        lora:
{lora}    outs:
    - path: data/adapter
      hash: md5
      md5: {RAW}
"""
    )


def reason(stage: str, config: Config, **folders: Path) -> str:
    return stage_start.describe(stage, config, argparse.Namespace(params=config.source, **folders))


def test_reason_is_what_differs_from_the_last_run(config: Config) -> None:
    rank = config.tree["lora"]["rank"]
    lock(config, str(rank))
    assert reason("train", config) == reason("prepare", config) == ""
    lock(config, "64")
    assert reason("train", config) == f"lora.rank 64 -> {rank}"
    Path("stages/train/b.py").write_text("b = 1\n")
    assert reason("train", config) == f"lora.rank 64 -> {rank}; code changed: stages/train"


def test_first_run(config: Config) -> None:
    assert reason("validate", config) == "first run"
    Path("dvc.lock").unlink()
    assert reason("train", config) == "first run"


def test_input_that_the_stage_before_has_written_anew(config: Config) -> None:
    lock(config, str(config.tree["lora"]["rank"]))
    text = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(text.replace(PREPARED, RAW, 1))
    assert reason("train", config) == "data/prepared changed"


def test_images_were_added(config: Config) -> None:
    count = sum(path.is_file() for path in Path("data/raw").rglob("*"))
    Path("data/raw/new.png").touch()
    assert reason("prepare", config) == f"data/raw has {count + 1} files, {count} before"
    Path("data/raw.dvc").write_text(f"outs:\n- md5: {PREPARED}\n  path: raw\n")
    assert reason("prepare", config) == "data/raw changed"


def test_run_of_a_sweep_names_its_folder(config: Config) -> None:
    adapter = Path("runs/raw/rank-16-s0/adapter")
    assert reason("train", config, latents=Path("runs/raw/latents"), adapter=adapter) == f"writes {adapter}"
    assert reason("train", config, adapter=Path(PATHS["adapter"])) != f"writes {adapter}"


@pytest.mark.parametrize(
    "content", ["", "stages:\n", "stages:\n  train:\n    deps: [\n", "\x00", "stages:\n  train:\n    5\n"]
)
def test_damaged_lock_never_stops_a_stage(config: Config, content: str, caplog: pytest.LogCaptureFixture) -> None:
    Path("dvc.lock").write_text(content)
    caplog.clear()
    stage_start.log_stage_start("train", config, argparse.Namespace())
    (line,) = (record.getMessage() for record in caplog.records)
    assert line in ("[3/6] train", "[3/6] train: first run")


def test_digest_is_that_of_dvc() -> None:
    for name in ("lora_dag/core", "lora_dag/__init__.py", "stages/train"):
        assert stage_start.digest(REPOSITORY / name) == dvc_md5(REPOSITORY / name)


def test_reason_takes_less_than_50_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load(Path("params.yaml"))
    stage_start.describe("report", config, argparse.Namespace())  # imports
    best = min(timed(config) for _ in range(5))
    assert best < 0.05


def timed(config: Config) -> float:
    start = time.process_time()
    assert "first run" not in stage_start.describe("report", config, argparse.Namespace())
    return time.process_time() - start
