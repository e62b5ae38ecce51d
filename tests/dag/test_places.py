"""Every command in a folder of a bigger repository, in a worktree, a moved folder; blanks and letters beyond ASCII."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_dag.artifacts import metrics
from lora_dag.commands.compare.command import read_revisions
from lora_dag.commands.verify import find_revision
from lora_dag.core.console import Problem, UserError
from stages.report import last_commit
from tests.helpers import command
from tests.helpers.checkout import Checkout
from tests.helpers.planted import NUM_IMAGES, git, plant, write_lock

PROJECT = "проекты 1/lora [dag]"
QUOTED = "%D0%BF%D1%80%D0%BE%D0%B5%D0%BA%D1%82%D1%8B%201/lora%20%5Bdag%5D"
DIGESTS = ("1" * 64, "ada97e5" + "0" * 57)  # the second is the planted one
ADDRESS = "https://github.com/o/r"


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a project of its own at the top, and this one below it: two commits, rank 2 and 4."""
    folder = tmp_path_factory.mktemp("grosses Archiv é")
    (folder / "base").mkdir()
    (folder / "base/model_index.json").write_text("{}")
    root = folder / "dépôt"
    checkout = Checkout(root / PROJECT, folder / "base", root)
    checkout.set(validate__max_images=NUM_IMAGES, export__formats=["diffusers", "peft"])
    for name, rank, loss in (("2", 2, 0.5), ("4", 4, 0.4)):
        checkout.set(lora__rank=rank)
        plant(checkout.path, loss)
        path = checkout.path / "reports/train/metrics.json"
        metrics.save(path, metrics.load(path) | {"train.adapter_digest": DIGESTS[rank == 4][:16]})
        write_lock(checkout.path)
        for other in ("reports/train/metrics.json", "dvc.lock", "params.yaml", "reports/dataset/images.csv"):
            (root / other).parent.mkdir(parents=True, exist_ok=True)
            (root / other).write_text(f"the other project, {name}")
        checkout.git("-C", str(root), "add", "--all")
        checkout.git("commit", "--quiet", "--message", f"rank {rank}")
    return root


def worktree(top: Path, place: Path) -> None:
    git("-C", str(top), "worktree", "add", "--quiet", "--detach", str(place))


def cloned(top: Path, place: Path) -> None:
    git("clone", "--quiet", str(top), str(place))


def moved(top: Path, place: Path) -> None:
    git("clone", "--quiet", str(top), str(place.with_name("first")))
    shutil.move(place.with_name("first"), place)


@pytest.fixture(params=[cloned, worktree, moved])
def here(request: pytest.FixtureRequest, top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    request.param(top, tmp_path / "un lieu à part")
    monkeypatch.chdir(tmp_path / "un lieu à part" / PROJECT)
    return Path()


def problems(*words: str) -> tuple[Problem, ...]:
    try:
        command.run(*words)
    except UserError as error:
        return error.problems
    return ()


def test_the_gate_judges_this_project_and_links_its_images(here: Path) -> None:
    words = ("--against", "HEAD~1", "--repository", ADDRESS, "--out", "page.md")
    assert problems("gate", *words) == ()
    page, head = Path("page.md").read_text(encoding="utf-8"), git("rev-parse", "HEAD")
    assert page.startswith("# Experiment: passed") and "| lora.rank | 2 | 4 |" in page
    assert f"![]({ADDRESS}/blob/{head}/{QUOTED}/reports/samples.png?raw=true)" in page
    Path("reports/metrics.json").unlink()
    assert [each for each in problems("gate") if each.code == "report-missing" and "reports/metrics.json" in each]


def test_compare_and_explain_read_this_project_s_revisions(here: Path) -> None:
    assert [side.params["lora.rank"] for side in read_revisions(["HEAD~1", "HEAD", "workspace"])] == [2, 4, 4]
    assert problems("explain", "HEAD~1", "HEAD") == ()


def test_what_was_committed_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By verify, and the report's line."""
    assert [find_revision(digest) for digest in DIGESTS] == [git("rev-parse", name) for name in ("HEAD~1", "HEAD")]
    assert last_commit.committed(Path("reports/metrics.json")) == Path("reports/metrics.json").read_bytes()
