"""What reruns after a change, and what going back restores: DVC itself, on stages that take a moment.

tests/dag/test_pipeline.py tests the same with the real stages, and tests/dag/test_snakefile.py with Snakemake.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.changes import AFTER_TRAIN, CHANGES
from tests.helpers.checkout import Checkout, ran
from tests.helpers.planted import outputs, read
from tests.helpers.stubbed import ALL, Stubbed, make_stubbed
from tests.helpers.workspace import REPOSITORY, make_image


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Stubbed:
    """Tests that change it put it back."""
    return make_stubbed(tmp_path_factory.mktemp("reruns"), tiny_base)


@pytest.fixture(autouse=True)
def put_back(stubbed: Stubbed) -> Iterator[None]:
    yield
    stubbed.git("checkout", "--quiet", "params.yaml")


def planned(checkout: Checkout) -> set[str]:
    """The stages that DVC finds changed, and those that read what these write."""
    found = ran(checkout.dvc("repro", "--dry"))
    written: set[str] = set()
    for name, stage in read(checkout.path / "dvc.yaml")["stages"].items():  # in the order of running
        if name in found or written & set(stage["deps"]):
            found.add(name)
            written |= set(outputs(stage))
    return found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *CHANGES,
        ({"cache__batch_size": 3}, ALL - {"prepare"}),
        ({"dataset__source": "data/other"}, ALL),
        ({"sweep__grid": {"lora.rank": [2, 4]}}, set()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_dvc_status_lists_only_the_stages_that_a_change_affects(
    stubbed: Stubbed, change: dict[str, Any], expected: set[str]
) -> None:
    stubbed.set(**change)
    assert planned(stubbed) == expected


def test_training_reruns_for_another_rank_and_going_back_restores(stubbed: Stubbed) -> None:
    adapter = stubbed.path / "data/adapter/stub.txt"
    before = adapter.read_text()
    assert stubbed.repro(lora__rank=4) == AFTER_TRAIN
    assert adapter.read_text() != before
    stubbed.git("checkout", "--quiet", "params.yaml")
    assert ran(stubbed.dvc("repro")) <= {"report"}  # it writes to git alone
    assert adapter.read_text() == before and stubbed.git("status", "--porcelain") == ""


def test_an_edited_image_reruns_everything_and_putting_it_back_nothing(stubbed: Stubbed) -> None:
    path = stubbed.path / "data/raw/00.png"
    original = path.read_bytes()
    path.unlink()
    make_image(100).save(path)
    assert planned(stubbed) == ALL
    path.unlink()
    path.write_bytes(original)
    assert planned(stubbed) == set()
    stubbed.git("checkout", "--quiet", "--", "data")
    assert stubbed.git("status", "--porcelain") == ""


def test_after_a_new_lock_one_command_restores_a_fresh_clone(stubbed: Stubbed) -> None:
    """``python -m base.bundle``: plain `dvc pull`, `dvc status`, `dvc exp apply` succeed, and `dvc push` refuses."""
    released, clone = copy.copy(stubbed), copy.copy(stubbed)
    released.path, clone.path = stubbed.path.with_name("released"), stubbed.path.with_name("clone")
    shutil.copytree(stubbed.path, released.path, symlinks=True)
    shutil.copy(REPOSITORY / ".dvc/config", released.path / ".dvc/config")
    for name in ("raw", "other", "base"):
        with (released.path / f"data/{name}.dvc").open("a") as file:
            file.write("  remote: bundled\n  push: false\n")
    with (released.path / "data/.gitignore").open("a") as file:
        file.write("/demo\n")
    released.run("env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "base.bundle")
    released.commit("A new lock")

    released.run("git", "clone", "--quiet", str(released.path), str(clone.path))
    clone.dvc("pull")
    assert "Data and pipelines are up to date." in clone.dvc("status")
    for name in ("prepared", "latents", "adapter", "export"):
        own, kept = (clone.path / folder / name / "stub.txt" for folder in ("data", "data/demo"))
        assert own.read_text() == kept.read_text()
    assert ran(clone.dvc("repro")) == set()
    clone.dvc("exp", "run", "--temp", "--name", "rank-4", "-S", "lora.rank=4")
    assert "have been applied" in clone.dvc("exp", "apply", "rank-4")
    assert clone.run(sys.executable, "-m", "dvc", "push", check=False).returncode != 0
    assert clone.git("status", "--porcelain", ".dvc") == ""
