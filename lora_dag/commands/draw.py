"""Several adapter files on one sheet, alone and together, at every combination of the scales given.

In: files that diffusers' ``load_lora_weights`` reads, each with one or more scales; data/latents, the base.
Out: compare/adapters.png, a row per prompt of section ``validate``, a column for the base and for each combination.
Run: ``lora-dag draw a.safetensors:0.8 b.safetensors:0,0.5,1``
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.bases import layout, resolve
from lora_dag.core import params
from lora_dag.core.console import UserError, add_settings, as_path, log
from lora_dag.core.device import setup
from lora_dag.core.files import from_json
from lora_dag.core.labels import exact, numbers
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.core.tensors import load_metadata, read_header
from lora_dag.families.long_texts import warn_of_long_prompts
from lora_dag.families.protocol import load_family
from stages.validate.heldout_loss import make_eval_set
from stages.validate.params import ValidateParams, prompt_problems
from stages.validate.score_snapshots import make_sampling

if TYPE_CHECKING:
    from stages.validate.heldout_loss import EvalSet

OUTPUT = Path("compare/adapters.png")
SHEET_BYTES = 2_000_000  # in no git history
MAX_SCALE = 1000.0
"""Of either sign; what is drawn far below it is noise already."""
DOWN = (".lora_A.", ".lora_down.", ".down.")
"""In the names of the tensors that every converter of diffusers keeps, split or repeated, but no smaller."""


@dataclass(frozen=True)
class Entry:
    file: Path
    scales: tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["latents"])
    parser.add_argument(
        "entries", nargs="+", type=read_entry, metavar="FILE:SCALE", help="such as a.safetensors:0,0.5,1"
    )


def main(args: argparse.Namespace) -> None:
    config = params.load(args.params, args.overrides)
    settings, asked = config.section(ValidateParams), config.section(ModelParams)
    family = load_family(asked.family)
    if found := prompt_problems(settings, family):
        raise UserError(*found)
    model = resolve.resolve(asked, family).model
    base = layout.digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    layout.require_same_base(cache.base, base, args.latents)
    for entry in args.entries:
        require_base(entry.file, base)
    eval_set = make_eval_set(settings, model, family, cache, setup(config.section(RuntimeParams), model))
    warn_of_long_prompts([*settings.prompts, settings.negative_prompt], family, model)
    draw_grid(eval_set, settings, args.entries)


def read_entry(text: str) -> Entry:
    """``FILE:SCALE[,SCALE...]``, or FILE for a scale of 1.

    Raises:
        UserError: a scale that is no number or too large, or no such file.
    """
    name, colon, given = text.rpartition(":")
    try:
        scales = tuple(float(scale) for scale in given.split(",")) if colon else (1.0,)
    except ValueError:
        raise UserError(f"{text}: '{given}' is no scale; expected FILE:SCALE, such as a.safetensors:0.8") from None
    for scale in scales:
        if not abs(scale) <= MAX_SCALE:  # nan too
            raise UserError(f"{text}: {scale:g} is no scale; expected -{MAX_SCALE:g} to {MAX_SCALE:g}")
    file = as_path(name if colon else text)
    if not file.is_file():
        raise UserError(f"{text}: no such file")
    return Entry(file, scales)


def require_base(file: Path, base: dict[str, str]) -> None:
    """Raises UserError for a damaged file, or one of ours made on another base or not LoRA; others' are not known."""
    from safetensors import SafetensorError

    try:
        record = from_json(load_metadata(file).get("lora_dag", "{}"))
        recorded, config = dict(record.get("base", {})), dict(record.get("lora_config", {}))
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged, or no safetensors file ({error})") from None
    layout.require_same_base(recorded, base, file)
    if algo := config.get("algo"):
        raise UserError(f"{file}: made with lora.algo {algo}, which diffusers does not load; use validate.scales")


def require_readable(denoiser: Any, entries: list[Entry]) -> None:
    """Raises UserError for a run's own file: of names without a component, diffusers takes none and says nothing."""
    modules = {name for name, _ in denoiser.named_modules()}
    own = [
        entry.file for entry in entries if {name.partition(".lora_")[0] for name in read_header(entry.file)} & modules
    ]
    if own:
        raise UserError(*(f"{file}: the run's own file, which diffusers does not read; use its export" for file in own))


def load(pipeline: Any, entries: list[Entry]) -> list[str]:
    """Stock ``load_lora_weights``; the adapters' names.

    Raises:
        UserError: a file that diffusers does not read, or of which it leaves a part.
    """
    from lora_dag.core import quiet

    names = [f"adapter_{index}" for index in range(len(entries))]
    for name, entry in zip(names, entries, strict=True):
        try:
            with quiet.no_warnings():
                pipeline.load_lora_weights(entry.file.parent, weight_name=entry.file.name, adapter_name=name)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{entry.file}: diffusers does not load it ({what}); use the diffusers export") from None
        header = read_header(entry.file)
        there = sum(math.prod(header[key]["shape"]) for key in header if any(mark in key for mark in DOWN))
        if (found := taken(pipeline, name)) < max(1, there):
            what = f"{found:,} of {there:,} weights of its lora_A"
            raise UserError(f"{entry.file}: diffusers takes only {what}; use the diffusers export")
    return names


def taken(pipeline: Any, name: str) -> int:
    """Weights in the lora_A of an adapter, in all components."""
    modules = [part for part in pipeline.components.values() if hasattr(part, "named_parameters")]
    named = [item for module in modules for item in module.named_parameters()]
    return sum(parameter.numel() for key, parameter in named if f".lora_A.{name}." in key)


def draw_grid(eval_set: EvalSet, settings: ValidateParams, entries: list[Entry]) -> None:
    """Draw the base and every combination of scales, and write the sheet."""
    from lora_dag.diffusion.sampling import draw
    from lora_dag.pages.sheets import save_png, sheet

    pipeline = eval_set.family.load_pipeline(eval_set.model, eval_set.device)
    sampling = make_sampling(eval_set, settings, pipeline.vae_scale_factor)
    require_readable(getattr(pipeline, eval_set.family.DENOISER), entries)
    labels, columns = ["base"], [draw(pipeline, sampling, eval_set.model)]
    names = load(pipeline, entries)
    stems = [entry.file.stem for entry in entries]
    shown = stems if len({*stems}) == len(stems) else [str(entry.file) for entry in entries]
    for scales in itertools.product(*(entry.scales for entry in entries)):
        pipeline.set_adapters(names, list(scales))
        labels.append(", ".join(f"{name} {exact(scale)}" for name, scale in zip(shown, scales, strict=True)))
        columns.append(draw(pipeline, sampling, eval_set.model))
        log.info("drawn       %s", labels[-1])
    cell = min(256, max(128, *columns[0][0].size))
    rows = [list(row) for row in zip(*columns, strict=True)]
    heads = numbers(len(settings.prompts))
    save_png(OUTPUT, sheet(rows, settings.prompts, labels, cell, row_heads=heads), max_bytes=SHEET_BYTES)
    log.info("wrote       %s", OUTPUT)
