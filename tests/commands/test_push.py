"""Pushing to a local stand-in of the Hub (hub_server.py): one commit, none without a change, no token anywhere."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lora_dag.artifacts.adapter import FINAL
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core import params
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_file
from tests.conftest import REPOSITORY, TINY, Workspace, write_params
from tests.helpers.exported import ADAPTER, write_adapter
from tests.helpers.hub_server import TOKEN, Hub, Repository, serving
from tests.helpers.reports import LINEAGE, write_reports

NAME = "someone/icons"
PARAMS = TINY | {
    "export": {"license": "mit", "push_to_hub": {"repo_id": NAME, "private": True}},
    "validate": TINY["validate"] | {"prompts": ["red picture", "blue boat"]},
}
FILES = {
    ".gitattributes",
    "README.md",
    "samples.png",
    "comfyui/ink-icons.safetensors",
    "diffusers/pytorch_lora_weights.safetensors",
    "peft/adapter_config.json",
    "peft/adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workspace after export and report; what the other stages say is made up."""
    folder = tmp_path_factory.mktemp("pushed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params(Path("params.yaml"), PARAMS)
        Path("data").mkdir()
        Path("data/base").symlink_to(tiny_base)
        write_adapter()
        write_reports(Path("reports"))
        settings = params.load(Path("params.yaml")).sections["validate"].model_dump()
        lineage = LINEAGE | {"adapter": sha256_file(ADAPTER / FINAL)[:12], "validate": settings}
        save_lineage(Path("reports/validate/lineage.json"), lineage)
        for stage in ("export", "report"):
            patch.setattr(sys, "argv", [stage])
            importlib.import_module(f"stages.{stage}.__main__").main()
    return folder


@pytest.fixture
def hub(workspace: Workspace, made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The workspace holds what ``made`` does, and the client asks the stand-in, with a token."""
    shutil.rmtree("data/raw")
    shutil.copytree(made, ".", dirs_exist_ok=True, symlinks=False, ignore=shutil.ignore_patterns("base"))
    with serving() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(workspace.path / "no token"))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server


def push(workspace: Workspace, *argv: str) -> list[str]:
    return workspace.run("push", *argv)


def refusal(workspace: Workspace, hub: Hub, *argv: str) -> tuple[str, ...]:
    """Why nothing was written there, a line each."""
    before = {name: len(found.commits) for name, found in hub.repositories.items()}
    with pytest.raises(UserError) as caught:
        push(workspace, *argv)
    assert all("\n" not in line and TOKEN not in line for line in caught.value.problems)
    assert {name: len(found.commits) for name, found in hub.repositories.items()} == before
    return caught.value.problems


def test_everything_goes_up_in_one_commit(workspace: Workspace, hub: Hub) -> None:
    lines = push(workspace)
    repository = hub.repositories[NAME]
    assert set(repository.files) == FILES and repository.private
    assert repository.commits[1:] == [f"Adapter {sha256_file(ADAPTER / FINAL)[:16]}"]
    for name in FILES - {".gitattributes", "README.md", "samples.png"}:
        assert repository.files[name] == Path("data/export", name).read_bytes(), name
    assert repository.files["README.md"] == Path("reports/model_card.md").read_bytes()
    assert repository.files["samples.png"] == Path("reports/samples.png").read_bytes()
    assert not any("warning" in line for line in lines)
    assert lines[0] == f"repository  {hub.endpoint}/{NAME} (new, private)"
    said = [line.split()[1].rstrip(",") for line in lines if line.startswith("upload")]
    assert set(said) == FILES - {".gitattributes"} and lines[-1].startswith(f"pushed      {hub.endpoint}/{NAME}/commit")


def test_samples_of_prompts_that_are_another_dataset_s_are_warned_of(workspace: Workspace, hub: Hub) -> None:
    table = Path("reports/dataset/pictures.csv")
    table.write_text(table.read_text(encoding="utf-8").replace("picture", "fox"), encoding="utf-8")
    assert push(workspace)[0].startswith("warning: params.yaml validate.prompts: no prompt has a word of any caption")


def test_what_stands_there_is_not_pushed_again(workspace: Workspace, hub: Hub) -> None:
    push(workspace)
    hub.requests.clear()
    lines = push(workspace)
    assert lines[1:] == ["nothing to do: it holds these 6 files"]
    assert hub.writes() == [] and len(hub.repositories[NAME].commits) == 2


def test_only_what_changed_is_committed_and_what_is_exported_no_more_goes(workspace: Workspace, hub: Hub) -> None:
    push(workspace)
    kept = {"notes.md": b"mine", "comfyui.txt": b"mine too"}
    hub.repositories[NAME].files |= kept
    formats = ("--set", "export.formats=[diffusers, peft]")
    for stage in ("export", "report"):
        workspace.run(stage, *formats)
    lines = push(workspace, *formats)
    assert "delete      comfyui/ink-icons.safetensors, which is exported no more" in lines
    assert [line.split()[1] for line in lines if line.startswith("upload")] == ["README.md,"]
    files = hub.repositories[NAME].files
    assert kept.items() <= files.items() and "comfyui/ink-icons.safetensors" not in files
    assert len(hub.repositories[NAME].commits) == 3


def test_as_a_person_runs_it(workspace: Workspace, hub: Hub) -> None:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.helpers.command", "push"]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("pushed      ")
    assert done.stderr == "" and TOKEN not in done.stdout
    done = subprocess.run(command, env=os.environ | own | {"HF_TOKEN": "hf_wrong"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {hub.endpoint}/{NAME}: the token is not accepted; run `hf auth login`, or set HF_TOKEN "
        "(Invalid credentials in Authorization header)\n"
    )


def test_the_token_of_a_login_is_taken(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(workspace, hub) == (f"{hub.endpoint}/{NAME}: no token; run `hf auth login`, or set HF_TOKEN",)
    assert hub.requests == []
    (workspace.path / "no token").write_text(TOKEN)
    assert push(workspace)[-1].startswith("pushed")


@pytest.mark.parametrize("status", [400, 401, 403, 412, 500])
def test_no_token_in_what_is_said_or_left_behind(
    workspace: Workspace, hub: Hub, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even of a server that sends it back."""
    caplog.set_level(logging.DEBUG, logger="lora-dag")
    before = workspace.tree(".")
    hub.refusal = (status, {})
    (line,) = refusal(workspace, hub)
    assert line.startswith(f"{hub.endpoint}/{NAME}: ") and "You sent Bearer ***" in line
    assert workspace.tree(".") == before and not any(TOKEN.encode() in data for data in before.values())
    shown = capfd.readouterr()
    assert TOKEN not in caplog.text + shown.out + shown.err


# Refused


def test_no_repository_is_named(workspace: Workspace, hub: Hub) -> None:
    assert refusal(workspace, hub, "--set", "export.push_to_hub=null") == (
        "params.yaml export.push_to_hub: null; set it to {repo_id: user/name, private: true}",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{repo_id: icons, private: true}", "params.yaml export.push_to_hub.repo_id: got 'icons'; string should match"),
        ("{repo_id: a/b}", "params.yaml export.push_to_hub.private: missing; expected bool"),
        ("{repo_id: a/b, private: true, token: hf_x}", "params.yaml export.push_to_hub.token: unknown key"),
    ],
)
def test_settings_are_checked_and_a_token_is_none_of_them(
    workspace: Workspace, hub: Hub, value: str, message: str
) -> None:
    (line,) = refusal(workspace, hub, "--set", f"export.push_to_hub={value}")
    assert line.startswith(message) and "hf_x" not in line


def test_settings_that_made_nothing_here(workspace: Workspace, hub: Hub) -> None:
    assert refusal(workspace, hub, "--set", "export.seed=7", "--set", "validate.seed=7", "--set", "report.title=X") == (
        "data/export: made with export.seed 0, params.yaml says 7",
        "reports/samples.png: made with validate.seed 0, params.yaml says 7",
        "reports/model_card.md: written for other reports or settings than stand here",
        "nothing was uploaded: run `dvc repro`, then push again",
    )
    assert hub.requests == []


def test_files_of_another_adapter(workspace: Workspace, hub: Hub) -> None:
    lineage = LINEAGE | {"validate": params.load(Path("params.yaml")).sections["validate"].model_dump()}
    save_lineage(Path("reports/validate/lineage.json"), lineage)
    adapter = (ADAPTER / "adapter.json").read_text()
    own = sha256_file(ADAPTER / FINAL)
    (ADAPTER / "adapter.json").write_text(adapter.replace(own, "f" * 64))
    assert refusal(workspace, hub)[:3] == (
        f"data/export: its adapter is {own[:16]}, data/adapter holds {'f' * 16}",
        f"reports/samples.png: its adapter is aaaaaaaaaaaa, data/export holds {own[:12]}",
        "reports/model_card.md: written for other reports or settings than stand here",
    )


def test_files_that_export_did_not_write_so(workspace: Workspace, hub: Hub) -> None:
    with Path("data/export/peft/adapter_config.json").open("a") as file:
        file.write(" ")
    Path("data/export/mine.txt").write_text("x")
    Path("data/export/comfyui/ink-icons.safetensors").unlink()
    assert refusal(workspace, hub)[:-1] == (
        "data/export/mine.txt: not written by export; move it elsewhere",
        "data/export/comfyui/ink-icons.safetensors: no such file",
        "data/export/peft/adapter_config.json: changed since it was written",
    )


def test_what_is_missing_names_its_stage(workspace: Workspace, hub: Hub) -> None:
    for name in ("export/lineage.json", "samples.png", "model_card.md"):
        Path("reports", name).unlink()
    assert refusal(workspace, hub) == (
        "reports/export/lineage.json: no such file; run `python -m stages.export` first",
        "reports/samples.png: no such file; run `python -m stages.validate` first",
        "reports/model_card.md: no such file; run `python -m stages.report` first",
    )


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_others_see_otherwise(workspace: Workspace, hub: Hub, private: bool) -> None:
    hub.repositories["someone/other"] = Repository(private=private)
    value = f"{{repo_id: someone/other, private: {str(not private).lower()}}}"
    changed = ("--set", f"export.push_to_hub={value}")
    workspace.run("report", *changed)
    said, is_now = ("false", "private") if private else ("true", "public")
    assert refusal(workspace, hub, *changed) == (
        f"params.yaml export.push_to_hub.private: {said}, but someone/other is {is_now}; change one of them: "
        f"{hub.endpoint}/someone/other/settings",
    )


def test_a_card_that_the_hub_does_not_take(workspace: Workspace, hub: Hub) -> None:
    hub.repositories[NAME] = Repository(private=True)
    card = Path("reports/model_card.md")
    card.write_text(card.read_text().replace('license: "mit"', 'license: "proprietary"'))
    (line,) = refusal(workspace, hub)
    assert line.startswith(f"{hub.endpoint}/{NAME}: refused (Invalid metadata in README.md. -")
    assert hub.objects == {}


def test_a_commit_that_came_between(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(workspace)
    hub.repositories[NAME].files["README.md"] = b"edited there"
    monkeypatch.setattr(Repository, "sha", property(lambda self: os.urandom(20).hex()))
    (line,) = refusal(workspace, hub)
    assert "it was changed meanwhile; push again (A commit has happened since" in line


def test_no_network(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    (line,) = refusal(workspace, hub)
    assert line.startswith(f"http://127.0.0.1:9/{NAME}: cannot be reached; push again (") and "onnect" in line
