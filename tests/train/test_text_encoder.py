"""``lora.train_text_encoder`` through the whole DAG: trained, resumed, measured, exported, and loaded by stock code."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel

from lora_dag import formats
from lora_dag.adapters import adapter_set, lora
from lora_dag.adapters.adapter_tensors import AdapterTensors
from lora_dag.adapters.params import LoraParams
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Manifest
from lora_dag.bases import component_files
from lora_dag.core import params as parameters
from lora_dag.core import seeding
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, sha256_file
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.families import sd
from lora_dag.families.protocol import all_families, load_family
from lora_dag.formats import AdapterKind
from lora_dag.formats.comfyui import reader
from lora_dag.images.decode import load_view
from stages.export.params import format_problems
from stages.train.optimizers import make_optimizer
from stages.train.params import TrainParams, cross_problems
from stages.validate.heldout_loss import make_eval_set
from stages.validate.params import ValidateParams
from tests.helpers.adapters import params
from tests.helpers.errors import refused
from tests.helpers.every_family import overrides, stock_loss
from tests.helpers.families import stock_of
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import REPOSITORY, Workspace

CPU = torch.device("cpu")
ADAPTER = Path("data/adapter")
ON = "lora.train_text_encoder=true"
DIFFUSERS = Path("data/export/diffusers/pytorch_lora_weights.safetensors")
COMFYUI = Path("data/export/comfyui/ink-icons.safetensors")
ALL = "export.formats=[diffusers, peft, comfyui, merged]"
STRONG = ("train.learning_rate=0.05", "lora.alpha=6", "lora.dropout=0.25", "train.prompt_dropout=0.5")
"""So that four steps show; alpha is three times the rank."""


@pytest.fixture(params=["sd", "sdxl"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def on_base(workspace: Workspace, name: str, bases: dict[str, Path]) -> Workspace:
    Path("data/base").unlink()
    shutil.copytree(bases[name], "data/base")
    return workspace


def test_the_dag_end_to_end(on_base: Workspace, name: str) -> None:
    argv = overrides(name, *STRONG, "train.num_steps=4", "validate.num_timesteps=1", ON, ALL)
    for stage in ("prepare", "cache_latents"):
        on_base.run(stage, *argv)
    latents = on_base.tree("data/latents")
    with broken_off(3):
        on_base.run("train", *argv)
    lines = on_base.run("train", *argv)
    assert "resumed from step 2" in lines
    resumed = on_base.tree("data/adapter")
    lines = on_base.run("train", *argv)
    assert on_base.tree("data/adapter") == resumed and on_base.tree("data/latents") == latents

    tensors, record = load_tensors(ADAPTER / FINAL), Adapter.load(ADAPTER)
    encoders = load_family(name).TEXT_ENCODERS
    assert set(record.text_lora) == set(encoders) and record.made_from["lora"]["train_text_encoder"] is True
    assert {key.partition(".")[0] for key in tensors if "self_attn" in key} == set(encoders)
    assert all(bool(tensor.any()) for tensor in tensors.values())
    metrics = read_json(Path("reports/train/metrics.json"))
    assert metrics["train.num_trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    text_lines = [line for line in lines if line.startswith("text ")]
    assert len(text_lines) == len(encoders) + 1 and "not used" in text_lines[-1]
    for component in encoders:
        num = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith(f"{component}."))
        assert any(line.startswith(f"text        {component}: rank 2") and f" {num:,} param" in line for line in lines)

    for stage in ("validate", "export", "report"):
        on_base.run(stage, *argv)
    metrics = read_json(Path("reports/export/metrics.json"))
    assert metrics["export.effect"] > 0.01
    assert [metrics[f"export.{kind}.unmapped_keys"] for kind in ("diffusers", "peft", "comfyui", "merged")] == [0] * 4
    assert "attention of text_encoder" in Path("reports/report.md").read_text()
    measured_by_stock_code(name, argv)
    drawn_by_stock_code(name, tensors)
    lines = on_base.run("draw", *argv, f"{DIFFUSERS}:0,1")
    assert len([line for line in lines if line.startswith("drawn")]) == 2


def measured_by_stock_code(name: str, argv: list[str]) -> None:
    """Return the losses of heldout.csv, computed by stock diffusers from the exported file, and the base's losses."""
    pipe = stock_pipeline(name)
    pipe.load_lora_weights("data/export/diffusers")
    config = parameters.load(Path("params.yaml"), argv[1::2])
    model, settings = config.section(ModelParams), config.section(ValidateParams)
    eval_set = make_eval_set(settings, model, load_family(name), LatentCache(Path("data/latents")), CPU)
    manifest = Manifest.load(Path("data/prepared"))
    items = {item.file_name: item for item in manifest.items}
    with Path("reports/validate/heldout.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert len(eval_set.rows) == len(scores) == 4
    for row, score in zip(eval_set.rows, scores, strict=True):
        item = items[row.image.file_name]
        view = manifest.augmentation.views(item, 1)[0]
        image = load_view((Path("data/raw") / item.file_name).read_bytes(), item, view, manifest.preprocessing)
        with torch.no_grad():
            found = stock_loss(pipe, stock_of(name), image, row, settings.seed)
            pipe.disable_lora()
            base = stock_loss(pipe, stock_of(name), image, row, settings.seed)
            pipe.enable_lora()
        assert found == pytest.approx(float(score["adapter"]), rel=1e-4)
        assert base == pytest.approx(float(score["base"]), rel=1e-4) and base != pytest.approx(found, rel=1e-3)


def drawn_by_stock_code(name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Return images with W + alpha / rank * B A, the diffusers file, PEFT's folders and the merged pipeline."""
    by_hand = stock_pipeline(name)
    denoiser = load_family(name).DENOISER
    for key, a in tensors.items():
        if ".lora_A." in key:
            component, _, own = key.rpartition(".lora_A")[0].partition(".")
            module = getattr(by_hand, component if component.startswith("text_encoder") else denoiser)
            own = own if component.startswith("text_encoder") else f"{component}.{own}"
            own = own if hasattr(module, "text_model") else own.removeprefix("text_model.")
            module.get_submodule(own).weight.data += 3 * tensors[key.replace("lora_A", "lora_B")] @ a
    expected, plain = draw(by_hand), draw(stock_pipeline(name))
    assert (expected - plain).abs().max() > 0.01
    loaded = stock_pipeline(name)
    loaded.load_lora_weights("data/export/diffusers", adapter_name="ours")
    torch.testing.assert_close(draw(loaded), expected, atol=1e-3, rtol=1e-3)
    loaded.set_adapters(["ours"], [0.0])
    torch.testing.assert_close(draw(loaded), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draw(stock_pipeline(name, "data/export/merged")), expected, atol=1e-3, rtol=1e-3)


def stock_pipeline(name: str, folder: str = "data/base") -> Any:
    pipeline = getattr(diffusers, stock_of(name).cls).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = {"height": 32, "width": 32}
    return pipeline("blue boat", num_inference_steps=2, generator=generator, output_type="latent", **size).images


def test_training_in_bfloat16(workspace: Workspace) -> None:
    """With half precision, step 0 must equal the base and the cache; otherwise train stops."""
    for stage in ("prepare", "cache_latents", "train"):
        workspace.run(stage, "--set", "model.dtype=bfloat16", "--set", ON)
    assert {tensor.dtype for tensor in load_tensors(ADAPTER / FINAL).values()} == {torch.float32}


def test_text_encoders_that_differ_from_the_cache_are_an_error(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    original = sd.encode_prompts
    monkeypatch.setattr(sd, "encode_prompts", lambda text, captions, _: original(text, captions[::-1]))
    with pytest.raises(
        RuntimeError, match=r"the text encoders' prompt_embeds differs from the cached one by [\d.]+ of "
    ):
        workspace.run("train", "--set", ON)
    assert not ADAPTER.exists()


def test_text_encoders_have_their_own_rate() -> None:
    names = ("a.lora_A.default.weight", "a.lora_magnitude_vector.default.weight")
    one, other = ({name: torch.nn.Parameter(torch.ones(1)) for name in names} for _ in range(2))
    changes = ["train.learning_rate=1e-3", "train.text_encoder_lr=1e-5", "train.weight_decay=0.5"]
    settings = parameters.load(REPOSITORY / "params.yaml", changes).section(TrainParams)
    groups = make_optimizer(settings, one, other, torch.device("cpu")).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.5), (1e-3, 0), (1e-5, 0.5), (1e-5, 0)]
    assert groups[2]["params"] == [other[names[0]]]
    settings = settings.model_copy(update={"text_encoder_lr": None})
    assert {group["lr"] for group in make_optimizer(settings, one, other, torch.device("cpu")).param_groups} == {1e-3}


# Files


KINDS: dict[str, dict[str, Any]] = {"sd": {"use_dora": True}, "sdxl": {"use_rslora": True, "bias": "lora_only"}}
WITH_TEXT = [name for name, family in all_families().items() if family.TEXT_ENCODERS]
FORMATS = {"sd": ["peft", "comfyui", "merged"], "sdxl": ["diffusers", "peft", "comfyui", "merged"]}
KOHYAS = {"sd": {"lora_te_"}, "sdxl": {"lora_te1_", "lora_te2_"}}
"""Prefixes of keys; a transformer's are the components' own names."""


def adapt(name: str, **changes: Any) -> Any:
    """Write data/adapter as after a long training; return a pipeline with it."""
    model = parameters.load(Path("params.yaml"), [f"model.family={name}"]).section(ModelParams)
    family, settings = load_family(name), params(**changes)
    pipeline = family.load_pipeline(model, CPU)
    encoders = family.text_encoders(family.text_of(pipeline))
    config = lora.make_config(settings, getattr(pipeline, family.DENOISER))
    base = component_files.digests(model, family.COMPONENTS)
    adapter = Adapter(config, base, 4, [], {}, text_lora=adapter_set.text_configs(settings, family, encoders))
    layers = adapter_set.inject_into_pipeline(pipeline, family.DENOISER, adapter)
    layers.keyed_init(0)
    for key, parameter in layers.trainable.items():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeding.generator(0, "test", key))
    biases = list(lora.bias.deltas(layers.modules[""]))
    header = {"format": "pt"} | ({"bias": config["bias"], "biases": json.dumps(biases)} if biases else {})
    save_tensors(ADAPTER / FINAL, layers.state_dict(), header)
    adapter.files[FINAL] = sha256_file(ADAPTER / FINAL)
    Adapter(config, base, 4, [], adapter.files, biases, {}, adapter.text_lora).save(ADAPTER)
    return pipeline


