"""Layers of the original checkpoints against diffusers' converters, and the export's check in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from lora_dag.adapters import original_layout
from lora_dag.adapters.original_layout import StackedLayer, original_layers
from lora_dag.adapters.targets import adaptable
from lora_dag.core.tensors import load_tensors
from lora_dag.families.protocol import all_families, load_family
from lora_dag.formats import comfyui
from lora_dag.formats.comfyui import reader
from tests.helpers import comfyui as comfyui_itself
from tests.helpers import single_files
from tests.helpers.adapters import adapt, adapt_family, algo
from tests.helpers.families import case
from tests.helpers.stacked import stacked
from tests.helpers.workspace import Workspace

TRANSFORMERS = [name for name, family in all_families().items() if family.DENOISER == "transformer"]
EVERY_ROW_SHOWS = {"target_modules": "all-linear", "use_dora": True}


def denoiser(family: str, base: Path) -> Any:
    import diffusers

    module = load_family(family)
    cls = getattr(diffusers, module.COMPONENTS[module.DENOISER])
    return cls.from_pretrained(base, subfolder=module.DENOISER)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_original_layers_equal_diffusers_converters(bases: dict[str, Path], family: str) -> None:
    """Each weight has one input. The converters also need norms without an adapter, and FLUX.1's its full width."""
    with torch.device("meta"):
        wide = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
        model = FluxTransformer2DModel(**wide) if family == "flux" else denoiser(family, bases[family])
    names = {part.name for layer in original_layers(model).values() for part in layer}
    assert set(adaptable(model)) <= names
    shapes = {n: tuple(t.shape)[:1] if n.endswith("bias") else (len(t), 1) for n, t in model.state_dict().items()}
    own = {n: torch.randn(shape) for n, shape in shapes.items() if n.rpartition(".")[0] in names}
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    converted = convert(stacked(model, own) | {name: torch.ones(16) for name in case(family).ORIGINAL_NORMS})
    assert {n for n in own if n not in converted or not torch.equal(converted[n], own[n])} == set()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_block_numbers_of_a_unet(bases: dict[str, Path], family: str) -> None:
    model = denoiser(family, bases[family])
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}
    found = {
        f"{layer}.weight": [f"{part.name}.weight" for part in stack] for layer, stack in original_layers(model).items()
    }
    assert found == {there: [here] for there, here in zip(single_files.unet(weights), weights, strict=True)}


def test_only_the_last_block_is_swapped(bases: dict[str, Path]) -> None:
    swapped = {family: original_layout.swapped_layers(denoiser(family, bases[family])) for family in bases}
    assert swapped["flux"] == {"norm_out.linear"}
    assert swapped["sd3"] == {"norm_out.linear", "transformer_blocks.1.norm1_context.linear"}
    assert swapped["sd"] == swapped["sdxl"] == swapped["z_image"] == set()


# The gate


def on_base(family: str, bases: dict[str, Path]) -> tuple[str, ...]:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases[family])
    return "--set", f"model.family={family}", "--set", "export.prompt=red apple", "--set", "export.formats=[comfyui]"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_missing_swap_of_rows_stops_the_export(
    workspace: Workspace, bases: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI brings B A into the checkpoint's order of rows, and expects dora_scale in that order."""
    argv = on_base(family, bases)
    adapt_family(family, **EVERY_ROW_SHOWS, alpha=8.0, rank=4)
    workspace.run("export", *argv)
    monkeypatch.setattr(original_layout, "swapped_layers", lambda module: set())
    with pytest.raises(RuntimeError, match=r"\S+ of the comfyui export \D+: [01]\.\d+"):
        workspace.run("export", *argv)


def test_a_tucker_core_stops_the_export(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI logs an error for it and does not change the layer."""
    adapt(workspace, **algo("lokr-tucker", alpha=6.0))
    original = comfyui.lycoris_tensors

    def as_trained(trained: Any, name: str) -> dict[str, torch.Tensor]:
        start = f"{name}."
        own = {k.removeprefix(start): t for k, t in trained.weights.items() if k.startswith(start)}
        return own | {"alpha": torch.tensor(6.0)} if "lokr_t2" in own else original(trained, name)

    monkeypatch.setattr(comfyui, "lycoris_tensors", as_trained)
    with pytest.raises(RuntimeError, match=r"comfyui export .*: .*_conv1.lokr_t2'"):
        workspace.run("export", "--set", "export.formats=[comfyui]")


# Our reader, against what ComfyUI made of one layer of each kind


@pytest.mark.parametrize("kind", comfyui_itself.LAYERS)
def test_the_reader_gives_comfyuis_weights(kind: str) -> None:
    recorded = load_tensors(comfyui_itself.ANSWERS)
    layer = {key.partition("/")[2]: tensor for key, tensor in recorded.items() if key.startswith(f"{kind}/")}
    weight, answer = layer.pop("weight"), layer.pop("answer")
    file = {f"transformer.x.{leaf}": tensor for leaf, tensor in layer.items()}
    change = reader.full_change(StackedLayer("x", "swapped" in kind), weight, reader.pop_tensors(file, "x"))
    torch.testing.assert_close(weight + change, answer, atol=2e-6, rtol=1e-6)
    assert bool(file) == torch.equal(answer, weight) == (kind == "lokr, tucker")  # which ComfyUI leaves as the base
