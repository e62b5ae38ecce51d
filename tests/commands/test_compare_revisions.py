"""Names of revisions: experiments, branches, what is near, and where there is no repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_dag.commands.compare import revisions
from lora_dag.commands.compare.command import folder_name
from lora_dag.core.console import UserError
from tests.helpers import command
from tests.helpers.compared import Repository, git
from tests.helpers.errors import refused


def test_a_shallow_clone_is_named(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("shallow")
    git("clone", "-q", "--depth", "1", Path.cwd().as_uri(), str(folder / "clone"))
    monkeypatch.chdir(folder / "clone")
    with refused("unknown-revision", "'HEAD~1'", "`git fetch --unshallow`"):
        revisions.find_commit("HEAD~1")


@pytest.mark.parametrize(
    ("name", "code", "value"),
    [
        ("clear-nwt", "unknown-revision", "(near: clear-newt)"),
        ("mian", "unknown-revision", "(near: main"),
        ("xyzzy", "unknown-revision", "(known: "),  # no name is near
        ("start", "revision-incomplete", "reports/metrics.json, reports/validate/heldout.csv, "),
    ],
)
def test_compare_rejects_a_revision_without_reports_or_a_wrong_name(
    repository: Repository, name: str, code: str, value: str
) -> None:
    with refused(code, name, value):
        repository.run(name)
    assert not Path("compare").exists()


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError) as error:
        command.run("compare")
    assert error.value.codes[0] == "not-a-repository"


def test_one_name_for_experiments_of_two_commits(repository: Repository) -> None:
    other, experiment = git("rev-parse", "start"), git("rev-parse", "main")
    git("update-ref", f"refs/exps/{other[:2]}/{other[2:]}/clear-newt", experiment)
    assert revisions.find_commit("clear-newt") != experiment  # HEAD's own
    git("checkout", "-q", "--detach", revisions.find_commit("clear-newt"))
    with refused("revision-ambiguous", "'clear-newt'", "2 commits"):
        revisions.find_commit("clear-newt")


def test_names_alike_have_folders_of_their_own() -> None:
    found = [folder_name(["main", name]) for name in ("try-a", "try/a", "try~a")]
    assert found[0] == "main..try-a" and len(set(found)) == 3
    assert all(re.fullmatch(r"main\.\.try-a-[0-9a-f]{6}", name) for name in found[1:])
