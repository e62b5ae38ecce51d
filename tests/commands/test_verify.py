"""A file's header against the repository, and the search for the revision that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lora_dag.core.console import UserError
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from tests.conftest import Workspace

FILES = [
    Path("data/export/diffusers/pytorch_lora_weights.safetensors"),
    Path("data/export/peft/adapter_model.safetensors"),
    Path("data/export/comfyui/ink-icons.safetensors"),
    Path("data/adapter/adapter.safetensors"),
]


@pytest.fixture
def exported(workspace: Workspace) -> Workspace:
    for stage in ("prepare", "cache_latents", "train", "export"):
        workspace.run(stage)
    return workspace


def differences(workspace: Workspace, file: Path, *argv: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        workspace.run("verify", str(file), *argv)
    return caught.value.problems


def git(*words: str) -> str:
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.com")
    return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_every_file_is_verified_and_nothing_is_written(exported: Workspace) -> None:
    before = exported.tree("data") | exported.tree("reports")
    for file in FILES:
        lines = exported.run("verify", str(file))
        assert lines[-1] == "verified    the file is that of data/adapter and of params.yaml"
        assert "made by     no commit or experiment here" in lines
    assert exported.tree("data") | exported.tree("reports") == before


def test_other_settings_and_another_adapter_are_named(exported: Workspace) -> None:
    kept = Path("old.safetensors")
    kept.write_bytes(FILES[2].read_bytes())
    assert differences(exported, kept, "--set", "lora.rank=4", "--set", "train.seed=7") == (
        "old.safetensors: made with lora.rank 2, params.yaml says 4",
        "old.safetensors: made with train.seed 0, params.yaml says 7",
    )
    exported.run("train", "--set", "train.seed=1")
    (problem,) = differences(exported, kept)
    assert problem.startswith("old.safetensors: its adapter is ") and "data/adapter holds" in problem


def test_changed_tensors_are_noticed(exported: Workspace) -> None:
    file = FILES[0]
    tensors = load_tensors(file)
    name = sorted(tensors)[0]
    save_tensors(file, tensors | {name: tensors[name] + 1}, load_metadata(file))
    assert differences(exported, file) == (f"{file}: its tensors were changed after it was written",)


def test_files_of_others_are_refused(exported: Workspace) -> None:
    save_tensors(Path("other.safetensors"), {"x": next(iter(load_tensors(FILES[0]).values()))})
    assert "has no header of this project (lora_dag)" in differences(exported, Path("other.safetensors"))[0]
    Path("broken.safetensors").write_bytes(b"\0" * 100)
    assert "damaged, or no safetensors file" in differences(exported, Path("broken.safetensors"))[0]
    assert differences(exported, Path("none")) == ("none: no such file",)


def test_the_revision_that_made_it_is_found(exported: Workspace) -> None:
    git("init", "--quiet", ".")
    git("add", "reports/train/metrics.json")
    git("commit", "--quiet", "-m", "first")
    first = git("rev-parse", "HEAD")
    kept = Path("old.safetensors")
    kept.write_bytes(FILES[0].read_bytes())
    exported.run("train", "--set", "train.seed=1")
    git("commit", "--quiet", "-am", "second")
    differences(exported, kept)
    lines = exported.run("verify", str(FILES[3]), "--set", "train.seed=1")
    second = git("rev-parse", "HEAD")
    assert f"made by     {second[:12]}: git checkout {second[:12]} && dvc repro" in lines
    from lora_dag.commands.verify import made_by, read

    assert made_by(read(kept)["adapter"]) == first
    git("update-ref", "refs/exps/12/3456/calm-owl", first)
    git("checkout", "--quiet", "--orphan", "other")
    assert made_by(read(kept)["adapter"]) == first
    assert made_by("0" * 64) == ""


def test_another_step_than_params_asks_for_is_named(exported: Workspace) -> None:
    end = Path("end.safetensors")
    end.write_bytes(FILES[2].read_bytes())
    exported.run("export", "--set", "export.step=2")
    line = "made of the adapter at step {}, params.yaml export.step asks for {}"
    assert differences(exported, FILES[2]) == (f"{FILES[2]}: {line.format(2, 4)}",)
    assert differences(exported, end, "--set", "export.step=2") == (f"{end}: {line.format(4, 2)}",)
    assert "step        2" in exported.run("verify", str(FILES[2]), "--set", "export.step=2")
    exported.run("verify", str(end), "--set", "export.step=4")
