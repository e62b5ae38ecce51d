"""Exports as other people's code sees them: stock diffusers, stock PEFT, a safetensors header."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open

from lora_dag.adapters import lora
from lora_dag.adapters.adapter_tensors import tensors_digest
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import read_json, sha256_file
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.families import sd
from stages.export.parity import ProofBase
from tests.helpers.exported import ADAPTER, CONFIG, write_adapter
from tests.helpers.workspace import Workspace

DIFFUSERS = Path("data/export/diffusers")
PEFT = Path("data/export/peft")
COMFYUI = Path("data/export/comfyui/ink-icons.safetensors")


@pytest.fixture
def adapted(workspace: Workspace) -> Workspace:
    write_adapter()
    return workspace


@pytest.fixture
def exported(adapted: Workspace) -> Workspace:
    adapted.run("export")
    return adapted


def stock() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipeline("blue boat", num_inference_steps=3, generator=generator, output_type="latent").images


@pytest.fixture
def trained_image(exported: Workspace) -> torch.Tensor:
    """What the adapter draws by the formula alone: alpha / rank * B A added to the weights, no LoRA code at work."""
    pipeline = stock()
    tensors = load_tensors(ADAPTER / FINAL)
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            pipeline.unet.get_submodule(name.removesuffix(".lora_A.weight")).weight.data += 3 * b @ a
    return draw(pipeline)


def test_stock_diffusers_generates_the_same_image(exported: Workspace, trained_image: torch.Tensor) -> None:
    pipeline = stock()
    plain = draw(pipeline)
    pipeline.load_lora_weights(DIFFUSERS)
    found = draw(pipeline)
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, trained_image, atol=1e-3, rtol=1e-3)


def test_stock_peft_generates_the_same_image(exported: Workspace, trained_image: torch.Tensor) -> None:
    pipeline = stock()
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, PEFT).get_base_model()
    torch.testing.assert_close(draw(pipeline), trained_image, atol=1e-3, rtol=1e-3)


def test_diffusers_header_has_the_config(exported: Workspace) -> None:
    with safe_open(DIFFUSERS / "pytorch_lora_weights.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = set(file.keys())
    assert config["unet.lora_alpha"] == config["unet.r"] == 2  # B has the strength
    assert config["unet.target_modules"] == CONFIG["target_modules"]
    assert keys == {f"unet.{name}" for name in load_tensors(ADAPTER / FINAL)}


@pytest.mark.parametrize(
    "path", [DIFFUSERS / "pytorch_lora_weights.safetensors", PEFT / "adapter_model.safetensors", COMFYUI], ids=str
)
def test_headers_have_provenance(workspace: Workspace, path: Path) -> None:
    for stage in ("prepare", "cache_latents", "train", "export"):
        workspace.run(stage)
    header = load_metadata(path)
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora" and header["modelspec.title"] == "ink-icons"
    assert header["modelspec.prediction_type"] == "v"
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_steps"]) == ("2", "2", "4")
    assert header["modelspec.hash_sha256"] == f"0x{tensors_digest(load_tensors(path))}"
    record = json.loads(header["lora_dag"])
    adapter = Adapter.load(ADAPTER)
    assert record["adapter"] == sha256_file(ADAPTER / FINAL) and record["base"] == adapter.base
    assert record["latents"] == LatentCache(Path("data/latents")).digest and record["num_images"] == 6
    assert record["lora"]["rank"] == 2 and record["train"]["learning_rate"] == 1e-3
    assert record["packages"]["peft"] == importlib.metadata.version("peft")
    assert not any(str(place) in str(header) for place in (workspace.path, Path.home(), Path("data/base")))
    assert "modelspec.date" not in header


def test_header_depends_on_captions(workspace: Workspace) -> None:
    records = []
    for caption in ("thing 0", "another thing"):
        text = Path("data/raw/metadata.jsonl").read_text()
        Path("data/raw/metadata.jsonl").write_text(text.replace("thing", caption))
        for stage in ("prepare", "cache_latents", "train"):
            workspace.run(stage)
        records.append(Adapter.load(ADAPTER).made_from)
    assert records[0]["captions"] != records[1]["captions"] and records[0]["images"] == records[1]["images"]


def test_peft_folder_equals_save_pretrained(exported: Workspace) -> None:
    config = read_json(PEFT / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["inference_mode"] is True
    tensors = load_tensors(PEFT / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{name}" for name in load_tensors(ADAPTER / FINAL)}


def test_strength_is_in_b_and_trained_alpha_in_the_provenance(exported: Workspace) -> None:
    """Programs that read no config load these files too; kohya's keys have an alpha of their own."""
    trained = load_tensors(ADAPTER / FINAL)
    for path, prefix in (
        (DIFFUSERS / "pytorch_lora_weights.safetensors", "unet."),
        (PEFT / "adapter_model.safetensors", "base_model.model."),
    ):
        for name, tensor in load_tensors(path).items():
            own = trained[name.removeprefix(prefix)]
            assert torch.equal(tensor, 3 * own if ".lora_B." in name else own), name
    for path, alpha in ((DIFFUSERS / "pytorch_lora_weights.safetensors", "2"), (COMFYUI, "6")):
        header = load_metadata(path)
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", alpha)
        assert json.loads(header["lora_dag"])["lora_config"]["lora_alpha"] == 6


