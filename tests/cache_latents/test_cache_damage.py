"""A killed run, damaged entries and shards, folders where files belong: only what is missing is encoded again."""

from __future__ import annotations

import itertools
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from lora_dag.artifacts import latent_cache
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.store import Store
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.locks import writing
from lora_dag.families import sd
from tests.helpers import forked
from tests.helpers.encodings import LATENTS, Calls, encode, from_empty_store
from tests.helpers.errors import assert_line, refused
from tests.helpers.workspace import Workspace, outcome


def kill_instead(owner: Any, name: str, left: int) -> None:
    """Kill this process at the call of ``owner.name`` after ``left`` other calls."""
    real, calls = getattr(owner, name), itertools.count()

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("owner", "name", "left", "missing"),
    [
        (Store, "save", 0, (8, 8)),
        (Store, "save", 5, (3, 8)),
        (Store, "save", 11, (0, 6)),  # 8 images, the empty caption and two others
        (latent_cache, "save_tensors", 2, (0, 0)),
        (latent_cache, "write_json", 0, (0, 0)),
    ],
)
def test_after_a_kill_only_missing_entries_are_encoded(
    workspace: Workspace, calls: Calls, owner: Any, name: str, left: int, missing: tuple[int, int]
) -> None:
    workspace.run("prepare")

    def run() -> None:
        kill_instead(owner, name, left)
        workspace.run("cache_latents")

    assert forked.exit_code(run) == -signal.SIGKILL
    with pytest.raises(UserError, match="data/latents/manifest.json.*`python -m stages.cache_latents`"):
        LatentCache(LATENTS)
    workspace.run("cache_latents")
    assert calls.take() == missing
    assert workspace.tree("data/latents") == from_empty_store(workspace)


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("damage", ["length", "header", "data", "cut", "empty"])
def test_damaged_entry_is_made_again(cached: Workspace, calls: Calls, kind: str, damage: str) -> None:
    before = cached.tree("data/latents")
    empty = LatentCache(LATENTS).manifest["captions"][""]
    entry = next(path for path in sorted(Path(f".state/store/{kind}").rglob("*.safetensors")) if path.stem != empty)
    blob = bytearray(entry.read_bytes())
    if damage in ("cut", "empty"):
        entry.write_bytes(blob[: len(blob) // 2 if damage == "cut" else 0])
    else:
        blob[{"length": 3, "header": 40, "data": -5}[damage]] ^= 0xFF
        entry.write_bytes(blob)
    lines = cached.run("cache_latents")
    assert sum(line.startswith("warning: ") and str(entry.resolve()) in line for line in lines) == 1
    assert calls.take() == ((1, 0) if kind == "latents" else (0, 1))
    assert any(line.startswith(f"{'images' if kind == 'latents' else 'captions':11} encoded 1, ") for line in lines)
    assert cached.tree("data/latents") == before


def test_swapped_entries_are_made_again(cached: Workspace, calls: Calls) -> None:
    before = cached.tree("data/latents")
    first, second = sorted(Path(".state/store/latents").rglob("*.safetensors"))[:2]
    aside = first.rename("aside")
    second.rename(first)
    aside.rename(second)
    lines = cached.run("cache_latents")
    for path in (first, second):
        assert any(line.startswith("warning: ") and str(path.resolve()) in line for line in lines)
    assert calls.take() == (2, 0)
    assert cached.tree("data/latents") == before


def test_a_second_run_on_the_same_folder_is_refused(cached: Workspace) -> None:
    before = cached.tree("data/latents")
    with writing(LATENTS), refused("folder-locked", "data/latents", f"process {os.getpid()}"):
        cached.run("cache_latents")
    assert cached.tree("data/latents") == before
    with writing(Path("runs/latents")):
        cached.run("cache_latents")


def test_a_folder_in_place_of_the_last_run_is_a_warning(cached: Workspace) -> None:
    path = Path(".state/store/last.json")
    path.unlink()
    path.mkdir()
    Path("reports/latents/metrics.json").unlink()
    lines = cached.run("cache_latents")
    assert_line("\n".join(lines), "last-run-not-recorded", f"{path.resolve()}: Is a directory")
    assert Path("reports/latents/metrics.json").exists() and lines[-3] == "images      encoded 0, reused 8"


def test_a_folder_in_place_of_an_entry_is_named(cached: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    entry = sorted(Path(".state/store/latents").rglob("*.safetensors"))[0]
    entry.unlink()
    entry.mkdir()
    assert_line(outcome(cached, "cache_latents", capsys), "path-occupied", f"{entry.resolve()}: Is a directory")


def test_damaged_entries_share_a_batch(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached.tree("data/latents")
    for entry in sorted(Path(".state/store/latents").rglob("*.safetensors"))[:3]:
        entry.write_bytes(entry.read_bytes()[:-1] + b"\x07")
    sizes: list[int] = []
    encode_images = sd.encode_images
    monkeypatch.setattr(sd, "encode_images", lambda vae, x: sizes.append(len(x)) or encode_images(vae, x))
    assert cached.run("cache_latents")[-3] == "images      encoded 3, reused 5"
    assert sizes == [4]
    assert cached.tree("data/latents") == before


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_shard_is_refused_and_filled_again(cached: Workspace, calls: Calls, cut: bool) -> None:
    before = cached.tree("data/latents")
    shard = sorted(LATENTS.rglob("*.safetensors"))[0]
    blob = bytearray(shard.read_bytes())
    blob[-1] ^= 1
    shard.write_bytes(blob[:-8] if cut else blob)
    with pytest.raises(UserError, match=f"{shard}.*`python -m stages.cache_latents`"):
        LatentCache(LATENTS)
    cached.run("cache_latents")
    assert calls.take() == (0, 0)
    assert cached.tree("data/latents") == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664)])
def test_files_can_be_read_by_the_group(workspace: Workspace, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        encode(workspace)
    finally:
        os.umask(before)
    written = [path for folder in (LATENTS, Path(".state")) for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8 + 9 + 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}


def test_stale_shards_are_removed(cached: Workspace) -> None:
    (LATENTS / "images/zz.safetensors").write_bytes(b"stale")
    (LATENTS / "old").mkdir()
    (LATENTS / "old/x").write_bytes(b"stale")
    cached.run("cache_latents")
    assert set(cached.tree("data/latents")) == {"manifest.json", *read_json(LATENTS / "manifest.json")["shards"]}
    assert not (LATENTS / "old").exists()
