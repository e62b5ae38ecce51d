"""Artifacts that were edited by hand, cut off or written by another version are one line, not a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.adapter import Adapter
from stages.artifacts.latent_cache import LatentCache
from stages.artifacts.manifest import Manifest
from stages.core.console import UserError
from tests.conftest import Workspace

STAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "data/prepared/manifest.jsonl": ("prepare", Manifest.load),
    "data/latents/manifest.json": ("cache_latents", LatentCache),
    "data/adapter/adapter.json": ("train", Adapter.load),
}


@pytest.mark.parametrize("text", ["{}", "[]", "", "{", "null", '{"items": [{"file_name": "a.png"}]}'])
@pytest.mark.parametrize("name", STAGES)
def test_content_of_another_shape_names_the_stage_that_writes_it(tmp_path: Path, name: str, text: str) -> None:
    stage, load = STAGES[name]
    path = tmp_path / Path(name).name
    path.write_text(text)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{path.name}: (edited by hand|damaged)") as caught:
        load(tmp_path)
    assert f"stages.{stage}" in str(caught.value) or "dvc repro" in str(caught.value)


def test_a_cache_without_a_caption_that_training_needs_is_refused_at_once(workspace: Workspace) -> None:
    workspace.run("prepare")
    workspace.run("cache_latents")
    path = Path("data/latents/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["captions"][""]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="edited by hand"):
        LatentCache(path.parent)


def test_prepared_without_its_second_file_is_refused(workspace: Workspace) -> None:
    workspace.run("prepare")
    Path("data/prepared/dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json: no such file; run `python -m stages\.prepare`"):
        Manifest.load(Path("data/prepared"))