def test_lineage_lists_files_and_provenance(exported: Workspace) -> None:
    lineage = load_lineage(Path("reports/export/lineage.json"))
    assert lineage["adapter"] == sha256_file(ADAPTER / FINAL) and lineage["lora_config"] == CONFIG
    files = exported.tree("data/export")
    assert {name: file["bytes"] for name, file in lineage["files"].items()} == {n: len(b) for n, b in files.items()}
    assert all(file["sha256"] == sha256_file(Path("data/export") / name) for name, file in lineage["files"].items())
    assert "push_to_hub" not in lineage["export"] and lineage["export"]["formats"] == ["diffusers", "peft", "comfyui"]
    assert lineage["pipeline"] == {
        "class": "StableDiffusionPipeline",
        "denoiser": "unet",
        "load": 'pipe = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)',
        "pretrained": "data/base",
        "variant": None,
    }


def test_absolute_base_path_is_not_written(adapted: Workspace) -> None:
    adapted.run("export", "--set", f"model.pretrained={adapted.path / 'data/base'}")
    path = Path("reports/export/lineage.json")
    assert load_lineage(path)["pipeline"]["pretrained"] == "base" and str(adapted.path) not in path.read_text()


def test_headers_have_license_and_base(exported: Workspace) -> None:
    paths = sorted(Path("data/export").rglob("*.safetensors"))
    plain = [load_metadata(path) for path in paths]
    exported.run("export", "--set", "export.license=Apache-2.0", "--set", "export.base_model=owner/base")
    assert len(paths) == 3
    for path, before in zip(paths, plain, strict=True):
        after = load_metadata(path)
        assert after.pop("modelspec.license") == "Apache-2.0" and "modelspec.license" not in before
        assert json.loads(after.pop("lora_dag")) == json.loads(before.pop("lora_dag")) | {"base_model": "owner/base"}
        assert after == before
    pipeline = load_lineage(Path("reports/export/lineage.json"))["pipeline"]
    assert pipeline["load"] == 'pipe = StableDiffusionPipeline.from_pretrained("owner/base", safety_checker=None)'


