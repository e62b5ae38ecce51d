"""Start from an existing adapter, ``lora.init_from``, at the file's strength.

B is rescaled where lora.alpha gives another strength than the file has. If a setting does not fit the file, the error
names the setting and a value that fits.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.adapters import bias, foreign_file, lora, targets
from lora_dag.core.console import Problem, UserError, plural, warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_dag.adapters.foreign_file import AdapterFile, Layer
    from lora_dag.adapters.params import LoraParams

MAX_NAMES = 12  # names listed in a message


def fill(params: LoraParams, denoiser: Any, base_digests: dict[str, str]) -> str:
    """Load ``lora.init_from`` into an injected adapter and return a summary of the file; empty without a file.

    Args:
        base_digests: component -> digest of the base; a file that records another base causes a warning.

    Raises:
        UserError: settings that do not fit the file.
    """
    if params.init_from is None:
        return ""
    file = read(params, denoiser)
    factors = {name: layer.scaling / scaling(denoiser, name) for name, layer in file.layers.items()}
    tensors = {name + bias.KEY: delta for name, delta in file.biases.items()}
    for name, layer in file.layers.items():
        shapes = denoiser.get_submodule(name)
        tensors[f"{name}.lora_A.weight"] = layer.a.reshape(shapes.lora_A[lora.NAME].weight.shape)
        tensors[f"{name}.lora_B.weight"] = (layer.b * factors[name]).reshape(shapes.lora_B[lora.NAME].weight.shape)
        if layer.is_dora:
            tensors[f"{name}.lora_magnitude_vector"] = peft_magnitude(layer, shapes)
    lora.load(denoiser, tensors)
    return summary(params, file, base_digests, factors)


def read(params: LoraParams, denoiser: Any) -> AdapterFile:
    """Read the pinned file and require that it fits the injected adapter; the denoiser may be on the meta device.

    Raises:
        UserError: settings that do not fit the file.
    """
    assert params.init_from is not None
    file = foreign_file.read(Path(params.init_from.path), denoiser, params.setting("init_from"))
    if mismatches := problems(params, denoiser, file):
        raise UserError(*mismatches)
    return file


def summary(params: LoraParams, file: AdapterFile, base_digests: dict[str, str], factors: dict[str, float]) -> str:
    """Return a line for the log; warn if alpha was assumed or the base model differs."""
    assert params.init_from is not None
    path = params.init_from.path
    place = f"{params.setting('init_from')}: '{path}'"
    if not file.has_alpha:
        warn("alpha-assumed", f"{place} has no alpha. It is assumed to equal the rank, which gives strength 1.")
    if other := [name for name, value in base_digests.items() if file.base_digests.get(name, value) != value]:
        text = f"{place} was trained with another {', '.join(other)} than model.pretrained has."
        warn("trained-on-other-base", text)
    changed = sorted({f"{factor:.4g}" for factor in factors.values() if not math.isclose(factor, 1)}, key=float)
    rescaled = f" (B x {' and '.join(changed[:4])}, because of lora.alpha)" if changed else ""
    count = f"{plural(len(file.layers), 'layer')} from all {plural(file.num_tensors, 'tensor')}"
    return f"{path} ({str(params.init_from.sha256)[:12]}), {count}, strength of the file{rescaled}"


def peft_magnitude(layer: Layer, target: Any) -> torch.Tensor:
    """Return a layer's DoRA magnitudes in PEFT's form."""
    shape = target.lora_magnitude_vector[lora.NAME].weight.shape
    if layer.magnitude is not None or layer.dora_scale is None:
        return layer.magnitude.reshape(shape)  # type: ignore[union-attr]
    weight = target.get_base_layer().weight.detach().float().flatten(1)
    scaled = weight + layer.scaling * layer.b.to(weight).flatten(1) @ layer.a.to(weight).flatten(1)
    ratio = scaled.norm(dim=1) / weight.norm(dim=1)
    return (layer.dora_scale.to(weight).flatten() * ratio).reshape(shape)


# Settings that do not fit


def problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[Problem]:
    """Return a problem per setting that differs from the file, with a value that fits, and for other shapes."""
    mismatches = target_problems(params, denoiser, file)
    mismatches += shape_problems(params, denoiser, file)
    mismatches += rank_problems(params, denoiser, file)
    is_dora = any(layer.is_dora for layer in file.layers.values())
    if is_dora != params.use_dora:
        found = "DoRA magnitudes" if is_dora else "no DoRA magnitudes"
        given = str(params.use_dora).lower()
        mismatches.append(mismatch(params, "use_dora", found, given, f"lora.use_dora={str(is_dora).lower()}"))
    if params.init_lora_weights == "eva":
        setting = params.setting("init_lora_weights")
        text = f"{setting}: eva would replace the weights of lora.init_from. Use gaussian."
        mismatches.append(Problem("eva-with-init-from", text))
    return mismatches + bias_problems(params, denoiser, file)


def mismatch(params: LoraParams, key: str, found: str, given: object, fix: str) -> Problem:
    """Return the problem of a setting that differs from the file.

    Args:
        found: the file's value.
        given: the setting's value.
        fix: the overrides that fit.
    """
    text = f"{params.setting(key)}: got {given}, but the file of lora.init_from has {found}. Use {fix}"
    return Problem("init-from-differs", text)


def target_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[Problem]:
    """Return a problem if the file adapts other layers than the settings do."""
    ours, theirs = set(lora.target_names(denoiser)), set(file.layers)
    if ours == theirs:
        return []
    differences = ((theirs - ours, "only in the file"), (ours - theirs, "not in the file"))
    texts = [f"{len(names)} {difference}, such as {min(names)}" for names, difference in differences if names]
    given = f"{plural(len(ours), 'layer')} ({', '.join(texts)})"
    layers = {n.removesuffix(".base_layer"): m for n, m in targets.adaptable(denoiser).items() if ".lora_" not in n}
    fix = fitting_targets(theirs, layers, targets.presets(denoiser))
    fix += " lora.exclude_modules=[]" if params.exclude_modules else ""
    return [mismatch(params, "target_modules", plural(len(theirs), "layer"), given, fix)]


def fitting_targets(names: set[str], layers: targets.Layers, presets: Mapping[str, str]) -> str:
    """Return a value of lora.target_modules for exactly these layers: a preset, endings, or their names."""
    choices: list[str | list[str]] = list(presets)
    choices += [sorted({".".join(name.split(".")[-words:]) for name in names}) for words in (1, 2, 3)]
    choices.insert(len(presets), sorted({targets.ending(name) for name in names}))
    for choice in choices:
        if set(itertools.chain(*targets.matched_groups(choice, layers, presets).values())) == names:
            return f"lora.target_modules={choice if isinstance(choice, str) else yaml_list(choice)}"
    listed = yaml_list(sorted(names)) if len(names) <= MAX_NAMES else f"[{min(names)}, ...] with all {len(names)} names"
    return f"lora.target_modules={listed}"


def yaml_list(names: list[str]) -> str:
    return f"[{', '.join(names)}]"


def shape_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[Problem]:
    """Return a problem if the file's layers have other numbers of inputs or outputs than the base's."""
    texts = []
    for name in shared_layers(denoiser, file):
        layer, target = file.layers[name], denoiser.get_submodule(name)
        ours = (target.lora_A[lora.NAME].weight[0].numel(), len(target.lora_B[lora.NAME].weight))
        theirs = (layer.a[0].numel(), len(layer.b))
        if ours != theirs:
            sizes = (
                f"{theirs[0]} inputs and {theirs[1]} outputs in the file, {ours[0]} and {ours[1]} in model.pretrained"
            )
            texts.append(f"{name} has {sizes}")
    if not texts:
        return []
    more = f" ({len(texts)} such layers)" if len(texts) > 1 else ""
    fix = "Set model.pretrained to the base model that the file was trained on."
    return [Problem("adapter-of-other-base", f"{params.setting('init_from')}: {texts[0]}{more}. {fix}")]


def rank_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[Problem]:
    """Return a problem if the file has other ranks than the settings give."""
    names = shared_layers(denoiser, file)
    ours, theirs = (
        {name: denoiser.get_submodule(name).r[lora.NAME] for name in names},
        {name: file.layers[name].rank for name in names},
    )
    if ours == theirs:
        return []
    rank, _ = Counter(theirs.values()).most_common(1)[0]
    pattern = rank_pattern(rank, theirs)
    fix = f"lora.rank={rank} lora.alpha={matching_alpha(params, file, rank)}"
    if params.rank_pattern:  # `dvc exp run -S` would add to it
        fix += " lora.rank_pattern=null"
    if pattern:
        fix += f" lora.rank_pattern={{{', '.join(f'{key}: {value}' for key, value in pattern.items())}}}"
    given, found = (" and ".join(map(str, sorted(set(values.values())))) for values in (ours, theirs))
    return [mismatch(params, "rank", found, given, fix)]


def shared_layers(denoiser: Any, file: AdapterFile) -> list[str]:
    """Return the layers that both the file and the settings adapt, in the model's order."""
    return [name for name in lora.target_names(denoiser) if name in file.layers]


