"""diffusers' contracts of a LoRA loader, tested on exported files with unchanged pipelines.

They are those of diffusers' tests/pipelines/testing_utils/lora.py, for a UNet and a transformer. Below them: what its
converters make of our ComfyUI files, a reader that is not ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from lora_dag.adapters import adapter_tensors, lora
from lora_dag.core import seeding
from lora_dag.core.params import FAMILIES
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.families.protocol import load_family
from tests.helpers.adapters import params
from tests.helpers.exports import write
from tests.helpers.families import stock_of

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_only": {"bias": "lora_only"},
}
CASES = [(name, kind) for name in ("sd", "flux") for kind in KINDS]
Answer = Callable[[], torch.Tensor]


@pytest.fixture(scope="module")
def pipelines(bases: dict[str, Path]) -> dict[str, Any]:
    found = {name: getattr(diffusers, stock_of(name).cls).from_pretrained(bases[name]) for name in FAMILIES}
    for pipe in found.values():
        denoiser(pipe).requires_grad_(False)
    return found


@pytest.fixture
def pipe(pipelines: dict[str, Any], name: str) -> Iterator[Any]:
    """Return an unchanged pipeline, which must equal the base model again at the end."""
    pipeline = pipelines[name]
    yield pipeline
    pipeline.unload_lora_weights()


@pytest.fixture
def answer(pipe: Any, name: str) -> Answer:
    """Return the output of the pipeline's denoiser."""
    draw = seeding.generator(0, name)
    given = stock_of(name).encode(pipe, ["red apple"])
    given["add_time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    noisy = torch.randn(1, 4 if name in ("sd", "sdxl") else 16, 8, 8, generator=draw)
    return torch.no_grad()(lambda: stock_of(name).call(pipe, noisy, torch.tensor([500]), given))


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def export(pipe: Any, name: str, folder: Path, answer: Answer, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Return a strong adapter in the diffusers and ComfyUI formats, and the denoiser's output with it."""
    model, family = denoiser(pipe), load_family(name)
    config = lora.make_config(params(**changes), model)
    for key, parameter in lora.inject(model, config).items():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=seeding.generator(seed, key))
    expected, read = answer(), adapter_tensors.read(config, model)
    lora.delete(model)
    write("diffusers", folder, family, {family.DENOISER: read})
    if not (read.biases and family.DENOISER == "transformer"):
        write("comfyui", folder / "comfyui", family, {family.DENOISER: read})
    return expected


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_load_scale_fuse_and_unfuse(
    name: str, kind: str, pipe: Any, answer: Answer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = answer()
    expected = export(pipe, name, tmp_path, answer, **KINDS[kind])
    assert torch.equal(answer(), base)
    pipe.load_lora_weights(tmp_path, adapter_name="ours")
    assert "unexpected keys" not in caplog.text and "missing keys" not in caplog.text
    assert all(" text_encoder" in text or "TextModel" in text for text in caplog.messages), caplog.messages
    assert close(answer(), expected) and not close(expected, base)

    pipe.set_adapters(["ours"], [0.5])
    half = answer()
    assert not close(half, expected) and not close(half, base)
    pipe.set_adapters(["ours"], [0.0])
    assert kind == "dora" or close(answer(), base)  # DoRA's magnitudes have no scale in PEFT
    pipe.set_adapters(["ours"], [1.0])
    if kind == "lora_only" and name == "sd":  # PEFT merges no bias into a layer without one
        with pytest.raises(RuntimeError, match="because the base layer has no bias"):
            pipe.fuse_lora()
        return
    pipe.fuse_lora(lora_scale=0.5)
    assert close(answer(), half)
    pipe.unfuse_lora()
    pipe.set_adapters(["ours"], [1.0])  # unfuse_lora leaves the scale of fuse_lora behind
    pipe.fuse_lora()
    assert close(answer(), expected)
    pipe.unfuse_lora()
    assert close(answer(), expected)
    pipe.disable_lora()
    assert close(answer(), base)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_config_survives_being_saved_and_loaded_by_diffusers(
    name: str, kind: str, pipe: Any, answer: Answer, tmp_path: Path
) -> None:
    """Alpha is twice the rank; the file has the strength in B and alpha equal to the rank."""
    expected = export(pipe, name, tmp_path, answer, **KINDS[kind])
    pipe.load_lora_weights(tmp_path, adapter_name="ours")
    denoiser(pipe).save_lora_adapter(tmp_path / "again", adapter_name="ours")
    pipe.unload_lora_weights()
    denoiser(pipe).load_lora_adapter(tmp_path / "again", prefix=None, adapter_name="again", use_safetensors=True)
    assert close(answer(), expected)
    config = denoiser(pipe).peft_config["again"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (2, 2, 0.0, False)
    assert (config.use_dora, config.lora_bias) == (kind == "dora", kind == "lora_only")
    header = load_metadata(tmp_path / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"]
    assert json.loads(header)[f"{load_family(name).DENOISER}.lora_alpha"] == 2


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_several_adapters_are_set_and_deleted(name: str, pipe: Any, answer: Answer, tmp_path: Path) -> None:
    base = answer()
    expected = {
        kind: export(pipe, name, tmp_path / kind, answer, seed, **KINDS[kind])
        for seed, kind in enumerate(("plain", "rslora"))
    }
    for kind in expected:
        pipe.load_lora_weights(tmp_path / kind, adapter_name=kind)
    for kind, alone in expected.items():
        pipe.set_adapters(kind)
        assert close(answer(), alone)
    pipe.set_adapters(list(expected), [0.5, 0.25])
    both = answer()
    assert not any(close(both, other) for other in (base, *expected.values()))
    pipe.delete_adapters("rslora")
    pipe.set_adapters("plain")
    assert close(answer(), expected["plain"])
    pipe.delete_adapters("plain")
    assert pipe.get_list_adapters() == {} and torch.equal(answer(), base)
    for kind in expected:
        pipe.load_lora_weights(tmp_path / kind, adapter_name=kind)
    pipe.set_adapters(list(expected), [0.5, 0.25])
    pipe.fuse_lora(adapter_names=list(expected))
    assert close(answer(), both)
    pipe.unfuse_lora()


# ComfyUI's file, and both without their headers, read by diffusers

PATTERNS = {"rank": 4, "alpha": 1.5, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 5.0}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd", {"use_rslora": True}),
        ("sd", {"target_modules": "all-linear+conv"}),
        ("sdxl", {"target_modules": "attention+ff"}),
        ("sd3", {"target_modules": "all-linear", "alpha": 1.5}),
        ("flux", PATTERNS),
        ("z_image", PATTERNS | {"use_rslora": True}),
    ],
    ids=str,
)
def test_diffusers_reads_our_comfyui_files(
    name: str, changes: dict[str, Any], pipe: Any, answer: Answer, tmp_path: Path
) -> None:
    base = answer()
    expected = export(pipe, name, tmp_path, answer, **changes)
    pipe.load_lora_weights(tmp_path / "comfyui", weight_name="ink-icons.safetensors")
    assert close(answer(), expected) and not close(expected, base)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd", PATTERNS),
        ("sdxl", PATTERNS | {"use_rslora": True}),
        ("sd3", {"use_dora": True}),
        ("flux", PATTERNS),
        ("z_image", {"use_rslora": True}),
    ],
    ids=str,
)
def test_a_program_that_reads_no_header_loads_the_trained_strength(
    name: str, changes: dict[str, Any], pipe: Any, answer: Answer, tmp_path: Path
) -> None:
    """Most programs use the rank as alpha if the file has no alpha."""
    expected = export(pipe, name, tmp_path, answer, **changes)
    tensors = load_tensors(tmp_path / "pytorch_lora_weights.safetensors")
    assert not any("alpha" in key for key in tensors)
    pipe.load_lora_weights(tensors)
    assert close(answer(), expected)
