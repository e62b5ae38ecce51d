"""The model card: front matter that the Hub takes, and lines that are true of what was exported and measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from lora_dag.artifacts import model_card
from lora_dag.artifacts.lineage import save as save_lineage
from tests.helpers.reports import MADE, write_reports
from tests.helpers.workspace import Workspace

CARD = Path("reports/model_card.md")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card shows none."""
    monkeypatch.setattr("stages.report.__main__.plot_losses", lambda *_: None)
    monkeypatch.setattr("stages.report.html_page.write_page", lambda *_: "")


def card(workspace: Workspace, *argv: str, export: dict[str, Any] | None = None, **made: Any) -> ModelCard:
    """Of reports whose export says ``made``, as the hub's own client reads it."""
    write_reports(workspace.path / "reports")
    lineage = MADE | {"export": MADE["export"] | (export or {})} | made
    save_lineage(Path("reports/export/lineage.json"), lineage)
    workspace.run("report", *argv)
    found = ModelCard.load(CARD)
    assert not re.search(r"nan|\bNone\b|/tmp", found.text.replace("=None", "")), found.text
    return found


def test_front_matter_is_the_hubs(workspace: Workspace) -> None:
    data = card(workspace).data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert {"lora", "stable-diffusion", "template:sd-lora"} <= set(data["tags"])
    assert data["instance_prompt"] == "red apple"
    assert data["widget"] == [{"text": "red apple", "output": {"url": "samples.png"}}]
    assert not {"license", "base_model", "base_model_relation"} & set(data)  # a folder is no model of the Hub


def test_body_has_metrics_and_provenance(workspace: Workspace) -> None:
    text = card(workspace).text
    for words in (
        "# Ink icons",
        "A LoRA for StableDiffusionPipeline: rank 8, alpha 4, on `to_k`, `to_q`; 107,520 parameters, 0.43 MB in",
        "trained for 4 steps on 6 images.",
        "Held-out loss fell by 0.0400 (−31 %), 95 % interval [−0.0450, −0.0350]",
        "![Samples](samples.png)",
        "| Held-out loss | 0.1300 | 0.0900 | −0.0400 [−0.0450, −0.0350] |",
        "| `train.batch_size` | `16` |",
        "| for training | 6 |",
        f"| Images, SHA-256 | `{'2' * 16}` |",
        f"| `diffusers/pytorch_lora_weights.safetensors` | 0.45 MB | `{'e' * 16}` |",
        f"| Base: unet | `{'c' * 16}` |",
        "Packages: peft 0.21.2.",
        "on 2 images of the same dataset, with one training seed",
        "Not stated.",
    ):
        assert words in text, words
    assert all(Path("reports", link).is_file() for link in re.findall(r"!\[[^]]*]\(([^)]+)\)", text))
    first = CARD.read_bytes()
    workspace.run("report")
    assert CARD.read_bytes() == first


def test_only_what_was_exported_is_named(workspace: Workspace) -> None:
    text = card(workspace, export={"formats": ["comfyui"]}).text
    assert "comfyui/icons.safetensors" in text and "load_lora_weights(" not in text and "PeftModel" not in text
    text = card(workspace, export={"formats": ["merged"]}).text
    assert 'StableDiffusionPipeline.from_pretrained("data/export/merged")' in text and "omfy" not in text
    text = card(workspace, export={"formats": ["peft"], "resized_ranks": [4, 2]}).text
    assert text.count(MADE["pipeline"]["load"]) == 1 and "load_lora_weights(" not in text
    assert "at smaller ranks, with the largest singular values: `resized/rank-4/`, `resized/rank-2/`." in text


def test_lines_for_any_prompt_variant_and_left_out_component(workspace: Workspace) -> None:
    prompt = 'icon: a "red" apple # 1, naïve'
    load = 'pipe = StableDiffusionPipeline.from_pretrained("data/base", variant="fp16", text_encoder_3=None)'
    pipeline = MADE["pipeline"] | {"variant": "fp16", "load": load}
    found = card(workspace, export={"prompt": prompt}, pipeline=pipeline)
    assert found.data.to_dict()["instance_prompt"] == prompt
    lines = found.text.split("```python\n")[1].split("```")[0]
    compile(lines, "card", "exec")
    assert f"\n{load}\n" in lines


