"""Check a folder of images and captions; write a manifest with sizes, caption variants and split, and a report.

In: dataset.source.  Out: data/prepared/{manifest.jsonl,dataset.json}, reports/dataset/{metrics.json,images.csv,...}
Run: ``python -m stages.prepare``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lora_dag.artifacts.manifest import Augmentation, Item, Manifest
from lora_dag.core import params
from lora_dag.core.console import PATHS, Problem, UserError, log, parser, plural, run, warn
from lora_dag.core.locks import writing
from lora_dag.core.stage_start import log_stage_start
from lora_dag.images.decode import preprocessing
from lora_dag.images.read import image_reader
from stages.prepare import caption_variants, dataset_report, split
from stages.prepare.checked_image import CheckedImage
from stages.prepare.inspection import inspect
from stages.prepare.listing import leave_out_bad
from stages.prepare.params import DatasetParams
from stages.prepare.sources import list_entries

MAX_LEFT_OUT = 5
"""Images in the log of left-out images."""


def main() -> None:
    args = parser(__doc__, ("prepared", "dataset_reports")).parse_args()
    config = params.load(args.params, args.overrides)
    log_stage_start("prepare", config, args)
    dataset = config.section(DatasetParams)

    require_apart(dataset, [args.prepared, args.dataset_reports, *map(Path, PATHS.values())])
    with writing(args.prepared):
        prepare(dataset, args.prepared, args.dataset_reports)


def prepare(dataset: DatasetParams, prepared: Path, reports: Path) -> None:
    read = image_reader(dataset.source)
    listing = list_entries(dataset)
    checked = inspect(listing.entries, dataset, read)
    left_out = leave_out_bad([*listing.problems, *checked.problems], listing.entries, dataset)
    splits = split.assign_splits(checked.rows, dataset, len(left_out))
    left_out |= splits.excluded
    items = [to_item(row, splits, dataset) for row in checked.rows if row.entry.file_name in splits.split_of]
    log_warnings([*listing.warnings, *checked.warnings, *splits.warnings], items, left_out)
    for text in splits.notes:
        log.info("note: %s", text)

    manifest = Manifest(
        items,
        preprocessing(dataset.background, dataset.image_interpolation_mode),
        Augmentation(dataset.crop, dataset.flip, dataset.seed),
        dataset.unmasked_weight,
        dataset.source,
    )
    manifest.save(prepared)
    dataset_report.write_report(manifest, sorted(left_out.items()), splits.groups, len(listing.unlisted), read, reports)
    log_end(manifest, prepared, reports)
    log.info("next        python -m stages.cache_latents")


def require_apart(dataset: DatasetParams, outputs: Iterable[Path]) -> None:
    """Raise UserError for a source that contains an output of a stage, or lies in one."""
    source = Path(dataset.source).resolve()
    for output in outputs:
        if output.resolve() == source:
            overlap = "is a folder that a stage writes"
        elif output.resolve().is_relative_to(source):
            overlap = f"contains {output}, which a stage writes"
        elif source.is_relative_to(output.resolve()):
            overlap = f"is inside of {output}, which a stage writes"
        else:
            continue
        text = f"'{dataset.source}' {overlap}. Name a folder that holds only images."
        raise UserError(Problem("source-overlaps-output", text).at(dataset.setting("source")))


def to_item(row: CheckedImage, splits: split.Assignment, dataset: DatasetParams) -> Item:
    entry = row.entry
    subset = dataset.as_subsets()[entry.subset]
    caption, captions = caption_variants.captions_of(entry.captions, subset.caption_prefix or "", dataset)
    return Item(
        file_name=entry.file_name,
        sha256=row.sha256,
        caption=caption,
        captions=captions,
        split=splits.split_of[entry.file_name],
        source_width=row.width,
        source_height=row.height,
        width=row.target_width,
        height=row.target_height,
        mask=mask_of(row, dataset),
        mask_sha256=row.mask_sha256,
        repeats=subset.repeats,
        loss_weight=subset.loss_weight,
        regularization=subset.regularization,
        transparent=row.has_alpha,
    )


def mask_of(row: CheckedImage, dataset: DatasetParams) -> str | None:
    """Return ``alpha`` if the image has transparent pixels, or the name of its mask file, or None."""
    if dataset.mask == "alpha":
        return "alpha" if row.has_alpha else None
    return row.entry.mask


def log_warnings(warnings: Iterable[Problem], items: list[Item], left_out: dict[str, str]) -> None:
    for problem in warnings:
        warn(problem.code, problem)
    num_blank = sum(not item.caption.strip() for item in items)
    if num_blank:
        train = plural(num_blank, "caption is empty and trains", "captions are empty and train")
        warn("caption-empty", f"{train} without a prompt.")
    for name, reason in list(left_out.items())[:MAX_LEFT_OUT]:
        warn("image-left-out", reason if name in reason else f"{name}: {reason}")
    if len(left_out) > MAX_LEFT_OUT:
        more = plural(len(left_out) - MAX_LEFT_OUT, "more image is", "more images are")
        warn("image-left-out", f"{more} left out. images.csv of the dataset report has all reasons.")


def log_end(manifest: Manifest, prepared: Path, reports: Path) -> None:
    counts = Counter(item.split for item in manifest.items)
    sizes = Counter((item.width, item.height) for item in manifest.items)
    largest = ", ".join(f"{width} x {height}" for (width, height), _ in sizes.most_common(3))
    more = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
    log.info("images      %d from %s, as %s%s pixels", len(manifest.items), manifest.source, largest, more)
    log.info("split       %d train, %d held out", counts["train"], counts["heldout"])
    log.info("wrote       %s, %s", prepared / "manifest.jsonl", reports / "contact.png")


if __name__ == "__main__":
    run(main, kept="the checks of images are cached")
