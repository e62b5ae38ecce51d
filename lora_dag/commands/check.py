"""Check parameters, base, dataset, packages, disk and device before a run.

Run: ``lora-dag check [--set section.key=value]``; exit code 0: no problem, 2: one line per problem
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_dag.bases import image_sizes, resolve
from lora_dag.commands.check_machine import (
    PACKAGES,
    check_device,
    disk_problems,
    existing,
    package_problems,
)
from lora_dag.commands.check_memory import check_memory
from lora_dag.commands.check_settings import (
    machine_notes,
    mapping_notes,
    setting_problems,
    snapshot_notes,
    sweep_problems,
)
from lora_dag.commands.check_training import check_captions, check_features, check_objective, check_training
from lora_dag.core import params
from lora_dag.core.console import Problem, UserError, add_settings, log, plural, warn
from lora_dag.core.files import state_dir
from lora_dag.core.params import Config, ModelParams
from lora_dag.families.protocol import load_family
from lora_dag.images.read import image_reader
from lora_dag.pages import default_texts
from lora_dag.pipeline import sharing
from lora_dag.sweeps import grid
from stages.prepare import caption_variants, split
from stages.prepare.geometry import buckets
from stages.prepare.inspection import Inspected, inspect
from stages.prepare.listing import Listing, leave_out_bad
from stages.prepare.params import DatasetParams
from stages.prepare.sources import list_entries
from stages.train.params import TrainParams
from stages.validate import feature_files
from stages.validate.params import ValidateParams

if TYPE_CHECKING:
    pass

OPEN_SECONDS = 30.0
"""Time limit for opening images, enough for some thousand photographs. prepare opens the remaining images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="memory that the run must fit into (default: this device's own)"
    )


