"""git leaves the bytes that digests name alone under every configuration; where it did not, the gate says so once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from lora_dag.commands.gate import lock
from tests.helpers.planted import Clone, git
from tests.helpers.workspace import REPOSITORY

CONFIGURED = ("-c", "core.autocrlf=true", "-c", "core.eol=crlf", "-c", "core.safecrlf=false")
HASHED = (".dvc/store", "lora_dag", "stages", "params.yaml", "reports")


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for name in HASHED for path in [root / name, *(root / name).rglob("*")] if path.is_file()]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths if "__pycache__" not in p.parts}


def test_no_configuration_of_git_changes_what_digests_name(tmp_path: Path) -> None:
    """Committed and cloned by git as it is on Windows: the same bytes, CRLF kept where a file has it."""
    here = tmp_path / "here"
    here.mkdir()
    for name in HASHED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, here / name)
    shutil.copy(REPOSITORY / ".gitattributes", here)
    (here / "reports/windows.txt").write_bytes(b"a\r\nb\n")
    for words in (("init", "--quiet"), ("add", "--all", "--force"), ("commit", "--quiet", "--message", "all")):
        git("-C", str(here), *CONFIGURED, *words)
    git(*CONFIGURED, "clone", "--quiet", str(here), str(tmp_path / "clone"))
    before = contents(here)
    assert len(before) > 500 and contents(tmp_path / "clone") == before


def test_the_attributes_rewrite_nothing_that_is_committed(tmp_path: Path) -> None:
    """`git add --renormalize`, in an index of its own, stages what is edited here and nothing else."""

    def run(*words: str) -> set[str]:
        environment = os.environ | {"GIT_INDEX_FILE": str(tmp_path / "index")}
        command = ["git", "-C", str(REPOSITORY), *words]
        return set(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())

    run("read-tree", "HEAD")
    edited = run("diff", "--name-only", "HEAD")
    run("add", "--renormalize", ".")
    assert run("diff", "--cached", "--name-only", "HEAD") <= edited


def converted() -> None:
    """As git leaves a clone whose attributes are not asked: those in .git/info come first."""
    Path(".git/info").mkdir(exist_ok=True)
    Path(".git/info/attributes").write_text("* text=auto\n")
    git("config", "core.autocrlf", "true")
    git("rm", "-r", "-q", "--cached", ".")
    git("reset", "--quiet", "--hard")


def test_the_gate_says_once_that_line_ends_are_others(clone: Clone) -> None:
    clone("main")
    converted()
    (line,) = lock.problems()
    assert re.match(r"line ends: \d{2,} files have CRLF where dvc.lock has LF \(core.autocrlf\?\), such as ", line), (
        line
    )
    Path("stages/train/loop.py").write_text("other")  # a change beside it is named as ever
    assert [p.partition(":")[0] for p in lock.problems()] == ["line ends", "stages/train"]
    Path(".git/info/attributes").unlink()
    (cure,) = re.findall("`(git config .*)`", line)
    subprocess.run(cure, shell=True, check=True, capture_output=True)
    assert lock.problems() == []
