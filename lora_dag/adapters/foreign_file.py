"""Reader of LoRA files of other programs and earlier runs: layers by the denoiser's names, with their strength.

It reads our adapter.safetensors (with adapter.json), files of diffusers and PEFT, and kohya's and ComfyUI's keys.
Layers of the original checkpoint are split into the denoiser's (lora_dag/adapters/original_layout.py). An unknown key
is an error, so that every tensor of a file is used.

load_lora_weights of diffusers 0.42 is not used, because it silently ignores a part of most such files.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.adapters.init_from_pin import SETTING, config_beside
from lora_dag.adapters.original_layout import StackedLayer, original_layers, swap_halves, swapped_layers
from lora_dag.adapters.targets import matches
from lora_dag.core.console import Problem, UserError, plural
from lora_dag.core.files import from_json, read_json, sha256_file
from lora_dag.core.tensors import load_metadata, load_tensors, read_header

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

LEAVES = {
    "lora_A.weight": "a",
    "lora_down.weight": "a",
    "lora_B.weight": "b",
    "lora_up.weight": "b",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "lora_B.bias": "bias_of_b",
    "bias_delta": "delta",
    "diff_b": "delta",
}
"""Ending of a key -> kind of tensor."""
DOTTED = ("base_model.model.", "unet.", "transformer.", "diffusion_model.", "")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
TEXT = ("text_encoder", "lora_te")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""safetensors' dtypes that hold weights."""
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
"""safetensors' dtypes that only an alpha may have."""
PER_ROW = ("b", "magnitude", "dora_scale", "bias_of_b", "delta")
"""Kinds of tensors with an entry for each row of the layer's weight."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""PEFT's initializations that move a part of the base's weights into the adapter: it needs that changed base."""


@dataclass(frozen=True)
class Layer:
    """Low-rank change of one layer."""

    a: torch.Tensor
    """float32 [r, in, ...]"""
    b: torch.Tensor
    """float32 [out, r, ...]"""
    scaling: float
    """Factor of B A."""
    magnitude: torch.Tensor | None = None
    """DoRA magnitudes in PEFT's form."""
    dora_scale: torch.Tensor | None = None
    """DoRA magnitudes in ComfyUI's form: magnitude * ||W|| / ||W + s B A||, float32 [out, 1, ...]."""

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def is_dora(self) -> bool:
        return self.magnitude is not None or self.dora_scale is not None


@dataclass(frozen=True)
class AdapterFile:
    """Content of a file, in float32."""

    layers: dict[str, Layer]
    biases: dict[str, torch.Tensor]
    """Module -> change of its bias."""
    base_digests: dict[str, str] = field(default_factory=dict)
    """Component -> digest of the base model it was trained on; empty if the file does not record it."""
    has_alpha: bool = True
    """False if the file contains no alpha. Then the strength is 1."""
    num_tensors: int = 0
    """Number of tensors in the file, all of which are used."""


def read(file: Path, denoiser: Any, setting: str = SETTING) -> AdapterFile:
    """Read the layers of a file by the denoiser's names.

    Args:
        denoiser: may have an adapter, and may be on the meta device.
        setting: name of the setting with the file's path, for messages.

    Raises:
        UserError: the file is damaged, or has tensors that do not fit a LoRA of this denoiser.
    """
    try:
        return read_layers(file, denoiser)
    except UserError as error:
        raise error.at(f"{setting}: '{file}'") from None


def read_layers(file: Path, denoiser: Any) -> AdapterFile:
    """Read the layers of a file; texts of its errors do not contain the file's name."""
    from safetensors import SafetensorError

    try:
        tensors, header = load_tensors(file), load_metadata(file)
        entries = ("lora_dag", "lora_adapter_metadata")
        record, packed = (require_mapping(from_json(header.get(name, "{}")), name) for name in entries)
    except (SafetensorError, ValueError) as error:
        text = f"damaged, or no safetensors file ({error}). Fetch it again."
        raise UserError(Problem("adapter-file-damaged", text)) from None
    require_numbers(tensors, file)
    config, base_digests = read_config(file, packed), require_mapping(record.get("base", {}), "base")
    if (beside := config_beside(file)) and beside.name == "adapter.json":
        content = require_mapping(read_json(beside), f"{beside}")
        base_digests = require_mapping(content.get("base", {}), f"base of {beside}")
    groups = group_by_module({name: tensor.float() for name, tensor in tensors.items()})
    if not record and any("dora_scale" in group for group in groups.values()):
        text = (
            "the file contains DoRA as dora_scale, which programs interpret in two ways. Use a file of diffusers or "
            "PEFT (lora_magnitude_vector)."
        )
        raise UserError(Problem("dora-scale-ambiguous", text))
    named = rename_to_denoiser(groups, denoiser)
    for name in swapped_layers(denoiser) & named.keys():
        if "dora_scale" in named[name]:  # our files have the original checkpoint's order of rows
            named[name] = named[name] | {"dora_scale": swap_halves(named[name]["dora_scale"])}
    has_alpha = bool(config or record) or any("alpha" in group for group in groups.values())
    adapter_file = build_adapter_file(named, config, base_digests)
    return replace(adapter_file, has_alpha=has_alpha, num_tensors=len(tensors))


