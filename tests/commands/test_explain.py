"""`lora-dag explain`: each kind of cause, planted in a dvc.lock. tests/dag/test_pipeline.py explains real runs."""

from __future__ import annotations

import json
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lora_dag.artifacts.lineage import save as save_lineage
from tests.helpers import command
from tests.helpers.compared import commit, git
from tests.helpers.errors import refused

PARAMS: dict[str, Any] = {
    "model": {"pretrained": "data/base"},
    "dataset": {"source": "data/raw"},
    "lora": {"rank": 8},
    "export": {"name": "icons", "push_to_hub": None},
}
READS = {
    "prepare": (["data/raw", "stages/prepare/split.py", "lora_dag/core/files.py"], ["dataset"], ["data/prepared"]),
    "train": (["data/base", "data/prepared", "lora_dag/core/files.py"], ["lora"], ["data/adapter"]),
    "export": (["data/base", "data/adapter"], ["export.name"], ["data/export"]),
}


class Pipeline:
    """params.yaml, dvc.lock and the export's lineage, as DVC and the stages would write them."""

    def __init__(self) -> None:
        self.params = deepcopy(PARAMS)
        self.files = {path: "0" for deps, _, outs in READS.values() for path in [*deps, *outs]}
        self.results = dict.fromkeys(READS, 1)
        self.packages = {"torch": "2.13.0", "peft": "0.21.2"}

    def write(self) -> None:
        stages = {
            stage: {
                "cmd": f"python -m stages.{stage}",
                "deps": [self.dependency(path) for path in deps],
                "params": {
                    "params.yaml": {key: self.setting(key) for key in keys},
                    f"stages/{stage}/__init__.py": {"RESULTS": self.results[stage]},
                },
                "outs": [{"path": path, "md5": self.files[path]} for path in outs],
            }
            for stage, (deps, keys, outs) in READS.items()
        }
        yaml = YAML()
        for path, tree in (("params.yaml", self.params), ("dvc.lock", {"schema": "2.0", "stages": stages})):
            with Path(path).open("w") as file:
                yaml.dump(tree, file)
        save_lineage(Path("reports/export/lineage.json"), {"packages": self.packages})

    def dependency(self, path: str) -> dict[str, Any]:
        count = {} if path.endswith(".py") else {"nfiles": 8 + len(self.files[path])}
        return {"path": path, "md5": self.files[path], **count}

    def setting(self, key: str) -> Any:
        section, _, name = key.partition(".")
        return self.params[section][name] if name else self.params[section]


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    made = Pipeline()
    made.write()
    commit("Start")
    return made


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    def run(*arguments: str) -> str:
        caplog.set_level("INFO", logger="lora-dag")
        command.run("explain", *arguments)
        return caplog.text

    return run


def test_parameters_and_what_follows_from_them(pipeline: Pipeline, explained: Any) -> None:
    pipeline.params["lora"]["rank"] = 16
    pipeline.files |= {"data/adapter": "1", "data/export": "1"}
    pipeline.write()
    page = explained("main", "workspace")
    assert "# From main to workspace" in page
    assert "- **parameters**: lora.rank 8 → 16\n\nNot changed: data, base, code, environment." in page
    assert "| prepare | unchanged |" in page
    assert "| train | ran again: parameters (lora.rank 8 → 16) |" in page
    assert "| export | ran again: data/adapter from train |" in page


def test_data(pipeline: Pipeline, explained: Any) -> None:
    pipeline.files |= {"data/raw": "11111", "data/prepared": "1", "data/adapter": "1", "data/export": "1"}
    pipeline.write()
    page = explained()
    assert "- **data**: data/raw (9 → 13 files)\n\nNot changed: parameters, base, code, environment." in page
    assert "| prepare | ran again: data (data/raw (9 → 13 files)) |" in page
    assert "| train | ran again: data/prepared from prepare |" in page


def test_base(pipeline: Pipeline, explained: Any) -> None:
    pipeline.files |= {"data/base": "1", "data/adapter": "1", "data/export": "1"}
    pipeline.write()
    page = explained()
    assert "- **base**: data/base\n" in page
    assert "| export | ran again: base (data/base); data/adapter from train |" in page


def test_code_that_gives_the_same_bytes_goes_no_further(pipeline: Pipeline, explained: Any) -> None:
    pipeline.files["stages/prepare/split.py"] = "1"
    pipeline.write()
    page = explained()
    assert "- **code**: stages/prepare/split.py\n" in page
    assert "| prepare | other code with the same results: stages/prepare/split.py |" in page
    assert "| train | unchanged |" in page


def test_code_and_a_parameter_that_give_the_same_bytes(pipeline: Pipeline, explained: Any) -> None:
    pipeline.files["lora_dag/core/files.py"] = "1"
    pipeline.params["lora"]["rank"] = 16
    pipeline.write()
    page = explained()
    assert "| prepare | other code with the same results: lora_dag/core/files.py |" in page
    row = "ran again: parameters (lora.rank 8 → 16); code (lora_dag/core/files.py) (bit-identical outputs) |"
    assert f"| train | {row}" in page


