"""`lora-dag relock` on stages that take a moment: DVC's and Snakemake's own answers before and after it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkout import ran
from tests.helpers.planted import read
from tests.helpers.stubbed import ALL, Stubbed, make_stubbed

UP_TO_DATE = "Data and pipelines are up to date."
MESSAGE = ("lora_dag/core/console.py", "run the same command again", "start the same command again")
COMMENT = ("stages/train/loop.py", "from __future__", "# One optimizer step after another.\nfrom __future__")
PROGRESS_BAR = ("lora_dag/core/progress.py", '"""', '"""Bars. ')


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Stubbed:
    return make_stubbed(tmp_path_factory.mktemp("relock"), tiny_base)


@pytest.fixture(autouse=True)
def put_back(checkout: Stubbed) -> Iterator[None]:
    first = checkout.git("rev-parse", "HEAD").strip()
    yield
    checkout.git("reset", "--quiet", "--hard", first)
    checkout.git("clean", "--quiet", "--force", "-d")
    checkout.dvc("checkout", "--quiet", "--force")
    assert UP_TO_DATE in checkout.dvc("status")


def relock(checkout: Stubbed, *words: str) -> tuple[int, list[str]]:
    """Exit code and lines."""
    done = checkout.python("-m", "lora_dag", "relock", *words, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def edit(checkout: Stubbed, path: str, old: str, new: str) -> None:
    text = (checkout.path / path).read_text()
    assert old in text
    (checkout.path / path).write_text(text.replace(old, new, 1))


def raise_results(checkout: Stubbed, stage: str) -> None:
    edit(checkout, f"stages/{stage}/__init__.py", "RESULTS = 1", "RESULTS = 2")


def recorded(checkout: Stubbed, kind: str) -> dict[str, dict[str, str]]:
    """Stage -> path -> md5 of its ``deps`` or ``outs``."""
    stages = read(checkout.path / "dvc.lock")["stages"]
    return {name: {each["path"]: each["md5"] for each in stage[kind]} for name, stage in stages.items()}


def test_a_kill_at_the_replacement_leaves_the_lock_as_it_was(checkout: Stubbed) -> None:
    """DVC's own way empties the file before it writes."""
    edit(checkout, *MESSAGE)
    before = (checkout.path / "dvc.lock").read_bytes()
    code = (
        "import os, sys; replace = os.replace; from lora_dag.commands import parse\n"
        "def kill(source, target, **options):\n"
        "    os._exit(9) if str(target).endswith('dvc.lock') else replace(source, target, **options)\n"
        "os.replace = kill; args = parse(['relock']); args.main(args)"
    )
    assert checkout.python("-c", code, check=False).returncode == 9
    assert (checkout.path / "dvc.lock").read_bytes() == before


def test_code_that_is_no_python_is_not_accepted(checkout: Stubbed) -> None:
    edit(checkout, "stages/train/loop.py", "from __future__", "def (\nfrom __future__")
    status, lines = relock(checkout)
    assert status == 2 and "stages/train/loop.py:" in lines[-1] and "no Python" in lines[-1]


def test_an_edited_message_comment_and_progress_bar_run_nothing(checkout: Stubbed) -> None:
    outs, deps = recorded(checkout, "outs"), recorded(checkout, "deps")
    for change in (MESSAGE, COMMENT, PROGRESS_BAR):
        edit(checkout, *change)
    assert ran(checkout.dvc("repro", "--dry")) == ALL  # strict by itself
    assert relock(checkout, "--dry-run")[0] == 0 and recorded(checkout, "deps") == deps
    code, lines = relock(checkout)
    assert code == 0 and "accepted    train: of lora_dag/core, stages/train alone" in lines
    assert any("lora_dag/core/console.py and 2 more: not committed; `pytest tests/golden`" in line for line in lines)
    assert UP_TO_DATE in checkout.dvc("status") and ran(checkout.dvc("repro")) == set()
    assert recorded(checkout, "outs") == outs
    changed = {
        path for name in ALL for path in deps[name] if deps[name][path] != recorded(checkout, "deps")[name][path]
    }
    assert changed == {"lora_dag/core", "stages/train"}
    assert "up to date  dvc.lock has the code of today" in relock(checkout)[1]


def test_going_back_to_other_parameters_restores_under_the_new_code(checkout: Stubbed) -> None:
    """The run cache has the accepted run too."""
    edit(checkout, *COMMENT)
    relock(checkout)
    checkout.commit("A comment")
    assert "train" in checkout.repro(lora__rank=4)
    checkout.git("checkout", "--quiet", "params.yaml")
    assert ran(checkout.dvc("repro")) <= {"report"}  # it writes to git alone