def rank_pattern(rank: int, theirs: dict[str, int]) -> dict[str, int]:
    """Return lora.rank_pattern for layers of another rank: by ending if all its layers share one rank, else by name."""
    by_ending: dict[str, set[int]] = {}
    for name, value in theirs.items():
        by_ending.setdefault(targets.ending(name), set()).add(value)
    return {
        (targets.ending(name) if len(by_ending[targets.ending(name)]) == 1 else name): value
        for name, value in theirs.items()
        if value != rank
    }


def matching_alpha(params: LoraParams, file: AdapterFile, rank: int) -> str:
    """Return the lora.alpha that gives most of the file's layers their strength."""
    strength, _ = Counter(layer.scaling for layer in file.layers.values()).most_common(1)[0]
    if math.isclose(strength, 1) and not params.use_rslora:
        return "null"
    return f"{strength * (math.sqrt(rank) if params.use_rslora else rank):g}"


def bias_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[Problem]:
    """Return a problem if the file has other biases than lora.bias trains, or biases of other sizes."""
    ours, theirs = bias.deltas(denoiser), file.biases
    if set(ours) == set(theirs):
        different = [name for name in ours if ours[name].shape != theirs[name].shape]
        fix = "Set model.pretrained to the base model that the file was trained on."
        texts = [
            f"{params.setting('init_from')}: the file's bias of {name} has another size. {fix}" for name in different
        ]
        return [Problem("adapter-of-other-base", text) for text in texts[:1]]
    every = {*bias.biased(denoiser, "all"), *ours}
    modes = {"none": set(), "lora_only": every & set(lora.target_names(denoiser)), "all": every}
    mode = next((mode for mode, names in modes.items() if names == set(theirs)), None)
    fix = f"lora.bias={mode}" if mode else "a file with the biases of one mode: none, lora_only or all"
    return [mismatch(params, "bias", f"{len(theirs) or 'no'} trained biases", params.bias, fix)]


def scaling(denoiser: Any, name: str) -> float:
    """Return the factor of B A in a layer."""
    return denoiser.get_submodule(name).scaling[lora.NAME]
