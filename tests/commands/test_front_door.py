"""``lora-dag`` in the folders of a clone, while another clone is the installed one; and what a shell completes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lora_dag.__main__ import main as entry
from lora_dag.commands import COMMANDS
from lora_dag.core import clone
from lora_dag.core.console import as_path
from tests.helpers.compared import git
from tests.helpers.errors import assert_line
from tests.helpers.workspace import REPOSITORY

WHERE = '''"""Where a command works. Run: `lora-dag where`"""

from pathlib import Path

import stages
from lora_dag.core.console import add_settings


def add_arguments(parser):
    add_settings(parser, ["adapter"])


def main(args):
    print(Path.cwd(), Path(stages.__file__).parent, args.params, args.adapter, sep="\\n")
'''
ROW = '"check": Command('


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a command of its own, ``where``, which the installed clone does not have."""
    root = tmp_path_factory.mktemp("clones") / "other clone"
    for name in ("lora_dag", "stages"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "data/mine").mkdir(parents=True)
    table = root / "lora_dag/commands/__init__.py"
    rows = table.read_text(encoding="utf-8").replace(ROW, f'"where": Command("where", "say where"), {ROW}', 1)
    table.write_text(rows, encoding="utf-8")
    (root / "lora_dag/commands/where.py").write_text(WHERE)
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that pip writes, with this repository installed: its packages come last on the path."""
    script = tmp_path_factory.mktemp("bin") / "lora-dag"
    script.write_text(
        f"import sys\nsys.path.append({str(REPOSITORY)!r})\nfrom lora_dag.__main__ import main\nsys.exit(main())\n"
    )
    return script


def run(folder: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=kept | variables, capture_output=True, text=True)


def test_the_installed_command_runs_the_code_of_the_clone_it_is_called_in(other: Path, installed: Path) -> None:
    for folder in (other, other / "data/mine"):
        done = run(folder, installed, "where")
        lines = done.stdout.splitlines()
        assert lines == [str(other), str(other / "stages"), "params.yaml", "data/adapter"], done.stderr
    assert done.stderr == f"clone       {other}\n"
    done = run(REPOSITORY, installed, "where")
    assert done.returncode == 2 and done.stderr.startswith("error: lora-dag where: unknown command. ")


def test_python_m_does_the_same_in_the_root(other: Path) -> None:
    done = run(other, "-m", "lora_dag", "where")
    assert done.stderr == ""
    assert done.stdout.splitlines()[:2] == [str(other), str(other / "stages")] and done.stderr == ""


def test_a_copy_that_dvc_makes_inside_of_a_clone_is_a_clone_of_its_own(other: Path, installed: Path) -> None:
    copy = other / ".dvc/tmp/exps/standalone/tmpx"
    shutil.copytree(other, copy, ignore=shutil.ignore_patterns(".dvc"))
    (copy / "lora_dag/commands/where.py").write_text(WHERE.replace("print(", "print('the copy', "))
    assert run(copy / "data", installed, "where").stdout.splitlines()[:2] == ["the copy", str(copy)]
    shutil.rmtree(other / ".dvc")


def test_paths_that_are_typed_are_relative_to_the_current_folder(other: Path, installed: Path) -> None:
    below = run(other / "data", installed, "where", "--params", "../my.yaml", "--adapter=mine").stdout.splitlines()
    assert below[2:] == [str(other / "data/../my.yaml"), str(other / "data/mine")]
    root = run(other, installed, "where", "--params", "my.yaml", "--adapter=data/mine").stdout.splitlines()
    assert root[2:] == ["my.yaml", "data/mine"]


def test_a_tilde_is_the_home_folder_below_the_root_too(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(other / "data")
    monkeypatch.setenv("HOME", "/home/someone")
    assert as_path("~/x") == Path("/home/someone/x") and as_path("x") == other / "data/x"


def test_outside_of_every_clone_it_is_one_line(tmp_path: Path, installed: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "dvc.yaml").touch()
    assert clone.find(tmp_path) is None
    assert "before a run:" in run(tmp_path, installed, "--help").stdout
    for words in (["check"], ["check", "--help"], []):
        done = run(tmp_path, installed, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert_line(done.stderr, "outside-clone", f"error: {tmp_path}: ", "dvc.yaml, lora_dag/__main__.py, stages")


def test_an_unknown_command_is_one_line(installed: Path) -> None:
    done = run(REPOSITORY, installed, "explian", "HEAD")
    assert (done.returncode, done.stdout) == (2, "")
    assert_line(done.stderr, "unknown-command", "lora-dag explian", " explain?")


def test_the_blocks_of_readme_install_the_command() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"lora-dag": f"{entry.__module__}:{entry.__name__}"}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- ci: \w+ -->\n```sh\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2 and all("\npip install -r requirements.lock -e .\n" in block for block in blocks)
    found = project["tool"]["setuptools"]["packages"]["find"]
    assert found == {
        "include": ["lora_dag*", "stages*"]
    }  # what `lora_dag` imports, and none of tests, base, benchmarks


def test_ci_runs_the_blocks_of_readme() -> None:
    script = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    (function,) = re.findall(r"^block\(\) \{\n.*?^\}\n", script, re.MULTILINE | re.DOTALL)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^run (\w+)$", script, re.MULTILINE)
    assert names == ["main", "tests"]
    for name in names:
        done = subprocess.run(["bash", "-c", f"{function}block {name}"], cwd=REPOSITORY, capture_output=True, text=True)
        assert f"<!-- ci: {name} -->\n```sh\n{done.stdout}```\n" in readme and done.stdout.count("\n") == 4


# What a shell completes


def completions(installed: Path, folder: Path, line: str) -> set[str]:
    """As bash has them from ``register-python-argcomplete lora-dag``."""
    answer = installed.with_name("answer")
    done = run(
        folder,
        installed,
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_STDOUT_FILENAME=str(answer),
        _ARGCOMPLETE_SHELL="bash",
        _ARGCOMPLETE_IFS="\n",
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
        COMP_TYPE="9",
    )
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in answer.read_text().split("\n")}


def test_commands_and_options_are_completed(installed: Path) -> None:
    assert completions(installed, REPOSITORY, "lora-dag ") >= set(COMMANDS)
    assert completions(installed, REPOSITORY, "lora-dag prom") == {"promote"}
    assert completions(installed, REPOSITORY, "lora-dag gate --ag") == {"--against"}


def test_settings_revisions_and_runs_are_completed_in_the_clone_that_is_used(other: Path, installed: Path) -> None:
    (other / "runs/raw/rank-4-s0/reports").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(other)
        git("init", "--quiet", "--initial-branch=main")
        git("commit", "--quiet", "--allow-empty", "--message", "Start")
        git("branch", "foxes")
    folder = other / "data"
    assert completions(installed, folder, "lora-dag check --set lora.ra") == {"lora.rank=", "lora.rank_pattern="}
    assert completions(installed, folder, "lora-dag compare fo") == {"foxes"}
    assert completions(installed, folder, "lora-dag promote ra") == {"raw/rank-4-s0"}
    assert completions(installed, folder, "lora-dag whe") == {"where"}
