"""Fixtures that many tests need; those of one theme are in tests/helpers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from lora_dag.core.params import FAMILIES
from tests.helpers import command
from tests.helpers.checkout import reproduced, tiny_checkout  # noqa: F401
from tests.helpers.compared import repository  # noqa: F401
from tests.helpers.encodings import cached, calls, masked  # noqa: F401
from tests.helpers.planted import clone, published  # noqa: F401
from tests.helpers.sources import here  # noqa: F401
from tests.helpers.trainings import encoded, interrupt, mixed, reference  # noqa: F401
from tests.helpers.workspace import (
    REPOSITORY,
    TINY,
    Images,
    Workspace,
    forget_precision,
    is_stage,
    make_image,
    run_stage,
    write_params,
    write_rows,
)

pytest_plugins = ("tests.helpers.unit_tier",)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random StableDiffusionPipeline of 0.3 M parameters in the diffusers layout; pixels in multiples of 8."""
    from tests.helpers import families

    return families.save("sd", tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a tiny random base of its pipeline class."""
    from tests.helpers import families

    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_base if name == "sd" else families.save(name, folder / name) for name in FAMILIES}


@pytest.fixture
def images() -> Images:
    """``images(folder, count=8)`` writes an imagefolder of distinct PNGs, captions and metadata.jsonl."""

    def make(folder: Path, count: int = 8, size: int = 48) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            make_image(index, size).save(folder / f"{index:02}.png")
        write_rows(folder, [{"file_name": f"{index:02}.png", "text": f"thing {index}"} for index in range(count)])
        return folder

    return make


@pytest.fixture
def workspace(
    tmp_path: Path,
    tiny_base: Path,
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Workspace:
    write_params(tmp_path / "params.yaml", TINY)
    images(tmp_path / "data" / "raw")
    (tmp_path / "data" / "base").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    caplog.set_level(logging.INFO, logger="lora-dag")

    def call(stage: str, *argv: str) -> list[str]:
        caplog.clear()
        if is_stage(stage):
            run_stage(stage, *argv)
        else:
            forget_precision()
            command.run(stage, *argv)
        return [record.getMessage() for record in caplog.records if record.name == "lora-dag"]

    return Workspace(tmp_path, call)
