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
from tests.helpers.errors import assert_line, refused
from tests.helpers.sources import png

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Stand-in for the Hub with one model."""

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


def test_a_killed_download_is_resumed(repository: Repository) -> None:
    repository.killed_after = 3
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(Path("data/pin.yaml"))
    repository.killed_after = None
    folder = hub.fetch(Path("data/pin.yaml"))
    assert (folder / "train/metadata.csv").exists()
    assert repository.calls == ["info", "download"] * 2


def edit(path: Path) -> None:
    """Write other bytes of the same number, with the same time."""
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
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert_line(messages, "snapshot-changed", "data/pin.yaml", "1 file ", "train/a.png")


def test_edited_files_are_deleted_before_the_download(repository: Repository) -> None:
    """The client takes a file with the time of the download for complete."""
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
    with refused("snapshot-extra-files", "data/pin.yaml: 1 file in ", str(folder), "acme/icons", "train/b.png"):
        hub.fetch(Path("data/pin.yaml"))


def test_damaged_marker_is_no_snapshot(repository: Repository) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    folder.with_name(f"{COMMIT}.json").write_text("[")
    hub.fetch(Path("data/pin.yaml"))
    assert repository.calls == ["info", "download"] * 2


def test_another_selection_of_files_is_another_snapshot(repository: Repository) -> None:
    everything = hub.fetch(Path("data/pin.yaml"))
    path = Path("data/pin.yaml")
    chosen = hub.fetch(path, pin=replace(hub.read_pin(path), files=("*.csv",)))
    assert chosen != everything
    assert [path.name for path in chosen.rglob("*.*")] == ["metadata.csv"]


def test_files_that_did_not_arrive(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: "")
    with refused("hub-incomplete", "data/pin.yaml: 3 files of acme/icons", "README.md"):
        hub.fetch(Path("data/pin.yaml"))


# Refused


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("hub: acme/icons\n", "pin-revision", ("revision: missing", "40 hex digits")),
        ("hub: acme/icons\nrevision: main\n", "pin-revision", ("revision: got 'main'", "40 hex digits")),
        ("hub: acme/icons\nrevision: v1.0\n", "pin-revision", ("revision: got 'v1.0'", "40 hex digits")),
        ("hub: acme/icons\nrevision: 0123abc\n", "pin-revision", ("revision: got '0123abc'", "40 hex digits")),
        (f"hub: acme/icons\nrevision: {'1' * 40}\n", "pin-revision", ("revision: got the number 1111", "quotes")),
        (f"hub: icons\nrevision: {COMMIT}\n", "pin-hub", ("hub: got 'icons'", "https://huggingface.co/")),
        (f"hub: ../icons\nrevision: {COMMIT}\n", "pin-hub", ("hub: got '../icons'", "owner/name")),
        (
            f"hub: acme/icons\nrevison: {COMMIT}\nrevision: {COMMIT}\n",
            "unknown-setting",
            ("revison: ", "Did you mean revision"),
        ),
    ],
)
def test_bad_pin(repository: Repository, text: str, code: str, values: tuple[str, ...]) -> None:
    with refused(code, f"data/pin.yaml {values[0]}", *values[1:]):
        hub.read_pin(pin(text))
    assert repository.calls == []


BOMB = "\n".join(["x0: &x0 [a, a]", *(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)), "files: *x39", ""])


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        (BOMB, "pin-alias", ("data/pin.yaml:2: ", "*x0")),
        ("x" * 70_000, "pin-too-large", ("data/pin.yaml: 70,000 bytes", "65,536")),
        (f"hub: {'x' * 9000}\nrevision: {COMMIT}", "pin-hub", (f"hub: got 'xxx{'x' * 116}...", "owner/name")),
    ],
    ids=["bomb", "large", "name"],
)
def test_pins_that_would_flood(repository: Repository, text: str, code: str, values: tuple[str, ...]) -> None:
    with refused(code, *values) as raised:
        hub.read_pin(pin(text))
    assert len(raised.value.problems[0]) < 400


def test_a_missing_revision_suggests_how_to_find_the_commit(repository: Repository) -> None:
    page, command = "https://huggingface.co/acme/icons/commits/main", "h.model_info('acme/icons').sha"
    with refused("pin-revision", page, command):
        hub.read_pin(pin("hub: acme/icons\n"))


def test_every_problem_of_a_pin_at_once(repository: Repository) -> None:
    assert len(problems(lambda: hub.read_pin(pin("repo: acme/icons\nrevision: main\n")))) == 3
    (problem,) = problems(lambda: hub.read_pin(pin("- hub")))
    assert problem.startswith("data/pin.yaml: ") and "got list" in problem
    with refused("pin-missing", "data/none.yaml", "hub and revision"):
        hub.read_pin(Path("data/none.yaml"))


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "code", "values"),
    [
        (
            errors.GatedRepoError("gated", response=response(403)),
            "hub-gated",
            ("data/pin.yaml hub: acme/icons", "https://huggingface.co/acme/icons", "`hf auth login`"),
        ),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            "hub-no-repository",
            ("data/pin.yaml hub: https://huggingface.co/acme/icons", "`hf auth login`"),
        ),
        (
            errors.RevisionNotFoundError("404", response=response(404)),
            "hub-no-revision",
            ("data/pin.yaml revision: acme/icons", COMMIT, "https://huggingface.co/acme/icons/commits/main"),
        ),
        (
            ConnectionError("name not known\nsecond line"),
            "hub-failed",
            ("data/pin.yaml: acme/icons", "(name not known)"),
        ),
        (errors.OfflineModeIsEnabled("offline mode"), "hub-failed", ("data/pin.yaml: acme/icons", "(offline mode)")),
    ],
)
def test_failures_of_the_hub(repository: Repository, error: Exception, code: str, values: tuple[str, ...]) -> None:
    repository.error = error
    with refused(code, *values):
        hub.fetch(Path("data/pin.yaml"))
    assert repository.calls == ["info"]


def test_a_full_disk_is_reported_as_such(repository: Repository) -> None:
    repository.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        hub.fetch(Path("data/pin.yaml"))


def test_no_file_matches(repository: Repository) -> None:
    path = Path("data/pin.yaml")
    available = "README.md, icons.py, train/a.png, train/metadata.csv"
    with refused("hub-no-match", "data/pin.yaml files: ", "['*.tar']", available):
        hub.fetch(path, pin=replace(hub.read_pin(path), files=("*.tar",)))


def test_marker_names_every_file(repository: Repository) -> None:
    folder = hub.fetch(Path("data/pin.yaml"))
    marker = json.loads(folder.with_name(f"{COMMIT}.json").read_text())
    assert sorted(marker) == ["README.md", "train/a.png", "train/metadata.csv"]
    assert marker["README.md"] == {"bytes": 7, "sha256": sha256_file(folder / "README.md")}
    shutil.rmtree(folder)
    hub.fetch(Path("data/pin.yaml"))
    assert (folder / "README.md").exists()
