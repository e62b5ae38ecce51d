"""``NAME.safetensors`` with the keys that ComfyUI reads. ComfyUI itself is not run here: reader.py loads the file back.

A UNet has kohya's keys: lora_down, lora_up, alpha. A transformer has diffusers' keys, lora_A and lora_B without alpha
and with the strength in B, so that diffusers reads the file too. Further keys are dora_scale and diff_b, and for
LyCORIS lokr_*, hada_* and alpha.
For DoRA, ComfyUI divides by the row norms of the base, PEFT by the row norms of W + s B A. So dora_scale is the
magnitude times the ratio of both norms, which is exact at strength 1. ComfyUI reorders the rows of B A for the original
checkpoint, but expects dora_scale in the checkpoint's order.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_dag.core.console import log
from lora_dag.formats import LoadedBack

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_dag.adapters.adapter_tensors import AdapterTensors, Tensors
    from lora_dag.adapters.base_modules import BaseModules
    from lora_dag.formats import AdapterKind, Card, Export
    from lora_dag.formats.comfyui.reader import Change

FILE = "{name}.safetensors"
READER = "a reader of ComfyUI's keys"
IS_ADAPTER = True
LOADED_BY_PEFT = False
CAVEAT = "The ComfyUI file was checked by a reader of ComfyUI's keys, not by ComfyUI itself."
TOLERANCE = 1e-5  # of a layer's largest weight, float32


def unsupported_reason(adapter: AdapterKind) -> str:
    """Return why the format cannot hold the adapter; empty if it can."""
    if adapter.denoiser != "unet" and adapter.bias != "none":
        return "ComfyUI joins q, k and v of a transformer into one layer, and no key names its bias (lora.bias)"
    return ""


def write(export: Export, folder: Path) -> None:
    """Write the files into ``folder``."""
    from lora_dag.adapters.adapter_set import file_name
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
    """Return the key of a layer: ``lora_unet_down_blocks_0_conv``. A prefix that ends in a dot keeps the dots."""
    return prefix + (name if prefix.endswith(".") else name.replace(".", "_"))


def layer_tensors(part: AdapterTensors, name: str, is_kohyas: bool) -> Tensors:
    """Return the tensors of a layer by the last part of their keys."""
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
    """Return the tensors and alpha of a layer by the names of LyCORIS, which PEFT also uses.

    A second factor of LoKr in Tucker form (convolutions) is multiplied out, because ComfyUI 0.29.0 skips layers with
    lokr_t2. With two full factors the strength is multiplied into the first one, because PEFT scales them, but LyCORIS
    and ComfyUI do not.
    """
    import torch
    from peft.tuners.lokr.layer import make_weight_cp

    scaling, tensors = part.scalings[name], part.layer_tensors(name)
    if "lokr_t2" in tensors:
        tucker = (tensors.pop(leaf) for leaf in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        tensors["lokr_w2"] = make_weight_cp(*tucker).contiguous()
    if tensors.keys() == {"lokr_w1", "lokr_w2"}:
        tensors["lokr_w1"] = scaling * tensors["lokr_w1"]
        scaling = 1.0
    return tensors | {"alpha": torch.tensor(float(scaling * part.ranks[name]))}


def load_back(export: Export, folder: Path) -> LoadedBack:
    """Load the file by our own reader of ComfyUI's keys, into the layers of the original checkpoint."""
    from lora_dag.formats.comfyui import reader

    modules = export.load_modules()
    denoiser, *encoders = modules.adapted.values()
    patch = reader.read(denoiser, folder / FILE.format(name=export.name), text_encoders=encoders)
    if not patch.unread:
        require_layers(export, modules, patch.changes)
    applied = contextlib.ExitStack()
    applied.enter_context(reader.applied(patch, denoiser, encoders))
    return LoadedBack(modules, patch.unread, applied.close)


def require_layers(export: Export, modules: BaseModules, changes: Mapping[str, Change]) -> None:
    """Compare the weights of every adapted layer, since outputs hardly depend on some layers.

    Args:
        modules: the base, which is restored afterwards.
        changes: parameter -> function that applies the file.

    Raises:
        RuntimeError: a layer differs from the trained one.
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
                change = changes.get(f"{prefix}{name}.weight")
                patched_weight = change(base) if change else base
                error = float((patched_weight - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise RuntimeError(f"{prefix}{name} of the comfyui export differs from the trained layer: {error:.3g}")
        lora.delete(module)
    log.info("comfyui     largest relative difference of a weight in the original checkpoint's layers %.2g", worst)


def usage(card: Card) -> str:
    """Return Markdown on how to load the files."""
    end = ", and load it at strength 1, where DoRA is exact." if card.use_dora else "."
    return f"With ComfyUI: put `comfyui/{FILE.format(name=card.name)}` below `models/loras`{end}"
