"""Draws several adapter files on one sheet, at every combination of the given scales.

In: files that diffusers' ``load_lora_weights`` reads, each with one or more scales; data/latents, the base model.
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
from lora_dag.bases import component_files, resolve
from lora_dag.core import params
from lora_dag.core.console import Problem, UserError, add_settings, as_path, log
from lora_dag.core.device import setup
from lora_dag.core.files import from_json, missing_file
from lora_dag.core.labels import exact_number, numbered_heads
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
SHEET_BYTES = 2_000_000  # larger than reports: git ignores compare/
MAX_SCALE = 1000.0
"""Limit of a scale's absolute value; far smaller ones already give noise."""
LORA_A_MARKS = (".lora_A.", ".lora_down.", ".down.")
"""Parts of tensor names of lora_A, of which diffusers' converters drop no weights."""


@dataclass(frozen=True)
class ScaledFile:
    """An adapter file and the scales to draw it at."""

    file: Path
    scales: tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["latents"])
    parser.add_argument(
        "entries", nargs="+", type=parse_entry, metavar="FILE:SCALE", help="such as a.safetensors:0,0.5,1"
    )


def main(args: argparse.Namespace) -> None:
    config = params.load(args.params, args.overrides)
    settings, requested = config.section(ValidateParams), config.section(ModelParams)
    family = load_family(requested.family)
    if problems := prompt_problems(settings, family):
        raise UserError(*problems)
    model = resolve.resolve(requested, family).model
    base = component_files.digests(model, family.COMPONENTS)
    cache = LatentCache(args.latents)
    component_files.require_same_base(cache.base, base, args.latents)
    for entry in args.entries:
        require_base(entry.file, base)
    eval_set = make_eval_set(settings, model, family, cache, setup(config.section(RuntimeParams), model))
    warn_of_long_prompts([*settings.prompts, settings.negative_prompt], family, model)
    draw_grid(eval_set, settings, args.entries)


def parse_entry(text: str) -> ScaledFile:
    """Parse ``FILE:SCALE[,SCALE...]``, or FILE for a scale of 1.

    Raises:
        UserError: a scale is no number or too large, or the file does not exist.
    """
    name, colon, numbers_text = text.rpartition(":")
    try:
        scales = tuple(float(scale) for scale in numbers_text.split(",")) if colon else (1.0,)
    except ValueError:
        message = f"{text}: got '{numbers_text}', but numbers are expected. Write a.safetensors:0.8, for example."
        raise UserError(Problem("invalid-scale", message)) from None
    for scale in scales:
        if not abs(scale) <= MAX_SCALE:  # nan too
            message = f"{text}: got {scale:g}, but -{MAX_SCALE:g} to {MAX_SCALE:g} is expected."
            raise UserError(Problem("invalid-scale", message))
    file = as_path(name if colon else text)
    if not file.is_file():
        raise UserError(missing_file(file))
    return ScaledFile(file, scales)


def require_base(file: Path, base: dict[str, str]) -> None:
    """Raise UserError for a damaged file, or an export made on another base model or not LoRA.

    For files of other programs, the base model is unknown and not checked.
    """
    from safetensors import SafetensorError

    try:
        record = from_json(load_metadata(file).get("lora_dag", "{}"))
        recorded, config = dict(record.get("base", {})), dict(record.get("lora_config", {}))
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        text = f"{file}: damaged, or no safetensors file ({error})."
        raise UserError(Problem("adapter-damaged", text)) from None
    component_files.require_same_base(recorded, base, file)
    if algo := config.get("algo"):
        text = f"{file}: made with lora.algo {algo}, which diffusers does not load. Set validate.scales instead."
        raise UserError(Problem("adapter-not-loadable", text))


def require_readable(denoiser: Any, entries: list[ScaledFile]) -> None:
    """Raise UserError for files of data/adapter: diffusers silently ignores tensor names without a component."""
    modules = {name for name, _ in denoiser.named_modules()}
    own = [
        entry.file for entry in entries if {name.partition(".lora_")[0] for name in read_header(entry.file)} & modules
    ]
    if own:
        raise UserError(
            *(
                Problem(
                    "adapter-not-exported",
                    f"{file}: written by train, and diffusers does not read it. Use the file in data/export.",
                )
                for file in own
            )
        )


def load_adapters(pipeline: Any, entries: list[ScaledFile]) -> list[str]:
    """Load the files with diffusers' ``load_lora_weights`` and return the adapters' names.

    Raises:
        UserError: diffusers does not read a file, or only a part of it.
    """
    from lora_dag.core import quiet

    names = [f"adapter_{index}" for index in range(len(entries))]
    for name, entry in zip(names, entries, strict=True):
        try:
            with quiet.without_warnings():
                pipeline.load_lora_weights(entry.file.parent, weight_name=entry.file.name, adapter_name=name)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            text = f"{entry.file}: diffusers does not load it ({cause}). Use the diffusers export."
            raise UserError(Problem("adapter-not-loadable", text)) from None
        header = read_header(entry.file)
        expected = sum(math.prod(header[key]["shape"]) for key in header if any(mark in key for mark in LORA_A_MARKS))
        if (loaded := num_loaded_weights(pipeline, name)) < max(1, expected):
            text = f"{entry.file}: diffusers loads only {loaded:,} of the {expected:,} weights of its lora_A."
            raise UserError(Problem("adapter-not-loadable", f"{text} Use the diffusers export."))
    return names


def num_loaded_weights(pipeline: Any, name: str) -> int:
    """Return the number of weights in the lora_A of an adapter, in all components."""
    modules = [part for part in pipeline.components.values() if hasattr(part, "named_parameters")]
    parameters = [item for module in modules for item in module.named_parameters()]
    return sum(parameter.numel() for key, parameter in parameters if f".lora_A.{name}." in key)


def draw_grid(eval_set: EvalSet, settings: ValidateParams, entries: list[ScaledFile]) -> None:
    """Draw the base and every combination of scales, and write the sheet."""
    from lora_dag.diffusion.sampling import draw
    from lora_dag.pages.sheets import save_png, sheet

    pipeline = eval_set.family.load_pipeline(eval_set.model, eval_set.device)
    sampling = make_sampling(eval_set, settings, pipeline.vae_scale_factor)
    require_readable(getattr(pipeline, eval_set.family.DENOISER), entries)
    labels, columns = ["base"], [draw(pipeline, sampling, eval_set.model)]
    names = load_adapters(pipeline, entries)
    stems = [entry.file.stem for entry in entries]
    titles = stems if len({*stems}) == len(stems) else [str(entry.file) for entry in entries]
    for scales in itertools.product(*(entry.scales for entry in entries)):
        pipeline.set_adapters(names, list(scales))
        labels.append(", ".join(f"{name} {exact_number(scale)}" for name, scale in zip(titles, scales, strict=True)))
        columns.append(draw(pipeline, sampling, eval_set.model))
        log.info("drawn       %s", labels[-1])
    cell = min(256, max(128, *columns[0][0].size))
    rows = [list(row) for row in zip(*columns, strict=True)]
    heads = numbered_heads(len(settings.prompts))
    save_png(OUTPUT, sheet(rows, settings.prompts, labels, cell, row_heads=heads), max_bytes=SHEET_BYTES)
    log.info("wrote       %s", OUTPUT)
