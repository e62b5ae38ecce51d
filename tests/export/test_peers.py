"""Our files read by ComfyUI itself: COMFYUI=/path/to/ComfyUI pytest -n0 -m peers -s tests/export/test_peers.py

Needs ComfyUI's einops, psutil and scipy beside this repository's packages; none of its code is here. Prints, for each
family, kind of adapter and format, the largest error of a weight and the adapter's largest change of one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import SD3Transformer2DModel

from lora_dag.adapters import original_layout
from lora_dag.adapters.adapter_set import text_model_name
from lora_dag.core.params import FAMILIES
from lora_dag.core.tensors import load_tensors
from lora_dag.families.protocol import load_family
from tests.helpers import comfyui, single_files
from tests.helpers.exports import write
from tests.helpers.readers import KINDS, far, judged, states, train, verdict
from tests.helpers.stacked import stacked

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no checkout of ComfyUI"),
]
CASES = [(family, kind, name) for family in FAMILIES for kind in KINDS for name in ("comfyui", "diffusers")]
"""Family, kind and format of a file; what the format refuses is left out as the cases run."""


def denoiser_of(family: str, base: Path) -> Any:
    """SD3's in ComfyUI has heads of 64."""
    if family == "sd3":
        torch.manual_seed(0)
        config = SD3Transformer2DModel.load_config(base, subfolder="transformer")
        return SD3Transformer2DModel.from_config(config | {"attention_head_dim": 64, "caption_projection_dim": 128})
    module = load_family(family)
    cls = getattr(diffusers, module.COMPONENTS[module.DENOISER])
    return cls.from_pretrained(base, subfolder=module.DENOISER)


def encoders_of(family: str, base: Path) -> dict[str, Any]:
    module = load_family(family)
    return {
        name: getattr(transformers, module.COMPONENTS[name]).from_pretrained(base, subfolder=name)
        for name in module.TEXT_ENCODERS
    }


def original(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A denoiser's tensors under the original checkpoint's names."""
    return single_files.unet(state) if hasattr(model, "down_blocks") else stacked(model, state)


def there(modules: dict[str, Any], found: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by component under ComfyUI's names."""
    (_, state), *text = found.items()
    tensors = {
        f"diffusion_model.{name}": tensor for name, tensor in original(next(iter(modules.values())), state).items()
    }
    for (_, encoder), letter in zip(text, "lg", strict=False):
        place = f"clip_{letter}.transformer."
        tensors |= {place + text_model_name(n): t for n, t in encoder.items() if "self_attn" in n}
    return tensors


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_comfyui_reads_the_trained_weights(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, kind: str, name: str
) -> None:
    comfy = comfyui.load()
    if family == "z_image" and not hasattr(comfy.utils, "z_image_to_diffusers"):
        pytest.skip(f"ComfyUI {comfyui.version()} has no key map of Z-Image")
    if (expected := verdict(family, kind, name, "ComfyUI")) is None:
        pytest.skip("no such file")
    module = load_family(family)
    modules = {module.DENOISER: denoiser_of(family, bases[family]), **encoders_of(family, bases[family])}
    trained = train(module, modules, kind)
    path = write(name, tmp_path, module, trained.parts)
    found = (states(modules), trained.merged, trained.without_dora)
    base, wanted, without_dora = (there(modules, each) for each in found)
    unprefixed = {n.removeprefix("diffusion_model."): t for n, t in base.items() if not n.startswith("clip_")}
    denoiser = comfyui.model(family, unprefixed)
    text = comfyui.encoders([encoder.config for encoder in list(modules.values())[1:]])
    for key, tensor in base.items():
        if key.startswith("clip_"):
            comfy.utils.set_attr_param(text, key, tensor.clone())
    caplog.set_level(logging.WARNING)
    read = base | dict(comfyui.patched(denoiser, text, load_tensors(path)))
    said = [message for message in caplog.messages if "not loaded" in message.lower() or "ERROR" in message]
    case = f"ComfyUI {comfyui.version()} {family:8} {kind:19} {name:10}"
    print(f"\n{case} error {far(read, wanted):.2g} of {far(base, wanted):.2g}, {len(said)} keys not taken")
    assert judged(read, wanted, without_dora, bool(said)) == expected, said[:4]
    assert far(base, wanted) > 0.01


def test_recorded_answers_match_the_installed_comfyui() -> None:
    recorded, found = load_tensors(comfyui.ANSWERS), comfyui.answers()
    assert recorded.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, recorded[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_equals_comfyuis_key_map(bases: dict[str, Path], family: str) -> None:
    """Every layer that has a key here has that key there, with these rows and the swap."""
    comfy = comfyui.load()
    if family == "z_image" and not hasattr(comfy.utils, "z_image_to_diffusers"):
        pytest.skip(f"ComfyUI {comfyui.version()} has no key map of Z-Image")
    denoiser = denoiser_of(family, bases[family])
    theirs = comfy.lora.model_lora_keys_unet(comfyui.model(family, original(denoiser, dict(denoiser.state_dict()))), {})
    layers = original_layout.original_layers(denoiser)
    is_unet = load_family(family).DENOISER == "unet"
    for layer, stack in layers.items():
        start = 0
        for part in stack:
            found = theirs[f"lora_unet_{part.name.replace('.', '_')}" if is_unet else f"transformer.{part.name}"]
            target, rows, function = (*found, None)[:3] if isinstance(found, tuple) else (found, None, None)
            assert target == f"diffusion_model.{layer}.weight"
            if len(stack) > 1:
                size = denoiser.get_submodule(part.name).out_features
                assert rows == (0, start, size), part
                start += size
            else:
                assert rows is None, part
            assert (function is not None) == part.swapped, part
            assert function is None or function(torch.tensor([[1.0], [2.0]])).tolist() == [[2.0], [1.0]]
