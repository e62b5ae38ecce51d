"""`lora-dag relock` with stages that take a moment, checked by DVC's and Snakemake's own status before and after."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_dag.core.clone import PROJECT
from tests.helpers.checkout import ran
from tests.helpers.errors import assert_line
from tests.helpers.planted import read
from tests.helpers.stubbed import ALL, Stubbed, make_stubbed

UP_TO_DATE = "Data and pipelines are up to date."
MESSAGE = ("lora_dag/core/console.py", "from __future__", "# A message.\nfrom __future__")
COMMENT = ("stages/train/loop.py", "from __future__", "# One optimizer step after another.\nfrom __future__")
PROGRESS_BAR = ("lora_dag/core/progress.py", '"""', '"""Bars. ')


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Stubbed:
    return make_stubbed(tmp_path_factory.mktemp("relock"), tiny_base)


@pytest.fixture(autouse=True)
def reset(checkout: Stubbed) -> Iterator[None]:
    first = checkout.git("rev-parse", "HEAD").strip()
    yield
    checkout.git("reset", "--quiet", "--hard", first)
    checkout.git("clean", "--quiet", "--force", "-d")
    checkout.dvc("checkout", "--quiet", "--force")
    assert UP_TO_DATE in checkout.dvc("status")


def relock(checkout: Stubbed, *words: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines of the output."""
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


def test_a_kill_leaves_dvc_lock_unchanged(checkout: Stubbed) -> None:
    """DVC itself empties the file before it writes."""
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


def test_code_with_a_syntax_error_is_not_accepted(checkout: Stubbed) -> None:
    edit(checkout, "stages/train/loop.py", "from __future__", "def (\nfrom __future__")
    status, lines = relock(checkout)
    assert status == 2
    line = (checkout.path / "stages/train/loop.py").read_text(encoding="utf-8").splitlines().index("def (") + 1
    assert_line(lines[-1], "code-unreadable", f"stages/train/loop.py:{line}: ")


def test_an_edited_message_comment_and_progress_bar_run_nothing(checkout: Stubbed) -> None:
    outs, deps = recorded(checkout, "outs"), recorded(checkout, "deps")
    for change in (MESSAGE, COMMENT, PROGRESS_BAR):
        edit(checkout, *change)
    assert ran(checkout.dvc("repro", "--dry")) == ALL  # strict by itself
    assert relock(checkout, "--dry-run")[0] == 0 and recorded(checkout, "deps") == deps
    code, lines = relock(checkout)
    assert code == 0 and "accepted    train: only lora_dag/core, stages/train changed" in lines
    assert_line("\n".join(lines), "code-uncommitted", "lora_dag/core/console.py and 2 more", "`pytest tests/golden`")
    assert UP_TO_DATE in checkout.dvc("status") and ran(checkout.dvc("repro")) == set()
    assert recorded(checkout, "outs") == outs
    changed = {
        path for name in ALL for path in deps[name] if deps[name][path] != recorded(checkout, "deps")[name][path]
    }
    assert changed == {"lora_dag/core", "stages/train"}
    assert "up to date  dvc.lock has the current code" in relock(checkout)[1]


@pytest.mark.parametrize("is_here", [True, False])
def test_the_base_of_an_older_dvc_lock_is_accepted(checkout: Stubbed, is_here: bool) -> None:
    """Its path has no prefix there. The data need not be here."""
    deps = recorded(checkout, "deps")
    lock = checkout.path / "dvc.lock"
    lock.write_text(lock.read_text().replace(f"path: {PROJECT}", "path: "))
    edit(checkout, *MESSAGE)
    if not is_here:
        shutil.rmtree(checkout.path / "data/base")
    assert relock(checkout)[0] == 0
    base = f"{PROJECT}data/base"
    assert recorded(checkout, "deps")["train"][base] == deps["train"][base]
    checkout.dvc("checkout", "--quiet")
    assert ran(checkout.dvc("repro")) == set()


def test_the_run_cache_has_the_accepted_run(checkout: Stubbed) -> None:
    """Earlier parameters are restored from it under the new code."""
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
    follows = [line.split(":")[0].split()[-1] for line in lines if line.startswith("may run")]
    assert follows == ["validate", "export", "report"]
    assert recorded(checkout, "deps")["train"] == deps["train"] and lines[-1] == "next        dvc repro"
    assert ran(checkout.dvc("repro")) == {"train"}  # which writes the same, so that nothing follows
    assert UP_TO_DATE in checkout.dvc("status")
    assert read(checkout.path / "dvc.lock")["stages"]["train"]["params"]["stages/train/__init__.py"] == {"RESULTS": 2}


