"""Which layers an adapter goes on: presets, endings or a regex, patterns of rank and alpha; and what that will cost."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import lycoris
from lora_dag.core.console import UserError
from lora_dag.families.protocol import family_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_dag.adapters.params import LoraParams

ATTENTION = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv|to_qkv_mlp_proj"
FEED_FORWARD = r"(ff|ff_context)\.(net\.0\.proj|net\.2)|ff\.linear_(in|out)"
"""Names of diffusers' Attention and FeedForward; a family with others says so in PRESET_LAYERS."""
PRESETS = ("attention", "attention+ff", "all-linear", "all-linear+conv")
EDGES = ("conv_in", "conv_out")
"""The convolutions to and from latents: a preset leaves them alone, as kohya's conv LoRA does (out: 4 channels)."""
A_TEXT = "; a text is a preset or a regex over whole names, a list holds endings"
BYTES_PER_PARAMETER = 16  # float32: the parameter, its gradient, and AdamW's two moments

Layers = dict[str, torch.nn.Module]


def lora_settings(params: LoraParams, denoiser: torch.nn.Module) -> dict[str, Any]:
    """What ``params`` say about layers, as arguments of peft.LoraConfig; a setting at its default is left out.

    Raises:
        UserError: targets and patterns that match no layer, with the nearest names; ranks above a layer's size.
    """
    layers = adaptable(denoiser)
    groups = matched_groups(params.target_modules, layers, presets(denoiser))
    targets = list(dict.fromkeys(name for names in groups.values() for name in names))
    problems, excluded = [], set()
    for target in params.exclude_modules:
        names = [name for name in targets if has_ending(name, target)]
        excluded.update(names)
        if not names:
            problems.append(nothing("exclude_modules", target, "none of the targets", targets))
    targets = [name for name in targets if name not in excluded]
    for setting, pattern in (("rank_pattern", params.rank_pattern), ("alpha_pattern", params.alpha_pattern)):
        for key in pattern:
            if not any(matches(key, name) for name in targets) and not is_of_rank(params, setting, key):
                problems.append(nothing(setting, key, "none of the targets", targets))
        problems += ambiguous(params, setting, targets)
    for label, names in groups.items():
        if not names:
            problem = nothing("target_modules", label, f"no layer of {type(denoiser).__name__}", layers)
            problems.append(problem if isinstance(params.target_modules, list) else problem + A_TEXT)
        problems += rank_problems(params, label, [name for name in names if name not in excluded], layers)
    problems += dora_problems(params, [name for name in targets if isinstance(layers[name], torch.nn.Conv2d)], layers)
    weights: dict[str, Any] = {name: layers[name].weight for name in targets}
    problems += lycoris.idle_settings(params, weights, {name: rank(params, name)[0] for name in targets})
    if excluded and not targets:
        problems.append("params.yaml lora.exclude_modules: nothing is left of lora.target_modules")
    plain_endings = isinstance(params.target_modules, list) and not excluded
    problems += [] if plain_endings else not_alone(targets, layers)
    if problems:
        raise UserError(*problems)
    settings: dict[str, Any] = {"target_modules": sorted(params.target_modules if plain_endings else targets)}
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "decompose_both", "use_effective_conv2d"):
        if value := getattr(params, name):
            settings[name] = value
    return settings