def test_only_one_denoiser_is_in_memory(adapted: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large base there is room for one; and no image of its own size is drawn."""
    loaded: list[weakref.ref[Any]] = []
    load = sd.load_denoiser

    def counted(*args: Any) -> Any:
        assert [ref for ref in loaded if ref() is not None] == []
        denoiser = load(*args)
        denoiser.register_forward_pre_hook(lambda _, args: sizes.add(tuple(args[0].shape)))
        loaded.append(weakref.ref(denoiser))
        return denoiser

    sizes: set[tuple[int, ...]] = set()
    monkeypatch.setattr(sd, "load_denoiser", counted)
    monkeypatch.setattr(sd, "load_pipeline", None)
    gc.disable()  # nothing waits for it
    try:
        formats = "export.formats=[diffusers, peft, comfyui, merged]"
        adapted.run("export", "--set", formats, "--set", "export.resized_ranks=[1]")
    finally:
        gc.enable()
    assert len(loaded) == 1 and sizes == {(2, 4, 16, 16)}


def test_metrics_have_parity_and_effect(exported: Workspace) -> None:
    metrics = read_json(Path("reports/export/metrics.json"))
    assert metrics["export.effect"] > 0.1
    for name in ("diffusers", "peft", "comfyui"):
        assert 0 <= metrics[f"export.{name}.max_abs_error"] <= 1e-4 and metrics[f"export.{name}.unmapped_keys"] == 0
    assert math.isclose(metrics["export.megabytes"], 4096 * 4 / 1e6, rel_tol=1e-3)


def test_two_exports_give_the_same_bytes(exported: Workspace) -> None:
    first = exported.tree("data/export") | exported.tree("reports/export")
    assert set(first) == {
        "comfyui/ink-icons.safetensors",
        "diffusers/pytorch_lora_weights.safetensors",
        "energy.csv",
        "lineage.json",
        "metrics.json",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
    }
    Path("data/export/stale").write_text("x")
    exported.run("export")
    assert exported.tree("data/export") | exported.tree("reports/export") == first


def test_files_are_readable_by_all_users(adapted: Workspace) -> None:
    before = os.umask(0o022)
    try:
        adapted.run("export")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in Path("data/export").rglob("*") if path.is_file()}
    assert len(modes) == 4 and set(modes.values()) == {0o644}


def test_an_adapter_trained_with_dropout_is_exported_without(workspace: Workspace) -> None:
    """diffusers leaves what it loads in train mode: with dropout in the header it would drop while sampling."""
    for stage in ("prepare", "cache_latents", "train", "export"):
        workspace.run(stage, "--set", "lora.dropout=0.5")
    assert read_json(PEFT / "adapter_config.json")["lora_dropout"] == 0
    pipeline = stock()
    pipeline.load_lora_weights(DIFFUSERS)
    assert torch.equal(draw(pipeline), draw(pipeline))


# Refusals


def refusal(workspace: Workspace, *argv: str) -> Problem:
    """Return the only problem of an export that writes nothing."""
    with pytest.raises(UserError) as caught:
        workspace.run("export", *argv)
    assert not Path("data/export").exists() and not Path("reports/export").exists()
    (problem,) = caught.value.problems
    assert isinstance(problem, Problem)
    return problem


def test_missing_adapter_is_refused(workspace: Workspace) -> None:
    problem = refusal(workspace)
    assert problem.startswith("data/adapter/adapter.json: ") and "python -m stages.train" in problem


@pytest.mark.parametrize("offset", [3, 40, -5], ids=["length", "header", "data"])
def test_damaged_adapter_is_refused(adapted: Workspace, offset: int) -> None:
    blob = bytearray((ADAPTER / FINAL).read_bytes())
    blob[offset] ^= 0xFF
    (ADAPTER / FINAL).write_bytes(blob)
    problem = refusal(adapted)
    assert problem.startswith(f"{ADAPTER / FINAL}: ") and "python -m stages.train" in problem


def test_adapter_of_another_base_is_refused(adapted: Workspace) -> None:
    shutil.copytree("data/base", "data/other")
    path = Path("data/other/unet/diffusion_pytorch_model.safetensors")
    tensors = load_tensors(path)
    name = sorted(tensors)[0]
    save_tensors(path, tensors | {name: tensors[name] + 0.1}, {"format": "pt"})
    problem = refusal(adapted, "--set", "model.pretrained=data/other")
    assert problem.startswith("data/adapter: ") and "unet" in problem and "dvc repro" in problem


def test_export_with_another_output_is_not_kept(adapted: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StableDiffusionPipeline.save_lora_weights

    def weaker(folder: Path, **kwargs: Any) -> None:
        kwargs["unet_lora_adapter_metadata"]["lora_alpha"] = 1
        original(folder, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", weaker)
    with pytest.raises(RuntimeError, match="diffusers export differs"):
        adapted.run("export")
    assert not Path("data/export").exists()


def test_adapter_without_effect_is_refused(adapted: Workspace) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_tensors(ADAPTER / FINAL).items()}
    save_tensors(ADAPTER / FINAL, zeros)
    adapter = Adapter.load(ADAPTER)
    Adapter(CONFIG, adapter.base, 4, [], {FINAL: sha256_file(ADAPTER / FINAL)}).save(ADAPTER)
    with pytest.raises(RuntimeError, match="the adapter changes nothing"):
        adapted.run("export")


def test_a_part_of_a_format_that_is_left_in_the_base_is_noticed(
    adapted: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = lora.delete
    calls: list[object] = []

    def forgets(module: Any) -> None:
        calls.append(module)
        if len(calls) != 2:  # after the trained adapter was removed
            original(module)

    monkeypatch.setattr(lora, "delete", forgets)
    with pytest.raises(RuntimeError, match="a part of an export was left in the base"):
        adapted.run("export")
    assert not Path("data/export").exists()


def test_a_weight_that_a_check_changes_is_noticed(adapted: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ProofBase.remove_adapter
    calls: list[object] = []

    def changes(base: ProofBase) -> None:
        original(base)
        calls.append(base)
        if len(calls) == 2:  # after the file's check
            base.modules.denoiser.conv_out.bias.data[0] += 1e-6

    monkeypatch.setattr(ProofBase, "remove_adapter", changes)
    with pytest.raises(RuntimeError, match="the weights of the base changed"):
        adapted.run("export", "--set", "export.formats=[comfyui]")
    assert not Path("data/export").exists()
