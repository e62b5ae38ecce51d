"""``lora.init_from``: the fresh adapter filled with an existing one, at the existing one's strength.

B is rescaled where lora.alpha gives another strength than the file's. Whatever does not fit is refused, with the
setting and the value that would.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.adapters import bias, foreign_file, lora, targets
from lora_dag.core.console import UserError, log, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_dag.adapters.foreign_file import AdapterFile, Layer
    from lora_dag.adapters.params import LoraParams

MANY = 12  # names that a line still lists


def fill(params: LoraParams, denoiser: Any, base_digests: dict[str, str]) -> str:
    """Fill an injected adapter from ``lora.init_from``; a line of what it starts from, empty where it starts fresh.

    Args:
        base_digests: of the base, by component; one of our files that was made with another is warned of.

    Raises:
        UserError: everything that does not fit.
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
            tensors[f"{name}.lora_magnitude_vector"] = magnitude(layer, shapes)
    lora.load(denoiser, tensors)
    return summary(params, file, base_digests, factors)


def read(params: LoraParams, denoiser: Any) -> AdapterFile:
    """The pinned file, which fits the injected adapter; the denoiser may be on the meta device.

    Raises:
        UserError: everything that does not fit.
    """
    assert params.init_from is not None
    file = foreign_file.read(Path(params.init_from.path), denoiser)
    if found := problems(params, denoiser, file):
        raise UserError(*found)
    return file


def summary(params: LoraParams, file: AdapterFile, base_digests: dict[str, str], factors: dict[str, float]) -> str:
    """For the plan; warns of an alpha that was guessed and of another base."""
    assert params.init_from is not None
    path = params.init_from.path
    if not file.says_alpha:
        log.warning("warning: lora.init_from: nothing beside '%s' says its alpha; taken as its rank, strength 1", path)
    if other := [name for name, value in base_digests.items() if file.base.get(name, value) != value]:
        names = ", ".join(other)
        log.warning("warning: lora.init_from: '%s' was trained on another %s than model.pretrained holds", path, names)
    changed = sorted({f"{factor:.4g}" for factor in factors.values() if not math.isclose(factor, 1)}, key=float)
    rescaled = f"; B times {' and '.join(changed[:4])}, for the strength that lora.alpha gives" if changed else ""
    count = f"{plural(len(file.layers), 'layer')} from all {plural(file.num_tensors, 'tensor')}"
    return f"{path} ({str(params.init_from.sha256)[:12]}), {count}, at its own strength{rescaled}"


def magnitude(layer: Layer, target: Any) -> torch.Tensor:
    """DoRA's as PEFT keeps it."""
    shape = target.lora_magnitude_vector[lora.NAME].weight.shape
    if layer.magnitude is not None or layer.dora_scale is None:
        return layer.magnitude.reshape(shape)  # type: ignore[union-attr]
    weight = target.get_base_layer().weight.detach().float().flatten(1)
    scaled = weight + layer.scaling * layer.b.to(weight).flatten(1) @ layer.a.to(weight).flatten(1)
    ratio = scaled.norm(dim=1) / weight.norm(dim=1)
    return (layer.dora_scale.to(weight).flatten() * ratio).reshape(shape)


# What does not fit


def problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[str]:
    """A line per setting that differs from the file, with the value that fits, and one for shapes of another base."""
    found = (
        target_problems(params, denoiser, file) + shape_problems(denoiser, file) + rank_problems(params, denoiser, file)
    )
    is_dora = any(layer.is_dora for layer in file.layers.values())
    if is_dora != params.use_dora:
        has = "magnitudes of DoRA" if is_dora else "no magnitudes of DoRA"
        found.append(differs("use_dora", has, params.use_dora, f"lora.use_dora={str(is_dora).lower()}"))
    if params.init_lora_weights == "eva":
        found.append(
            "params.yaml lora.init_lora_weights: eva would replace the start that lora.init_from is; use gaussian"
        )
    return found + bias_problems(params, denoiser, file)


def differs(setting: str, has: str, ours: object, use: str) -> str:
    return f"params.yaml lora.{setting}: the file of lora.init_from has {has}, params.yaml says {ours}; use {use}"


def target_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[str]:
    ours, theirs = set(lora.targets(denoiser)), set(file.layers)
    if ours == theirs:
        return []
    sides = ((theirs - ours, "only in the file"), (ours - theirs, "not in it"))
    where = ", ".join(f"{len(names)} {side}, such as {min(names)}" for names, side in sides if names)
    layers = {n.removesuffix(".base_layer"): m for n, m in targets.adaptable(denoiser).items() if ".lora_" not in n}
    use = fitting_targets(theirs, layers, targets.presets(denoiser))
    use += " lora.exclude_modules=[]" if params.exclude_modules else ""
    return [differs("target_modules", plural(len(theirs), "layer"), f"{len(ours)} ({where})", use)]


