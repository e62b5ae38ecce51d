"""``validate.feature_model``: features against the models' own logits, refused models, and the metrics end to end."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPTextModel

from lora_dag.artifacts import metrics
from lora_dag.artifacts.lineage import parse as parse_lineage
from lora_dag.bases import hub
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, sha256_file
from lora_dag.core.params import ModelParams
from lora_dag.families.protocol import load_family
from stages.validate import feature_files, features, sheets
from stages.validate.heldout_loss import EvalSet
from stages.validate.params import FeatureModelParams
from stages.validate.vae import Vae
from tests.helpers import image_text
from tests.helpers.caches import write_mixed_cache
from tests.helpers.errors import assert_problem, codes_of, refused
from tests.helpers.pipelines import clip, clip_tokenizer
from tests.helpers.validated import write_adapter
from tests.helpers.workspace import Workspace, make_image

COMMIT = "12" * 20
CAPTIONS = ["red apple", "blue boat " * 9, "Green circle, ink icon"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a tiny random image-text model."""
    folder = tmp_path_factory.mktemp("image-text")
    return {kind: image_text.save(kind, folder / kind) for kind in feature_files.KINDS}


def pinned(path: Path, sha256: str | None = None) -> FeatureModelParams:
    return FeatureModelParams(path=str(path), sha256=sha256 or feature_files.digest(path))


def load(path: Path, batch_size: int = 2) -> features.FeatureModel:
    settings: Any = SimpleNamespace(feature_model=pinned(path), batch_size=batch_size, setting=str)
    model = features.load(settings, torch.device("cpu"))
    assert model is not None
    return model


# Features


