from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from lora_dag.bases import hub
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_file
from tests.helpers.sources import png

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A stand-in for the Hub that holds one model."""

    files: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    error: Exception | None = None
    killed_after: int | None = None
    """Files."""

    def model_info(self, repo_id: str, revision: str) -> Any:
        self.calls.append("info")
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repo_id: str, *, local_dir: Path, **options: Any) -> str:
        self.calls.append("download")
        assert (repo_id, options["repo_type"], options["revision"]) == ("acme/icons", "model", COMMIT)
        patterns = options["allow_patterns"] or ["*"]
        for index, (name, blob) in enumerate(self.files.items()):
            if self.killed_after == index:
                raise KeyboardInterrupt
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and not name.endswith(".py"):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(blob)
        return str(local_dir)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / "state"))
    made = Repository({"README.md": b"# Icons", "icons.py": b"raise SystemExit", "train/a.png": png(0)})
    made.files["train/metadata.csv"] = b"file_name,text\na.png,a cat\n"
    monkeypatch.setattr(huggingface_hub, "model_info", made.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    pin(f"hub: acme/icons\nrevision: {COMMIT}\n")
    return made


def pin(text: str) -> Path:
    Path("data").mkdir(exist_ok=True)
    Path("data/pin.yaml").write_text(text)
    return Path("data/pin.yaml")


def problems(call: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def test_snapshot_is_fetched_once(repository: Repository) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    assert folder == Path("state").resolve() / "hub" / "models" / "acme--icons" / COMMIT
    assert sorted(path.name for path in folder.rglob("*.*")) == ["README.md", "a.png", "metadata.csv"]
    repository.error = ConnectionError("no network")
    assert hub.fetch(Path("data/pin.yaml")) == folder
    assert repository.calls == ["info", "download"]


def test_killed_download_goes_on(repository: Repository) -> None:
    repository.killed_after = 3
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(Path("data/pin.yaml"))
    repository.killed_after = None
    folder = hub.fetch(Path("data/pin.yaml"))
    assert (folder / "train/metadata.csv").exists()
    assert repository.calls == ["info", "download"] * 2


def edit(path: Path) -> None:
    """Other bytes of the same number, and the same time."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"x"), edit])
def test_lost_and_edited_files_are_fetched_again(
    repository: Repository, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    spoil(folder / "train/a.png")
    assert (hub.fetch(Path("data/pin.yaml")) / "train/a.png").read_bytes() == png(0)
    assert (
        "warning: the snapshot of data/pin.yaml has 1 file that was changed or lost since the download, such as"
        " train/a.png; fetching again"
    ) in caplog.text


def test_the_client_does_not_find_what_was_edited(repository: Repository) -> None:
    """It would take a file for whole whose time is that of the download."""
    folder = hub.fetch(Path("data/pin.yaml"))
    edit(folder / "train/a.png")
    repository.error = ConnectionError("no network")
    problems(lambda: hub.fetch(Path("data/pin.yaml")))
    assert not (folder / "train/a.png").exists()


def test_files_put_into_a_snapshot_are_no_part_of_the_commit(repository: Repository) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/x").write_bytes(b"the client's")
    assert hub.fetch(Path("data/pin.yaml")) == folder
    (folder / "train/b.png").write_bytes(png(1))
    (problem,) = problems(lambda: hub.fetch(Path("data/pin.yaml")))
    assert problem.startswith("data/pin.yaml: 1 file in ") and problem.endswith(
        " is none of acme/icons, such as train/b.png; move them to a folder of your own"
    )


def test_damaged_marker_is_no_snapshot(repository: Repository) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    folder.with_name(f"{COMMIT}.json").write_text("[")
    hub.fetch(Path("data/pin.yaml"))
    assert repository.calls == ["info", "download"] * 2


def test_another_choice_of_files_is_another_snapshot(repository: Repository) -> None:
    everything = hub.fetch(Path("data/pin.yaml"))
    path = Path("data/pin.yaml")
    chosen = hub.fetch(path, pin=replace(hub.read_pin(path), files=("*.csv",)))
    assert chosen != everything
    assert [path.name for path in chosen.rglob("*.*")] == ["metadata.csv"]


def test_files_that_did_not_arrive(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: "")
    assert problems(lambda: hub.fetch(Path("data/pin.yaml"))) == [
        "data/pin.yaml: 3 files of acme/icons did not arrive, such as README.md; run again"
    ]


# Refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub: acme/icons\n", "revision: missing; expected a commit of 40 hex digits, since what a branch, a tag or"),
        ("hub: acme/icons\nrevision: main\n", "revision: got 'main'; expected a commit of 40 hex digits"),
        ("hub: acme/icons\nrevision: v1.0\n", "revision: got 'v1.0'; expected a commit of 40 hex digits"),
        ("hub: acme/icons\nrevision: 0123abc\n", "revision: got '0123abc'; expected a commit of 40 hex digits"),
        (f"hub: acme/icons\nrevision: {'1' * 40}\n", f"revision: got the number {'1' * 40}; put the commit in quotes"),
        (f"hub: icons\nrevision: {COMMIT}\n", "hub: got 'icons'; expected owner/name, as in https://huggingface.co/"),
        (f"hub: ../icons\nrevision: {COMMIT}\n", "hub: got '../icons'; expected owner/name"),
        (f"hub: acme/icons\nrevison: {COMMIT}\nrevision: {COMMIT}\n", "revison: unknown key (near: revision)"),
    ],
)
def test_bad_pin(repository: Repository, text: str, message: str) -> None:
    (problem,) = problems(lambda: hub.read_pin(pin(text)))
    assert problem.startswith(f"data/pin.yaml {message}")
    assert repository.calls == []