def require_mapping(value: Any, name: str) -> dict[str, Any]:
    """Raise UserError if a part of a file is no mapping."""
    if not isinstance(value, dict):
        text = f"damaged: {name} is {value!r:.40}, but a mapping is expected. Fetch the file again."
        raise UserError(Problem("adapter-file-damaged", text))
    return value


def require_numbers(tensors: Tensors, file: Path) -> None:
    """Raise UserError for a tensor without a float dtype (alpha may be an integer), or with NaN or infinity."""
    dtypes = {name: entry["dtype"] for name, entry in read_header(file).items()}
    for name, tensor in tensors.items():
        if dtypes[name] not in FLOATS + (INTEGERS if name.endswith(".alpha") else ()):
            text = f"{name} has dtype {dtypes[name]}, but floats are expected. Use a file with a float dtype."
            raise UserError(Problem("adapter-file-dtype", text))
        if not tensor.float().isfinite().all():
            text = f"{name} contains NaN or infinity, so its training failed. Use another file."
            raise UserError(Problem("adapter-file-not-finite", text))


def read_config(file: Path, packed: dict[str, Any]) -> dict[str, Any]:
    """Return the LoraConfig with the file's alpha; empty if there is none.

    Args:
        packed: config in a header of diffusers, with keys that begin with the component.

    Raises:
        UserError: the config belongs to no LoRA, or to an adapter that needs a changed base.
    """
    beside = config_beside(file)
    if beside is None:
        config = {key.partition(".")[2]: value for key, value in packed.items() if key.startswith(("unet.", "trans"))}
    else:
        config = require_mapping(read_json(beside), f"{beside}")
        if beside.name == "adapter.json":
            if sha256_file(file) not in require_mapping(config.get("files", {}), f"files of {beside}").values():
                text = f"{beside} belongs to another file. Put the adapter.json of this file beside it."
                raise UserError(Problem("adapter-json-of-other-file", text))
            config = require_mapping(config.get("lora_config", {}), f"lora_config of {beside}")
    kind, init = config.get("peft_type", "LORA"), str(config.get("init_lora_weights", "")).lower()
    if kind != "LORA":
        raise UserError(Problem("adapter-no-lora", f"the file is {kind}, but LoRA is expected. Use a LoRA file."))
    if init.startswith(CHANGE_THE_BASE):
        text = f"the file was initialized by {init}, which changed its base model. Convert it to plain LoRA first."
        raise UserError(Problem("adapter-changed-base", text))
    require_alphas(config)
    return config


