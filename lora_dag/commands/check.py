"""Preflight: parameters, base, dataset, packages, disk and device, checked before anything is computed.

Run: ``lora-dag check [--set section.key=value]``; exit code 2 and one line per problem, 0 when all is well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.adapters import init_from_pin
from lora_dag.adapters.params import LoraParams
from lora_dag.bases import layout, resolve
from lora_dag.core import params, slow_dtype
from lora_dag.core.console import UserError, add_settings, log, plural
from lora_dag.core.files import state_dir
from lora_dag.core.params import Config, ModelParams, RuntimeParams
from lora_dag.families.protocol import load_family
from lora_dag.formats import AdapterKind
from lora_dag.pages import words
from lora_dag.pictures.read import reader
from lora_dag.pipeline import sharing
from lora_dag.pipeline.yaml_edit import flow
from lora_dag.sweeps import grid
from lora_dag.sweeps.grid import Run
from stages.cache_latents.params import CacheParams, flip_problems
from stages.export.params import ExportParams, format_refusals, rank_refusals, step_refusals
from stages.prepare import caption_variants, split
from stages.prepare.geometry import buckets
from stages.prepare.inspection import Inspected, inspect
from stages.prepare.listing import Listing, leave_out_bad
from stages.prepare.params import DatasetParams
from stages.prepare.sources import list_entries
from stages.train.params import TrainParams, cross_problems
from stages.validate import feature_files
from stages.validate.params import ValidateParams, prompt_problems

if TYPE_CHECKING:
    import torch

# Series that the project is tested with; the exact versions stand in requirements.lock.
PACKAGES = {
    "torch": "2.13",
    "diffusers": "0.42",
    "peft": "0.21",
    "transformers": "5",
    "accelerate": "1",
    "safetensors": "0",
    "dvc": "3",
    "snakemake": "9",
}
OPEN_SECONDS = 30.0
"""For which pictures are opened: some thousand photographs; the next run, or prepare, goes on with what is left."""
LEAST_DISK = 500 * 2**20
"""Bytes: what the demo's store, latents, adapter and exports take twice over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def main(args: argparse.Namespace) -> None:
    tree = params.overridden(args.params, args.overrides)
    config = params.check(tree, args.params)
    runs = grid.plan(tree, args.params)
    model, dataset = config.section(ModelParams), config.section(DatasetParams)
    family = load_family(model.family)
    base = resolve.check(model, family)
    found = package_problems() + base.problems + size_problems(config, base.configs)
    opened: list[str] = []
    found += dataset_problems(config, opened) + setting_problems(config) + disk_problems()
    found += feature_files.problems(config.section(ValidateParams).feature_model)
    notes = dict.fromkeys(text for each in runs for text in snapshot_notes(each.config))
    notes |= dict.fromkeys(mapping_notes(config))
    for text in [*notes, *machine_notes(config.section(RuntimeParams).num_machines), *sharing.unshared()]:
        log.info("note: %s", text)
    others = {each.places["prepare"]: each.config for each in runs if each.config.section(DatasetParams) != dataset}
    found += [problem for other in others.values() for problem in dataset_problems(other, [])]
    found += [problem for problem in sweep_problems(runs) if problem not in found]
    if found:
        raise UserError(*found)
    log.info("parameters  %s, %s", args.params, plural(len(config.sections), "section"))
    if len(runs) > 1:
        log.info("sweep       %s", plural(len(runs), "run"))
    log.info("base        %s, family %s", model.pretrained, model.family)
    if base.to_do:
        log.info("            %s", base.to_do)
    log.info("dataset     %s", dataset.source)
    log.info("pictures    %s", *opened)
    log.info("packages    %s", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    log.info("disk        %.1f GB free for the state directory", shutil.disk_usage(existing(state_dir())).free / 1e9)
    device = check_device(config, base.configs)  # from here on it imports torch, which takes seconds
    if base.configs:
        check_objective(config, base.configs)
        check_captions(base.configs)
        check_training(config, base.configs, device)
    check_features(config.section(ValidateParams), device)


def package_problems() -> list[str]:
    """Packages that are missing or of another series, and a torchvision that would break the imports of the others."""
    found = []
    for name, series in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"package {name}: not installed; pip install -r requirements.lock")
            continue
        if not f"{version}.".startswith(f"{series}."):
            found.append(f"package {name}: got {version}, tested with {series}; pip install -r requirements.lock")
    torchvision = built_version("torchvision")
    return found + (torchvision_problems(built_version("torch"), torchvision) if torchvision else [])