def test_a_raised_number_runs_its_stage_and_the_rest_is_accepted(checkout: Stubbed) -> None:
    deps = recorded(checkout, "deps")
    edit(checkout, *MESSAGE)
    raise_results(checkout, "train")
    code, lines = relock(checkout)
    assert code == 3
    assert [line for line in lines if line.startswith("must run")] == ["must run    train: RESULTS 1 → 2"]
    follows = [line.split(":")[0].split()[-1] for line in lines if line.startswith("may follow")]
    assert follows == ["validate", "export", "report"]
    assert recorded(checkout, "deps")["train"] == deps["train"] and lines[-1] == "next        dvc repro"
    assert ran(checkout.dvc("repro")) == {"train"}  # which writes the same, so that nothing follows
    assert UP_TO_DATE in checkout.dvc("status")
    assert read(checkout.path / "dvc.lock")["stages"]["train"]["params"]["stages/train/__init__.py"] == {"RESULTS": 2}


def test_a_number_of_results_with_a_type_or_none(checkout: Stubbed) -> None:
    path = checkout.path / "stages/train/__init__.py"
    path.write_text("RESULTS: int = 1\n")
    code, lines = relock(checkout)
    assert code == 0 and "accepted    train: of stages/train alone" in lines
    assert UP_TO_DATE in checkout.dvc("status")
    lock = (checkout.path / "dvc.lock").read_text()
    for text, found in (
        ("", "none that DVC can read"),
        ("RESULTS = 1.5\n", "1.5"),
        ("RESULTS = True\n", "True"),
        ("RESULTS = 1\nRESULTS += 1\n", "2 such lines"),
    ):
        path.write_text(text)
        code, (line,) = relock(checkout)
        expected = "stages/train/__init__.py: expected one line RESULTS = NUMBER, such as RESULTS = 1; got "
        assert code == 2 and line.endswith(f"{expected}{found}; restore it")
        assert (checkout.path / "dvc.lock").read_text() == lock


def test_parameters_data_and_outputs_are_reasons(checkout: Stubbed) -> None:
    lock = (checkout.path / "dvc.lock").read_text()
    edit(checkout, *MESSAGE)
    checkout.set(lora__rank=4, report__title="Another", dataset__source="data/other")
    (checkout.path / "reports/metrics.json").write_text("edited")
    (checkout.path / "reports/samples.png").unlink()
    adapter = checkout.path / "data/adapter/stub.txt"
    adapter.unlink()  # a link into DVC's cache
    adapter.write_text("edited")
    code, lines = relock(checkout)
    assert code == 3
    for line in (
        "prepare: params.yaml dataset.source data/raw → data/other",
        "prepare: data/other is not what it read",
        "train: params.yaml lora.rank 2 → 4",
        "train: data/adapter is not what it wrote; `dvc checkout data/adapter` puts that back",
        "validate: reports/metrics.json is not what it wrote; `git checkout reports/metrics.json` puts that back",
        "validate: reports/samples.png is not here; `git checkout reports/samples.png` puts that back",
        "validate: data/adapter is not what it read",
        "report: params.yaml report.title Ink icons → Another",
    ):
        assert f"must run    {line}" in lines, line
    assert (checkout.path / "dvc.lock").read_text() == lock


def test_other_files_of_a_stage_in_dvc_yaml_are_reasons(checkout: Stubbed) -> None:
    edit(checkout, "dvc.yaml", "      - reports/train/metrics.json: {cache: false}\n", "")
    edit(checkout, "dvc.yaml", "      - data/prepared\n      - ", "      - data/prepared\n      - profiles\n      - ")
    edit(checkout, "dvc.yaml", "cmd: python -m stages.export", "cmd: python -m stages.export --params params.yaml")
    code, lines = relock(checkout)
    assert code == 3
    assert "must run    train: dvc.yaml does not list reports/train/metrics.json, which it wrote" in lines
    assert "must run    cache_latents: profiles is not what it read" in lines
    assert "must run    export: its command was `python -m stages.export`" in lines


def test_a_clone_without_data_is_relocked(checkout: Stubbed, tmp_path: Path) -> None:
    clone = Stubbed.__new__(Stubbed)
    clone.path = tmp_path / "clone"
    checkout.git("clone", "--quiet", ".", str(clone.path))
    edit(clone, *MESSAGE)
    code, lines = relock(clone)
    assert code == 0, "\n".join(lines)
    assert not (clone.path / "data/adapter").exists()
    assert UP_TO_DATE in clone.dvc("repro", "--dry", "--allow-missing")
    assert recorded(clone, "outs") == recorded(checkout, "outs")
    edit(clone, "data/raw.dvc", "md5: ", "md5: 0123456789abcdef0123456789abcdef.dir #")
    code, lines = relock(clone)
    assert code == 3 and "must run    prepare: data/raw is not what it read" in lines