@pytest.mark.parametrize("name", WITH_TEXT, indirect=True)
def test_every_format_gives_the_embeddings_of_the_adapted_encoders(on_base: Workspace, name: str) -> None:
    pipeline = adapt(name, **KINDS.get(name, {}))
    formats = FORMATS.get(name, ["diffusers", "comfyui"])
    if "diffusers" not in formats:
        with pytest.raises(UserError, match=r"export.formats: diffusers .*lora.train_text_encoder.*lora.use_dora"):
            on_base.run("export", *overrides(name))
    on_base.run("export", *overrides(name, f"export.formats=[{', '.join(formats)}]"))
    encode = torch.no_grad()(stock_of(name).encode)
    expected, plain = encode(pipeline, ["red apple"]), encode(stock_pipeline(name), ["red apple"])
    for kind in formats:
        found = encode(loaded(name, kind), ["red apple"])
        for part, tensor in found.items():
            torch.testing.assert_close(tensor, expected[part], atol=1e-4, rtol=1e-4)
    assert any((expected[part] - tensor).abs().max() > 0.1 for part, tensor in plain.items())
    keys = [re.match(r"(.*te.*)text_model.encoder.layers.0.self_attn.q_proj\.", key) for key in load_tensors(COMFYUI)]
    own_names = {f"{component}." for component in load_family(name).TEXT_ENCODERS}
    assert {found[1] for found in keys if found} == KOHYAS.get(name, own_names)
    header = load_metadata(COMFYUI)
    assert set(json.loads(header["lora_dag"])["text_lora"]) == set(load_family(name).TEXT_ENCODERS)


