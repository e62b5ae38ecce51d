"""A LoRA file of another program or an earlier run -> its layers by the denoiser's own names, with their strength.

Read are our adapter.safetensors (with adapter.json), diffusers' and PEFT's files, and kohya's or ComfyUI's keys. Layers
of the original checkpoint are taken apart into the denoiser's, by lora_dag/adapters/original_layout.py. A key that has
no place is refused, so that every tensor of a file counts.

load_lora_weights of diffusers 0.42 is not used here: it leaves out a part of most such files without a word.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.adapters.init_from_pin import SETTING, config_beside
from lora_dag.adapters.original_layout import Part, parts, swap_halves, swapped_layers
from lora_dag.adapters.targets import matches
from lora_dag.core.console import UserError, plural
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
"""Ending of a key -> what the tensor is."""
DOTTED = ("base_model.model.", "unet.", "transformer.", "diffusion_model.", "")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
TEXT = ("text_encoder", "lora_te")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""safetensors' dtypes that hold weights."""
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
"""And, with those, an alpha."""
OF_ROWS = ("b", "magnitude", "dora_scale", "bias_of_b", "delta")
"""Tensors with an entry for each row of the layer's weight."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""PEFT's starts that move a part of the base's weights into the adapter: without that base the file means nothing."""


@dataclass(frozen=True)
class Layer:
    """A low-rank change of one layer."""

    a: torch.Tensor
    """float32 [r, in, ...]"""
    b: torch.Tensor
    """float32 [out, r, ...]"""
    scaling: float
    """What B A is multiplied by."""
    magnitude: torch.Tensor | None = None
    """DoRA's, as PEFT keeps it."""
    dora_scale: torch.Tensor | None = None
    """The same as ComfyUI reads it: times ||W|| / ||W + s B A||, float32 [out, 1, ...]."""

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def is_dora(self) -> bool:
        return self.magnitude is not None or self.dora_scale is not None


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, in float32."""

    layers: dict[str, Layer]
    biases: dict[str, torch.Tensor]
    """Module's name -> what is added to its bias."""
    base: dict[str, str] = field(default_factory=dict)
    """Digest per component of the base that it was trained on, where one of our files says so."""
    says_alpha: bool = True
    """False where nothing names an alpha: the strength is taken as 1."""
    num_tensors: int = 0
    """How many the file has; all of them are in the layers and biases, or the file was refused."""


def read(file: Path, denoiser: Any) -> AdapterFile:
    """The layers of a file by the denoiser's names.

    Args:
        denoiser: may carry an adapter, and be on the meta device.

    Raises:
        UserError: every kind of key that has no place here.
    """
    from safetensors import SafetensorError

    try:
        tensors, header = load_tensors(file), load_metadata(file)
        names = ("lora_dag", "lora_adapter_metadata")
        record, packed = (mapping(from_json(header.get(name, "{}")), file, name) for name in names)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{SETTING}: '{file}' is damaged, or no safetensors file ({error})") from None
    require_numbers(tensors, file)
    config, base = read_config(file, packed), mapping(record.get("base", {}), file, "base")
    if (beside := config_beside(file)) and beside.name == "adapter.json":
        base = mapping(mapping(read_json(beside), beside, "content").get("base", {}), beside, "base")
    groups = grouped({name: tensor.float() for name, tensor in tensors.items()}, file)
    if not record and any("dora_scale" in group for group in groups.values()):
        raise UserError(
            f"{SETTING}: '{file}' holds DoRA as dora_scale, which programs read in two ways; start from a file of "
            "diffusers or PEFT (lora_magnitude_vector)"
        )
    named, strange = by_layer(groups, denoiser, file)
    if strange:
        raise UserError(
            f"{SETTING}: '{file}' adapts {strange[0]}, which {type(denoiser).__name__} does not have; is it for "
            "another model.family or base?"
        )
    for name in swapped_layers(denoiser) & named.keys():
        if "dora_scale" in named[name]:  # of ours, in the original checkpoint's order of rows
            named[name] = named[name] | {"dora_scale": swap_halves(named[name]["dora_scale"])}
    says_alpha = bool(config or record) or any("alpha" in group for group in groups.values())
    return replace(assembled(named, config, base), says_alpha=says_alpha, num_tensors=len(tensors))