@pytest.mark.parametrize("kind", feature_files.KINDS)
def test_cosines_equal_the_models_own_logits(
    models: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    originals = [make_image(index, 30 + 7 * index, 24) for index in range(3)]
    model = load(models[kind])
    with caplog.at_level(logging.INFO, logger="lora-dag"):
        images, texts = model.embed_images(originals), model.embed_texts(CAPTIONS)
    assert images.dtype == texts.dtype == np.float32 and images.shape == texts.shape
    assert np.linalg.norm(images, axis=1) == pytest.approx(1, abs=1e-6)
    line, *named = [r.getMessage() for r in caplog.records if r.name == "lora-dag"]
    long = 1 if kind == "clip" else 2  # the others' tokens are bytes here
    assert line.startswith("warning: ") and f"{long} caption" in line
    assert f"{image_text.CONTEXT} tokens" in line and kind in line
    assert len(named) == long

    stock, processor = AutoModel.from_pretrained(models[kind]), AutoProcessor.from_pretrained(models[kind])
    read = [caption.lower() for caption in CAPTIONS] if kind != "clip" else CAPTIONS
    sizes = {"padding": "max_length", "truncation": True, "max_length": image_text.CONTEXT}
    if kind == "siglip2":
        sizes |= {"patch_size": 4, "max_num_patches": 16}  # the processor's defaults are those of one model
    inputs = processor(text=read, images=originals, return_tensors="pt", **sizes)
    if kind != "clip":
        inputs.pop("attention_mask")
    with torch.no_grad():
        logits = stock(**inputs).logits_per_image
    bias = getattr(stock, "logit_bias", torch.zeros(1))
    assert images @ texts.T == pytest.approx(((logits - bias) / stock.logit_scale.exp()).detach().numpy(), abs=1e-5)


def test_features_do_not_depend_on_other_inputs(models: dict[str, Path]) -> None:
    originals = [make_image(index, 40) for index in range(5)]
    model = load(models["clip"], batch_size=3)
    together, captions = model.embed_images(originals), model.embed_texts(CAPTIONS)
    assert np.array_equal(model.embed_images(originals[:4]), together[:4])
    assert np.array_equal(model.embed_texts(CAPTIONS[:1]), captions[:1])
    assert load(models["clip"], batch_size=5).embed_images(originals) == pytest.approx(together, abs=1e-6)


def test_feature_model_is_optional() -> None:
    settings: Any = SimpleNamespace(feature_model=None, batch_size=2)
    assert features.load(settings, torch.device("cpu")) is None
    assert feature_files.model_problems(None) == []


@pytest.mark.parametrize("name", ["sd", "sd3", "sdxl"])
def test_heldout_images_equal_the_stock_vae(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Against encode and decode of the stock VAE, which knows no shift and scale; two shapes, batches of two."""
    family, device = load_family(name), torch.device("cpu")
    model = ModelParams(family=name, pretrained=str(bases[name]), variant=None, dtype="float32", quantization=None)
    vae = family.load_vae(model, device)
    sizes = [(32, 32), (32, 32), (48, 32), (32, 32)]
    pixels = [
        torch.from_numpy(np.array(make_image(i, *size))).permute(2, 0, 1) / 127.5 - 1 for i, size in enumerate(sizes)
    ]
    latents = {str(index): family.encode_images(vae, image[None])[0][0] for index, image in enumerate(pixels)}
    rows = [
        SimpleNamespace(stratum=stratum, image=SimpleNamespace(split=split, view=view))
        for view, split in zip(latents, ["heldout", "heldout", "heldout", "train"], strict=True)
        for stratum in (0, 1)
    ]
    cache = SimpleNamespace(latents=lambda view: (latents[view], None))
    eval_set = EvalSet(rows, cache, None, family, model, device, seed=0, batch_size=2)  # type: ignore[arg-type]
    found = features.heldout_images(eval_set, Vae(eval_set))
    assert [image.size for image in found] == sizes[:3]
    for image, expected in zip(found, pixels, strict=False):
        with torch.no_grad():
            decoded = vae.decode(vae.encode(expected[None]).latent_dist.mean).sample[0]
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(image, dtype=float) - levels).max() <= 1


# Refused models


def assert_refused(params: FeatureModelParams, code: str, *values: str) -> None:
    """Assert that the model has one problem, with this code and these values."""
    (problem,) = feature_files.model_problems(params)
    assert_problem(UserError(problem), code, *values)


def test_other_models_and_incomplete_folders_are_refused(
    models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    tokenizer = clip_tokenizer()
    clip(CLIPTextModel, tokenizer).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    place = f"{tmp_path}/text/config.json model_type"
    assert_refused(
        pinned(tmp_path / "text"), "no-feature-model", place, "'clip_text_model'", "CLIP, SigLIP or SigLIP 2"
    )
    assert_refused(pinned(tiny_base), "no-feature-model", f"{tiny_base}:", "diffusers", "CLIP, SigLIP or SigLIP 2")
    (tmp_path / "none").mkdir()
    assert_refused(pinned(tmp_path / "none"), "no-feature-model", f"{tmp_path}/none: config.json")
    place = "params.yaml validate.feature_model"
    assert_refused(pinned(Path("openai/clip"), "0"), "feature-model-missing", place, "'openai/clip'", "hf download")

    for name, missing in (
        ("processor_config.json", "preprocessor_config.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("tokenizer.json", "vocab.json"),
        ("model.safetensors", ".safetensors"),
    ):
        folder = shutil.copytree(models["clip"], tmp_path / f"without-{name}")
        (folder / name).unlink()
        (problem,) = feature_files.model_problems(pinned(folder))
        assert str(folder) in problem and missing in problem
    folder = pinned(tmp_path / "without-model.safetensors")
    (tmp_path / "without-model.safetensors/pytorch_model.bin").write_bytes(b"")
    (problem,) = feature_files.model_problems(folder)
    assert "pytorch_model.bin" in problem and "pickle" in problem
    (tmp_path / "without-model.safetensors/modeling.py").write_text("print('run')\n")
    (problem,) = feature_files.model_problems(folder)
    assert "modeling.py" in problem


def test_siglip_tokenizer_needs_sentencepiece(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["siglip"], tmp_path / "siglip")
    edit(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    assert_refused(pinned(folder), "package-missing", f"{folder}/tokenizer_config.json", "pip install sentencepiece")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def test_errors_of_transformers_are_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["clip"], tmp_path / "clip")
    edit(folder / "config.json", projection_dim=16)
    with refused("feature-model-incomplete", str(folder), "2 tensors", "text_p"):
        load(folder)
    edit(folder / "config.json", projection_dim="many")
    with refused("feature-model-damaged", str(folder)) as caught:
        load(folder)
    assert "\n" not in caught.value.problems[0]
    edit(folder / "processor_config.json", processor_class="Nothing", image_processor={"size": 3})
    with refused("feature-model-damaged", str(folder)):
        load(folder)


def test_digest_must_match(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["clip"], tmp_path / "clip")
    found = feature_files.digest(folder)
    place, override = (
        "params.yaml validate.feature_model",
        f'"validate.feature_model={{path: {folder}, sha256: {found}}}"',
    )
    unpinned = FeatureModelParams(path=str(folder))
    assert_refused(unpinned, "feature-model-digest", place, f"'{folder}'", "sha256 is null", f"-S {override}")
    assert feature_files.model_problems(pinned(folder)) == []
    before = pinned(folder)
    edit(folder / "config.json", initializer_factor=2.0)
    assert_refused(before, "feature-model-digest", place, f"sha256 is {found}", feature_files.digest(folder))
    moved = shutil.move(folder, tmp_path / "moved")
    assert feature_files.digest(Path(moved)) == feature_files.digest(Path(moved).resolve()) != found


# A pin of the Hub


def test_link_keeps_its_own_name(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "ours").symlink_to(models["clip"])
    link = tmp_path / "ours"
    assert feature_files.resolve_model(pinned(link)).name == "ours"


def test_a_hub_pin_is_fetched_once_and_named(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    path = tmp_path / "clip.yaml"
    path.write_text(f"hub: acme/clip\nrevision: '{COMMIT}'\n")
    calls = []

    def download(path: Path, pin: hub.Pin) -> list[str]:
        calls.append(pin.files)
        shutil.copytree(models["clip"], pin.folder)
        return sorted(file.name for file in pin.folder.iterdir())

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "list_files", lambda path, pin: ["config.json", "model.safetensors"])
    assert feature_files.model_problems(pinned(path)) == [] and not calls
    assert pinned(path).sha256 == sha256_file(path)
    source = feature_files.resolve_model(pinned(path))
    assert (source.name, calls) == (f"acme/clip@{COMMIT[:12]}", [feature_files.FETCHED])
    assert feature_files.resolve_model(pinned(path)) == source and len(calls) == 1
    assert load(path).name == source.name

    path.write_text("hub: acme/clip\nrevision: main\n")
    (line,) = feature_files.model_problems(pinned(path))
    assert line.startswith(f"{path} revision: got 'main'") and "40 hex digits" in line


def test_a_hub_pin_without_safetensors_or_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    path = tmp_path / "clip.yaml"
    path.write_text(f"hub: acme/clip\nrevision: '{COMMIT}'\n")
    monkeypatch.setattr(hub, "list_files", lambda path, pin: ["README.md", "config.json", "pytorch_model.bin"])
    with refused("no-safetensors", str(path), "acme/clip", "pytorch_model.bin"):
        feature_files.resolve_model(pinned(path))
    monkeypatch.undo()
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    monkeypatch.setattr("huggingface_hub.model_info", offline)
    with pytest.raises(UserError, match=r"clip.yaml: acme/clip .*no route"):
        feature_files.resolve_model(pinned(path))


def offline(*args: Any, **options: Any) -> None:
    raise ConnectionError("no route")


# The stage


def test_validate_measures_samples_against_prompts_and_heldout_images(
    workspace: Workspace, models: dict[str, Path]
) -> None:
    write_mixed_cache()
    write_adapter(0.3)
    shutil.copytree(models["clip"], "data/clip")
    digest = feature_files.digest(Path("data/clip"))
    three = "validate.prompts=[red apple, blue boat, green circle]"
    setting = f"validate.feature_model={{path: data/clip, sha256: {digest}}}"
    assert "features    clip" in workspace.run("check", "--set", setting)
    drawn: dict[int, list[list[Image.Image]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        draw = sheets.write_sheets
        patch.setattr(sheets, "write_sheets", lambda r, e, *rest: drawn.update(e.images) or draw(r, e, *rest))
        lines = workspace.run("validate", "--set", three, "--set", setting)
    assert "features    clip: 3 samples, 4 held-out images" in lines
    assert any(re.fullmatch(r"clip_score  [\d.]+, base [\d.]+", line) for line in lines)
    first, measured = workspace.tree("reports"), metrics.load(Path("reports/metrics.json"))
    names = [
        f"samples.{name}{end}" for name in ("clip_score", "cmmd", "feature_kid") for end in ("", "_base", "_change")
    ]
    assert all(isinstance(measured[name], float) and measured[name] for name in names)
    for name in ("clip_score", "cmmd", "feature_kid"):
        low, change, high = (measured[f"samples.{name}_change{end}"] for end in ("_low", "", "_high"))
        assert isinstance(low, float) and isinstance(change, float) and isinstance(high, float) and low < change < high
        assert change == pytest.approx(measured[f"samples.{name}"] - measured[f"samples.{name}_base"], abs=1e-4)  # type: ignore[operator]

    stock, processor = AutoModel.from_pretrained("data/clip"), AutoProcessor.from_pretrained("data/clip")
    for step, name in ((0, "samples.clip_score_base"), (4, "samples.clip_score")):
        inputs = processor(
            text=["red apple", "blue boat", "green circle"], images=drawn[step][0], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            cosines = stock(**inputs).logits_per_image.diagonal() / stock.logit_scale.exp()
        assert measured[name] == pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-4)

    made = parse_lineage(first["validate/lineage.json"])
    assert made["feature_model"] == "clip" and made["validate"]["feature_model"] == {"sha256": digest}
    Path("data/clip").rename("data/moved")
    workspace.run("validate", "--set", three, "--set", setting.replace("data/clip", "data/moved"))
    again = workspace.tree("reports")
    changed = {name for name in again if again[name] != first[name]}
    assert changed - {"validate/run.json"} == {"validate/lineage.json"}


def test_a_bad_feature_model_stops_check_and_validate_before_anything_runs(workspace: Workspace) -> None:
    setting = "validate.feature_model={path: data/base}"
    for stage in ("check", "validate"):
        result = workspace.process(stage, "--set", setting)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert codes_of(result.stderr) == ["no-feature-model"]
        assert "data/base: " in result.stderr