def built_version(name: str) -> str:
    """What the package's version.py says, such as 2.13.0+cu130: PyPI's metadata leaves the build out. "" if absent."""
    spec = importlib.util.find_spec(name)  # imports nothing
    if spec is None or spec.origin is None:
        return ""
    stated = re.search(r"__version__.*= *'(.+)'", Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))
    return stated[1] if stated else importlib.metadata.version(name)


def torchvision_problems(torch: str, torchvision: str) -> list[str]:
    """torchvision 0.(N+15) belongs to torch 2.N, of the same build; any other fails inside ``import diffusers``."""
    minor, _, build = (part for part in torch.partition("+"))
    vision_minor, _, vision_build = torchvision.partition("+")
    fits = minor.split(".")[1:2] and vision_minor.split(".")[1] == str(int(minor.split(".")[1]) + 15)
    if fits and (build == vision_build or not (build and vision_build)):
        return []
    return [
        f"package torchvision: {torchvision} beside torch {torch} breaks `import diffusers`; "
        "the project does not need it: pip uninstall torchvision"
    ]


def size_problems(config: Config, configs: ModelParams | None) -> list[str]:
    """Of the pictures that the parameters ask for; nothing while the base's configs are not here."""
    if configs is None:
        return []
    model, dataset = config.section(ModelParams), config.section(DatasetParams)
    sizes = buckets(dataset) if dataset.aspect_buckets else [(dataset.resolution, dataset.resolution)]
    return layout.size_problems(configs, load_family(model.family), sizes, model.pretrained)


def dataset_problems(config: Config, opened: list[str]) -> list[str]:
    """What is wrong with rows, pictures and split, as prepare would find it.

    Args:
        opened: how many pictures were opened is added to it, in words.
    """
    dataset = config.section(DatasetParams)
    try:
        listing = list_entries(dataset)
        looked_at = open_pictures(listing, dataset)
        opened.append(said_of(looked_at, listing))
        num_problems = len(listing.problems) + len(looked_at.problems)
        is_all = looked_at.num_seen == len(listing.entries)
        sides = split.assign(looked_at.rows, dataset, num_problems) if is_all and looked_at.rows else None
        for text in [*listing.warnings, *looked_at.warnings, *(sides.warnings if sides else ())]:
            log.warning("warning: %s", text)
        for text in sides.notes if sides else split_notes(listing, dataset):
            log.info("note: %s: %s", dataset.source, text)
        prefixes = [subset.caption_prefix or "" for subset in dataset.as_subsets()]
        captions = [caption_variants.joined(prefixes[entry.subset], entry.captions[0]) for entry in listing.entries]
        if text := words.strangers(config.section(ValidateParams).prompts, captions):
            log.warning("warning: %s", text)
        found = batch_problems(listing, config)
        for reason in leave_out_bad([*listing.problems, *looked_at.problems], listing.entries, dataset).values():
            log.warning("warning: will be left out: %s", reason)
    except UserError as error:
        return list(error.problems)
    return found


def open_pictures(listing: Listing, dataset: DatasetParams) -> Inspected:
    """Look at the pictures for OPEN_SECONDS; what is found is remembered, so that prepare need not look again."""
    if disk_problems():
        return Inspected([], [], [], 0)
    return inspect(listing.entries, dataset, reader(dataset.source), OPEN_SECONDS)


def said_of(looked_at: Inspected, listing: Listing) -> str:
    count, total = looked_at.num_seen, len(listing.entries)
    if count == total:
        return f"{count:,} opened"
    return f"{count:,} of {total:,} opened in {OPEN_SECONDS:.0f} s; prepare opens the others"


