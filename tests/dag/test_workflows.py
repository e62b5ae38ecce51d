"""The workflows of .github: what they may do, and their very lines run in clones, with GitHub's side stood in for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lora_dag.commands.gate import lock, recomputed_metrics
from lora_dag.pipeline.code import dvc_md5
from tests.helpers.checkout import Checkout
from tests.helpers.planted import Clone, git
from tests.helpers.workspace import REPOSITORY

FOLDER = REPOSITORY / ".github/workflows"
NOT_INSTALLED = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pandas",
    "matplotlib",
    "PIL",
)
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))


def load(name: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(FOLDER / name)


def steps(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(job, step)"""
    return [(job, step) for job, body in load(name)["jobs"].items() for step in body["steps"]]


# What they may do


def test_there_are_two_workflows() -> None:
    assert NAMES == ["checks.yml", "experiment.yml"]


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_pinned_by_commit_with_their_release_named(name: str) -> None:
    uses = re.findall(r"uses: (.+)", (FOLDER / name).read_text())
    assert uses and all(re.match(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in uses)


@pytest.mark.parametrize("name", NAMES)
def test_every_job_has_permissions_and_a_timeout(name: str) -> None:
    workflow = load(name)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and job["permissions"]
        assert "concurrency" in job or "concurrency" in workflow or "needs" in job


def test_write_permissions_of_each_job() -> None:
    jobs = load("experiment.yml")["jobs"]
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "gate": {"contents": "read"},
        "comment": {"pull-requests": "write"},
        "full-run": {"contents": "write"},
    }
    assert all(job["permissions"] == {"contents": "read"} for job in load("checks.yml")["jobs"].values())
    for job, step in (*steps("experiment.yml"), *steps("checks.yml")):
        if "checkout" in step.get("uses", "") and job != "full-run":
            assert step["with"]["persist-credentials"] is False, job
    assert not any("uses" in step for job, step in steps("experiment.yml") if job == "comment")  # none of its code


def test_jobs_with_a_write_token_run_no_code_of_a_pull_request(tmp_path: Path) -> None:
    """On ``pull_request_target``: only the base branch is checked out, and there are no secrets and no uploads."""
    assert "pull_request_target" not in load("checks.yml")["on"]
    runner = Runner(tmp_path / "runner", {"github.event_name": "pull_request_target"})
    runner.values["needs.gate.outputs.page"] = "# Experiment"
    started = [job for job in load("experiment.yml")["jobs"] if runner.would_run(job)]
    assert started == ["gate", "comment"]
    mine = [step for job, step in steps("experiment.yml") if job in started]
    checkouts = [step for step in mine if "checkout" in step.get("uses", "")]
    assert [step["with"]["ref"] for step in checkouts] == ["${{ github.event.pull_request.base.ref }}"]
    assert "${{ secrets" not in (FOLDER / "experiment.yml").read_text()
    head = [step["name"] for step in mine if "HEAD_SHA" in step.get("env", {})]
    assert head == ["Fetch the pull request, as data", "Gate"]
    tokens = [step["name"] for step in mine if "${{ github.token }}" in step.get("env", {}).values()]
    assert tokens == ["Fetch the pull request, as data", "One comment, updated"]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_pull_request_is_part_of_a_script(name: str) -> None:
    assert not any("${{" in step.get("run", "") for _, step in steps(name))


@pytest.mark.parametrize("name", NAMES)
def test_scripts_call_only_existing_commands_and_files(name: str) -> None:
    """Programs of this environment, modules of this repository, and files in it."""
    for job, step in steps(name):
        script = step.get("run", "").replace("\\\n", " ")
        done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for module in re.findall(r"python3? -m (\S+)", script):
            assert importlib.util.find_spec(module), f"{job}: {module}"
        for path in re.findall(r"(?:--constraint|--requirement|--check) (\S+)", script):
            assert (REPOSITORY / path).exists(), f"{job}: {path}"
    programs = {"ruff", "mypy", "snakefmt", "pytest", "dvc"}
    called = {word for _, step in steps(name) for word in re.findall(r"^ *(\w+)", step.get("run", ""), re.M)}
    assert all(shutil.which(program, path=str(Path(sys.executable).parent)) for program in called & programs)


