"""``validate.feature_model``: features against the models' own logits, what is refused, and the metrics end to end."""

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
from tests.conftest import Workspace, picture
from tests.helpers import image_text
from tests.helpers.caches import write_mixed_cache
from tests.helpers.pipelines import clip, clip_tokenizer
from tests.helpers.validated import write_adapter

COMMIT = "12" * 20
CAPTIONS = ["red apple", "blue boat " * 9, "Green circle, ink icon"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a tiny random image-text model."""
    folder = tmp_path_factory.mktemp("image-text")
    return {kind: image_text.save(kind, folder / kind) for kind in feature_files.KINDS}


def asked(path: Path, sha256: str | None = None) -> FeatureModelParams:
    return FeatureModelParams(path=str(path), sha256=sha256 or feature_files.digest(path))


def load(path: Path, batch_size: int = 2) -> features.FeatureModel:
    settings: Any = SimpleNamespace(feature_model=asked(path), batch_size=batch_size)
    model = features.load(settings, torch.device("cpu"))
    assert model is not None
    return model


# Features


@pytest.mark.parametrize("kind", feature_files.KINDS)
def test_cosines_are_the_models_own_logits(
    models: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [picture(index, 30 + 7 * index, 24) for index in range(3)]
    model = load(models[kind])
    with caplog.at_level(logging.INFO, logger="lora-dag"):
        images, texts = model.images(pictures), model.texts(CAPTIONS)
    assert images.dtype == texts.dtype == np.float32 and images.shape == texts.shape
    assert np.linalg.norm(images, axis=1) == pytest.approx(1, abs=1e-6)
    line, *named = [r.getMessage() for r in caplog.records if r.name == "lora-dag"]
    long = 1 if kind == "clip" else 2  # the others' tokens are bytes here
    have = "1 caption has" if long == 1 else "2 captions have"
    assert line.startswith(f"warning: {have} more than {image_text.CONTEXT} tokens; the rest is not read by {kind}")
    assert len(named) == long

    stock, processor = AutoModel.from_pretrained(models[kind]), AutoProcessor.from_pretrained(models[kind])
    read = [caption.lower() for caption in CAPTIONS] if kind != "clip" else CAPTIONS
    sizes = {"padding": "max_length", "truncation": True, "max_length": image_text.CONTEXT}
    if kind == "siglip2":
        sizes |= {"patch_size": 4, "max_num_patches": 16}  # the processor's defaults are those of one model
    inputs = processor(text=read, images=pictures, return_tensors="pt", **sizes)
    if kind != "clip":
        inputs.pop("attention_mask")
    with torch.no_grad():
        logits = stock(**inputs).logits_per_image
    bias = getattr(stock, "logit_bias", torch.zeros(1))
    assert images @ texts.T == pytest.approx(((logits - bias) / stock.logit_scale.exp()).detach().numpy(), abs=1e-5)


def test_features_do_not_depend_on_what_else_is_asked(models: dict[str, Path]) -> None:
    pictures = [picture(index, 40) for index in range(5)]
    model = load(models["clip"], batch_size=3)
    together, captions = model.images(pictures), model.texts(CAPTIONS)
    assert np.array_equal(model.images(pictures[:4]), together[:4])
    assert np.array_equal(model.texts(CAPTIONS[:1]), captions[:1])
    assert load(models["clip"], batch_size=5).images(pictures) == pytest.approx(together, abs=1e-6)


def test_no_feature_model_is_none() -> None:
    settings: Any = SimpleNamespace(feature_model=None, batch_size=2)
    assert features.load(settings, torch.device("cpu")) is None
    assert feature_files.problems(None) == []


@pytest.mark.parametrize("name", ["sd", "sd3", "sdxl"])
def test_heldout_pictures_are_what_the_vae_makes_of_them(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Against encode and decode of the stock VAE, which knows no shift and scale; two shapes, batches of two."""
    family, device = load_family(name), torch.device("cpu")
    model = ModelParams(family=name, pretrained=str(bases[name]), variant=None, dtype="float32")
    vae = family.load_vae(model, device)
    sizes = [(32, 32), (32, 32), (48, 32), (32, 32)]
    pixels = [
        torch.from_numpy(np.array(picture(i, *size))).permute(2, 0, 1) / 127.5 - 1 for i, size in enumerate(sizes)
    ]
    latents = {str(index): family.encode_images(vae, image[None])[0][0] for index, image in enumerate(pixels)}
    rows = [
        SimpleNamespace(stratum=stratum, picture=SimpleNamespace(split=split, view=view))
        for view, split in zip(latents, ["heldout", "heldout", "heldout", "train"], strict=True)
        for stratum in (0, 1)
    ]
    cache = SimpleNamespace(latents=lambda view: (latents[view], None))
    eval_set = EvalSet(rows, cache, None, family, model, device, seed=0, batch_size=2)  # type: ignore[arg-type]
    found = features.heldout_pictures(eval_set, Vae(eval_set))
    assert [image.size for image in found] == sizes[:3]
    for image, expected in zip(found, pixels, strict=False):
        with torch.no_grad():
            decoded = vae.decode(vae.encode(expected[None]).latent_dist.mean).sample[0]
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(image, dtype=float) - levels).max() <= 1


# What is refused


def refused(folder: Path) -> str:
    (line,) = feature_files.problems(asked(folder))
    return line


