"""Every kind of adapter through every format: its reader answers as the trained adapter, or the format is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from lora_dag.adapters import lora
from lora_dag.adapters.adapter_tensors import AdapterTensors
from lora_dag.artifacts.adapter import Adapter
from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.formats import comfyui
from lora_dag.formats.comfyui import reader
from stages.export.params import format_problems
from tests.helpers.adapters import ADAPTER, COMFYUI, FORMATS, KINDS, adapt, algo, kind, loaded, predict, unet
from tests.helpers.workspace import Workspace

CASES = [(kind, mode) for kind in KINDS for mode in ("none", "lora_only", "all")]
DEFAULT = {("plain", mode) for mode in ("none", "lora_only", "all")} | {
    ("rslora", "none"),
    ("dora", "lora_only"),
    ("conv", "all"),
    ("dora-conv", "none"),
    ("dora-conv", "all"),
}
"""Each kind and each mode; a mode of biases asks no kind but DoRA."""


@pytest.mark.parametrize(
    ("kind", "mode"),
    [pytest.param(*case, marks=[] if case in DEFAULT else [pytest.mark.slow]) for case in CASES],
)
def test_every_format_matches_the_adapter_or_is_refused(workspace: Workspace, kind: str, mode: str) -> None:
    denoiser = adapt(workspace, **KINDS[kind], bias=mode)
    expected = predict(denoiser)
    use_dora = "dora" in kind
    refused = {"diffusers", "peft"} if mode == "all" or (mode == "lora_only" and use_dora) else set()
    written = [name for name in FORMATS if name not in refused]
    if refused:
        with pytest.raises(UserError, match="Use comfyui or merged") as caught:
            workspace.run("export", "--set", f"export.formats=[{', '.join(FORMATS)}]")
        assert len(caught.value.problems) == 2 and not Path("data/export").exists()
    lines = workspace.run("export", "--set", f"export.formats=[{', '.join(written)}]")
    metrics = read_json(Path("reports/export/metrics.json"))
    assert metrics["export.effect"] > 0.05
    adapter, lineage = Adapter.load(ADAPTER), load_lineage(Path("reports/export/lineage.json"))
    assert (lineage["lora_config"], lineage["biases"]) == (adapter.lora_config, adapter.biases)
    headers = [load_metadata(path) for path in Path("data/export").rglob("*.safetensors")]
    records = [json.loads(header["lora_dag"]) for header in headers if "lora_dag" in header]
    assert len(records) == len(written) - 1 and all(record.items() <= lineage.items() for record in records)
    scale = expected.abs().max()
    for name in written:
        assert any(line.startswith(f"{name:11} loaded back") for line in lines)
        assert metrics[f"export.{name}.unmapped_keys"] == 0
        assert (loaded(name) - expected).abs().max() <= 1e-5 * max(1, scale), name


def test_refused_formats_have_a_reason_and_an_alternative() -> None:
    (diffusers,) = format_problems(["diffusers", "comfyui"], kind(bias="all"))
    assert diffusers.startswith("params.yaml export.formats: diffusers ") and diffusers.code == "format-unsupported"
    assert "lora.bias all" in diffusers and diffusers.endswith("Use comfyui or merged.")
    (dora,) = format_problems(["peft"], kind(bias="lora_only", use_dora=True))
    assert "lora.bias lora_only" in dora and "lora.use_dora" in dora
    (transformer,) = format_problems(["comfyui", "merged"], kind(bias="lora_only", denoiser="transformer"))
    assert transformer.endswith("Use diffusers, peft or merged.")
    assert format_problems(FORMATS, kind(bias="lora_only")) == []


def test_diffusers_scales_and_disables_trained_biases(workspace: Workspace) -> None:
    denoiser = adapt(workspace, bias="lora_only")
    workspace.run("export", "--set", "export.formats=[diffusers]")
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    base = predict(pipeline.unet)
    pipeline.load_lora_weights("data/export/diffusers", adapter_name="ours")
    pipeline.set_adapters(["ours"], [0.5])
    lora.set_scale(denoiser, 0.5)
    torch.testing.assert_close(predict(pipeline.unet), predict(denoiser), atol=1e-5, rtol=1e-5)
    pipeline.disable_lora()
    assert torch.equal(predict(pipeline.unet), base)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(pipeline.unet), base)


def test_layers_that_cannot_be_fused_are_counted(workspace: Workspace) -> None:
    """to_q, to_k and to_v of Stable Diffusion have no bias, conv1 has one."""
    for targets, count in (("attention", 12 * 2), (["conv1"], 0)):
        adapt(workspace, bias="lora_only", target_modules=targets)
        lines = workspace.run("export", "--set", "export.formats=[diffusers, peft]")
        assert load_lineage(Path("reports/export/lineage.json")).get("unfusable", 0) == count
        warnings = [line for line in lines if line.endswith("[cannot-fuse]")]
        assert [line.split()[1] for line in warnings] == ([str(count)] if count else [])
        pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
        pipeline.load_lora_weights("data/export/diffusers")
        model = PeftModel.from_pretrained(unet(), "data/export/peft")
        for fuse in (pipeline.fuse_lora, model.merge_and_unload):
            with pytest.raises(RuntimeError, match="has no bias") if count else contextlib.nullcontext():
                fuse()
    workspace.run("export", "--set", "export.formats=[comfyui]")
    assert "unfusable" not in load_lineage(Path("reports/export/lineage.json"))


@pytest.mark.parametrize("mode", ["none", "all"])
def test_comfyui_strength_equals_the_adapter_scale(workspace: Workspace, mode: str) -> None:
    denoiser = adapt(workspace, bias=mode)
    workspace.run("export", "--set", "export.formats=[comfyui]")
    lora.set_scale(denoiser, 0.25)
    fresh = unet()
    base = predict(fresh)
    with reader.patched(fresh, COMFYUI, strength=0.25):
        torch.testing.assert_close(predict(fresh), predict(denoiser), atol=1e-5, rtol=1e-5)
    assert torch.equal(predict(fresh), base)


def test_comfyui_file_has_kohyas_keys_and_the_real_alpha(workspace: Workspace) -> None:
    adapt(workspace, target_modules=["attn1.to_q", "conv1"], bias="all", use_dora=True, use_rslora=True, rank=4)
    workspace.run("export", "--set", "export.formats=[comfyui]")
    tensors = load_tensors(COMFYUI)
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    conv = "lora_unet_mid_block_resnets_0_conv1"
    for key, up, down in ((linear, (32, 4), (4, 32)), (conv, (32, 4, 1, 1), (4, 32, 3, 3))):
        assert tensors[f"{key}.lora_up.weight"].shape == up and tensors[f"{key}.lora_down.weight"].shape == down
        assert tensors[f"{key}.alpha"] == 8.0  # rsLoRA's alpha / sqrt(rank) = 2, as alpha / rank
        assert tensors[f"{key}.dora_scale"].shape == (32, *[1] * (len(up) - 1))
    assert tensors["lora_unet_conv_norm_out.diff_b"].shape == (32,) and f"{conv}.diff_b" in tensors
    assert load_metadata(COMFYUI)["ss_network_dim"] == "4"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"rank": 4, "alpha": 3.0}, {"comfyui": ("4", "3"), "diffusers": ("4", "4"), "peft": ("4", "4")}),
        ({"rank": 4, "alpha": 3.0, "use_rslora": True}, {"comfyui": ("4", "6"), "diffusers": ("4", "4")}),
        ({"rank": 4, "alpha": 1.5, "alpha_pattern": {"to_v": 5.0}}, {"comfyui": ("4", "Dynamic"), "peft": ("4", "4")}),
        (
            {"rank": 4, "alpha": 3.0, "rank_pattern": {"to_k": 3}},
            {"comfyui": ("Dynamic", "3"), "diffusers": 2 * ("Dynamic",)},
        ),
        (algo("lokr", rank=2, alpha=6.0), {"comfyui": ("2", "6"), "peft": ("2", "6")}),
        (algo("lokr-tucker", alpha=6.0), {"comfyui": ("2", "Dynamic"), "peft": ("2", "6")}),
    ],
    ids=str,
)
def test_the_header_has_the_ranks_and_alphas_of_the_tensors(
    workspace: Workspace, changes: dict[str, Any], shown: dict[str, tuple[str, str]]
) -> None:
    """kohya's tools show and trust ss_network_dim and ss_network_alpha."""
    adapt(workspace, **changes)
    workspace.run("export", "--set", f"export.formats=[{', '.join(shown)}]")
    for name, expected in shown.items():
        (path,) = Path("data/export", name).glob("*.safetensors")
        header = load_metadata(path)
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == expected, name
    alphas = {f"{float(tensor):g}" for key, tensor in load_tensors(COMFYUI).items() if key.endswith(".alpha")}
    assert shown["comfyui"][1] == (alphas.pop() if len(alphas) == 1 else "Dynamic")