def test_the_gate_s_job_installs_pinned_versions() -> None:
    script = next(
        step["run"] for job, step in steps("experiment.yml") if job == "gate" and "pip" in step.get("run", "")
    )
    pins = (REPOSITORY / "requirements.lock").read_text()
    names = script.partition("--constraint requirements.lock ")[2].split()
    assert "dvc" in names and all(re.search(rf"^{name.replace('.', '[.-]')}==", pins, re.M) for name in names)


# Their lines, run


@dataclass
class Runner:
    """GitHub's side of a job: variables, expressions, files; ``gh`` and ``pip`` note how they were called."""

    folder: Path
    values: dict[str, str]
    """Of expressions: ``github.event.pull_request.head.sha`` and the like."""
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stubs = self.folder / "bin"
        stubs.mkdir(parents=True)
        for name in ("gh", "pip"):
            note = f'#!/bin/bash\necho "{name} $*" >> "{self.folder}/calls"\n'
            (stubs / name).write_text(note + (f'cat > "{self.folder}/body"\n' if name == "gh" else ""))
            (stubs / name).chmod(stat.S_IRWXU)
        absent = self.folder / "absent"
        absent.mkdir()
        for name in NOT_INSTALLED:
            (absent / f"{name}.py").write_text(f"raise ImportError('the job does not install {name}')\n")
        kept = {
            name: text for name, text in os.environ.items() if not name.startswith(("GITHUB_", "GH_", "PYTHONPATH"))
        }
        files = {f"GITHUB_{name}": str(self.folder / name) for name in ("STEP_SUMMARY", "OUTPUT")}
        path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]])
        address = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "o/r"}
        self.environment = kept | files | address | self.environment
        self.environment |= {"PATH": path, "PYTHONPATH": str(absent), "RUNNER_TEMP": str(self.folder)}

    def would_run(self, job: str) -> bool:
        """The job's condition."""
        text = load("experiment.yml")["jobs"][job]["if"].replace("!cancelled()", "True")
        text = text.replace("&&", " and ").replace("||", " or ")
        return bool(eval(re.sub(r"\b(?:github|needs)(?:\.\w+)+", lambda m: repr(self.values.get(m[0], "")), text)))

    def run(self, job: str) -> int:
        """Every script of a job in the current folder, as GitHub does, to the first that fails."""
        body = load("experiment.yml")["jobs"][job]
        for step in body["steps"]:
            if "run" in step:
                own = {name: self.fill(text) for name, text in (body.get("env", {}) | step.get("env", {})).items()}
                script = ["bash", "-e", "-c", step["run"]]
                done = subprocess.run(script, env=self.environment | own, capture_output=True, text=True)
                self.stderr = done.stderr
                if done.returncode:
                    return done.returncode
        return 0

    def fill(self, text: str) -> str:
        return re.sub(r"\$\{\{ (.+?) \}\}", lambda m: self.values[m[1]], text)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8") if (self.folder / name).exists() else ""

    def page(self) -> str:
        """The job's output, as GitHub reads it."""
        name, _, rest = self.read("OUTPUT").partition("<<")
        end, _, text = rest.partition("\n")
        assert name == "page" and text.endswith(f"{end}\n")
        return text.removesuffix(f"{end}\n")


def pull_request(folder: Path, fork: bool = False) -> Runner:
    """Of the current branch into main: pushed, and main checked out afresh, as actions/checkout does."""
    head, remote = git("rev-parse", "HEAD"), git("remote", "get-url", "origin")
    git("push", "--quiet", "--force", "origin", "HEAD:refs/pull/7/head")
    git("clone", "--quiet", "--branch", "main", remote, str(folder / "checkout"))
    os.chdir(folder / "checkout")
    values = {
        "github.event_name": "pull_request_target",
        "github.event.action": "opened",
        "github.event.pull_request.head.sha": head,
        "github.event.pull_request.number": "7",
        "github.event.pull_request.head.repo.full_name": "someone/r" if fork else "o/r",
        "github.repository": "o/r",
        "github.token": "token",
    }
    return Runner(folder, values, {"GITHUB_BASE_REF": "main", "GITHUB_HEAD_REF": "$(touch owned)"})


def comment(runner: Runner) -> None:
    runner.values["needs.gate.outputs.page"] = runner.page()
    assert runner.would_run("comment")
    assert runner.run("comment") == 0