def split_notes(listing: Listing, dataset: DatasetParams) -> list[str]:
    """Fewer held-out pictures than can tell much, as far as can be told without opening all of them."""
    subsets = dataset.as_subsets()
    drawn = [entry for entry in listing.entries if not subsets[entry.subset].regularization]
    if not drawn:
        return []
    if dataset.heldout_split is not None:
        count = sum(entry.split == dataset.heldout_split for entry in drawn)
        what, cure = f"{plural(count, 'picture is', 'pictures are')} held out of {len(drawn)}", "add pictures to it"
    else:
        count = round((dataset.heldout_fraction or 0) * len(drawn))
        what = f"about {plural(count, 'picture', 'pictures')} of {len(drawn)} will be held out"
        cure = "raise dataset.heldout_fraction, or add pictures"
    if count >= split.FEW_HELDOUT:
        return []
    return [f"{what}, and fewer than {split.FEW_HELDOUT} seldom tell settings apart; {cure}"]


def machine_notes(num_machines: int) -> list[str]:
    if num_machines == 1:
        return []
    way = "use `snakemake --workflow-profile profiles/slurm`"
    return [f"params.yaml runtime.num_machines: {num_machines}, and `dvc repro` stops before train; {way}"]


def snapshot_notes(config: Config) -> list[str]:
    """Where a training would leave its end alone."""
    train = config.section(TrainParams)
    every = train.snapshot_every_n_steps
    if every <= train.num_steps:
        return []
    alone = "the progress sheet and the held-out curve have the start and the end alone"
    return [
        f"params.yaml train.snapshot_every_n_steps: {every} keeps none of {train.num_steps} steps: {alone}; lower it"
    ]


def mapping_notes(config: Config) -> list[str]:
    """Mappings that are set: DVC's -S adds to them, and ``{}`` leaves them as they are."""
    lora, train = config.section(LoraParams), config.section(TrainParams)
    alphas = {key: value for key, value in lora.alpha_pattern.items() if value != lora.rank_pattern.get(key)}
    found = {"lora.rank_pattern": lora.rank_pattern, "lora.alpha_pattern": alphas}  # alpha null adds the ranks to these
    found["train.optimizer_args"] = train.optimizer_args
    return [
        f"params.yaml {key}: {flow(value)}; `-S` adds to it, `-S {key}=null` empties it, "
        f"and `-S {key}=null -S '{key}={{...}}'` replaces it"
        for key, value in found.items()
        if value
    ]


def batch_problems(listing: Listing, config: Config) -> list[str]:
    """A batch that even all pictures, held-out ones included, cannot fill; train counts again."""
    subsets = config.section(DatasetParams).as_subsets()
    total = sum(subsets[entry.subset].repeats for entry in listing.entries)
    size = config.section(TrainParams).batch_size
    if not total or size <= total:
        return []
    return [
        f"params.yaml train.batch_size: {size} is more than the dataset's {total} pictures, repeats counted; lower it"
    ]


def setting_problems(config: Config) -> list[str]:
    """Settings that do not go together, whatever the data; and the adapter to start from."""
    family = load_family(config.section(ModelParams).family)
    lora, train = config.section(LoraParams), config.section(TrainParams)
    found = flip_problems(config.section(DatasetParams).flip, config.section(CacheParams).num_variants)
    found += export_problems(config)
    if start := lora.init_from:
        found += init_from_pin.problems(start.path, start.sha256)
    return found + cross_problems(lora, train, family) + prompt_problems(config.section(ValidateParams), family)


def sweep_problems(runs: list[Run]) -> list[str]:
    """Those of every run of a sweep, each once, with the first run that has it where there are several."""
    first: dict[str, str] = {}
    for each in runs:
        for problem in [*setting_problems(each.config), *pin_problems(each.config)]:
            first.setdefault(problem, f" (sweep: {each.name})" if len(runs) > 1 else "")
    return [problem + name for problem, name in first.items()]


def pin_problems(config: Config) -> list[str]:
    """A feature model that is not here or not pinned; whether it is the pinned one, validate asks: that takes seconds
    per gigabyte, and every job of Snakemake makes the plan again.
    """
    asked = config.section(ValidateParams).feature_model
    if asked is None or (asked.sha256 and Path(asked.path).exists()):
        return []
    return feature_files.problems(asked)


