"""Features of Stable Diffusion 3: an optional T5 encoder with the highest token limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from lora_dag.bases import component_files, diffusers_folder
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_tensors
from lora_dag.families import sd3
from tests.helpers.errors import assert_line, codes_of, refused
from tests.helpers.families import stock_of
from tests.helpers.workspace import Workspace

CPU = torch.device("cpu")


def params(base: Path) -> ModelParams:
    return ModelParams(family="sd3", pretrained=str(base), variant=None, dtype="float32", quantization=None)


@pytest.fixture(scope="module")
def without_t5(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pipeline as diffusers saves it after ``text_encoder_3=None, tokenizer_3=None``."""
    folder = tmp_path_factory.mktemp("sd3") / "base"
    pipe = StableDiffusion3Pipeline.from_pretrained(bases["sd3"], text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(folder)
    return folder


def test_a_base_without_t5_is_accepted_and_encodes_zeros_in_its_place(without_t5: Path, bases: dict[str, Path]) -> None:
    model = params(without_t5)
    assert diffusers_folder.folder_problems(model, sd3) == []
    found = sd3.encode_prompts(sd3.load_text(model, CPU), ["red apple", ""])
    with torch.no_grad():
        pipe = StableDiffusion3Pipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)
        expected = stock_of("sd3").encode(pipe, ["red apple", ""])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    whole = sd3.encode_prompts(sd3.load_text(params(bases["sd3"]), CPU), ["red apple", ""])
    assert found["prompt_embeds"].shape == whole["prompt_embeds"].shape == (2, 20 + 256, 64)
    assert torch.equal(found["prompt_embeds"][:, :20], whole["prompt_embeds"][:, :20])
    assert not found["prompt_embeds"][:, 20:].any()


def test_leaving_t5_out_is_another_base(without_t5: Path, bases: dict[str, Path]) -> None:
    without, whole = (component_files.digests(params(base), sd3.COMPONENTS) for base in (without_t5, bases["sd3"]))
    assert without["text_encoder_3"] == without["tokenizer_3"] == "absent"
    with refused("base-changed", "data/latents", "text_encoder_3", "tokenizer_3"):
        component_files.require_same_base(without, whole, Path("data/latents"))


def test_a_listed_t5_without_a_folder_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["sd3"], base)
    shutil.rmtree(base / "text_encoder_3")
    (problem,) = diffusers_folder.folder_problems(params(base), sd3)
    assert problem.code == "base-incomplete" and problem.startswith(f"{base / 'text_encoder_3'}: no such folder")
    assert "T5EncoderModel" in problem and '"text_encoder_3": [null, null]' in problem


def test_the_whole_dag_without_t5(workspace: Workspace, without_t5: Path) -> None:
    Path("data/base").unlink()
    Path("data/base").symlink_to(without_t5)
    formats = "export.formats=[diffusers, merged]"
    for stage in ("prepare", "cache_latents", "train", "validate", "export", "report"):
        workspace.run(stage, "--set", "model.family=sd3", "--set", "train.num_steps=2", "--set", formats)
    metrics = json.loads(Path("reports/export/metrics.json").read_text())
    assert metrics["export.diffusers.max_abs_error"] <= 1e-4 < metrics["export.effect"]
    assert metrics["export.merged.max_abs_error"] <= 1e-4
    card = Path("reports/model_card.md").read_text()
    assert 'from_pretrained("data/base", text_encoder_3=None, tokenizer_3=None)' in card
    assert 'from_pretrained("data/export/merged", text_encoder_3=None, tokenizer_3=None)' in card


UNREAD = "transformer_blocks.1.attn.add_q_proj"
"""Of the last block: captions end there."""


@pytest.mark.parametrize(
    ("target_modules", "takes_unread"), [("attention", False), ("all-linear", False), ("[to_q, add_q_proj]", True)]
)
def test_a_layer_without_gradient_is_a_warning(
    workspace: Workspace, bases: dict[str, Path], target_modules: str, takes_unread: bool
) -> None:
    """Presets exclude it. Chosen by hand it stays untrained, with a warning, and the run succeeds."""
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases["sd3"])
    changes = ("model.family=sd3", f"lora.target_modules={target_modules}", "train.num_steps=5")
    argv = [word for change in changes for word in ("--set", change)]
    lines = [line for stage in ("prepare", "cache_latents", "train", "export") for line in workspace.run(stage, *argv)]
    log = "\n".join(lines)
    assert codes_of(log).count("no-gradient") == takes_unread
    if takes_unread:
        assert_line(log, "no-gradient", UNREAD, "lora.exclude_modules")
    tensors = load_tensors(Path("data/adapter/adapter.safetensors"))
    assert (f"{UNREAD}.lora_B.weight" in tensors) == takes_unread
    assert "transformer_blocks.0.attn.add_q_proj.lora_B.weight" in tensors
    untouched = {name for name, tensor in tensors.items() if not tensor.any()}
    assert untouched == ({f"{UNREAD}.lora_B.weight"} if takes_unread else set())
    metrics = json.loads(Path("reports/export/metrics.json").read_text())
    for kind in ("diffusers", "peft", "comfyui"):
        assert metrics[f"export.{kind}.max_abs_error"] <= 1e-5 < metrics["export.effect"]


def test_t5_sets_the_token_limit(bases: dict[str, Path], without_t5: Path) -> None:
    assert sd3.max_tokens(params(bases["sd3"])) == 256
    assert sd3.max_tokens(params(without_t5)) == 20
    (count,) = sd3.count_tokens(params(bases["sd3"]), ["thing " * 300])
    assert count > 256


def test_min_snr_is_refused(workspace: Workspace, bases: dict[str, Path]) -> None:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases["sd3"])
    overrides = ["--set", "model.family=sd3"]
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage, *overrides)
    weighting = ["--set", "train.loss_weighting=min_snr", "--set", "train.snr_gamma=5.0"]
    for stage in ("check", "train"):
        with refused("needs-snr", "--set train.loss_weighting: min_snr", "flow_prediction", "uniform"):
            workspace.run(stage, *overrides, *weighting)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        (["dataset.resolution=72"], ("got 72, ", "up to 64 pixels", "multiple of 8 up to 64")),
        (
            ["dataset.resolution=64", "dataset.aspect_buckets=true"],
            ("up to 80 pixels", "up to 64 pixels", "dataset.max_aspect_ratio"),
        ),
    ],
    ids=["square", "buckets"],
)
def test_a_side_without_positions_is_refused_before_anything_is_cut(
    workspace: Workspace, bases: dict[str, Path], changes: list[str], values: tuple[str, ...]
) -> None:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases["sd3"])
    overrides = [
        word for change in ("model.family=sd3", "dataset.max_upscale=2", *changes) for word in ("--set", change)
    ]
    with refused("resolution-too-large", "--set dataset.resolution: ", "data/base", *values):
        workspace.run("check", *overrides)