def test_on_the_hub_the_lines_name_the_repository(workspace: Workspace) -> None:
    pushed = ("--set", "export.push_to_hub={repo_id: someone/icons, private: true}")
    formats = ["diffusers", "peft", "merged"]
    text = card(workspace, *pushed, export={"formats": formats}).text
    assert 'load_lora_weights("someone/icons", subfolder="diffusers", weight_name=' in text
    assert 'PeftModel.from_pretrained(pipe.unet, "someone/icons", subfolder="peft")' in text
    assert 'from_pretrained(snapshot_download("someone/icons") + "/merged")' in text and "data/export" not in text


def test_elsewhere_the_lines_name_the_folder(workspace: Workspace) -> None:
    text = card(workspace, "--export", "runs/rank-4/export").text
    assert 'load_lora_weights("runs/rank-4/export", subfolder="diffusers"' in text


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("FLUX-1-dev", {"license": "other", "license_name": "flux-1-dev"}),
    ],
)
def test_license_and_base(workspace: Workspace, name: str, fields: dict[str, str]) -> None:
    found = card(workspace, export={"license": name}, base_model="owner/base")
    data = found.data.to_dict()
    assert {key: data[key] for key in data if key.startswith("license")} == fields
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "adapter")
    assert f"`{name}`, as stated by the author." in found.text
    assert "see [its model card](https://huggingface.co/owner/base)" in found.text


def test_a_merged_pipeline_is_a_finetune_of_its_base(workspace: Workspace) -> None:
    data = card(workspace, export={"formats": ["merged"]}, base_model="owner/base").data.to_dict()
    assert data["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "alpha 4, DoRA, on `to_k`"),
        ({"use_rslora": True, "rank_pattern": {"to_k": 3}}, "alpha 4, rsLoRA, on `to_k`"),
        ({"target_modules": r".*attn1\.to_q"}, "on `.*attn1\\.to_q`;"),
        ({"target_modules": [f"down_blocks.{i}.resnets.0.conv{i % 2}" for i in range(30)]}, "on `conv0`, `conv1`;"),
    ],
)
def test_kinds_of_adapters(workspace: Workspace, changes: dict[str, Any], words: str) -> None:
    text = card(workspace, lora_config=MADE["lora_config"] | changes).text
    assert words in text
    assert ("strength 1, where DoRA is exact" in text) == ("use_dora" in changes)


def test_another_algorithm_and_trained_text_encoders_are_named(workspace: Workspace) -> None:
    text = card(workspace, lora_config=MADE["lora_config"] | {"algo": "lokr"}).text
    assert "A LoKr for StableDiffusionPipeline: rank 8" in text
    text = card(workspace, text_lora={"text_encoder": MADE["lora_config"]}).text
    assert "on `to_k`, `to_q`, attention of `text_encoder`; 107,520" in text
    assert 'PeftModel.from_pretrained(pipe.text_encoder, "data/export", subfolder="peft/text_encoder")' in text


def test_trained_biases_are_named(workspace: Workspace) -> None:
    biased = {"lora_config": MADE["lora_config"] | {"bias": "all"}, "biases": ["conv_in"]}
    assert "alpha 4, biases all, on" in card(workspace, export={"formats": ["comfyui"]}, **biased).text


def test_an_adapter_that_cannot_be_fused_says_so(workspace: Workspace) -> None:
    text = card(workspace, unfusable=12).text
    assert "raise an error for this adapter, because the base has no bias in 12 layers" in text
    assert "fuse_lora" not in card(workspace).text


def test_the_mark_goes_by_reports_and_settings(workspace: Workspace) -> None:
    card(workspace)
    paths = Path("reports"), Path("reports/export")
    fingerprint = model_card.fingerprint(*paths, "Ink icons", None)
    assert CARD.read_text().endswith(f"\n\n{fingerprint}\n")
    others = [model_card.fingerprint(*paths, "Ink icons", "a/b"), model_card.fingerprint(*paths, "Other", None)]
    Image.new("RGB", (9, 9)).save("reports/samples.png")
    assert len({fingerprint, *others, model_card.fingerprint(*paths, "Ink icons", None)}) == 4