def export_problems(config: Config) -> list[str]:
    """Formats that could not hold what training will make, and a step that it keeps no snapshot of."""
    lora, train, export = config.section(LoraParams), config.section(TrainParams), config.section(ExportParams)
    adapter = AdapterKind(
        algo=lora.algo,
        bias=lora.bias,
        use_dora=lora.use_dora,
        rank=max([lora.rank, *lora.rank_pattern.values()]),
        denoiser=load_family(config.section(ModelParams).family).DENOISER,
        trains_text=lora.train_text_encoder,
    )
    found = format_refusals(export.formats, adapter)
    found += step_refusals(export.step, train.snapshot_steps, train.num_steps)
    return found + rank_refusals(export.resized_ranks, adapter)


def disk_problems() -> list[str]:
    folder = existing(state_dir())
    if not folder.is_dir():
        return [f"{folder}: a file stands where the state directory should be; remove it or set LORA_STATE_DIR"]
    if not os.access(folder, os.W_OK):
        return [f"{state_dir()}: not writable; set LORA_STATE_DIR to a folder that is"]
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        need = f"at least {LEAST_DISK / 1e6:.0f} MB are needed"
        return [f"{state_dir()}: {free / 1e6:.0f} MB free, {need}; set LORA_STATE_DIR to another disk"]
    return []


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_device(config: Config, configs: ModelParams | None) -> torch.device:
    from lora_dag.core.device import setup

    model = config.section(ModelParams)
    device = setup(config.section(RuntimeParams), model)
    import torch

    log.info("device      %s, %s, %s", device, plural(torch.get_num_threads(), "thread"), model.dtype)
    if configs:
        slow_dtype.warn(device, configs)
    sys.stdout.flush()
    return device


def check_objective(config: Config, configs: ModelParams) -> None:
    from lora_dag.diffusion import objectives
    from stages.train import noising
    from stages.train.loss import require_snr

    noise_scheduler = load_family(configs.family).load_scheduler(configs)
    require_snr(objectives.make_objective(noise_scheduler), config.section(TrainParams))
    noising.make_timesteps(config.section(TrainParams), noise_scheduler)
    log.info("objective   %s", objectives.prediction_type(noise_scheduler))


def check_captions(configs: ModelParams) -> None:
    """Opens the tokenizer, which may lack what its family reads."""
    family = load_family(configs.family)
    (own,) = family.count_tokens(configs, [""])
    log.info("captions    up to %d tokens, %d of them the model's own", family.max_tokens(configs), own)


def check_training(config: Config, configs: ModelParams, device: torch.device) -> None:
    """Optimizer and processes; the adapter, on the denoiser built without its weights, and what it starts from."""
    import diffusers
    import torch

    from lora_dag.adapters import lora
    from lora_dag.core import quiet
    from lora_dag.families import common
    from stages.train import init_from, launch, optimizers
    from stages.train.build import require_tracker

    lora_params, train, runtime = config.section(LoraParams), config.section(TrainParams), config.section(RuntimeParams)
    require_tracker(runtime)
    launch.require_share(train, runtime.num_processes)
    optimizers.try_out(train, device)
    family = load_family(configs.family)
    cls = getattr(diffusers, family.COMPONENTS[family.DENOISER])
    with torch.device("meta"), quiet.no_warnings():  # of weights that are cast, and there are none
        denoiser = cls.from_config(common.config(configs, family.DENOISER)).to(getattr(torch, configs.dtype))
        lora.inject(denoiser, lora.make_config(lora_params, denoiser))
    log.info("adapter     %s", plural(len(lora.targets(denoiser)), "layer"))
    if lora_params.init_from is not None:
        init_from.read(lora_params, denoiser)
        log.info("start       %s", lora_params.init_from.path)


def check_features(settings: ValidateParams, device: torch.device) -> None:
    """Loads the image-text model, if one is named and here."""
    from stages.validate import features

    asked = settings.feature_model
    if asked and not feature_files.is_here(asked):
        log.info("features    %s, downloaded when validate starts", asked.path)
    elif model := features.load(settings, device):
        log.info("features    %s", model.name)