def fitting_targets(names: set[str], layers: targets.Layers, presets: Mapping[str, str]) -> str:
    """A value of lora.target_modules that chooses these layers and no other: a preset, endings, or their names."""
    choices: list[str | list[str]] = list(presets)
    choices += [sorted({".".join(name.split(".")[-words:]) for name in names}) for words in (1, 2, 3)]
    choices.insert(len(presets), sorted({targets.ending(name) for name in names}))
    for choice in choices:
        if set(itertools.chain(*targets.matched_groups(choice, layers, presets).values())) == names:
            return f"lora.target_modules={choice if isinstance(choice, str) else brackets(choice)}"
    listed = brackets(sorted(names)) if len(names) <= MANY else f"[{min(names)}, ...], all {len(names)} of them"
    return f"lora.target_modules={listed}"


def brackets(names: list[str]) -> str:
    return f"[{', '.join(names)}]"


def shape_problems(denoiser: Any, file: AdapterFile) -> list[str]:
    """A line where the file's layers have other inputs or outputs than the base's."""
    found = []
    for name in common(denoiser, file):
        layer, target = file.layers[name], denoiser.get_submodule(name)
        ours = (target.lora_A[lora.NAME].weight[0].numel(), len(target.lora_B[lora.NAME].weight))
        theirs = (layer.a[0].numel(), len(layer.b))
        if ours != theirs:
            found.append(
                f"{name} has {theirs[0]} inputs and {theirs[1]} outputs, in model.pretrained {ours[0]} and {ours[1]}"
            )
    if not found:
        return []
    more = f" ({len(found)} such layers)" if len(found) > 1 else ""
    where = "params.yaml lora.init_from: in the file "
    return [f"{where}{found[0]}{more}; it was made for another base: set model.pretrained to that one"]


def rank_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[str]:
    names = common(denoiser, file)
    ours, theirs = ({name: denoiser.get_submodule(name).r[lora.NAME] for name in names}, ranks(file, names))
    if ours == theirs:
        return []
    rank, _ = Counter(theirs.values()).most_common(1)[0]
    pattern = rank_pattern(rank, theirs)
    use = f"lora.rank={rank} lora.alpha={alpha(params, file, rank)}"
    if params.rank_pattern:  # `dvc exp run -S` would add to it
        use += " lora.rank_pattern=null"
    if pattern:
        use += f" lora.rank_pattern={{{', '.join(f'{key}: {value}' for key, value in pattern.items())}}}"
    text = " and ".join(map(str, sorted(set(theirs.values()))))
    return [differs("rank", text, " and ".join(map(str, sorted(set(ours.values())))), use)]


def common(denoiser: Any, file: AdapterFile) -> list[str]:
    """Layers that the file and the parameters both adapt, in the model's order."""
    return [name for name in lora.targets(denoiser) if name in file.layers]


def ranks(file: AdapterFile, names: list[str]) -> dict[str, int]:
    return {name: file.layers[name].rank for name in names}


def rank_pattern(rank: int, theirs: dict[str, int]) -> dict[str, int]:
    """lora.rank_pattern for the layers of another rank: by ending where all of an ending share one, else by name."""
    by_ending: dict[str, set[int]] = {}
    for name, value in theirs.items():
        by_ending.setdefault(targets.ending(name), set()).add(value)
    return {
        (targets.ending(name) if len(by_ending[targets.ending(name)]) == 1 else name): value
        for name, value in theirs.items()
        if value != rank
    }


def alpha(params: LoraParams, file: AdapterFile, rank: int) -> str:
    """lora.alpha that gives most of the file's layers their own strength."""
    strength, _ = Counter(layer.scaling for layer in file.layers.values()).most_common(1)[0]
    if math.isclose(strength, 1) and not params.use_rslora:
        return "null"
    return f"{strength * (math.sqrt(rank) if params.use_rslora else rank):g}"


def bias_problems(params: LoraParams, denoiser: Any, file: AdapterFile) -> list[str]:
    """A line if other biases were trained than lora.bias trains, or of other sizes."""
    ours, theirs = bias.deltas(denoiser), file.biases
    if set(ours) == set(theirs):
        wrong = [name for name in ours if ours[name].shape != theirs[name].shape]
        return [f"params.yaml lora.init_from: the file's bias of {name} has another size" for name in wrong[:1]]
    every = {*bias.biased(denoiser, "all"), *ours}
    modes = {"none": set(), "lora_only": every & set(lora.targets(denoiser)), "all": every}
    mode = next((mode for mode, names in modes.items() if names == set(theirs)), None)
    use = f"lora.bias={mode}" if mode else "a file whose biases are those of one mode: none, lora_only, all"
    return [differs("bias", f"{len(theirs) or 'no'} trained biases", params.bias, use)]


def scaling(denoiser: Any, name: str) -> float:
    """What lora.alpha multiplies B A by in a layer."""
    return denoiser.get_submodule(name).scaling[lora.NAME]