BOMB = "\n".join(["x0: &x0 [a, a]", *(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)), "files: *x39", ""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "data/pin.yaml:2: an alias (*x0); write the value itself"),
        ("x" * 70_000, "data/pin.yaml: 70,000 bytes; a file that pins a model has at most 65,536"),
        (f"hub: {'x' * 9000}\nrevision: {COMMIT}", f"data/pin.yaml hub: got 'xxx{'x' * 116}...; expected owner/name"),
    ],
    ids=["bomb", "large", "name"],
)
def test_pins_that_would_flood(repository: Repository, text: str, message: str) -> None:
    (problem,) = problems(lambda: hub.read_pin(pin(text)))
    assert problem.startswith(message) and len(problem) < 400


def test_the_refusal_says_how_to_find_the_commit(repository: Repository) -> None:
    (problem,) = problems(lambda: hub.read_pin(pin("hub: acme/icons\n")))
    assert "no run could be repeated" in problem
    assert "https://huggingface.co/acme/icons/commits/main" in problem
    assert "h.model_info('acme/icons').sha" in problem


def test_every_problem_of_a_pin_at_once(repository: Repository) -> None:
    assert len(problems(lambda: hub.read_pin(pin("repo: acme/icons\nrevision: main\n")))) == 3
    assert problems(lambda: hub.read_pin(pin("- hub"))) == ["data/pin.yaml: expected a mapping of sections, got list"]
    (problem,) = problems(lambda: hub.read_pin(Path("data/none.yaml")))
    assert problem == "data/none.yaml: no such file; expected a YAML file with the keys hub and revision"


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("gated", response=response(403)),
            "data/pin.yaml hub: acme/icons is gated; accept its terms at https://huggingface.co/acme/icons and"
            " run `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            "data/pin.yaml hub: no model https://huggingface.co/acme/icons; check the name, or run"
            " `hf auth login` if it is private",
        ),
        (
            errors.RevisionNotFoundError("404", response=response(404)),
            f"data/pin.yaml revision: acme/icons has no commit {COMMIT}; see"
            " https://huggingface.co/acme/icons/commits/main",
        ),
        (
            ConnectionError("name not known\nsecond line"),
            "data/pin.yaml: acme/icons cannot be downloaded (name not known); run again, it goes on from there",
        ),
        (
            errors.OfflineModeIsEnabled("offline mode"),
            "data/pin.yaml: acme/icons cannot be downloaded (offline mode); run again, it goes on from there",
        ),
    ],
)
def test_the_hub_does_not_give_it(repository: Repository, error: Exception, message: str) -> None:
    repository.error = error
    assert problems(lambda: hub.fetch(Path("data/pin.yaml"))) == [message]
    assert repository.calls == ["info"]


def test_a_full_disk_is_told_as_one(repository: Repository) -> None:
    repository.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        hub.fetch(Path("data/pin.yaml"))


def test_no_file_matches(repository: Repository) -> None:
    path = Path("data/pin.yaml")
    assert problems(lambda: hub.fetch(path, pin=replace(hub.read_pin(path), files=("*.tar",)))) == [
        "data/pin.yaml files: no file of acme/icons matches ['*.tar']; it has README.md, icons.py, train/a.png,"
        " train/metadata.csv"
    ]


def test_marker_names_every_file(repository: Repository) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    marker = json.loads(folder.with_name(f"{COMMIT}.json").read_text())
    assert sorted(marker) == ["README.md", "train/a.png", "train/metadata.csv"]
    assert marker["README.md"] == {"bytes": 7, "sha256": sha256_file(folder / "README.md")}
    shutil.rmtree(folder)
    hub.fetch(Path("data/pin.yaml"))
    assert (folder / "README.md").exists()
