"""``model.quantization`` through the stages: trained, resumed, measured, exported, and refused where it cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from lora_dag.artifacts.adapter import Adapter
from lora_dag.core import params
from lora_dag.core.params import FAMILIES, Quantization
from tests.helpers.every_family import overrides
from tests.helpers.trainings import LONG, history, outputs, weights
from tests.helpers.workspace import Workspace

KINDS = get_args(Quantization)
OF_FAMILY = dict(zip(FAMILIES, KINDS * len(FAMILIES), strict=False))
"""Each family with one quantization in the quick tests; the slow ones have all pairs."""


WHERE = ("", "_quantized")
"""Endings of the errors of exported files on the base as it is and on the quantized base."""


def on(kind: str) -> tuple[str, str]:
    return "--set", f"model.quantization={kind}"


def read(path: str) -> dict[str, float]:
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if OF_FAMILY[name] == kind else pytest.mark.slow)
        for name in FAMILIES
        for kind in KINDS
    ],
)
def test_the_dag_on_a_quantized_base(name: str, kind: str, workspace: Workspace, bases: dict[str, Path]) -> None:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases[name])
    settings = overrides(name, f"model.quantization={kind}", "validate.drift_prompts=[]")
    for stage in ("prepare", "cache_latents", "train", "validate", "export", "report"):
        workspace.run(stage, *settings)

    assert {tensor.dtype for tensor in weights().values()} == {torch.float32}
    assert read("reports/train/metrics.json")["train.base_unchanged"] is True
    assert Adapter.load(Path("data/adapter")).made_from["model"]["quantization"] == kind

    measured, exported = read("reports/metrics.json"), read("reports/export/metrics.json")
    price = [measured[f"val.quantization_price{bound}"] for bound in ("", "_low", "_high")]
    share = measured["val.loss"] / measured["val.loss_unquantized"] - 1
    assert price[0] == pytest.approx(share, abs=1e-4) and price[0] != 0 and price[1] < price[0] < price[2]
    assert exported["export.quantization_error"] > 0
    errors = [exported[f"export.{file}.max_abs_error{on}"] for file in ("diffusers", "peft") for on in WHERE]
    assert max(errors) <= 1e-5 < exported["export.effect"]
    report = Path("reports/report.md").read_text(encoding="utf-8")
    assert f"float32, {kind} in the blocks" in report and f"| {kind}: " in report


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_on_a_quantized_base_resumes_bit_identically(
    kind: str, encoded: Workspace, interrupt: Callable[..., None]
) -> None:
    encoded.run("train", *LONG, *on(kind))
    expected, losses = outputs(encoded), history()
    for folder in ("data/adapter", "reports/train", ".state/runs"):
        shutil.rmtree(folder)
    interrupt(3, *LONG, *on(kind))
    encoded.run("train", *LONG, *on(kind))
    assert outputs(encoded) == expected and history() == losses


def test_gradient_checkpointing_gives_the_same_bytes_on_a_quantized_base(encoded: Workspace) -> None:
    encoded.run("train", *LONG, *on("int8"))
    expected = weights()
    shutil.rmtree(".state/runs")
    encoded.run("train", *LONG, *on("int8"), "--set", "train.gradient_checkpointing=true")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights().items())


def test_runs_on_different_quantizations_have_different_checkpoints(encoded: Workspace) -> None:
    for kind in ("null", *KINDS):
        encoded.run("train", *on(kind))
    assert len([*Path(".state/runs").iterdir()]) == 1 + len(KINDS)


@pytest.mark.parametrize(
    "setting",
    [
        "lora.use_dora=true",
        "lora.algo=lokr lora.init_lora_weights=kaiming",
        "lora.algo=loha lora.init_lora_weights=kaiming",
        "lora.bias=all",
        "lora.train_text_encoder=true",
        "lora.init_lora_weights=eva",
        "lora.target_modules=all-linear+conv",
        "model.dtype=bfloat16",
    ],
)
def test_every_kind_of_adapter_trains_on_a_quantized_base(setting: str, encoded: Workspace) -> None:
    """The stage itself checks step 0 against the base, gradients of all layers, and the unchanged base."""
    changes = [word for change in setting.split() for word in ("--set", change)]
    if "bfloat16" in setting:
        encoded.run("cache_latents", *changes)
    encoded.run("train", *changes, *on("nf4"))
    assert {tensor.dtype for tensor in weights().values()} == {torch.float32}
    assert read("reports/train/metrics.json")["train.base_unchanged"] is True


def test_the_price_can_be_left_out(encoded: Workspace) -> None:
    settings = (*on("int8"), "--set", "validate.unquantized_loss=false")
    for stage in ("train", "validate"):
        encoded.run(stage, *settings)
    assert not [name for name in read("reports/metrics.json") if "quantiz" in name]


def test_records_of_an_unquantized_run_have_no_new_keys() -> None:
    """Lineage, digests of a sweep's folders and keys of caches stay those of versions without the settings."""
    plain = params.load(Path("params.yaml"))
    assert "quantization" not in plain.sections["model"].model_dump(mode="json")
    assert "unquantized_loss" not in plain.sections["validate"].model_dump(mode="json")
    changed = params.load(Path("params.yaml"), ["model.quantization=int8", "validate.unquantized_loss=false"])
    assert changed.sections["model"].model_dump()["quantization"] == "int8"
    assert changed.sections["validate"].model_dump()["unquantized_loss"] is False
