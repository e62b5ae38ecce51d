"""Family sd on a folder like Stable Diffusion 1.5 on the Hub: fp16 variant, PNDM, safety checker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.bases import component_files, diffusers_folder
from lora_dag.core.params import ModelParams
from lora_dag.families import sd
from tests.helpers.workspace import Workspace


@pytest.fixture(scope="module")
def sd15(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base in float16 as ``*.fp16.safetensors``, with the further files and index entries of SD 1.5."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("hub") / "sd15"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float16, safety_checker=None)
    pipeline.save_pretrained(folder, variant="fp16")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [" ".join(pair) for pair in tokenizer["merges"]]
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer/tokenizer.json").unlink()
    return folder


def params(folder: Path, variant: str | None = "fp16") -> ModelParams:
    return ModelParams(family="sd", pretrained=str(folder), variant=variant, dtype="float32", quantization=None)


def test_the_hub_layout_is_accepted_and_digests_cover_the_variant(sd15: Path, tmp_path: Path) -> None:
    assert diffusers_folder.folder_problems(params(sd15), sd) == []
    before = component_files.digests(params(sd15), sd.COMPONENTS)
    both = tmp_path / "both"
    shutil.copytree(sd15, both)
    (both / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"the other variant, which nothing reads")
    assert component_files.digests(params(both), sd.COMPONENTS) == before
    (both / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"edited")
    assert component_files.digests(params(both), sd.COMPONENTS)["unet"] != before["unet"]


def test_tokens_are_the_same_from_vocab_and_merges(sd15: Path, tiny_base: Path) -> None:
    captions = ["red apple", "a blue boat, ink icon"]
    assert sd.count_tokens(params(sd15), captions) == sd.count_tokens(params(tiny_base, None), captions)
    assert (
        sd.load_tokenizer(params(sd15))(captions).input_ids
        == sd.load_tokenizer(params(tiny_base, None))(captions).input_ids
    )


def test_every_stage_runs_on_it(workspace: Workspace, sd15: Path) -> None:
    formats = "export.formats=[diffusers, peft, comfyui, merged]"
    overrides = [w for kv in (f"model.pretrained={sd15}", "model.variant=fp16", formats) for w in ("--set", kv)]
    for stage in ("prepare", "cache_latents", "train", "validate", "export", "report"):
        workspace.run(stage, *overrides)
    metrics = json.loads(Path("reports/export/metrics.json").read_text())
    for name in ("diffusers", "peft", "comfyui", "merged"):
        assert metrics[f"export.{name}.max_abs_error"] <= 1e-5 < metrics["export.effect"]
    assert Path("data/export/merged/unet/diffusion_pytorch_model.safetensors").exists()
    assert 'variant="fp16"' in Path("reports/model_card.md").read_text()


def test_zero_terminal_snr_is_the_schedulers_word(workspace: Workspace, tiny_base: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    base = tmp_path / "zero"
    shutil.copytree(tiny_base, base)
    DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    ).save_pretrained(base / "scheduler")
    noise_scheduler = sd.load_scheduler(params(base, None))
    assert noise_scheduler.alphas_cumprod[-1] == 0 and noise_scheduler.config.prediction_type == "v_prediction"
    overrides = ("--set", f"model.pretrained={base}", "--set", "train.loss_weighting=min_snr")
    overrides += ("--set", "train.snr_gamma=5.0")
    for stage in ("prepare", "cache_latents", "train", "validate"):
        workspace.run(stage, *overrides)
    assert load_lineage(Path("reports/validate/lineage.json"))["table"]["prediction_type"] == "v_prediction"


def test_everything_loaded_is_frozen_and_in_eval_mode(sd15: Path) -> None:
    device = torch.device("cpu")
    model = params(sd15).model_copy(update={"dtype": "bfloat16"})
    for module in (
        sd.load_vae(model, device),
        sd.load_text(model, device)["text_encoder"][1],
        sd.load_denoiser(model, device),
    ):
        assert not module.training
        assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in module.parameters())


def test_small_latents_in_bfloat16_are_attended_without_sdpa_on_a_cpu(tiny_base: Path) -> None:
    for dtype, processor in (("bfloat16", "AttnProcessor"), ("float32", "AttnProcessor2_0")):
        model = ModelParams(family="sd", pretrained=str(tiny_base), variant=None, dtype=dtype, quantization=None)
        unet = sd.load_denoiser(model, torch.device("cpu"))
        assert {type(found).__name__ for found in unet.attn_processors.values()} == {processor}


def test_sharded_weights_are_digested_and_a_missing_shard_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_base, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    sd.load_denoiser(params(tiny_base, None), torch.device("cpu")).save_pretrained(
        folder / "unet", max_shard_size="400KB"
    )
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and diffusers_folder.folder_problems(params(folder, None), sd) == []
    whole, parts = (sd.load_denoiser(params(base, None), torch.device("cpu")) for base in (tiny_base, folder))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    before = component_files.digests(params(folder, None), sd.COMPONENTS)
    content = bytearray(shards[-1].read_bytes())
    content[-1] ^= 1
    shards[-1].write_bytes(content)
    assert component_files.digests(params(folder, None), sd.COMPONENTS)["unet"] != before["unet"]
    shards[-1].unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    missing = f"1 of {len(shards)} shards are missing, such as {shards[-1].name}."
    (problem,) = diffusers_folder.folder_problems(params(folder, None), sd)
    assert problem.code == "shards-missing" and problem.startswith(f"{index}: {missing}")
    index.write_text("[]")
    problems = diffusers_folder.folder_problems(params(folder, None), sd)
    assert any(problem.code == "base-damaged" and problem.startswith(f"{index}: no index") for problem in problems)
    index.unlink()
    without = "a shard without its index (*.safetensors.index.json)"
    (problem,) = diffusers_folder.folder_problems(params(folder, None), sd)
    assert problem.code == "shards-missing" and problem.startswith(f"{shards[0]}: {without}")