def test_an_honest_pull_request_passes_with_a_summary_and_a_comment(clone: Clone, tmp_path: Path) -> None:
    clone("rank-4")
    runner = pull_request(tmp_path / "runner")
    head = runner.values["github.event.pull_request.head.sha"]
    assert runner.would_run("gate") and not runner.would_run("full-run")
    assert runner.run("gate") == 0, runner.stderr
    assert runner.read("STEP_SUMMARY") == runner.page()
    assert runner.page().startswith(f"# Experiment: passed\n\nCommit `{head[:10]}` against `origin/main`")
    assert f"https://github.com/o/r/blob/{head}/reports/samples.png?raw=true" in runner.page()
    comment(runner)
    assert "gh pr comment 7 --repo o/r --edit-last --create-if-none --body-file -" in runner.read("calls")
    assert runner.read("body").strip() == runner.page().strip()
    assert not list(tmp_path.rglob("owned"))


def tamper() -> None:
    """A better figure, another rank and other code, each without a run."""
    for path, old, new in (
        ("reports/metrics.json", '"val.loss": 0.', '"val.loss": 0.0'),
        ("params.yaml", "rank: 4", "rank: 16"),
        ("stages/train/loop.py", "from __future__", "#\nfrom __future__"),
    ):
        text = Path(path).read_text(encoding="utf-8")
        assert old in text
        Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")
    shutil.copy("reports/progress.png", "reports/loss.png")
    git("commit", "--quiet", "--all", "--message", "Better than it is")


def test_a_tampered_pull_request_fails_with_files_and_reasons(clone: Clone, tmp_path: Path) -> None:
    clone("rank-4")
    tamper()
    runner = pull_request(tmp_path / "runner")
    assert runner.run("gate") == 2
    for start in (
        "params.yaml lora.rank: got 16, but dvc.lock has 4 (train)",
        "reports/metrics.json: edited since stage validate wrote it",
        "reports/loss.png: edited since stage report wrote it",
        "stages/train: changed since the last run of train",
    ):
        assert f"error: {start}" in runner.stderr
        assert f"- `` {start}" in runner.page()  # the line quotes a command, so its own marks are longer
    comment(runner)
    assert runner.read("body").startswith("# Experiment: failed")


def test_a_pull_request_that_brings_its_own_gate_is_judged_by_the_base_branch_s(clone: Clone, tmp_path: Path) -> None:
    """Its gate passes whatever it sees, and so would its workflow."""
    clone("worse")
    Path("lora_dag/commands/gate/command.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n", encoding="utf-8")
    Path(".github/workflows/experiment.yml").write_text("on: push\n", encoding="utf-8")
    git("commit", "--quiet", "--all", "--message", "Better")
    runner = pull_request(tmp_path / "runner", fork=True)
    assert runner.run("gate") == 2
    assert "report.gates.max_heldout_change: held-out loss +19.90 %" in runner.stderr
    assert runner.page().startswith("# Experiment: failed (this branch changes the gate's code, the workflows)\n")
    assert not (tmp_path / "owned").exists()


def test_a_conflicting_pull_request_fails_with_the_files(clone: Clone, tmp_path: Path) -> None:
    clone("rank-4")
    root = git("rev-parse", "origin/main~1")
    git("reset", "--quiet", "--soft", root)  # as if it had left before main had reports
    git("commit", "--quiet", "--message", "Rank 4 from the start")
    runner = pull_request(tmp_path / "runner")
    assert runner.run("gate") == 2
    assert "conflicts with" in runner.page() and "reports/metrics.json" in runner.page()


def test_events_that_start_a_comment_or_a_full_run(clone: Clone, tmp_path: Path) -> None:
    clone("rank-4")
    ours, fork = (pull_request(tmp_path / name, fork=name == "fork") for name in ("ours", "fork"))
    for runner in (ours, fork):
        runner.values["needs.gate.outputs.page"] = "# Experiment"
        assert runner.would_run("gate") and runner.would_run("comment")
    for runner in (ours, fork):
        runner.values |= {"github.event_name": "pull_request", "github.event.label.name": "full-run"}
    assert ours.would_run("full-run") and not fork.would_run("full-run")
    ours.values["github.actor"] = "dependabot[bot]"
    assert not ours.would_run("comment")
    by_hand = Runner(tmp_path / "by-hand", {"github.event_name": "workflow_dispatch"})
    assert by_hand.would_run("full-run") and not by_hand.would_run("gate")