@pytest.mark.parametrize("name", ["sd"], indirect=True)
def test_a_wrong_alpha_of_a_text_encoder_stops_the_export(
    on_base: Workspace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity check runs from the prompt on, with the loaded text encoders."""
    adapt(name)
    original = AdapterTensors.peft_config

    def forgetful(part: AdapterTensors, **changes: Any) -> dict[str, Any]:
        is_encoder = "q_proj" in part.config["target_modules"]
        return original(part, **changes) | ({"lora_alpha": 1.0} if is_encoder else {})

    monkeypatch.setattr(AdapterTensors, "peft_config", forgetful)
    with pytest.raises(RuntimeError, match=r"diffusers export \D+: [\d.e-]+ > "):
        on_base.run("export", *overrides(name, "export.formats=[diffusers]"))
    assert not Path("data/export").exists()


def loaded(name: str, kind: str) -> Any:
    """Return a stock pipeline with the file; ComfyUI's weights are merged."""
    if kind == "merged":
        return stock_pipeline(name, "data/export/merged")
    pipeline, components = stock_pipeline(name), load_family(name).TEXT_ENCODERS
    if kind == "diffusers":
        pipeline.load_lora_weights("data/export/diffusers")
    for component in components if kind == "peft" else ():
        PeftModel.from_pretrained(getattr(pipeline, component), f"data/export/peft/{component}")
    if kind == "comfyui":
        encoders = [getattr(pipeline, component) for component in components]
        denoiser = getattr(pipeline, load_family(name).DENOISER)
        with reader.patched(denoiser, COMFYUI, text_encoders=encoders) as unread:
            assert unread == []
            modules = [module for encoder in encoders for module in encoder.modules() if has_weight(module)]
            patched = [module.weight.detach().clone() for module in modules]
        for module, weight in zip(modules, patched, strict=True):
            module.weight.data = weight
    return pipeline


def has_weight(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torch.Tensor)


# Settings


def test_without_trained_text_encoders_files_do_not_mention_them(workspace: Workspace) -> None:
    """Only the record of all settings mentions them."""
    for stage in ("prepare", "cache_latents", "train", "export"):
        workspace.run(stage)
    for text in (*workspace.tree("data").values(), *workspace.tree("reports").values()):
        assert b"text_lora" not in text
    workspace.run("verify", str(DIFFUSERS))
    with pytest.raises(UserError, match=r"lora.train_text_encoder False, .*lora.train_text_encoder is True"):
        workspace.run("verify", str(DIFFUSERS), "--set", ON)


def test_a_rate_without_effect_and_a_family_without_text_encoders_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("train", "check"):
        with refused("setting-ignored", "--set train.text_encoder_lr: got 1e-05", "lora.train_text_encoder", "null"):
            workspace.run(stage, "--set", "train.text_encoder_lr=1e-5")
    config = parameters.load(Path("params.yaml"), [ON])
    settings = config.section(LoraParams), config.section(TrainParams)
    assert cross_problems(*settings, load_family("sd")) == []
    monkeypatch.setattr(sd, "TEXT_ENCODERS", {})
    (problem,) = cross_problems(*settings, load_family("sd"))
    assert problem.code == "no-trainable-text-encoder" and problem.startswith("--set lora.train_text_encoder: ")
    assert "StableDiffusionPipeline" in problem and "flux, sd3, sdxl" in problem and "false" in problem


def test_formats_without_text_encoders_suggest_others() -> None:
    (line,) = format_problems(
        list(formats.FORMATS), AdapterKind("lora", "none", True, 4, "transformer", trains_text=True)
    )
    assert "lora.train_text_encoder" in line and "lora.use_dora" in line
    assert line.endswith("Use comfyui, peft or merged.")
