"""``cache_latents --gc``: what a commit can bring back stays, all else is freed."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dag.artifacts.store import Store
from lora_dag.core.console import UserError
from tests.conftest import Workspace, picture

DVC_YAML = "stages:\n  cache_latents:\n    cmd: python -m stages.cache_latents\n    outs: [data/latents]\n"
SIZES = {"A": 24, "B": 40, "C": 48}
"""Versions differ in resolution: eight other latents each, and the same captions."""


def git(*words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    return subprocess.run(("git", *identity, *words), check=True, capture_output=True, text=True).stdout.strip()


def dvc(*words: str) -> None:
    subprocess.run((sys.executable, "-m", "dvc", *words), check=True, capture_output=True)


class Repository:
    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.store = Store()

    def make(self, version: str) -> None:
        """data/latents of that version, in the workspace alone."""
        words = ("--set", f"dataset.resolution={SIZES[version]}")
        self.workspace.run("prepare", *words)
        self.workspace.run("cache_latents", *words)

    def commit(self, version: str) -> None:
        self.make(version)
        dvc("commit", "--quiet", "--force", "cache_latents")
        git("add", "dvc.yaml", "dvc.lock")
        git("commit", "--quiet", "--message", version)

    def clear(self) -> None:
        """A workspace without data/latents."""
        shutil.rmtree("data/latents")

    def collect(self, *argv: str) -> str:
        """Under parameters with which nothing was encoded, unless ``argv`` says otherwise."""
        return self.workspace.run("cache_latents", "--gc", "--set", "cache.batch_size=3", *argv)[-1]

    def num_entries(self) -> int:
        return len(list(self.store.entries()))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of git and DVC without any version."""
    folder = tmp_path_factory.mktemp("versions") / "started"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        git("init", "--quiet", "--initial-branch=main")
        dvc("init", "--quiet")
        Path("dvc.yaml").write_text(DVC_YAML)
        git("add", ".dvc", "dvc.yaml")
        git("commit", "--quiet", "--message", "start")
    return folder


@pytest.fixture
def repository(workspace: Workspace, started: Path) -> Repository:
    shutil.copytree(started, workspace.path, dirs_exist_ok=True)
    return Repository(workspace)


@pytest.fixture
def committed(repository: Repository, started: Path) -> Repository:
    """With version A, which the first to ask makes for all."""
    made = started.with_name("A")
    if made.exists():
        shutil.copytree(made, ".", dirs_exist_ok=True)
    else:
        repository.commit("A")
        shutil.copytree(".", made, ignore=shutil.ignore_patterns("raw", "base"))
    return repository


def freed(line: str) -> tuple[str, int, int]:
    """``freed`` or ``would free``, and the two numbers of entries."""
    found = re.fullmatch(r"(freed|would free) (\d+\.\d) MB: (\d+) of (\d+) entries", line)
    assert found, line
    return found[1], int(found[3]), int(found[4])


def test_what_no_commit_uses_is_freed_and_the_rest_stays(committed: Repository) -> None:
    committed.make("B")
    committed.commit("C")
    committed.clear()
    assert committed.num_entries() == 3 * 8 + 9
    assert freed(committed.collect("--dry-run")) == ("would free", 8, 33)
    assert committed.num_entries() == 33
    assert freed(committed.collect()) == ("freed", 8, 33)
    assert freed(committed.collect()) == ("freed", 0, 25)
    for version, encoded in (("A", 0), ("C", 0), ("B", 8)):
        before = committed.num_entries()
        committed.make(version)
        assert committed.num_entries() - before == encoded


@pytest.mark.parametrize("kept_by", ["branch", "tag", "remote", "stash", "older stash", "experiment", "detached", None])
def test_every_kind_of_ref_keeps_its_entries(committed: Repository, kept_by: str | None) -> None:
    start = git("rev-parse", "HEAD~")
    if kept_by == "detached":
        git("checkout", "--quiet", "--detach")
        git("branch", "--force", "main", start)
    elif kept_by in ("stash", "older stash"):
        git("reset", "--quiet", "--soft", start)
        git("stash", "--quiet")
        if kept_by == "older stash":
            Path("dvc.yaml").write_text(DVC_YAML + "# newer\n")
            git("stash", "--quiet")
    else:
        refs = {
            "branch": "refs/heads/other",
            "tag": "refs/tags/v1",
            "remote": "refs/remotes/origin/main",
            "experiment": "refs/exps/ab/cdef/wise-owl",
        }
        if kept_by:
            git("update-ref", refs[kept_by], "HEAD")
        git("reset", "--quiet", "--hard", start)
    committed.clear()
    assert freed(committed.collect()) == ("freed", 0 if kept_by else 17, 17)


@pytest.mark.parametrize(
    "folder", ["data/latents", "runs/raw/latents-num_variants-2", ".dvc/tmp/exps/standalone/tmp1/data/latents"]
)
def test_folders_at_work_keep_their_entries(repository: Repository, folder: str) -> None:
    repository.make("A")
    if folder != "data/latents":
        shutil.copytree("data/latents", folder)
        shutil.rmtree("data/latents")
    assert freed(repository.collect()) == ("freed", 0, 17)