def mapping(value: Any, file: Path, what: str) -> dict[str, Any]:
    """Raises UserError for a part of a file that is no mapping."""
    if not isinstance(value, dict):
        raise UserError(f"{SETTING}: '{file}' is damaged: its {what} is {value!r:.40}, no mapping; fetch it again")
    return value


def require_numbers(tensors: Tensors, file: Path) -> None:
    """Raises UserError for tensors of no float dtype (alpha may be an integer), or with NaN or infinity."""
    dtypes = {name: entry["dtype"] for name, entry in read_header(file).items()}
    for name, tensor in tensors.items():
        if dtypes[name] not in FLOATS + (INTEGERS if name.endswith(".alpha") else ()):
            raise UserError(f"{SETTING}: '{file}': {name} is {dtypes[name]}; start from a file in a float dtype")
        if not tensor.float().isfinite().all():
            raise UserError(f"{SETTING}: '{file}': {name} has NaN or infinity; its training failed, use another file")


def read_config(file: Path, packed: dict[str, Any]) -> dict[str, Any]:
    """The LoraConfig that says the file's alpha; empty where there is none.

    Args:
        packed: what diffusers keeps in a header, its keys prefixed with the component.

    Raises:
        UserError: a config of something else, or one that goes with a changed base.
    """
    beside = config_beside(file)
    if beside is None:
        config = {key.partition(".")[2]: value for key, value in packed.items() if key.startswith(("unet.", "trans"))}
    else:
        config = mapping(read_json(beside), beside, "content")
        if beside.name == "adapter.json":
            if sha256_file(file) not in mapping(config.get("files", {}), beside, "files").values():
                raise UserError(f"{SETTING}: {beside} belongs to another file than '{file}'; keep the two together")
            config = mapping(config.get("lora_config", {}), beside, "lora_config")
    kind, start = config.get("peft_type", "LORA"), str(config.get("init_lora_weights", "")).lower()
    if kind != "LORA":
        raise UserError(f"{SETTING}: '{file}' is {kind}, no LoRA; start from a LoRA file")
    if start.startswith(CHANGE_THE_BASE):
        raise UserError(f"{SETTING}: '{file}' began as {start}, which changed its base; convert it to plain LoRA first")
    require_alphas(config, beside or file)
    return config


def require_alphas(config: dict[str, Any], file: Path) -> None:
    """Raises UserError for an alpha that is no finite number, or a pattern that is no regular expression."""
    patterns = mapping(config.get("alpha_pattern") or {}, file, "alpha_pattern")
    for name, value in {"lora_alpha": config.get("lora_alpha", 1), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"{SETTING}: '{file}': alpha of {name} is {value!r:.40}, no finite number; write the one meant"
            )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{SETTING}: '{file}': alpha_pattern {pattern!r:.40} is no pattern ({error})") from None


