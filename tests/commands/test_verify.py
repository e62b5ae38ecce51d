"""Comparison of a file's header with the repository, and the search for the revision that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lora_dag.core.console import Problem, UserError
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from tests.helpers.errors import refused
from tests.helpers.workspace import Workspace

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


def differences(workspace: Workspace, file: Path, *argv: str) -> tuple[Problem, ...]:
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
        assert lines[-1] == "verified    the file matches data/adapter and params.yaml"
        assert "made by     no commit or experiment here" in lines
    assert exported.tree("data") | exported.tree("reports") == before


def test_other_settings_and_another_adapter_are_named(exported: Workspace) -> None:
    kept = Path("old.safetensors")
    kept.write_bytes(FILES[2].read_bytes())
    rank, seed = differences(exported, kept, "--set", "lora.rank=4", "--set", "train.seed=7")
    assert rank.code == seed.code == "other-setting"
    assert rank.startswith("old.safetensors: made with lora.rank 2, ") and "--set lora.rank is 4" in rank
    assert seed.startswith("old.safetensors: made with train.seed 0, ") and "--set train.seed is 7" in seed
    exported.run("train", "--set", "train.seed=1")
    (problem,) = differences(exported, kept)
    assert problem.code == "other-adapter" and problem.startswith("old.safetensors: ") and "data/adapter" in problem


def test_changed_tensors_are_noticed(exported: Workspace) -> None:
    file = FILES[0]
    tensors = load_tensors(file)
    name = sorted(tensors)[0]
    save_tensors(file, tensors | {name: tensors[name] + 1}, load_metadata(file))
    with refused("adapter-changed", str(file)):
        exported.run("verify", str(file))


def test_files_of_others_are_refused(exported: Workspace) -> None:
    save_tensors(Path("other.safetensors"), {"x": next(iter(load_tensors(FILES[0]).values()))})
    with refused("no-provenance", "other.safetensors: "):
        exported.run("verify", "other.safetensors")
    Path("broken.safetensors").write_bytes(b"\0" * 100)
    with refused("adapter-damaged", "broken.safetensors: "):
        exported.run("verify", "broken.safetensors")
    with refused("file-missing", "data: a folder"):
        exported.run("verify", "data")
    with refused("file-missing", "none: "):
        exported.run("verify", "none")


def test_the_revision_that_made_a_file_is_found(exported: Workspace) -> None:
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
    from lora_dag.commands.verify import find_revision, read_provenance

    assert find_revision(read_provenance(kept)["adapter"]) == first
    git("update-ref", "refs/exps/12/3456/calm-owl", first)
    git("checkout", "--quiet", "--orphan", "other")
    assert find_revision(read_provenance(kept)["adapter"]) == first
    assert find_revision("0" * 64) == ""


def test_another_step_than_params_selects_is_named(exported: Workspace) -> None:
    end = Path("end.safetensors")
    end.write_bytes(FILES[2].read_bytes())
    exported.run("export", "--set", "export.step=2")
    with refused("other-step", f"{FILES[2]}: ", "at step 2", "params.yaml export.step selects 4"):
        exported.run("verify", str(FILES[2]))
    with refused("other-step", "end.safetensors: ", "at step 4", "--set export.step selects 2"):
        exported.run("verify", str(end), "--set", "export.step=2")
    assert "step        2" in exported.run("verify", str(FILES[2]), "--set", "export.step=2")
    exported.run("verify", str(end), "--set", "export.step=4")