def require_alphas(config: dict[str, Any]) -> None:
    """Raise UserError for an alpha that is no finite number, or a pattern that is no regular expression."""
    patterns = require_mapping(config.get("alpha_pattern") or {}, "alpha_pattern")
    for name, value in {"lora_alpha": config.get("lora_alpha", 1), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            text = f"alpha of {name} is {value!r:.40}, but a finite number is expected. Correct the config."
            raise UserError(Problem("adapter-alpha-invalid", text))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            text = f"alpha_pattern {pattern!r:.40} is no regular expression ({error}). Correct the config."
            raise UserError(Problem("adapter-alpha-invalid", text)) from None


def group_by_module(tensors: Tensors) -> dict[str, Tensors]:
    """Group the tensors by the file's names of modules, each by its kind.

    Raises:
        UserError: a key belongs to no LoRA, or to a text encoder.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    groups: dict[str, Tensors] = {}
    unknown, text_layers = [], set()
    for key, tensor in convert_unet_state_dict_to_peft(tensors).items():
        leaf = next((leaf for leaf in sorted(LEAVES, key=len, reverse=True) if key.endswith(f".{leaf}")), None)
        module = key.removesuffix(f".{leaf}")
        if key.startswith(TEXT):
            text_layers.add(module)
        elif leaf is None:
            unknown.append(key)
        else:
            groups.setdefault(module, {})[LEAVES[leaf]] = tensor
    problems = []
    if unknown:
        keys = plural(len(unknown), "key that does", "keys that do")
        text = f"the file has {keys} not belong to a LoRA ({unknown[0]}). LoHa, LoKr and full weights are unsupported."
        problems.append(Problem("adapter-no-lora", text))
    if text_layers:
        count = plural(len(text_layers), "layer")
        text = f"the file also adapts a text encoder ({count}), which is not supported. Use a file without it."
        problems.append(Problem("adapter-of-text-encoder", text))
    incomplete = [
        module
        for module, group in groups.items()
        if not is_complete(group) and not any(key.startswith(f"{module}.") for key in unknown)
    ]
    if incomplete:
        text = f"damaged: the tensors of {incomplete[0]} are no complete adapter. Fetch the file again."
        problems.append(Problem("adapter-file-damaged", text))
    if problems:
        raise UserError(*problems)
    return groups


def is_complete(group: Tensors) -> bool:
    """Return whether a group has A and B of one rank, at most one alpha and a magnitude per row, or only a bias.

    ``dora_scale`` may have an entry per input: OneTrainer's default, and LyCORIS's ``wd_on_output=False``.
    """
    a, b = group.get("a"), group.get("b")
    if a is None or b is None:
        return set(group) == {"delta"}
    if min(a.dim(), b.dim()) < 2 or not 0 < len(a) == b.shape[1]:
        return False
    sizes = {"alpha": [1], "magnitude": [len(b)], "dora_scale": [len(b), a.shape[1]], "bias_of_b": [len(b)]}
    return all(group[name].numel() in size for name, size in sizes.items() if name in group)


def rename_to_denoiser(groups: dict[str, Tensors], denoiser: Any) -> dict[str, Tensors]:
    """Return the groups by the denoiser's names.

    Raises:
        UserError: a layer is missing in the denoiser, or has another number of rows there.
    """
    modules = {name: [StackedLayer(name, swapped=False)] for name, _ in denoiser.named_modules()}
    known = original_layers(denoiser) | modules
    names = {prefix + name.replace(".", "_"): name for name in known for prefix in UNDERSCORED}
    renamed: dict[str, Tensors] = {}
    unknown = []
    for module, group in groups.items():
        dotted = next((module.removeprefix(p) for p in DOTTED if module.removeprefix(p) in known), None)
        name = names.get(module, dotted)
        if name is None:
            unknown.append(module)
        else:
            renamed |= split_rows(group, known[name], module, denoiser)
    if unknown:
        text = (
            f"the file adapts {unknown[0]}, which {type(denoiser).__name__} does not have. Check model.family and "
            "model.pretrained."
        )
        raise UserError(Problem("adapter-of-other-base", text))
    return renamed


def split_rows(group: Tensors, layers: list[StackedLayer], module: str, denoiser: Any) -> dict[str, Tensors]:
    """Split a file's layer into the denoiser's layers whose rows it stacks; they share A and alpha."""
    if len(layers) == 1 and not layers[0].swapped:
        return {layers[0].name: group}
    sizes = [denoiser.get_submodule(layer.name).out_features for layer in layers]
    split: dict[str, Tensors] = {layer.name: dict(group) for layer in layers}
    for kind in set(group) & set(PER_ROW):
        if len(group[kind]) != sum(sizes):
            text = (
                f"{module} has {len(group[kind])} outputs, but {sum(sizes)} in model.pretrained. Set model.pretrained "
                "to the base model that the file was trained on."
            )
            raise UserError(Problem("adapter-of-other-base", text))
        for layer, rows in zip(layers, group[kind].split(sizes), strict=True):
            split[layer.name][kind] = swap_halves(rows) if layer.swapped else rows
    return split


def build_adapter_file(named: dict[str, Tensors], config: dict[str, Any], base_digests: dict[str, str]) -> AdapterFile:
    """Return the groups as layers and biases, with the strength of the file or its config."""
    layers, biases = {}, {}
    for name, group in named.items():
        if "a" in group:
            scaling = strength(config, name, group)
            layers[name] = Layer(
                group["a"].contiguous(),
                group["b"].contiguous(),
                scaling,
                group.get("magnitude"),
                group.get("dora_scale"),
            )
            if "bias_of_b" in group and bool(group["bias_of_b"].any()):
                biases[name] = group["bias_of_b"] * scaling
        if "delta" in group:
            biases[name] = group["delta"]
    return AdapterFile(layers, biases, base_digests)


def strength(config: dict[str, Any], name: str, group: Tensors) -> float:
    """Return a layer's strength: kohya's alpha / rank, else from PEFT's config, else 1 (alpha equal to the rank)."""
    rank = len(group["a"])
    if "alpha" in group:
        return float(group["alpha"]) / rank
    if "lora_alpha" not in config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if matches(key, name)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