def grouped(tensors: Tensors, file: Path) -> dict[str, Tensors]:
    """Name of a module as the file has it -> its tensors by what they are.

    Raises:
        UserError: keys that are no LoRA's, or a text encoder's.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    groups: dict[str, Tensors] = {}
    unknown, text = [], set()
    for key, tensor in convert_unet_state_dict_to_peft(tensors).items():
        leaf = next((leaf for leaf in sorted(LEAVES, key=len, reverse=True) if key.endswith(f".{leaf}")), None)
        module = key.removesuffix(f".{leaf}")
        if key.startswith(TEXT):
            text.add(module)
        elif leaf is None:
            unknown.append(key)
        else:
            groups.setdefault(module, {})[LEAVES[leaf]] = tensor
    problems = []
    if unknown:
        keys = plural(len(unknown), "key that is", "keys that are")
        problems.append(
            f"{SETTING}: '{file}' has {keys} no LoRA's ({unknown[0]}); LoHa, LoKr and whole weights have no place here"
        )
    if text:
        layers = plural(len(text), "layer")
        problems.append(
            f"{SETTING}: '{file}' also adapts a text encoder ({layers}), which is not trained here; start from"
            " a file without it"
        )
    odd = [
        module
        for module, group in groups.items()
        if not is_whole(group) and not any(key.startswith(f"{module}.") for key in unknown)
    ]
    if odd:
        problems.append(f"{SETTING}: '{file}' is damaged: the tensors of {odd[0]} are no adapter; fetch it again")
    if problems:
        raise UserError(*problems)
    return groups


def is_whole(group: Tensors) -> bool:
    """Down and up of one rank with a single alpha and a magnitude per row, or a bias alone.

    ``dora_scale`` may be over inputs: OneTrainer's default, and LyCORIS's ``wd_on_output=False``.
    """
    a, b = group.get("a"), group.get("b")
    if a is None or b is None:
        return set(group) == {"delta"}
    if min(a.dim(), b.dim()) < 2 or not 0 < len(a) == b.shape[1]:
        return False
    sizes = {"alpha": [1], "magnitude": [len(b)], "dora_scale": [len(b), a.shape[1]], "bias_of_b": [len(b)]}
    return all(group[name].numel() in size for name, size in sizes.items() if name in group)


def by_layer(groups: dict[str, Tensors], denoiser: Any, file: Path) -> tuple[dict[str, Tensors], list[str]]:
    """The groups under the denoiser's names, and the names of those that no module has.

    Raises:
        UserError: a layer of the original checkpoint with another number of rows than this base's.
    """
    modules = {name: [Part(name, swapped=False)] for name, _ in denoiser.named_modules()}
    known = parts(denoiser) | modules
    names = {prefix + name.replace(".", "_"): name for name in known for prefix in UNDERSCORED}
    found: dict[str, Tensors] = {}
    strange = []
    for module, group in groups.items():
        plain = next((module.removeprefix(p) for p in DOTTED if module.removeprefix(p) in known), None)
        name = names.get(module, plain)
        if name is None:
            strange.append(module)
        else:
            found |= taken_apart(group, known[name], module, denoiser, file)
    return found, strange


def taken_apart(group: Tensors, layers: list[Part], module: str, denoiser: Any, file: Path) -> dict[str, Tensors]:
    """A file's layer as the denoiser's layers whose rows are stacked in it; they share A and alpha."""
    if len(layers) == 1 and not layers[0].swapped:
        return {layers[0].name: group}
    sizes = [denoiser.get_submodule(part.name).out_features for part in layers]
    found: dict[str, Tensors] = {part.name: dict(group) for part in layers}
    for kind in set(group) & set(OF_ROWS):
        if len(group[kind]) != sum(sizes):
            raise UserError(
                f"{SETTING}: '{file}': {module} has {len(group[kind])} outputs, in model.pretrained {sum(sizes)}; it "
                "was made for another base: set model.pretrained to that one"
            )
        for part, rows in zip(layers, group[kind].split(sizes), strict=True):
            found[part.name][kind] = swap_halves(rows) if part.swapped else rows
    return found


def assembled(named: dict[str, Tensors], config: dict[str, Any], base: dict[str, str]) -> AdapterFile:
    """The groups as layers and biases, each with the strength that the file or its config says."""
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
    return AdapterFile(layers, biases, base)


def strength(config: dict[str, Any], name: str, group: Tensors) -> float:
    """Of a layer: kohya's alpha / rank; else by PEFT's config; else 1, as an absent alpha is the rank."""
    rank = len(group["a"])
    if "alpha" in group:
        return float(group["alpha"]) / rank
    if "lora_alpha" not in config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if matches(key, name)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