@pytest.mark.parametrize(
    ("label", "head", "started"),
    [
        ("bug", "o/r", []),
        ("full-run", "o/r", ["full-run"]),
        ("rerun", "o/r", ["full-run"]),
        ("full-run", "someone/r", []),
        ("rerun", "someone/r", []),
    ],
)
def test_a_label_starts_a_full_run_or_nothing(tmp_path: Path, label: str, head: str, started: list[str]) -> None:
    """Nor a second gate, whose comment would replace the first: where the gate is skipped, it has no page."""
    values = {
        "github.event_name": "pull_request",
        "github.event.action": "labeled",
        "github.event.label.name": label,
        "github.event.pull_request.head.repo.full_name": head,
        "github.repository": "o/r",
    }
    runner = Runner(tmp_path / "runner", values)
    assert [job for job in load("experiment.yml")["jobs"] if runner.would_run(job)] == started


@pytest.mark.parametrize(
    ("action", "base", "started"),
    [("synchronize", "", ["gate"]), ("edited", "", []), ("edited", "release", ["gate"])],
)
def test_the_gate_runs_again_for_another_base_branch_but_not_for_another_title(
    tmp_path: Path, action: str, base: str, started: list[str]
) -> None:
    values = {"github.event_name": "pull_request_target", "github.event.action": action}
    runner = Runner(tmp_path / "runner", values | {"github.event.changes.base": base})
    assert [job for job in load("experiment.yml")["jobs"] if runner.would_run(job)] == started


LABEL = "github.event.label.name"


@pytest.mark.slow
def test_a_full_run_replaces_tampered_reports(
    reproduced: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch with another rank and nothing else: stages run, data go to the remote, reports to the branch."""
    reproduced.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    reproduced.dvc("push", "--quiet")
    reproduced.commit("A remote")
    reproduced.git("switch", "--quiet", "--create", "rank-4")
    reproduced.set(lora__rank=4)
    reproduced.commit("Rank 4")
    git("clone", "--quiet", "--bare", str(reproduced.path), str(tmp_path / "remote.git"))
    git("clone", "--quiet", "--branch", "rank-4", str(tmp_path / "remote.git"), str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    assert lock.problems()
    runner = Runner(tmp_path / "runner", {"github.head_ref || github.ref_name": "rank-4"} | {LABEL: "full-run"})
    runner.environment |= {"PYTHONPATH": "", "LORA_STATE_DIR": str(tmp_path / "state")}
    virtual = runner.folder / "bin/python3"
    virtual.write_text(f'#!/bin/bash\nmkdir -p .venv/bin && cp "{runner.folder}/bin/pip" .venv/bin/\n')
    virtual.chmod(stat.S_IRWXU)
    assert runner.run("full-run") == 0, runner.stderr
    git("clone", "--quiet", "--branch", "rank-4", str(tmp_path / "remote.git"), str(tmp_path / "after"))
    monkeypatch.chdir(tmp_path / "after")
    assert git("log", "-1", "--format=%an %s") == "github-actions[bot] Run the experiment"
    changed = git("diff", "--name-only", "HEAD~1").splitlines()
    assert {"dvc.lock", "reports/metrics.json", "reports/samples.png"} <= set(changed)
    assert all(path == "dvc.lock" or path.startswith("reports/") for path in changed)
    assert lock.problems() == [] and recomputed_metrics.problems() == []  # of a real run
    assert runner.run("full-run") == 0, runner.stderr  # nothing is left to do
    assert git("ls-remote", "origin", "rank-4").split()[0] == git("rev-parse", "HEAD")
    invent()
    git("push", "--quiet", "origin", "HEAD")
    assert lock.problems() == []
    assert runner.run("full-run") == 0 and "invented" in Path("reports/dataset.md").read_text(encoding="utf-8")
    runner.values[LABEL] = "rerun"
    assert runner.run("full-run") == 0, runner.stderr
    assert "invented" not in Path("reports/dataset.md").read_text(encoding="utf-8")
    assert git("diff", "--name-only", "HEAD~1").splitlines() == ["dvc.lock", "reports/dataset.md"]


def invent() -> None:
    """A report with its digest in dvc.lock: DVC takes it for up to date."""
    path = Path("reports/dataset.md")
    before = dvc_md5(path)
    path.write_text("invented\n", encoding="utf-8")
    text = Path("dvc.lock").read_text(encoding="utf-8")
    Path("dvc.lock").write_text(text.replace(before, dvc_md5(path)), encoding="utf-8")
    git("commit", "--quiet", "--all", "--message", "Invent a page")