def test_a_number_of_results_with_a_type_or_none(checkout: Stubbed) -> None:
    path = checkout.path / "stages/train/__init__.py"
    path.write_text("RESULTS: int = 1\n")
    code, lines = relock(checkout)
    assert code == 0 and "accepted    train: only stages/train changed" in lines
    assert UP_TO_DATE in checkout.dvc("status")
    lock = (checkout.path / "dvc.lock").read_text()
    for text, found in (
        ("", ""),
        ("RESULTS = 1.5\n", "1.5"),
        ("RESULTS = True\n", "True"),
        ("RESULTS = 1\nRESULTS += 1\n", "2"),
    ):
        path.write_text(text)
        code, (line,) = relock(checkout)
        assert code == 2 and "stages/train/__init__.py: " in line and "RESULTS = 1" in line and found in line
        assert (checkout.path / "dvc.lock").read_text() == lock


def test_changed_parameters_data_and_outputs_are_reasons(checkout: Stubbed) -> None:
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
        "prepare: data/other changed since the last run",
        "train: params.yaml lora.rank 2 → 4",
        "train: data/adapter was edited after the last run. `dvc checkout data/adapter` restores it",
        "validate: reports/metrics.json was edited after the last run. `git checkout reports/metrics.json` restores it",
        "validate: reports/samples.png is missing. `git checkout reports/samples.png` restores it",
        "validate: data/adapter changed since the last run",
        "report: params.yaml report.title Ink icons → Another",
    ):
        assert f"must run    {line}" in lines, line
    assert (checkout.path / "dvc.lock").read_text() == lock


def test_changed_file_lists_in_dvc_yaml_are_reasons(checkout: Stubbed) -> None:
    edit(checkout, "dvc.yaml", "      - reports/train/metrics.json: {cache: false}\n", "")
    edit(checkout, "dvc.yaml", "      - data/prepared\n      - ", "      - data/prepared\n      - profiles\n      - ")
    edit(checkout, "dvc.yaml", "cmd: python -m stages.export", "cmd: python -m stages.export --params params.yaml")
    code, lines = relock(checkout)
    assert code == 3
    assert "must run    train: dvc.yaml does not list its output reports/train/metrics.json" in lines
    assert "must run    cache_latents: profiles changed since the last run" in lines
    assert "must run    export: the command changed from `python -m stages.export`" in lines


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
    assert code == 3 and "must run    prepare: data/raw changed since the last run" in lines


def test_runs_without_a_results_number_need_assume_results(checkout: Stubbed) -> None:
    """An old dvc.lock has single files of code and no RESULTS."""
    path = checkout.path / "dvc.lock"
    old = path.read_text()
    for name in ALL:
        old = old.replace(f"      stages/{name}/__init__.py:\n        RESULTS: 1\n", "")
    path.write_text(old.replace("- path: stages/train\n", "- path: stages/train/trainer.py\n"))
    code, lines = relock(checkout)
    assert code == 3 and path.read_text() != old
    assert any(line.startswith("must run    train: the last run recorded no RESULTS") for line in lines)
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
def test_a_merge_of_an_edit_and_a_training_runs_nothing(checkout: Stubbed, raised: bool) -> None:
    """A raised RESULTS on the branch with the edit makes the training of the other branch out of date.

    A merge of dvc.lock line by line would hide that.
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
    assert_line("\n".join(lines), "lock-unmerged", "dvc.lock: ", "`git checkout --theirs dvc.lock`")
    assert ("must run    train: RESULTS 1 → 2" in lines) == raised
    assert ran(checkout.dvc("repro")) == ({"train"} if raised else set())
    checkout.commit("Merge")
    assert UP_TO_DATE in checkout.dvc("status")
    checkout.git("switch", "--quiet", "--force", "main")
    checkout.dvc("checkout", "--quiet", "--force")


def test_relock_reports_a_merge_conflict(checkout: Stubbed) -> None:
    edit(checkout, "dvc.lock", "stages:\n", "<<<<<<< HEAD\nstages:\n")
    code, lines = relock(checkout)
    assert code == 2 and len(lines) == 1
    assert_line(lines[0], "lock-conflict", "error: dvc.lock: ", "`git checkout --ours dvc.lock`", "`lora-dag relock`")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("dvc.yaml", "stages: [", "error: dvc.yaml:1: "),
        ("params.yaml", "lora: [", "error: params.yaml:1: "),
        ("dvc.lock", "stages: 1", "error: dvc.lock: the content does not have DVC's format. `dvc status`"),
        ("dvc.lock", None, "error: dvc.lock: the file is missing"),
    ],
)
def test_relock_reports_files_that_cannot_be_read(
    checkout: Stubbed, path: str, text: str | None, expected: str
) -> None:
    if text is None:
        (checkout.path / path).unlink()
    else:
        (checkout.path / path).write_text(text)
    code, lines = relock(checkout)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(expected), lines


def test_relock_waits_for_no_other_dvc_command(checkout: Stubbed) -> None:
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
    assert code == 2
    assert_line(lines[-1], "dvc-failed", "error: dvc: Unable to acquire lock")
