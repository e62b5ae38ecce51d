"""Choice of the adapted layers: presets, endings or a regex, patterns of rank and alpha; and the memory they need."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import lycoris
from lora_dag.core.console import Problem, UserError
from lora_dag.families.protocol import family_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_dag.adapters.params import LoraParams

ATTENTION = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv|to_qkv_mlp_proj"
FEED_FORWARD = r"(ff|ff_context)\.(net\.0\.proj|net\.2)|ff\.linear_(in|out)"
"""Layers of diffusers' Attention and FeedForward. A family with other names lists them in PRESET_LAYERS."""
PRESETS = ("attention", "attention+ff", "all-linear", "all-linear+conv")
EDGES = ("conv_in", "conv_out")
"""First and last convolution. Presets exclude them, as kohya's conv LoRA does (conv_out has 4 channels)."""
STRING_HINT = " A string is a preset or a regex over whole names. Write endings as a list."
BYTES_PER_PARAMETER = 16  # float32: parameter, gradient and two moments of AdamW

Layers = dict[str, torch.nn.Module]


def lora_settings(params: LoraParams, denoiser: torch.nn.Module) -> dict[str, Any]:
    """Return the settings of layers as arguments of peft.LoraConfig, without settings at their default.

    Raises:
        UserError: a target or pattern matches no layer, or a rank is above a layer's size.
    """
    layers = adaptable(denoiser)
    groups = matched_groups(params.target_modules, layers, presets(denoiser))
    matched = list(dict.fromkeys(name for names in groups.values() for name in names))
    excluded = {name for name in matched if any(has_ending(name, target) for target in params.exclude_modules)}
    targets = [name for name in matched if name not in excluded]
    problems = [
        no_match_problem(params, "exclude_modules", target, "none of the targets", matched)
        for target in params.exclude_modules
        if not any(has_ending(name, target) for name in matched)
    ]
    problems += pattern_problems(params, targets)
    for label, names in groups.items():
        if not names:
            hint = "" if isinstance(params.target_modules, list) else STRING_HINT
            scope = f"no layer of {type(denoiser).__name__}"
            problems.append(no_match_problem(params, "target_modules", label, scope, layers, hint))
        problems += rank_problems(params, label, [name for name in names if name not in excluded], layers)
    problems += dora_problems(params, [name for name in targets if isinstance(layers[name], torch.nn.Conv2d)], layers)
    weights = {name: weight_of(layers[name]) for name in targets}
    ranks = {name: rank_and_setting(params, name)[0] for name in targets}
    problems += lycoris.settings_without_effect(params, weights, ranks)
    if excluded and not targets:
        text = f"{params.setting('exclude_modules')}: excludes every layer of lora.target_modules. Exclude fewer."
        problems.append(Problem("no-targets-left", text))
    only_endings = isinstance(params.target_modules, list) and not excluded
    problems += [] if only_endings else inseparable_targets(params, targets, layers)
    if problems:
        raise UserError(*problems)
    settings: dict[str, Any] = {"target_modules": sorted(params.target_modules if only_endings else targets)}
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "decompose_both", "use_effective_conv2d"):
        if value := getattr(params, name):
            settings[name] = value
    return settings


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """Return a layer's weight; for a quantized layer one without values, since all floats at once would not fit."""
    return layer.state_dict()["weight"]


def adaptable(denoiser: torch.nn.Module) -> Layers:
    """Return the Linear and ungrouped Conv2d layers by name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)
    }


def presets(denoiser: torch.nn.Module) -> dict[str, str]:
    """Return each preset's regex over whole layer names of this denoiser."""
    family = family_of(denoiser)
    own = family.PRESET_LAYERS if family else {}
    attention = "|".join(filter(None, (ATTENTION, own.get("attention"))))
    feed_forward = "|".join(filter(None, (FEED_FORWARD, own.get("feed_forward"))))
    regexes = (rf"(.*\.)?({attention})", rf"(.*\.)?({attention}|{feed_forward})", ".*", ".*")
    return dict(zip(PRESETS, regexes, strict=True))


def matched_groups(target_modules: str | list[str], layers: Layers, presets: Mapping[str, str]) -> dict[str, list[str]]:
    """Group the targets by the given ending, or under a preset or regex by their own ending, in the model's order."""
    if isinstance(target_modules, list):
        return {target: [name for name in layers if has_ending(name, target)] for target in target_modules}
    groups: dict[str, list[str]] = {}
    regex = re.compile(presets.get(target_modules, target_modules))
    for name in filter(regex.fullmatch, layers):
        if target_modules not in presets or in_preset(target_modules, name, layers):
            groups.setdefault(ending(name), []).append(name)
    return groups or {target_modules: []}


def in_preset(preset: str, name: str, layers: Layers) -> bool:
    """Return whether a preset includes a layer that its regex matches."""
    if isinstance(layers[name], torch.nn.Conv2d) and (not preset.endswith("+conv") or name in EDGES):
        return False
    return not is_unused_query(name, layers)


def is_unused_query(name: str, layers: Layers) -> bool:
    """Return whether a layer is the captions' query of a block that drops the captions' output (SD3's last block)."""
    return has_ending(name, "add_q_proj") and f"{name.removesuffix('add_q_proj')}to_add_out" not in layers


