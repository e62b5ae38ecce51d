"""`lora-dag import owner/name`: a dataset of a local stand-in of the Hub (hub_server.py), at one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_dag import commands
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_file
from tests.helpers.errors import assert_are, assert_is
from tests.helpers.hub_server import Hub, Repository, serving
from tests.helpers.sources import captions, embedded, listed, png, splits, write_parquet

MINE = Path("data/mine")
NAME = "datasets/acme/icons"
FILE = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Path("data").mkdir()
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + FILE)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        files = {"README.md": b"# Icons", "icons.py": b"raise SystemExit"}
        for split in ("train", "test"):
            table = write_parquet(Path("made.parquet"), {"image": embedded(2), "text": ["one", "two"]})
            files[f"data/{split}-00000-of-00001.parquet"] = table.read_bytes()
        server.repositories[NAME] = Repository(False, files, card={"license": "cc-by-4.0"})
        yield server


def imported(source: str, *options: str) -> Path:
    args = commands.parse(["import", source, str(MINE), *options])
    args.main(args)
    return MINE


def problems(source: str, *options: str) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        imported(source, *options)
    assert not MINE.exists()
    return caught.value.problems


def images() -> dict[Path, bytes]:
    """All files but the provenance."""
    found = (path for path in MINE.rglob("*") if path.is_file() and path.name != "provenance.json")
    return {path.relative_to(MINE): path.read_bytes() for path in found}


def downloads(hub: Hub) -> list[str]:
    """Files that were requested."""
    return [line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]


@pytest.mark.parametrize("revision", ["", "@main", "@COMMIT"])
@pytest.mark.parametrize("start", ["", "https://huggingface.co/datasets/"])
def test_a_dataset_at_its_commit(hub: Hub, revision: str, start: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    commit = hub.repositories[NAME].sha
    imported(start + "acme/icons" + revision.replace("COMMIT", commit))
    listing = listed(MINE, heldout_fraction=None, heldout_split="test")
    assert captions(listing) == {f"{s}/{i}.png": (("one",), ("two",))[i] for s in ("test", "train") for i in range(2)}
    assert set(splits(listing).values()) == {"train", "test"}
    assert (MINE / "test/1.png").read_bytes() == png(1)
    found = json.loads((MINE / "provenance.json").read_text())
    assert (found["hub"], found["revision"], found["license"]) == ("acme/icons", commit, "cc-by-4.0")
    assert found["files"]["data/test-00000-of-00001.parquet"] == sha256_file(Path("made.parquet"))
    resolved = {"": "the default branch", "@main": "main"}.get(revision)
    said = [line for line in caplog.messages if line.startswith("revision")]
    assert said == ([f"revision    {resolved} of acme/icons is commit {commit}"] if resolved else [])
    assert "icons.py" not in downloads(hub)
    assert not Path("data/mine.partial").exists()


def test_the_same_bytes_as_from_a_folder(hub: Hub) -> None:
    imported("acme/icons")
    first = images()
    MINE.rename("data/first")
    for name, blob in hub.repositories[NAME].files.items():
        (Path("shards") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("shards") / name).write_bytes(blob)
    imported("shards")
    assert images() == first and len(first) == 6


def test_a_choice_of_files(hub: Hub) -> None:
    imported("acme/icons", "--files", "data/test-*")
    assert downloads(hub) == ["test-00000-of-00001.parquet"]
    assert sorted(path.name for path in MINE.iterdir()) == ["provenance.json", "test"]


def test_files_option_without_a_match(hub: Hub) -> None:
    files = "README.md, data/test-00000-of-00001.parquet, data/train-00000-of-00001.parquet, icons.py"
    assert_are(problems("acme/icons", "--files", "*.tar"), ("hub-no-match", "acme/icons", "*.tar", files))


def test_an_interrupted_download_resumes(hub: Hub) -> None:
    """Files that are whole are not requested again."""
    hub.lost = {"data/train-00000-of-00001.parquet"}
    (problem,) = problems("acme/icons")
    assert problem.count("acme/icons") == 1
    assert "test-00000-of-00001.parquet" in downloads(hub)
    hub.lost.clear()
    hub.requests.clear()
    imported("acme/icons")
    assert downloads(hub) == ["train-00000-of-00001.parquet"]
    assert (MINE / "train/1.png").read_bytes() == png(1)


def test_a_refusal_keeps_the_download_for_the_corrected_command(hub: Hub) -> None:
    problem = problems("acme/icons", "--caption-column", "caption")[0]
    assert_is(problem, "column-missing", "'caption'", "text (string)")
    hub.requests.clear()
    imported("acme/icons")
    assert downloads(hub) == []


def test_a_folder_of_images_is_copied(hub: Hub) -> None:
    files = {"train/a.png": png(0), "train/a.txt": b"a cat", "train/b.png": png(1), "train/b.txt": b"one\ntwo"}
    hub.repositories[NAME].files = {"README.md": b"# Icons", ".gitattributes": b"", **files}
    imported("acme/icons")
    assert captions(listed(MINE)) == {"train/a.png": ("a cat",), "train/b.png": ("one", "two")}
    there = {str(path.relative_to(MINE)) for path in MINE.rglob("*") if path.is_file()}
    assert there == {*files, "README.md", "provenance.json"}
    found = json.loads((MINE / "provenance.json").read_text())
    assert (found["hub"], found["revision"]) == ("acme/icons", hub.repositories[NAME].sha)


def test_missing_dataset_or_commit(hub: Hub) -> None:
    (problem,) = problems("acme/none")
    assert "https://huggingface.co/datasets/acme/none" in problem and "`hf auth login`" in problem
    commit = "12" * 20
    (problem,) = problems(f"acme/icons@{commit}")
    assert commit in problem and "https://huggingface.co/datasets/acme/icons/commits/main" in problem


def test_a_dataset_that_is_not_of_images(hub: Hub) -> None:
    hub.repositories[NAME].files = {"data.csv": b"a,b\n1,2\n"}
    assert_are(problems("acme/icons"), ("nothing-to-import", "acme/icons: ", "found data.csv"))