def test_the_present_parameters_keep_their_entries(repository: Repository) -> None:
    repository.make("A")
    repository.clear()
    assert freed(repository.collect("--set", "cache.batch_size=4")) == ("freed", 0, 17)
    assert freed(repository.collect()) == ("freed", 17, 17)


@pytest.mark.parametrize("changes", [("cache.batch_size=2",), ("cache.batch_size=1", "cache.tiling=true")])
def test_what_a_killed_run_encoded_where_memory_was_short_stays(
    repository: Repository, changes: tuple[str, ...]
) -> None:
    """The next run with batches of 4 falls back to the same."""
    repository.make("A")
    repository.workspace.run("cache_latents", *(word for change in changes for word in ("--set", change)))
    repository.clear()
    assert repository.num_entries() == 2 * 17
    assert freed(repository.collect("--set", "cache.batch_size=4")) == ("freed", 0, 34)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--prepared", "nowhere"), "nowhere/manifest.jsonl: no such file; run `python -m stages.prepare` first"),
        (("--set", "cache.batch_size=0"), "params.yaml cache.batch_size"),
        (("--set", "runtime.device=mps"), "params.yaml runtime.device: 'mps' is not available here"),
    ],
)
def test_what_the_present_parameters_use_must_be_known(
    repository: Repository, argv: tuple[str, ...], expected: str
) -> None:
    repository.make("A")
    repository.clear()
    with pytest.raises(UserError) as caught:
        repository.collect(*argv)
    (problem,) = caught.value.problems
    assert problem.startswith(expected)
    assert problem.endswith("; until then it cannot be known which entries the present parameters use; or pass --force")
    assert repository.num_entries() == 17
    assert freed(repository.collect(*argv, "--force")) == ("freed", 17, 17)


def thumbnails() -> set[str]:
    return {path.stem for path in Path(".state/store/thumbnails").glob("*/*")}


def test_thumbnails_of_pictures_that_no_version_names_are_freed(repository: Repository) -> None:
    def edit(seed: int) -> str:
        """Another picture 05.png; its digest."""
        picture(seed).save("data/raw/05.png")
        repository.make("A")
        return hashlib.sha256(Path("data/raw/05.png").read_bytes()).hexdigest()

    committed = edit(50)
    git("add", "--force", "reports/dataset/pictures.csv")
    git("commit", "--quiet", "--message", "pictures")
    forgotten, present = edit(51), edit(52)
    before = thumbnails()
    assert {committed, forgotten, present} <= before and len(before) == 10
    lines = repository.workspace.run("cache_latents", "--gc", "--dry-run")
    assert any(re.fullmatch(r"would free \d+\.\d MB: 1 of 10 thumbnails", line) for line in lines)
    assert thumbnails() == before
    repository.collect()
    assert thumbnails() == before - {forgotten}


def test_leftovers_of_killed_writes_are_freed(repository: Repository) -> None:
    repository.make("A")
    leftover = next(Path(".state/store/latents").iterdir()) / ".abc.safetensors.x1"
    leftover.write_bytes(bytes(2_000_000))
    assert repository.collect() == "freed 2.0 MB: 0 of 17 entries"
    assert not leftover.exists()


def test_versions_that_are_not_here_keep_nothing(committed: Repository) -> None:
    """As in a fresh clone, which fetches no other commit's data for this; what is here stays."""
    committed.commit("B")
    present = Path("dvc.lock").read_text()
    committed.commit("C")
    committed.clear()
    kept = re.findall(r"md5: (\w{32})\.dir", present)
    cache = Path(".dvc/cache/files/md5")
    for path in list(cache.rglob("*.dir")):
        if f"{path.parent.name}{path.stem}" not in kept:
            path.unlink()
    lines = committed.workspace.run("cache_latents", "--gc", "--set", "cache.batch_size=3")
    assert re.fullmatch(
        r"note: 2 committed versions of data/latents are not in DVC's cache \(\w{8}, \w{8}\): the entries that only "
        r"such versions use are freed too, and a run encodes them again when they are needed; "
        r"`dvc fetch --all-commits cache_latents` keeps what a remote has",
        lines[0],
    )
    assert freed(lines[-1]) == ("freed", 16, 33)  # the latents of two versions; captions are those of the third


def test_a_lock_file_that_cannot_be_read_stops_it(committed: Repository) -> None:
    lock = Path("dvc.lock")
    lock.write_text(re.sub(r"md5: \w+\.dir", "<<<<<<< HEAD", lock.read_text()))
    git("commit", "--quiet", "--all", "--message", "conflict")
    with pytest.raises(UserError, match=r"1 committed dvc.lock \(blob \w{8}\) cannot be read: .* pass --force"):
        committed.collect()


def stopped(repository: Repository, *expected: str) -> None:
    """Each line is one of the problems, and there is no other; with --force, there is none."""
    with pytest.raises(UserError) as caught:
        repository.collect()
    assert len(caught.value.problems) == len(expected), caught.value.problems
    for problem, pattern in zip(caught.value.problems, expected, strict=True):
        assert re.fullmatch(pattern, problem), problem