def test_a_folder_that_is_no_image_text_model_is_refused(
    models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    want = "validate.feature_model takes CLIP, SigLIP and SigLIP 2 in the transformers layout"
    tokenizer = clip_tokenizer()
    clip(CLIPTextModel, tokenizer).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    assert refused(tmp_path / "text") == (
        f"{tmp_path}/text/config.json model_type: got 'clip_text_model', no model of pictures and texts both; {want}"
    )
    assert refused(tiny_base) == f"{tiny_base}: a diffusers pipeline; {want}"
    (tmp_path / "none").mkdir()
    assert refused(tmp_path / "none").startswith(f"{tmp_path}/none: no config.json; {want}, also as OpenCLIP's")
    (line,) = feature_files.problems(asked(Path("openai/clip"), "0"))
    assert line.startswith("params.yaml validate.feature_model: 'openai/clip' is no folder; fetch it: hf download")

    for name, message in (
        ("processor_config.json", "no preprocessor_config.json, so pictures and texts cannot be prepared"),
        ("tokenizer_config.json", "no tokenizer_config.json, so pictures and texts cannot be prepared"),
        ("tokenizer.json", "no vocab.json with merges.txt; the folder is incomplete"),
        ("model.safetensors", "no .safetensors weights; the folder is incomplete"),
    ):
        folder = shutil.copytree(models["clip"], tmp_path / f"without-{name}")
        (folder / name).unlink()
        assert message in refused(folder)
    (tmp_path / "without-model.safetensors/pytorch_model.bin").write_bytes(b"")
    assert "only pytorch_model.bin, a pickle, which can run code" in refused(tmp_path / "without-model.safetensors")
    (tmp_path / "without-model.safetensors/modeling.py").write_text("print('run')\n")
    assert "code inside a model folder is never run" in refused(tmp_path / "without-model.safetensors")


def test_siglips_tokenizer_is_asked_for_its_package(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["siglip"], tmp_path / "siglip")
    edit(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    assert "pip install sentencepiece" in refused(folder)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def test_what_only_transformers_sees_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["clip"], tmp_path / "clip")
    edit(folder / "config.json", projection_dim=16)
    with pytest.raises(
        UserError, match="2 tensors that config.json asks for are missing or of another size, such as text_p"
    ):
        load(folder)
    edit(folder / "config.json", projection_dim="many")
    with pytest.raises(UserError, match=r"clip: transformers does not load it \(.*\); fetch the model again") as caught:
        load(folder)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    edit(folder / "processor_config.json", processor_class="Nothing", image_processor={"size": 3})
    with pytest.raises(UserError, match="clip: transformers does not load it"):
        load(folder)


def test_the_pin_names_the_digest_and_refuses_another(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["clip"], tmp_path / "clip")
    found = feature_files.digest(folder)
    where, line = f"params.yaml validate.feature_model: '{folder}' has the digest {found}", "to measure with it: -S"
    use = f'{line} "validate.feature_model={{path: {folder}, sha256: {found}}}"'
    unpinned = FeatureModelParams(path=str(folder))
    assert feature_files.problems(unpinned) == [f"{where}, params.yaml pins no sha256; {use}"]
    assert feature_files.problems(asked(folder)) == []
    before = asked(folder)
    edit(folder / "config.json", initializer_factor=2.0)
    (changed,) = feature_files.problems(before)
    assert f"params.yaml pins {found}; to measure with it" in changed
    moved = shutil.move(folder, tmp_path / "moved")
    assert feature_files.digest(Path(moved)) == feature_files.digest(Path(moved).resolve()) != found


# A pin of the Hub


def test_a_link_is_named_as_params_name_it(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "ours").symlink_to(models["clip"])
    link = tmp_path / "ours"
    assert feature_files.resolve(asked(link)).name == "ours"


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
    assert feature_files.problems(asked(path)) == [] and not calls
    assert asked(path).sha256 == sha256_file(path)
    source = feature_files.resolve(asked(path))
    assert (source.name, calls) == (f"acme/clip@{COMMIT[:12]}", [feature_files.FETCHED])
    assert feature_files.resolve(asked(path)) == source and len(calls) == 1
    assert load(path).name == source.name

    path.write_text("hub: acme/clip\nrevision: main\n")
    (line,) = feature_files.problems(asked(path))
    assert line.startswith(f"{path} revision: got 'main'; expected a commit of 40 hex digits")


def test_a_hub_pin_without_safetensors_or_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    path = tmp_path / "clip.yaml"
    path.write_text(f"hub: acme/clip\nrevision: '{COMMIT}'\n")
    monkeypatch.setattr(hub, "list_files", lambda path, pin: ["README.md", "config.json", "pytorch_model.bin"])
    with pytest.raises(UserError, match="acme/clip has no weights as safetensors at its top; it has pytorch_model.bin"):
        feature_files.resolve(asked(path))
    monkeypatch.undo()
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    monkeypatch.setattr("huggingface_hub.model_info", offline)
    with pytest.raises(UserError, match=r"clip.yaml: acme/clip cannot be downloaded \(no route\); run again"):
        feature_files.resolve(asked(path))


def offline(*args: Any, **options: Any) -> None:
    raise ConnectionError("no route")


# The stage


def test_validate_measures_samples_against_prompts_and_heldout_pictures(
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
        draw = sheets.draw
        patch.setattr(sheets, "draw", lambda r, e, *rest: drawn.update(e.pictures) or draw(r, e, *rest))
        lines = workspace.run("validate", "--set", three, "--set", setting)
    assert "features    clip: 3 samples, 4 held-out pictures" in lines
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
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: data/base: a diffusers pipeline; validate.feature_model takes CLIP")