def pattern_problems(params: LoraParams, targets: list[str]) -> list[Problem]:
    """Return the problems of keys of rank_pattern and alpha_pattern that match no target or the same one."""
    problems: list[Problem] = []
    for setting, pattern in (("rank_pattern", params.rank_pattern), ("alpha_pattern", params.alpha_pattern)):
        for key in pattern:
            if not any(matches(key, name) for name in targets) and not is_alpha_from_rank(params, setting, key):
                problems.append(no_match_problem(params, setting, key, "none of the targets", targets))
        problems += ambiguous_patterns(params, setting, targets)
    return problems


def rank_problems(params: LoraParams, label: str, names: list[str], layers: Layers) -> list[Problem]:
    """Return a problem per setting that gives a layer of this label more ranks than inputs or outputs."""
    smallest_sizes: dict[str, tuple[int, int]] = {}
    for name in names:
        number, setting = rank_and_setting(params, name)
        weight = weight_of(layers[name])
        smallest = min(weight.shape[:2] if lycoris.is_tucker(params, weight) else weight.flatten(1).shape)
        if number > smallest:
            smallest_sizes[setting] = min(smallest_sizes.get(setting, (smallest, number)), (smallest, number))
    problems = []
    for setting, (size, number) in smallest_sizes.items():
        text = f"{params.setting(setting)}: got {number}, but a '{label}' layer has size {size}. Use at most {size}."
        problems.append(Problem("rank-too-high", text))
    return problems


def rank_and_setting(params: LoraParams, name: str) -> tuple[int, str]:
    """Return a target's rank and the setting that contains it."""
    key = next((key for key in params.rank_pattern if matches(key, name)), None)
    return (params.rank, "rank") if key is None else (params.rank_pattern[key], f"rank_pattern.{key}")


def dora_problems(params: LoraParams, convolutions: list[str], layers: Layers) -> list[Problem]:
    """Return a problem for DoRA on half-precision convolutions.

    Under autocast PEFT computes their norms in the frozen dtype, and step 0 would differ from the base.
    """
    if not params.use_dora or all(weight_of(layers[name]).dtype == torch.float32 for name in convolutions):
        return []
    kinds = ", ".join(sorted({ending(name) for name in convolutions}))
    text = (
        f"{params.setting('use_dora')}: needs model.dtype float32 for convolutions ({kinds}). Set it, or exclude them."
    )
    return [Problem("dora-needs-float32", text)]


def is_alpha_from_rank(params: LoraParams, setting: str, key: str) -> bool:
    """Return whether a key of alpha_pattern may come from rank_pattern, as with ``lora.alpha: null``."""
    return setting == "alpha_pattern" and params.alpha_pattern[key] == params.rank_pattern.get(key)


def ambiguous_patterns(params: LoraParams, setting: str, targets: list[str]) -> list[Problem]:
    """Return a problem for each two keys that give one layer different values: PEFT would use the first one."""
    problems: list[Problem] = []
    pattern: Mapping[str, float] = getattr(params, setting)
    for one, other in itertools.combinations(pattern, 2):
        of_rank = [key for key in (one, other) if is_alpha_from_rank(params, setting, key)]
        both = [name for name in targets if matches(one, name) and matches(other, name)]
        if both and pattern[one] != pattern[other] and len(of_rank) < 2:  # two ranks are reported for rank_pattern
            fix = "Make one of them narrower."
            if of_rank:
                fix = f"With lora.alpha null, '{of_rank[0]}' of rank_pattern sets alpha too. Add it to alpha_pattern."
            text = f"{params.setting(setting)}: '{one}' and '{other}' both match {both[0]}. {fix}"
            problems.append(Problem("patterns-overlap", text))
    return problems


def inseparable_targets(params: LoraParams, targets: list[str], layers: Layers) -> list[Problem]:
    """Return a problem for a target whose whole name is the ending of another layer: PEFT would adapt both."""
    chosen = set(targets)
    for name in layers:
        target = next((target for target in targets if name.endswith(f".{target}")), None)
        if target is not None and name not in chosen:
            text = f"{params.setting('target_modules')}: PEFT cannot adapt {target} without {name}. Add {name}."
            return [Problem("targets-inseparable", text)]
    return []


def has_ending(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def matches(pattern: str, name: str) -> bool:
    """Return whether PEFT applies a key of rank_pattern or alpha_pattern, an ending or a regex, to a layer."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def ending(name: str) -> str:
    """Return the end of a name for target_modules: ``down_blocks.0.attn1.to_out.0`` -> ``to_out.0``."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def no_match_problem(
    params: LoraParams, setting: str, given: str, scope: str, names: Iterable[str], hint: str = ""
) -> Problem:
    """Return the problem of a target or pattern that matches nothing, with near names.

    Args:
        scope: subject of the message's negation, such as "none of the targets".
        names: layers that it could have matched.
        hint: sentence to add.
    """
    endings = sorted({ending(name) for name in names})
    near = difflib.get_close_matches(given, [*endings, *PRESETS], n=3, cutoff=0.3) or endings[:8]
    text = f"{params.setting(setting)}: '{given}' matches {scope}. Near: {', '.join(near)}.{hint}"
    return Problem("no-layer-matches", text)


def plan_lines(names: list[str], num_trainable: int, num_base: int) -> list[str]:
    """Return lines for the log: number of targets of each kind, and memory of the trained parameters."""
    kinds = Counter(ending(name) for name in names)
    return [
        "targets     " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        f"memory      {megabytes(num_trainable)} for adapter, gradients and AdamW (full fine-tuning: "
        f"{megabytes(num_base)}), plus base and activations",
    ]


def megabytes(num_parameters: int) -> str:
    return f"{num_parameters * BYTES_PER_PARAMETER / 1e6:,.1f} MB"