def test_unknown_keys_are_counted_and_stop_the_stage(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(workspace)
    monkeypatch.setattr(comfyui, "key", lambda name, _: f"lora_unet_{name}")
    with pytest.raises(RuntimeError, match="comfyui export has keys"):
        workspace.run("export")
    assert not Path("data/export").exists()


def test_another_alpha_stops_the_stage(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(workspace)
    monkeypatch.setattr(AdapterTensors, "peft_config", config_of_another_alpha)
    with pytest.raises(RuntimeError, match="peft export differs"):
        workspace.run("export", "--set", "export.formats=[peft]")


def config_of_another_alpha(part: AdapterTensors, **_: Any) -> dict[str, Any]:
    config = lora.peft_config(part.config | {"lora_alpha": 3.0}).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def test_merged_is_a_whole_pipeline_without_an_adapter(workspace: Workspace) -> None:
    adapt(workspace, bias="all")
    workspace.run("export", "--set", "export.formats=[merged]")
    pipeline = StableDiffusionPipeline.from_pretrained("data/export/merged", safety_checker=None)
    base, merged = load_tensors(Path("data/base/unet/diffusion_pytorch_model.safetensors")), pipeline.unet.state_dict()
    assert set(merged) == set(base)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith(".bias") or ".to_" in name}
    for name in ("vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert Path("data/export/merged", name).read_bytes() == Path("data/base", name).read_bytes()


def test_name_must_be_a_file_name(workspace: Workspace) -> None:
    for change in ("export.name=a/b", "export.name=''", "export.formats=[]", "export.formats=[peft, peft]"):
        with pytest.raises(UserError, match=change.split("=")[0]):
            workspace.run("export", "--set", change)