def main(args: argparse.Namespace) -> None:
    tree = params.read_with_overrides(args.params, args.overrides)
    config = params.check(tree, params.Origin(args.params, args.overrides))
    runs = grid.plan(tree, args.params, args.overrides)
    model, dataset = config.section(ModelParams), config.section(DatasetParams)
    family = load_family(model.family)
    base = resolve.check(model, family)
    found: list[Problem] = [*package_problems(), *base.problems, *size_problems(config, base.configs)]
    seen = check_dataset(config)
    found += [*seen.problems, *setting_problems(config), *disk_problems()]
    validate = config.section(ValidateParams)
    found += feature_files.model_problems(validate.feature_model, validate.setting("feature_model"))
    notes = dict.fromkeys(text for each in runs for text in snapshot_notes(each.config))
    notes |= dict.fromkeys(mapping_notes(config))
    sources = [f"{each.config.section(DatasetParams).source}" for each in runs]
    for text in [*notes, *machine_notes(config), *sharing.unshared_data([*sources, f"{model.pretrained}"])]:
        log.info("note: %s", text)
    others = {
        each.stage_folders["prepare"]: each.config for each in runs if each.config.section(DatasetParams) != dataset
    }
    found += [problem for other in others.values() for problem in check_dataset(other).problems]
    found += [problem for problem in sweep_problems(runs) if problem not in found]
    if found:
        raise UserError(*found)
    log.info("parameters  %s, %s", args.params, plural(len(config.sections), "section"))
    if len(runs) > 1:
        log.info("sweep       %s", plural(len(runs), "run"))
    log.info("base        %s, family %s", model.pretrained, model.family)
    if os.path.isabs(model.pretrained):
        text = "DVC finds a base model only below the clone; Snakemake finds it."
        warn("base-path-absolute", f"{model.setting('pretrained')}: {text} {params.link_into_clone(model.pretrained)}")
    if base.to_do:
        log.info("            %s", base.to_do)
    log.info("dataset     %s", dataset.source)
    log.info("images      %s", seen.opened)
    log.info("packages    %s", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    log.info("disk        %.1f GB free for the state directory", shutil.disk_usage(existing(state_dir())).free / 1e9)
    device = check_device(config, base.configs)  # from here on it imports torch, which takes seconds
    if base.configs:
        check_objective(config, base.configs)
        check_captions(base.configs)
        check_training(config, base.configs, device)
        size = max(buckets(dataset), key=lambda size: size[0] * size[1])
        check_memory(config, base.configs, size, seen.captions, device, args.memory and args.memory * 1e9)
    check_features(validate, device)


def size_problems(config: Config, configs: ModelParams | None) -> list[Problem]:
    """Return problems of the image sizes for this base; none if its configs are not downloaded."""
    if configs is None:
        return []
    model, dataset = config.section(ModelParams), config.section(DatasetParams)
    return [*image_sizes.size_problems(configs, load_family(model.family), buckets(dataset), model.pretrained)]


@dataclass(frozen=True)
class CheckedDataset:
    problems: list[Problem]
    """Problems of rows, images and split that prepare would find."""
    opened: str = ""
    """Text with the number of opened images."""
    captions: list[str] = field(default_factory=list)
    """First caption of each image, with the prefix of its subset."""


def check_dataset(config: Config) -> CheckedDataset:
    """Read the rows, open images for some seconds, and log warnings and notes."""
    dataset = config.section(DatasetParams)
    try:
        listing = list_entries(dataset)
        inspected = open_images(listing, dataset)
        num_problems = len(listing.problems) + len(inspected.problems)
        is_all = inspected.num_inspected == len(listing.entries)
        assignment = split.assign_splits(inspected.rows, dataset, num_problems) if is_all and inspected.rows else None
        for text in [*listing.warnings, *inspected.warnings, *(assignment.warnings if assignment else ())]:
            warn(text.code, text)
        for text in assignment.notes if assignment else split_notes(listing, dataset):
            log.info("note: %s: %s", dataset.source, text)
        prefixes = [subset.caption_prefix or "" for subset in dataset.as_subsets()]
        captions = [
            caption_variants.with_prefix(prefixes[entry.subset], entry.captions[0]) for entry in listing.entries
        ]
        validate = config.section(ValidateParams)
        if unrelated := default_texts.unrelated_prompts(validate.prompts, captions):
            warn(unrelated.code, unrelated.at(validate.setting("prompts")))
        for reason in leave_out_bad([*listing.problems, *inspected.problems], listing.entries, dataset).values():
            warn("image-left-out", f"will be left out: {reason}")
    except UserError as error:
        return CheckedDataset(list(error.problems))
    return CheckedDataset(batch_problems(listing, config, assignment), opened_text(inspected, listing), captions)


def open_images(listing: Listing, dataset: DatasetParams) -> Inspected:
    """Open images for up to OPEN_SECONDS; results are cached, so that prepare need not open them again."""
    if disk_problems():
        return Inspected([], [], [], 0)
    return inspect(listing.entries, dataset, image_reader(dataset.source), OPEN_SECONDS)


def opened_text(inspected: Inspected, listing: Listing) -> str:
    count, total = inspected.num_inspected, len(listing.entries)
    if count == total:
        return f"{count:,} opened"
    return f"{count:,} of {total:,} opened in {OPEN_SECONDS:.0f} s. prepare opens the others"


def split_notes(listing: Listing, dataset: DatasetParams) -> list[str]:
    """Return a note on too few held-out images, as estimated without opening all images."""
    subsets = dataset.as_subsets()
    drawn = [entry for entry in listing.entries if not subsets[entry.subset].regularization]
    if not drawn:
        return []
    if dataset.heldout_split is not None:
        count = sum(entry.split == dataset.heldout_split for entry in drawn)
        state, suggestion = f"{plural(count, 'image is', 'images are')} held out of {len(drawn)}", "Add images to it"
    else:
        count = round((dataset.heldout_fraction or 0) * len(drawn))
        state = f"about {plural(count, 'image', 'images')} of {len(drawn)} will be held out"
        suggestion = "Raise dataset.heldout_fraction, or add images"
    if count >= split.FEW_HELDOUT:
        return []
    return [f"{state}, but fewer than {split.FEW_HELDOUT} seldom show a difference between settings. {suggestion}."]


def batch_problems(listing: Listing, config: Config, assignment: split.Assignment | None) -> list[Problem]:
    """Return the problem of a batch larger than the number of training images; train checks again.

    Args:
        assignment: None if not all images were opened; held-out images count too then.
    """
    subsets = config.section(DatasetParams).as_subsets()
    total = sum(
        subsets[entry.subset].repeats
        for entry in listing.entries
        if assignment is None or assignment.split_of.get(entry.file_name) == "train"
    )
    train = config.section(TrainParams)
    size = train.batch_size
    if not total or size <= total:
        return []
    place = f"{train.setting('batch_size')}: got {size}"
    text = f"{place}, but there are {total} training images (with repeats). Set train.batch_size={total} or lower."
    return [Problem("batch-too-large", text)]