def commit_lock(blob: bytes) -> None:
    Path("dvc.lock").write_bytes(blob)
    git("commit", "--quiet", "--all", "--message", "lock")


def test_a_path_in_quotes_is_the_same_path(committed: Repository) -> None:
    lock = Path("dvc.lock").read_bytes().replace(b"path: data/latents", b'path: "data/latents"')
    git("reset", "--quiet", "--soft", "HEAD~")
    commit_lock(lock)
    committed.clear()
    assert freed(committed.collect()) == ("freed", 0, 17)


@pytest.mark.parametrize(
    "added", [b"# \xff\n", b"[", b"stages: 3\n", b"", b"stages:\n  a:\n    outs: [data/latents]\n"]
)
def test_a_lock_file_of_another_shape_stops_it(committed: Repository, added: bytes) -> None:
    commit_lock(Path("dvc.lock").read_bytes() + added if added.startswith(b"#") else added)
    committed.clear()
    stopped(committed, r"1 committed dvc\.lock \(blob \w{8}\) cannot be read: .*; pass --force to free them")
    assert freed(committed.collect("--force")) == ("freed", 0, 17)  # the commit before it can be read


@pytest.mark.parametrize("content", ["garbage", "1" * 40])
def test_a_broken_ref_stops_it(committed: Repository, content: str) -> None:
    Path(".git/refs/heads/broken").write_text(content + "\n")
    committed.clear()
    stopped(committed, r"git: .*refs/heads/broken.*: what was committed there cannot be known; .* pass --force .*")
    assert freed(committed.collect("--force")) == ("freed", 0, 17)


@pytest.mark.parametrize("missing", ["HEAD^{tree}", "HEAD:dvc.lock"])
def test_missing_objects_stop_it(committed: Repository, missing: str) -> None:
    committed.commit("B")
    committed.clear()
    digest = git("rev-parse", missing)
    (Path(".git/objects") / digest[:2] / digest[2:]).unlink()
    stopped(committed, r"git: .*: what was committed there cannot be known; run `git fsck`, or pass --force to free it")
    assert freed(committed.collect("--force")) == ("freed", 8, 25)


@pytest.mark.parametrize(
    "text", ['{"captions": [], "items": []}', "[" * 100_000, "{", "[]", '{"items": [3], "captions": {}}']
)
def test_a_manifest_of_another_shape_stops_it(repository: Repository, text: str) -> None:
    repository.make("A")
    Path("data/latents/manifest.json").write_text(text)
    unknown = "cannot be read: the entries it uses cannot be known; delete it, or pass --force to free them"
    stopped(repository, rf"data/latents/manifest\.json: {unknown}")
    assert freed(repository.collect("--force")) == ("freed", 17, 17)


def test_a_damaged_manifest_in_the_cache_of_dvc_stops_it(committed: Repository) -> None:
    digest = hashlib.md5(Path("data/latents/manifest.json").read_bytes()).hexdigest()
    path = Path(".dvc/cache/files/md5") / digest[:2] / digest[2:]
    committed.clear()
    path.chmod(0o644)
    path.write_text('{"captions": [], "items": []}')
    stopped(
        committed,
        r"1 committed version of data/latents \(\w{8}\) cannot be read in DVC's cache: the entries used there cannot "
        r"be known; pass --force to free them",
    )
    assert freed(committed.collect("--force")) == ("freed", 17, 17)


def test_dvc_may_keep_its_cache_elsewhere(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> None:
    dvc("cache", "dir", "--quiet", str(tmp_path_factory.mktemp("elsewhere")))
    repository.commit("A")
    assert not Path(".dvc/cache/files").exists()
    repository.clear()
    assert freed(repository.collect()) == ("freed", 0, 17)


def test_a_run_at_work_is_not_disturbed(repository: Repository) -> None:
    repository.make("A")
    with repository.store.in_use(), pytest.raises(UserError, match="a run of cache_latents is at work here"):
        repository.collect()


def test_a_store_that_others_may_use_is_refused(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    monkeypatch.setenv("LORA_STATE_DIR", str(folder))
    repository.make("A")
    with pytest.raises(UserError, match="may serve other repositories, whose use cannot be known; pass --force"):
        repository.collect()
    repository.clear()
    assert freed(repository.collect("--force")) == ("freed", 17, 17)


def test_outside_of_git_nothing_is_freed(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="--gc: no git repository here, .* nothing is freed"):
        workspace.run("cache_latents", "--gc")


def test_an_empty_store(repository: Repository) -> None:
    assert repository.collect().endswith("no store, nothing to free")


def test_exit_codes(repository: Repository) -> None:
    assert repository.workspace.process("cache_latents", "--dry-run").returncode == 2
    repository.make("A")
    repository.store.root.rename(repository.store.root.with_name("gone"))
    assert repository.workspace.process("cache_latents", "--gc").returncode == 0