def test_other_code_that_gives_other_bytes_ran(pipeline: Pipeline, explained: Any) -> None:
    pipeline.files |= {"stages/prepare/split.py": "1", "data/prepared": "1"}
    pipeline.write()
    assert "| prepare | ran again: code (stages/prepare/split.py) |" in explained()


def test_a_raised_number_of_results(pipeline: Pipeline, explained: Any) -> None:
    pipeline.results["prepare"] = 2
    pipeline.files["stages/prepare/split.py"] = "1"
    pipeline.write()
    assert (
        "| prepare | ran again: code (stages/prepare/split.py, RESULTS of prepare 1 → 2) (bit-identical" in explained()
    )


def test_of_many_files_the_first_are_named(pipeline: Pipeline, explained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deps, keys, outs = READS["prepare"]
    names = [f"stages/prepare/{letter}.py" for letter in "abcdef"]
    monkeypatch.setitem(READS, "prepare", ([*deps, *names], keys, outs))
    pipeline.files |= dict.fromkeys(names, "1")
    pipeline.write()
    row = (
        "| prepare | other code with the same results: stages/prepare/a.py, stages/prepare/b.py, stages/prepare/c.py, "
        "3 more |"
    )
    assert row in explained()


def test_environment(pipeline: Pipeline, explained: Any) -> None:
    pipeline.packages["torch"] = "2.14.0"
    pipeline.files |= {"data/adapter": "1", "data/export": "1"}
    pipeline.write()
    page = explained()
    assert "- **environment**: torch 2.13.0 → 2.14.0\n\nNot changed: parameters, data, base, code." in page
    assert "| train | other outputs from the same inputs: torch 2.13.0 → 2.14.0 |" in page
    assert "| export | ran again: data/adapter from train |" in page


def test_another_machine(pipeline: Pipeline, explained: Any) -> None:
    pipeline.files |= {"data/adapter": "1", "data/export": "1"}
    pipeline.write()
    assert "- **environment**: another machine, or packages" in explained()


def test_all_at_once(pipeline: Pipeline, explained: Any) -> None:
    pipeline.params["lora"]["rank"] = 16
    pipeline.packages["torch"] = "2.14.0"
    pipeline.files = {path: "1" for path in pipeline.files}
    pipeline.write()
    page = explained()
    causes = ("parameters", "data", "base", "code", "environment")
    assert all(f"- **{cause}**: " in page for cause in causes) and "Not changed" not in page
    assert (
        "| train | ran again: parameters (lora.rank 8 → 16); base (data/base); code (lora_dag/core/files.py); data/pr"
        in page
    )


def test_nothing(pipeline: Pipeline, explained: Any) -> None:
    assert "Nothing changed." in explained()


def test_explain_names_parameters_that_no_stage_has_used(pipeline: Pipeline, explained: Any) -> None:
    pipeline.params["lora"]["rank"] = 16
    with Path("params.yaml").open("w") as file:
        YAML().dump(pipeline.params, file)
    page = explained()
    assert "Nothing changed." in page
    assert "workspace: params.yaml has changed since the last run (lora.rank). `dvc repro`" in page


def test_errors_are_one_line(pipeline: Pipeline, explained: Any) -> None:
    with refused("unknown-revision", "'mian'", "near: main"):
        explained("mian")
    Path("dvc.lock").write_text(json.dumps({"stages": {"train": {"deps": []}}}))
    with refused("revision-damaged", "workspace: dvc.lock", "'cmd'", "`dvc repro`"):
        explained()
    Path("dvc.lock").unlink()
    with refused("revision-incomplete", "workspace: dvc.lock", "`dvc repro`"):
        explained()


def test_explain_reports_a_merge_conflict(pipeline: Pipeline, explained: Any) -> None:
    text = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(text.replace("stages:", "<<<<<<< HEAD\nstages:"))
    with refused("lock-conflict", "workspace: dvc.lock: ", "`git checkout --ours dvc.lock`", "`lora-dag relock`"):
        explained()


def test_explain_warns_of_an_unfinished_merge(pipeline: Pipeline, explained: Any) -> None:
    Path(".gitattributes").write_text("dvc.lock -merge\n")
    commit("Attributes")
    for branch, rank in (("one", 4), ("two", 16)):
        git("checkout", "-q", "-b", branch, "main")
        pipeline.params["lora"]["rank"] = rank
        pipeline.write()
        commit(branch)
    subprocess.run(["git", "merge", "-q", "one"], check=False, capture_output=True)
    Path("params.yaml").write_text("lora: {rank: 16}\ntrain: {seed: 0}\n")
    assert "[lock-unmerged]" in explained("main", "workspace")


def test_a_stage_with_a_number_for_a_name_is_a_stage(pipeline: Pipeline, explained: Any) -> None:
    Path("dvc.lock").write_text("stages: {1: {cmd: x}}\n")
    assert "| 1 | only in workspace |" in explained()
