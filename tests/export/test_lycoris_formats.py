"""LoKr and LoHa through the stages: trained, killed and resumed, exported, and loaded back by other people's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import save_file

from lora_dag.adapters import lora
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.families.protocol import load_family
from lora_dag.formats.comfyui import reader
from stages.export.params import format_problems
from tests.helpers.adapters import ADAPTER, ATTENTION, COMFYUI, CONV, adapt, algo, kind, loaded, predict, unet
from tests.helpers.errors import assert_problem
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import Workspace


def settings(name: str, **changes: Any) -> list[str]:
    """Arguments for a stage."""
    values = algo(name, **changes) | {"alpha": 4}
    return [word for key, value in values.items() for word in ("--set", f"lora.{key}={json.dumps(value)}")]


# Formats


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("lokr-whole", "none"),
        ("lokr-tucker", "none"),
        ("loha-tucker", "none"),
        ("lokr-both", "lora_only"),
        ("loha", "all"),
    ],
)
def test_every_format_matches_the_adapter_or_is_refused(workspace: Workspace, name: str, mode: str) -> None:
    denoiser = adapt(workspace, **algo(name, bias=mode, alpha=6.0))
    expected = predict(denoiser)
    written = ["comfyui", "merged"] + (["peft"] if mode == "none" else [])
    with pytest.raises(UserError, match=r"Use comfyui(, peft)? or merged") as caught:
        workspace.run("export", "--set", "export.formats=[diffusers, peft, comfyui, merged]")
    assert len(caught.value.problems) == 4 - len(written) and not Path("data/export").exists()
    workspace.run("export", "--set", f"export.formats=[{', '.join(written)}]")
    metrics = read_json(Path("reports/export/metrics.json"))
    assert metrics["export.effect"] > 0.01
    for file in written:
        assert metrics[f"export.{file}.unmapped_keys"] == 0
        assert (loaded(file) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), file
    lora.set_scale(denoiser, 0.25)
    with reader.patched(fresh := unet(), COMFYUI, strength=0.25):
        torch.testing.assert_close(predict(fresh), predict(denoiser), atol=1e-5, rtol=1e-5)
    require_lycoris_keys(name, lora.state_dict(denoiser))


def require_lycoris_keys(name: str, own: dict[str, torch.Tensor]) -> None:
    """PEFT's leaves and alpha below kohya's module names; two whole factors carry their scale themselves."""
    tensors = load_tensors(COMFYUI)
    for module in (CONV, ATTENTION):
        key = f"lora_unet_{module.replace('.', '_')}"
        leaves = {other.removeprefix(f"{module}.") for other in own if other.startswith(f"{module}.")}
        biases = {"diff_b"} if "bias_delta" in leaves else set()
        found = {other.removeprefix(f"{key}.") for other in tensors if other.startswith(f"{key}.")}
        if "lokr_t2" in leaves:  # which ComfyUI leaves out
            leaves = leaves - {"lokr_t2", "lokr_w2_a", "lokr_w2_b"} | {"lokr_w2"}
        assert found == leaves - {"bias_delta"} | biases | {"alpha"}
        rank = 4.0 if name == "lokr-whole" else 2.0
        assert tensors[f"{key}.alpha"] == (rank if {"lokr_w1", "lokr_w2"} <= leaves else 6.0)
    header = load_metadata(COMFYUI)
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"]) == {"algo": name.partition("-")[0]}


def test_diffusers_cannot_read_lycoris(workspace: Workspace, tmp_path: Path) -> None:
    tensors = lora.state_dict(adapt(workspace, **algo("lokr")))
    named = {f"unet.{key}": tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(named, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(tmp_path)


def test_refused_formats_have_a_reason_and_an_alternative() -> None:
    (diffusers,) = format_problems(["diffusers", "peft"], kind(algo="lokr", denoiser="transformer"))
    assert diffusers.startswith("params.yaml export.formats: diffusers ") and diffusers.code == "format-unsupported"
    assert "lora.algo is lokr" in diffusers and diffusers.endswith("Use comfyui, peft or merged.")
    (peft,) = format_problems(["peft"], kind(algo="loha", bias="lora_only"))
    assert "lora.algo loha" in peft and "lora.bias lora_only" in peft and peft.endswith("Use comfyui or merged.")
    both = format_problems(["diffusers", "peft"], kind(algo="loha", bias="all", denoiser="transformer"))
    assert len(both) == 2 and all(problem.endswith("Use merged.") for problem in both)


def test_check_refuses_before_training(workspace: Workspace) -> None:
    with pytest.raises(UserError) as caught:
        workspace.run("check", *settings("loha"))
    assert caught.value.problems == tuple(format_problems(["diffusers"], kind(algo="loha")))
    with pytest.raises(UserError) as caught:
        workspace.run("check", "--set", "lora.algo=lokr", "--set", "lora.dropout=0.1", "--set", "lora.use_dora=true")
    assert caught.value.codes == ("setting-of-other-algo",) * 3
    for start, value in (
        ("dropout: got 0.1", " 0."),
        ("use_dora: got true", "false"),
        ("init_lora_weights", "kaiming"),
    ):
        assert_problem(
            caught.value,
            "setting-of-other-algo",
            f"{'params.yaml' if start == 'init_lora_weights' else '--set'} lora.{start}",
            "lokr",
            value,
        )


# The stages


def test_killed_run_ends_in_the_same_bytes(workspace: Workspace) -> None:
    argv = settings("lokr-both", bias="all") + ["--set", "export.formats=[comfyui, merged]"]
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage, *argv)
    lines = workspace.run("train", *argv)
    assert any(line.startswith("lokr  ") for line in lines)
    expected = workspace.tree("data/adapter")
    with broken_off(3):
        workspace.run("train", *argv)
    assert "resumed from step 2" in workspace.run("train", *argv)
    assert workspace.tree("data/adapter") == expected
    for stage in ("validate", "export", "report"):
        workspace.run(stage, *argv)
    assert "LoKr" in Path("reports/report.md").read_text()
    adapter = Adapter.load(ADAPTER)
    assert adapter.lora_config["algo"] == "lokr" and adapter.made_from["lora"]["decompose_factor"] == 16
    assert "lora_dropout" not in adapter.lora_config
    for file in (ADAPTER / FINAL, COMFYUI):
        assert any(line.startswith("verified") for line in workspace.run("verify", *argv, str(file)))


@pytest.mark.parametrize(
    ("family", "cls", "name"), [("sd3", SD3Transformer2DModel, "lokr"), ("flux", FluxTransformer2DModel, "loha")]
)
def test_a_transformer_end_to_end(
    workspace: Workspace, bases: dict[str, Path], family: str, cls: Any, name: str
) -> None:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases[family])
    argv = [*settings(name, target_modules="all-linear"), "--set", f"model.family={family}"]
    argv += ["--set", "train.num_steps=3", "--set", "export.formats=[peft, comfyui, merged]"]
    for stage in ("prepare", "cache_latents", "train", "export"):
        workspace.run(stage, *argv)
    metrics = read_json(Path("reports/export/metrics.json"))
    assert metrics["export.effect"] > 1e-4 and all(v == 0 for k, v in metrics.items() if k.endswith("unmapped_keys"))
    keys = load_tensors(COMFYUI)
    assert all(key.startswith("transformer.") for key in keys) and any(
        f".{name[:2]}" in key or "hada_" in key for key in keys
    )

    merged = cls.from_pretrained("data/export/merged", subfolder="transformer")
    adapted = PeftModel.from_pretrained(cls.from_pretrained("data/base", subfolder="transformer"), "data/export/peft")
    with torch.no_grad():
        answers = [answer(load_family(family), model) for model in (merged, adapted.get_base_model())]
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)


def answer(family: Any, denoiser: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = denoiser.config
    prompt = {
        "prompt_embeds": torch.randn(1, 7, config.joint_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=generator),
    }
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    return family.predict(denoiser.eval(), latents, torch.tensor([300.0]), prompt)