def adaptable(denoiser: torch.nn.Module) -> Layers:
    """Linear and ungrouped Conv2d layers by name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)
    }


def presets(denoiser: torch.nn.Module) -> dict[str, str]:
    """Preset -> regex over the whole names of the layers of this denoiser."""
    family = family_of(denoiser)
    own = family.PRESET_LAYERS if family else {}
    attention = "|".join(filter(None, (ATTENTION, own.get("attention"))))
    feed_forward = "|".join(filter(None, (FEED_FORWARD, own.get("feed_forward"))))
    regexes = (rf"(.*\.)?({attention})", rf"(.*\.)?({attention}|{feed_forward})", ".*", ".*")
    return dict(zip(PRESETS, regexes, strict=True))


def matched_groups(target_modules: str | list[str], layers: Layers, presets: Mapping[str, str]) -> dict[str, list[str]]:
    """Ending given, or the layer's own under a preset or regex -> names of its layers, in the model's order."""
    if isinstance(target_modules, list):
        return {target: [name for name in layers if has_ending(name, target)] for target in target_modules}
    groups: dict[str, list[str]] = {}
    regex = re.compile(presets.get(target_modules, target_modules))
    for name in filter(regex.fullmatch, layers):
        if target_modules not in presets or in_preset(target_modules, name, layers):
            groups.setdefault(ending(name), []).append(name)
    return groups or {target_modules: []}


def in_preset(preset: str, name: str, layers: Layers) -> bool:
    """Whether a preset takes a layer that its regex names: no convolution unless it says so, no unread one."""
    if isinstance(layers[name], torch.nn.Conv2d) and (not preset.endswith("+conv") or name in EDGES):
        return False
    return not is_unread(name, layers)


def is_unread(name: str, layers: Layers) -> bool:
    """Of diffusers' Attention, the captions' query where captions end: nothing reads its output (SD3's last block)."""
    return has_ending(name, "add_q_proj") and f"{name.removesuffix('add_q_proj')}to_add_out" not in layers


def rank_problems(params: LoraParams, label: str, names: list[str], layers: Layers) -> list[str]:
    """A line where a layer of this label has fewer inputs or outputs than its rank."""
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        number, setting = rank(params, name)
        weight: Any = layers[name].weight
        smallest = min(weight.shape[:2] if lycoris.is_tucker(params, weight) else weight.flatten(1).shape)
        if number > smallest:
            line = f"params.yaml {setting}: {number} is above {smallest}, the size of a '{label}' layer"
            found[setting] = min(found.get(setting, (smallest, line)), (smallest, line))
    return [line for _, line in found.values()]


def rank(params: LoraParams, name: str) -> tuple[int, str]:
    """A target's rank, and the setting that says so."""
    key = next((key for key in params.rank_pattern if matches(key, name)), None)
    return (params.rank, "lora.rank") if key is None else (params.rank_pattern[key], f"lora.rank_pattern.{key}")


def dora_problems(params: LoraParams, convolutions: list[str], layers: Layers) -> list[str]:
    """Under autocast PEFT takes a convolution's norms in the frozen dtype: step 0 would not equal the base."""
    if not params.use_dora or all(layers[name].weight.dtype == torch.float32 for name in convolutions):
        return []
    kinds = ", ".join(sorted({ending(name) for name in convolutions}))
    return [f"params.yaml lora.use_dora: needs model.dtype float32 on convolutions ({kinds}); or leave them out"]


def is_of_rank(params: LoraParams, setting: str, key: str) -> bool:
    """Whether a key of alpha_pattern may have come from rank_pattern, as all of those do under ``lora.alpha: null``."""
    return setting == "alpha_pattern" and params.alpha_pattern[key] == params.rank_pattern.get(key)


def ambiguous(params: LoraParams, setting: str, targets: list[str]) -> list[str]:
    """A line for each two keys that match one layer with two values: PEFT would take whichever stands first."""
    found: list[str] = []
    pattern: Mapping[str, float] = getattr(params, setting)
    for one, other in itertools.combinations(pattern, 2):
        of_rank = [key for key in (one, other) if is_of_rank(params, setting, key)]
        both = [name for name in targets if matches(one, name) and matches(other, name)]
        if both and pattern[one] != pattern[other] and len(of_rank) < 2:  # of two ranks rank_pattern has the line
            cure = "make one narrower"
            if of_rank:
                cure = f"with lora.alpha null, '{of_rank[0]}' of rank_pattern is an alpha too: name it in alpha_pattern"
            found.append(f"params.yaml lora.{setting}: '{one}' and '{other}' both match {both[0]}; {cure}")
    return found


def not_alone(targets: list[str], layers: Layers) -> list[str]:
    """A line for a target whose whole name is also the ending of a layer that was not chosen: PEFT would take both."""
    chosen = set(targets)
    others = ((name, t) for name in layers if name not in chosen for t in targets if name.endswith(f".{t}"))
    return [f"params.yaml lora.target_modules: {t} cannot be chosen without {name}; add it" for name, t in others][:1]


def has_ending(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def matches(pattern: str, name: str) -> bool:
    """As PEFT reads the keys of rank_pattern and alpha_pattern: an ending, or a regex over one."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def ending(name: str) -> str:
    """``down_blocks.0.attn1.to_out.0`` -> ``to_out.0``: what a person writes in target_modules."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def nothing(setting: str, given: str, where: str, names: Iterable[str]) -> str:
    endings = sorted({ending(name) for name in names})
    near = difflib.get_close_matches(given, [*endings, *PRESETS], n=3, cutoff=0.3) or endings[:8]
    return f"params.yaml lora.{setting}: '{given}' matches {where} (near: {', '.join(near)})"


def plan(names: list[str], num_trainable: int, num_base: int) -> list[str]:
    """Lines for the log: the targets by kind, and the memory that training them takes beside the base's own."""
    kinds = Counter(ending(name) for name in names)
    return [
        "targets     " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        f"memory      {megabytes(num_trainable)} for adapter, gradients and optimizer (16 bytes a parameter, as AdamW "
        f"takes in float32); full fine-tuning {megabytes(num_base)}; base and activations come on top",
    ]


def megabytes(num_parameters: int) -> str:
    return f"{num_parameters * BYTES_PER_PARAMETER / 1e6:,.1f} MB"
