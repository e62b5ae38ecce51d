"""``NAME.safetensors`` with keys as ComfyUI reads them; no program here runs ComfyUI, so reader.py reads them back.

Of a UNet kohya's: lora_down, lora_up, alpha. Of a transformer diffusers' own, lora_A and lora_B without an alpha,
the strength in B: diffusers reads that file too. Besides dora_scale, diff_b; of LyCORIS lokr_*, hada_*, alpha.
ComfyUI divides a DoRA layer by the base's row norms where PEFT divides by those of W + s B A: dora_scale is the
magnitude times their ratio, exact at strength 1. It brings the rows of B A into the order of the original
checkpoint, and takes those of dora_scale for being in it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_dag.core.console import log
from lora_dag.formats import LoadedBack

if TYPE_CHECKING:
    from pathlib import Path

    from lora_dag.adapters.adapter_tensors import AdapterTensors, Tensors
    from lora_dag.adapters.base_modules import BaseModules
    from lora_dag.formats import AdapterKind, Card, Export

FILE = "{name}.safetensors"
READER = "a reader of ComfyUI's keys"
IS_ADAPTER = True
LOADED_BY_PEFT = False
LIMIT = "The file for ComfyUI was read by a reader of its keys and rows; ComfyUI itself was not run."
TOLERANCE = 1e-5  # of a layer's largest weight, float32


def refuse(adapter: AdapterKind) -> str:
    if adapter.denoiser != "unet" and adapter.bias != "none":
        return "ComfyUI joins a transformer's q, k and v into one layer, whose bias no key names"
    return ""


def write(export: Export, folder: Path) -> None:
    from lora_dag.adapters.adapted import file_name
    from lora_dag.adapters.adapter_tensors import kohya_network

    tensors: Tensors = {}
    prefixes = export.family.COMFYUI
    is_kohyas = prefixes[export.family.DENOISER].endswith("_")
    parts = {name: part if is_kohyas else part.folded() for name, part in export.tensors.items()}
    for component, part in parts.items():
        prefix = prefixes[component]
        for name in part.scalings:
            start = key(file_name(component, name), prefix)
            tensors |= {f"{start}.{leaf}": tensor for leaf, tensor in layer_tensors(part, name, is_kohyas).items()}
        for name, delta in part.biases.items():
            tensors[f"{key(name, prefix)}.diff_b"] = delta
    export.save(folder / FILE.format(name=export.name), tensors, kohya_network(parts.values(), tensors))


def key(name: str, prefix: str) -> str:
    """``down_blocks.0.conv`` -> ``lora_unet_down_blocks_0_conv``; a prefix that ends in a dot keeps the name."""
    return prefix + (name if prefix.endswith(".") else name.replace(".", "_"))


def layer_tensors(part: AdapterTensors, name: str, is_kohyas: bool) -> Tensors:
    """A target's tensors by their last names."""
    import torch

    from lora_dag.adapters.original_layout import swap_halves

    if "algo" in part.config:
        return lycoris_tensors(part, name)
    a, b = (part.weights[f"{name}.lora_{which}.weight"] for which in "AB")
    tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if is_kohyas:
        alpha = torch.tensor(float(part.scalings[name] * part.ranks[name]))
        tensors = {"lora_down.weight": a, "lora_up.weight": b, "alpha": alpha}
    if name in part.row_factors:
        rows = part.row_factors[name] * part.row_norms[name]
        tensors["dora_scale"] = swap_halves(rows) if name in part.swapped else rows
    return tensors


def lycoris_tensors(part: AdapterTensors, name: str) -> Tensors:
    """A target's tensors and alpha, as LyCORIS names them; so does PEFT.

    LoKr's second factor of a convolution in Tucker form is written whole: ComfyUI 0.29.0 leaves out a layer with
    lokr_t2. Two whole factors have the strength in the first one: LyCORIS and ComfyUI do not scale them, PEFT does.
    """
    import torch
    from peft.tuners.lokr.layer import make_weight_cp

    scaling, tensors = part.scalings[name], part.of_layer(name)
    if "lokr_t2" in tensors:
        tucker = (tensors.pop(leaf) for leaf in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        tensors["lokr_w2"] = make_weight_cp(*tucker).contiguous()
    if tensors.keys() == {"lokr_w1", "lokr_w2"}:
        tensors["lokr_w1"] = scaling * tensors["lokr_w1"]
        scaling = 1.0
    return tensors | {"alpha": torch.tensor(float(scaling * part.ranks[name]))}


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Our own reader of ComfyUI's keys, on the layers of the original checkpoint."""
    from lora_dag.formats.comfyui import reader

    modules = export.load_base()
    denoiser, *encoders = modules.adapted.values()
    found = reader.read(denoiser, folder / FILE.format(name=export.name), text_encoders=encoders)
    if not found.unread:
        require_layers(export, modules, found.weights)
    patched = contextlib.ExitStack()
    patched.enter_context(reader.in_place(reader.parameters(denoiser, encoders), found.weights))
    return LoadedBack(modules, found.unread, patched.close)


def require_layers(export: Export, modules: BaseModules, weights: Tensors) -> None:
    """Compare every adapted layer, of which outputs show few.

    Args:
        modules: the fresh base; it is the same afterwards.
        weights: parameter's name -> its value with the file in it.

    Raises:
        RuntimeError: the file makes a layer another one than training did.
    """
    import torch

    from lora_dag.adapters import lora

    export.inject(modules)
    worst = 0.0
    for number, (component, module) in enumerate(modules.adapted.items()):
        part, prefix = export.tensors[component], f"te{number}." if number else ""
        for name in part.scalings:
            with torch.no_grad():
                layer = module.get_submodule(name)
                base = layer.get_base_layer().weight
                expected = (base + layer.get_delta_weight(lora.NAME)) * part.row_factors.get(name, 1.0)
                own = weights.get(f"{prefix}{name}.weight", base)
                error = float((own - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise RuntimeError(f"the comfyui export makes {prefix}{name} other than training did: {error:.3g}")
        lora.delete(module)
    log.info("comfyui     in the original checkpoint's layers, largest relative difference of a weight %.2g", worst)


def usage(card: Card) -> str:
    end = ", and load it at strength 1, where DoRA is exact." if card.use_dora else "."
    return f"With ComfyUI: put `comfyui/{FILE.format(name=card.name)}` below `models/loras`{end}"
