"""Data that nobody else can get is named, and the store of the demo takes nothing else: asked of DVC itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from base import bundle
from lora_dag.pipeline.sharing import REMEDY, UNTRACKED, unshared_data
from tests.helpers.errors import refused
from tests.helpers.planted import git
from tests.helpers.workspace import REPOSITORY


def dvc(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This repository's way with DVC, and a demo of two small files in its store."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=main")
    assert dvc("init", "--quiet").returncode == 0
    shutil.copy(REPOSITORY / ".dvc/config", ".dvc/config")
    shutil.copy(REPOSITORY / ".gitignore", ".gitignore")
    Path("data").mkdir()
    add("raw", "the demo's images")
    pin("raw")
    cache = Path(".dvc/cache")
    bundle.fill(Path(".dvc/store"), cache, [digest("raw")])
    git("add", "--all")
    git("commit", "--quiet", "--message", "The demo")
    return tmp_path


def add(name: str, text: str) -> None:
    Path(f"data/{name}").mkdir(exist_ok=True)
    Path(f"data/{name}/a.txt").write_text(text)
    assert dvc("add", f"data/{name}").returncode == 0
    git("add", "data")


def pin(name: str) -> None:
    with Path(f"data/{name}.dvc").open("a") as file:
        file.write("  remote: bundled\n  push: false\n")


def digest(name: str) -> str:
    return bundle.read_yaml(Path(f"data/{name}.dvc"))["outs"][0]["md5"]


def test_the_demo_is_shared(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unshared_data() == []
    clone = project.parent / f"{project.name}-clone"
    git("clone", "--quiet", str(project), str(clone))
    monkeypatch.chdir(clone)
    assert dvc("pull").returncode == 0
    assert Path("data/raw/a.txt").read_text() == "the demo's images"


def test_a_dataset_that_nothing_tracks_is_named(project: Path) -> None:
    Path("data/foxes").mkdir()
    Path("data/foxes/a.txt").write_text("a fox")
    assert unshared_data(["data/raw", "data/foxes", str(project.parent)]) == [
        f"data/foxes: {UNTRACKED.format('data/foxes')}"
    ]
    assert dvc("add", "data/foxes").returncode == 0
    assert unshared_data(["data/foxes"]) == [
        f"data/foxes.dvc: others cannot download this data: no DVC remote is set. {REMEDY}"
    ]
    Path("data/model.yaml").write_text("hub: owner/name")
    git("add", "data/model.yaml")
    assert len(unshared_data(["data/model.yaml", "data/foxes/sub"])) == 1  # git has the first, DVC the second


def test_own_data_without_a_remote_is_reported_and_never_pushed_into_the_store(project: Path) -> None:
    add("mine", "mine")
    add("rex", "rex")
    assert unshared_data() == [
        f"data/mine.dvc, data/rex.dvc: others cannot download this data: no DVC remote is set. {REMEDY}"
    ]
    refused = dvc("push")
    assert refused.returncode != 0 and "no remote specified" in refused.stderr
    assert git("status", "--porcelain", ".dvc") == ""
    assert dvc("remote", "add", "--default", "ours", str(project.parent / f"{project.name}-ours")).returncode == 0
    assert unshared_data() == [] and dvc("push").returncode == 0
    assert git("status", "--porcelain", ".dvc/store") == ""
    assert len(list((project.parent / f"{project.name}-ours").rglob("*.dir"))) == 2


def test_a_remote_inside_of_the_clone_shares_nothing(project: Path) -> None:
    add("mine", "mine")
    dvc("remote", "default", "bundled")
    (line,) = unshared_data()
    assert line.code == "data-not-shared"
    reason = "others cannot download this data: the remote 'bundled' is a folder of this clone"
    assert line == f"data/mine.dvc: {reason}. {REMEDY}"
    dvc("push")
    assert ".dvc/store" in git("status", "--porcelain", "--untracked-files=all")  # to be seen
    assert unshared_data() == [line]


def test_an_edited_demo_dataset_counts_as_own_data(project: Path) -> None:
    add("raw", "other images")
    (line,) = unshared_data()
    assert line.startswith("data/raw.dvc: ") and line.endswith(REMEDY)
    assert all(part in line for part in ("`push: false`", "'bundled'", "the lines `remote:` and `push:`"))
    assert dvc("push").returncode != 0 and git("status", "--porcelain", ".dvc/store") == ""


def test_without_dvc_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert unshared_data() == []


def test_the_store_holds_the_demo_and_nothing_else(project: Path) -> None:
    store, cache = Path(".dvc/store"), Path(".dvc/cache")
    add("raw", "new images")
    bundle.fill(store, cache, [digest("raw")])
    assert sorted(path.stat().st_size for path in store.rglob("*") if path.is_file()) == sorted(
        path.stat().st_size for path in cache_files(digest("raw"))
    )
    shutil.rmtree(cache)
    bundle.fill(store, cache, [digest("raw")])  # what is there needs no cache
    before = sorted(store.rglob("*"))
    with refused("cache-incomplete", "1 objects", "`dvc repro`"):
        bundle.fill(store, cache, ["0" * 32])
    assert sorted(store.rglob("*")) == before


def cache_files(folder: str) -> list[Path]:
    import json

    listing = Path(".dvc/cache/files/md5", folder[:2], folder[2:])
    return [listing, *(listing.parents[1] / e["md5"][:2] / e["md5"][2:] for e in json.loads(listing.read_bytes()))]


# The committed demo


def test_what_dvc_lock_makes_is_in_the_store() -> None:
    """After a new dvc.lock: `python -m base.bundle`."""
    lock = bundle.read_yaml(REPOSITORY / "dvc.lock")["stages"]
    made = [bundle.demo_output(out) for stage in lock.values() for out in bundle.cached(stage)]
    assert bundle.read_yaml(REPOSITORY / bundle.DEMO)["outs"] == made


def test_a_fresh_clone_pulls_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, base and the results of the committed run, with no remote but the one that comes with the clone."""
    if "core.remote" in dvc("config", "--list").stdout:
        pytest.skip("a remote of your own holds the data")
    git("clone", "--quiet", f"file://{REPOSITORY}", str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    done = dvc("pull")
    assert done.returncode == 0, done.stderr
    assert dvc("status", "--json").stdout.strip() == "{}"
    assert git("status", "--porcelain") == ""
    assert Path("data/adapter/adapter.safetensors").is_file() and Path("data/export/diffusers").is_dir()
