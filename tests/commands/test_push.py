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
from tests.helpers.errors import assert_line, assert_problem, codes_of
from tests.helpers.exported import ADAPTER, write_adapter
from tests.helpers.hub_server import TOKEN, Hub, Repository, serving
from tests.helpers.reports import LINEAGE, write_reports
from tests.helpers.workspace import REPOSITORY, TINY, Workspace, write_params

NAME = "someone/icons"
PARAMS = TINY | {
    "export": {"license": "mit", "push_to_hub": {"repo_id": NAME, "private": True}},
    "validate": TINY["validate"] | {"prompts": ["red image", "blue boat"]},
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
    """A workspace after export and report; the results of other stages are made up."""
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
    """The workspace has the files of ``made``, and the client has a token and the address of the local server."""
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


def refusal(workspace: Workspace, hub: Hub, *argv: str) -> UserError:
    """Return the error of a push that writes nothing."""
    before = {name: len(found.commits) for name, found in hub.repositories.items()}
    with pytest.raises(UserError) as caught:
        push(workspace, *argv)
    assert all("\n" not in line and TOKEN not in line for line in caught.value.problems)
    assert {name: len(found.commits) for name, found in hub.repositories.items()} == before
    return caught.value


def test_all_files_are_uploaded_in_one_commit(workspace: Workspace, hub: Hub) -> None:
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
    uploaded = [line.split()[1].rstrip(",") for line in lines if line.startswith("upload")]
    assert set(uploaded) == FILES - {".gitattributes"} and lines[-1].startswith(
        f"pushed      {hub.endpoint}/{NAME}/commit"
    )


def test_prompts_of_another_dataset_are_warned_of(workspace: Workspace, hub: Hub) -> None:
    table = Path("reports/dataset/images.csv")
    table.write_text(table.read_text(encoding="utf-8").replace("image", "fox"), encoding="utf-8")
    assert_line("\n".join(push(workspace)), "prompts-unrelated", "params.yaml validate.prompts")


def test_unchanged_files_are_not_uploaded_again(workspace: Workspace, hub: Hub) -> None:
    push(workspace)
    hub.requests.clear()
    lines = push(workspace)
    (line,) = lines[1:]
    assert "6 files" in line
    assert hub.writes() == [] and len(hub.repositories[NAME].commits) == 2


def test_changed_files_are_committed_and_outdated_ones_deleted(workspace: Workspace, hub: Hub) -> None:
    push(workspace)
    kept = {"notes.md": b"mine", "comfyui.txt": b"mine too"}
    hub.repositories[NAME].files |= kept
    formats = ("--set", "export.formats=[diffusers, peft]")
    for stage in ("export", "report"):
        workspace.run(stage, *formats)
    lines = push(workspace, *formats)
    assert [line.split()[1] for line in lines if line.startswith("delete")] == ["comfyui/ink-icons.safetensors,"]
    assert [line.split()[1] for line in lines if line.startswith("upload")] == ["README.md,"]
    files = hub.repositories[NAME].files
    assert kept.items() <= files.items() and "comfyui/ink-icons.safetensors" not in files
    assert len(hub.repositories[NAME].commits) == 3


def test_copies_of_a_rank_that_is_no_longer_exported_are_deleted(workspace: Workspace, hub: Hub) -> None:
    push(workspace)
    outdated = "resized/rank-1/diffusers/pytorch_lora_weights.safetensors"
    hub.repositories[NAME].files[outdated] = b"a copy of rank 1"
    lines = push(workspace)
    assert [line.split()[1] for line in lines if line.startswith("delete")] == [f"{outdated},"]
    assert set(hub.repositories[NAME].files) == FILES


def test_command_line(workspace: Workspace, hub: Hub) -> None:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.helpers.command", "push"]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("pushed      ")
    assert done.stderr == "" and TOKEN not in done.stdout
    done = subprocess.run(command, env=os.environ | own | {"HF_TOKEN": "hf_wrong"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert codes_of(done.stderr) == ["token-rejected"] and done.stderr.count("\n") == 1
    assert_line(done.stderr, "token-rejected", f"{hub.endpoint}/{NAME}", "hf auth login", "HF_TOKEN", "Invalid cred")


def test_token_of_a_login_is_used(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    error = refusal(workspace, hub)
    assert_problem(error, "token-missing", f"{hub.endpoint}/{NAME}", "hf auth login", "HF_TOKEN")
    assert hub.requests == []
    (workspace.path / "no token").write_text(TOKEN)
    assert push(workspace)[-1].startswith("pushed")


@pytest.mark.parametrize("status", [400, 401, 403, 412, 500])
def test_no_output_or_file_contains_the_token(
    workspace: Workspace, hub: Hub, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even if the server sends the token back."""
    caplog.set_level(logging.DEBUG, logger="lora-dag")
    before = workspace.tree(".")
    hub.refusal = (status, {})
    (line,) = refusal(workspace, hub).problems
    assert line.startswith(f"{hub.endpoint}/{NAME}: ") and "You sent Bearer ***" in line
    assert workspace.tree(".") == before and not any(TOKEN.encode() in data for data in before.values())
    shown = capfd.readouterr()
    assert TOKEN not in caplog.text + shown.out + shown.err


# Refusals


def test_repository_must_be_set(workspace: Workspace, hub: Hub) -> None:
    error = refusal(workspace, hub, "--set", "export.push_to_hub=null")
    assert_problem(error, "missing-setting", "--set export.push_to_hub: ", "{repo_id: user/name, private: true}")


@pytest.mark.parametrize(
    ("value", "code", "key"),
    [
        ("{repo_id: icons, private: true}", "wrong-value", "repo_id"),
        ("{repo_id: a/b}", "missing-setting", "private"),
        ("{repo_id: a/b, private: true, token: hf_x}", "unknown-setting", "token"),
    ],
)
def test_settings_are_checked_and_a_token_is_not_accepted(
    workspace: Workspace, hub: Hub, value: str, code: str, key: str
) -> None:
    error = refusal(workspace, hub, "--set", f"export.push_to_hub={value}")
    assert_problem(error, code, f"--set export.push_to_hub.{key}:")
    assert len(error.problems) == 1 and "hf_x" not in error.problems[0]


def test_changed_settings_are_refused(workspace: Workspace, hub: Hub) -> None:
    changes = ("export.seed=7", "validate.seed=7", "report.title=X")
    error = refusal(workspace, hub, *(text for change in changes for text in ("--set", change)))
    export, sheet, card, advice = error.problems
    assert export.startswith("data/export: ") and "export.seed 0" in export and "7" in export
    assert sheet.startswith("reports/samples.png: ") and "validate.seed 0" in sheet and "7" in sheet
    assert_problem(error, "card-outdated", "reports/model_card.md: ")
    assert_problem(error, "nothing-uploaded", "dvc repro")
    assert (card.code, advice.code) == ("card-outdated", "nothing-uploaded")
    assert hub.requests == []


def test_files_of_another_adapter_are_refused(workspace: Workspace, hub: Hub) -> None:
    lineage = LINEAGE | {"validate": params.load(Path("params.yaml")).sections["validate"].model_dump()}
    save_lineage(Path("reports/validate/lineage.json"), lineage)
    adapter = (ADAPTER / "adapter.json").read_text()
    own = sha256_file(ADAPTER / FINAL)
    (ADAPTER / "adapter.json").write_text(adapter.replace(own, "f" * 64))
    error = refusal(workspace, hub)
    export, sheet, card, _ = error.problems
    assert export.startswith("data/export: ") and own[:16] in export and f"data/adapter holds {'f' * 16}" in export
    assert_problem(error, "other-adapter", "reports/samples.png: ", "aaaaaaaaaaaa", "data/export", own[:12])
    assert_problem(error, "card-outdated", "reports/model_card.md: ")
    assert "samples.png" in sheet and card.code == "card-outdated"


def test_extra_missing_and_changed_files_are_refused(workspace: Workspace, hub: Hub) -> None:
    with Path("data/export/peft/adapter_config.json").open("a") as file:
        file.write(" ")
    Path("data/export/mine.txt").write_text("x")
    Path("data/export/comfyui/ink-icons.safetensors").unlink()
    error = refusal(workspace, hub)
    assert error.codes == ("file-not-exported", "file-missing", "file-changed", "nothing-uploaded")
    assert_problem(error, "file-not-exported", "data/export/mine.txt: ")
    assert_problem(error, "file-missing", "data/export/comfyui/ink-icons.safetensors: ")
    assert_problem(error, "file-changed", "data/export/peft/adapter_config.json: ")


def test_missing_file_names_its_stage(workspace: Workspace, hub: Hub) -> None:
    for name in ("export/lineage.json", "samples.png", "model_card.md"):
        Path("reports", name).unlink()
    error = refusal(workspace, hub)
    assert error.codes == ("file-missing",) * 3
    assert_problem(error, "file-missing", "reports/export/lineage.json: ", "python -m stages.export")
    assert_problem(error, "file-missing", "reports/samples.png: ", "python -m stages.validate")
    assert_problem(error, "file-missing", "reports/model_card.md: ", "python -m stages.report")


@pytest.mark.parametrize("private", [True, False])
def test_other_visibility_is_refused(workspace: Workspace, hub: Hub, private: bool) -> None:
    hub.repositories["someone/other"] = Repository(private=private)
    value = f"{{repo_id: someone/other, private: {str(not private).lower()}}}"
    changed = ("--set", f"export.push_to_hub={value}")
    workspace.run("report", *changed)
    value, visibility = ("false", "private") if private else ("true", "public")
    values = (value, f"someone/other is {visibility}", f"{hub.endpoint}/someone/other/settings")
    error = refusal(workspace, hub, *changed)
    assert_problem(error, "repository-visibility", "--set export.push_to_hub.private: ", *values)


def test_card_with_invalid_metadata_is_refused(workspace: Workspace, hub: Hub) -> None:
    hub.repositories[NAME] = Repository(private=True)
    card = Path("reports/model_card.md")
    card.write_text(card.read_text().replace('license: "mit"', 'license: "proprietary"'))
    error = refusal(workspace, hub)
    assert_problem(error, "upload-refused", f"{hub.endpoint}/{NAME}: ", "(Invalid metadata in README.md. -")
    assert hub.objects == {}


def test_concurrent_commit_is_refused(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(workspace)
    hub.repositories[NAME].files["README.md"] = b"edited there"
    monkeypatch.setattr(Repository, "sha", property(lambda self: os.urandom(20).hex()))
    assert_problem(refusal(workspace, hub), "repository-changed", "(A commit has happened since")


def test_no_network(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_problem(refusal(workspace, hub), "hub-unreachable", f"http://127.0.0.1:9/{NAME}: ", "onnect")