def test_a_lock_from_before_there_were_numbers_is_accepted_only_when_a_person_says_so(checkout: Stubbed) -> None:
    """Single files of code, no RESULTS; nothing says which results those were."""
    path = checkout.path / "dvc.lock"
    old = path.read_text()
    for name in ALL:
        old = old.replace(f"      stages/{name}/__init__.py:\n        RESULTS: 1\n", "")
    path.write_text(old.replace("- path: stages/train\n", "- path: stages/train/trainer.py\n"))
    code, lines = relock(checkout)
    assert code == 3 and path.read_text() != old
    assert any(line.startswith("must run    train: its last run recorded no RESULTS") for line in lines)
    code, lines = relock(checkout, "--assume-results", "2")
    assert code == 3 and "must run    train: RESULTS 2 → 1" in lines
    assert relock(checkout, "--assume-results", "1")[0] == 0
    assert UP_TO_DATE in checkout.dvc("status") and checkout.git("status", "--porcelain") == ""


def test_a_frozen_stage_is_accepted_too(checkout: Stubbed) -> None:
    edit(checkout, "dvc.yaml", "  train:\n", "  train:\n    frozen: true\n")
    edit(checkout, *COMMENT)
    assert relock(checkout)[0] == 0
    edit(checkout, "dvc.yaml", "    frozen: true\n", "")
    assert UP_TO_DATE in checkout.dvc("status")


@pytest.mark.parametrize("raised", [False, True])
def test_two_branches_with_a_message_and_with_a_training_merge_without_a_run(checkout: Stubbed, raised: bool) -> None:
    """Unless the branch with the edit has raised the number: the training of the other is not of that.

    git would merge the two dvc.lock line by line into one that says that it is.
    """
    checkout.git("switch", "--quiet", "--create", f"message-{raised}")
    edit(checkout, *COMMENT)
    if raised:
        raise_results(checkout, "train")
    checkout.dvc("repro") if raised else relock(checkout)
    checkout.commit("Code")
    checkout.git("switch", "--quiet", "--create", f"rank-{raised}", "main")
    checkout.repro(lora__rank=8)
    checkout.commit("Rank 8")
    trained = recorded(checkout, "outs")
    merged = checkout.run("git", "merge", "--quiet", f"message-{raised}", check=False)
    assert merged.returncode == 1 and "CONFLICT (content): Merge conflict in dvc.lock" in merged.stdout
    code, lines = relock(checkout)
    assert code == (3 if raised else 0) and recorded(checkout, "outs") == trained
    assert any(line.startswith("warning: dvc.lock: a merge has changed it on both sides, and") for line in lines)
    assert ("must run    train: RESULTS 1 → 2" in lines) == raised
    assert ran(checkout.dvc("repro")) == ({"train"} if raised else set())
    checkout.commit("Merge")
    assert UP_TO_DATE in checkout.dvc("status")
    checkout.git("switch", "--quiet", "--force", "main")
    checkout.dvc("checkout", "--quiet", "--force")


def test_a_lock_with_conflicts_in_it_is_one_line(checkout: Stubbed) -> None:
    edit(checkout, "dvc.lock", "stages:\n", "<<<<<<< HEAD\nstages:\n")
    code, lines = relock(checkout)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: dvc.lock: a merge left conflicts in it; `git")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("dvc.yaml", "stages: [", "error: dvc.yaml:1: "),
        ("params.yaml", "lora: [", "error: params.yaml:1: "),
        ("dvc.lock", "stages: 1", "error: dvc.yaml or dvc.lock: not as DVC writes it"),
        ("dvc.lock", None, "error: dvc.lock: no such file, and Snakemake has run nothing here; run"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(checkout: Stubbed, path: str, text: str | None, expected: str) -> None:
    if text is None:
        (checkout.path / path).unlink()
    else:
        (checkout.path / path).write_text(text)
    code, lines = relock(checkout)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(expected), lines


def test_while_dvc_is_at_work_nothing_is_written(checkout: Stubbed) -> None:
    script = (
        "import time\nfrom dvc.repo import Repo\nwith Repo().lock:\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [*("env", "-C", str(checkout.path)), *("env", "python3", "-c", script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=checkout.environment, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            code, lines = relock(checkout)
        finally:
            holder.kill()
    assert code == 2 and lines[-1].startswith("error: dvc: Unable to acquire lock")
