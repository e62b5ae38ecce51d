"""The merged pipeline loads by the line of the model card, for every shape of model_index.json that bases have."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from lora_dag.core.files import read_json, write_json
from lora_dag.core.tensors import load_tensors
from lora_dag.formats import Card, merged
from tests.helpers.exported import write_adapter
from tests.helpers.workspace import TINY, Workspace, write_params

BASE, MERGED = Path("data/base"), Path("data/export/merged")
VISION: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION |= {"image_size": 8, "patch_size": 4}
ENTRIES = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}
CARD = Card("data/export", False, "", "StableDiffusionPipeline", [], "unet", [], "ink-icons", "red apple", 1, 3, False)


def save_part(name: str, variant: str | None = None) -> None:
    """Write a folder of the base."""
    if name == "feature_extractor":
        size = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}}
        CLIPImageProcessor(**size).save_pretrained(BASE / name)
    elif name == "safety_checker":
        config = CLIPConfig(vision_config=VISION, text_config=VISION, projection_dim=8)
        StableDiffusionSafetyChecker(config).save_pretrained(BASE / name, variant=variant)
    else:
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8))
        encoder.save_pretrained(BASE / name, variant=variant)


def make_base(listed: list[str], present: list[str], variant: str | None = None) -> None:
    """Copy the tiny base, list further components in its model_index.json, and write the folders of some."""
    source = BASE.resolve()
    BASE.unlink()
    shutil.copytree(source, BASE)
    index = read_json(BASE / "model_index.json")
    nulls = {name: [None, None] for name in ENTRIES}
    write_json(BASE / "model_index.json", index | nulls | {name: ENTRIES[name] for name in listed})
    for name in present:
        save_part(name, variant)


def load_as_printed() -> StableDiffusionPipeline:
    """Run the line of the model card."""
    (line,) = re.findall(r"`(\w+\.from_pretrained.*?)`", merged.usage(CARD))
    pipeline = eval(line, vars(diffusers).copy() | {"StableDiffusionPipeline": StableDiffusionPipeline})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipeline("blue boat", num_inference_steps=2, generator=generator, output_type="pt").images


SHAPES = {
    "all null": ([], []),
    "as README downloads SD 1.5": (["feature_extractor", "safety_checker"], ["feature_extractor"]),
    "whole": (["feature_extractor", "safety_checker"], ["feature_extractor", "safety_checker"]),
    "no folders": (["feature_extractor", "safety_checker", "image_encoder"], []),
    "checker without extractor": (["feature_extractor", "safety_checker"], ["safety_checker"]),
    "image encoder": (["feature_extractor", "image_encoder"], ["feature_extractor", "image_encoder"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_model_index_loads_as_the_card_prints(workspace: Workspace, shape: str) -> None:
    listed, present = SHAPES[shape]
    make_base(listed, present)
    write_adapter()
    workspace.run("export", "--set", "export.formats=[diffusers, merged]")
    kept = set() if shape == "checker without extractor" else {*present}
    index, before = read_json(MERGED / "model_index.json"), read_json(BASE / "model_index.json")
    assert index == before | {name: [None, None] for name in ENTRIES.keys() - kept}
    assert {path.name for path in MERGED.iterdir()} & ENTRIES.keys() == kept
    pipeline = load_as_printed()
    assert {name for name in ENTRIES if getattr(pipeline, name) is not None} == kept
    adapted = StableDiffusionPipeline.from_pretrained(BASE, **dict.fromkeys(ENTRIES))
    adapted.set_progress_bar_config(disable=True)
    adapted.load_lora_weights("data/export/diffusers")
    if pipeline.safety_checker is not None:  # random weights may call any image unsafe
        pipeline.safety_checker = None
    torch.testing.assert_close(draw(pipeline), draw(adapted), atol=1e-4, rtol=1e-4)


def test_a_variant_is_in_no_name_and_shards_are_loaded(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 files of the base keep their bytes; the merged denoiser is float32, in shards if it is large."""
    make_base(["feature_extractor", "safety_checker"], ["feature_extractor", "safety_checker"], variant="fp16")
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, **dict.fromkeys(ENTRIES), dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        for path in (BASE / name).glob("*.safetensors"):
            path.unlink()
        getattr(pipeline, name).save_pretrained(BASE / name, variant="fp16", max_shard_size="40KB")
    assert len(list((BASE / "vae").glob("*.fp16-0*.safetensors"))) > 1
    write_params(Path("params.yaml"), TINY | {"model": {"dtype": "float32", "variant": "fp16"}})
    monkeypatch.setattr(merged, "MAX_SHARD", 100_000)
    write_adapter()
    workspace.run("export", "--set", "export.formats=[merged]")
    files = sorted(path.name for path in MERGED.rglob("*") if path.is_file())
    assert not [name for name in files if "fp16" in name]
    dtypes = {path: {t.dtype for t in load_tensors(path).values()} for path in MERGED.glob("*/*.safetensors")}
    unet = [path for path in dtypes if path.parent.name == "unet"]
    assert len(unet) > 1 and all(path.stat().st_size < 110_000 for path in unet)
    assert all(dtypes[path] == {torch.float32 if path in unet else torch.float16} for path in dtypes.keys() - checker())
    for path in (BASE / "vae").glob("*.safetensors"):
        assert path.read_bytes() == (MERGED / "vae" / path.name.replace(".fp16", "")).read_bytes()
    assert load_as_printed().unet.dtype == torch.float32


def checker() -> set[Path]:
    return set(MERGED.glob("safety_checker/*"))


def test_a_changed_copy_is_noticed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base([], [])
    write_adapter()
    original = merged.copy_file

    def damaged(path: Path, target: Path, variant: str | None) -> None:
        original(path, target, variant)
        if target.name == "scheduler_config.json":
            target.write_text(target.read_text() + "\n")

    monkeypatch.setattr(merged, "copy_file", damaged)
    with pytest.raises(RuntimeError, match=r"scheduler/scheduler_config.json of the merged export differs"):
        workspace.run("export", "--set", "export.formats=[merged]")
    assert not Path("data/export").exists()
