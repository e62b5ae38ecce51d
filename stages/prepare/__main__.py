"""A folder of pictures and captions -> a checked manifest: sizes, caption variants, held-out split; and what a
reviewer looks at.

In: dataset.source.  Out: data/prepared/{manifest.jsonl,dataset.json}, reports/dataset/{metrics.json,pictures.csv,...}
Run: ``python -m stages.prepare``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lora_dag.artifacts.manifest import Augmentation, Item, Manifest
from lora_dag.core import params
from lora_dag.core.console import PATHS, UserError, log, parser, plural, run
from lora_dag.core.locks import writing
from lora_dag.pictures.decode import preprocessing
from lora_dag.pictures.read import reader
from stages.prepare import caption_variants, page, split
from stages.prepare.checked_picture import CheckedPicture
from stages.prepare.inspection import inspect
from stages.prepare.listing import leave_out_bad
from stages.prepare.params import DatasetParams
from stages.prepare.sources import list_entries


def main() -> None:
    args = parser(__doc__, ("prepared", "dataset_reports")).parse_args()
    dataset = params.load(args.params, args.overrides).section(DatasetParams)

    require_apart(Path(dataset.source), [args.prepared, args.dataset_reports, *map(Path, PATHS.values())])
    with writing(args.prepared):
        prepare(dataset, args.prepared, args.dataset_reports)


def prepare(dataset: DatasetParams, prepared: Path, reports: Path) -> None:
    read = reader(dataset.source)
    listing = list_entries(dataset)
    checked = inspect(listing.entries, dataset, read)
    left_out = leave_out_bad([*listing.problems, *checked.problems], listing.entries, dataset)
    sides = split.assign(checked.rows, dataset, len(left_out))
    left_out |= sides.withheld
    items = [to_item(row, sides, dataset) for row in checked.rows if row.entry.file_name in sides.sides]
    warn([*listing.warnings, *checked.warnings, *sides.warnings], items, left_out)
    for text in sides.notes:
        log.info("note: %s", text)

    manifest = Manifest(
        items,
        preprocessing(dataset.background, dataset.image_interpolation_mode),
        Augmentation(dataset.crop, dataset.flip, dataset.seed),
        dataset.unmasked_weight,
        dataset.source,
    )
    manifest.save(prepared)
    page.write(manifest, sorted(left_out.items()), sides.groups, len(listing.unlisted), read, reports)
    log_end(manifest, prepared, reports)
    log.info("next        python -m stages.cache_latents")


def require_apart(source: Path, outputs: Iterable[Path]) -> None:
    """Refuse a source that would feed the DAG with what it writes."""
    whole = source.resolve()
    for output in outputs:
        if output.resolve().is_relative_to(whole):
            what = f"holds {output}, which a stage writes"
        elif whole.is_relative_to(output.resolve()):
            what = f"lies in {output}, which a stage writes anew"
        else:
            continue
        raise UserError(f"params.yaml dataset.source: '{source}' {what}; name a folder of pictures alone")


def to_item(row: CheckedPicture, sides: split.Assignment, dataset: DatasetParams) -> Item:
    entry = row.entry
    subset = dataset.as_subsets()[entry.subset]
    caption, captions = caption_variants.captions_of(entry.captions, subset.caption_prefix or "", dataset)
    return Item(
        file_name=entry.file_name,
        sha256=row.sha256,
        caption=caption,
        captions=captions,
        split=sides.sides[entry.file_name],
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


def mask_of(row: CheckedPicture, dataset: DatasetParams) -> str | None:
    """``alpha`` where it hides anything, or the mask's file."""
    if dataset.mask == "alpha":
        return "alpha" if row.has_alpha else None
    return row.entry.mask


def warn(found: Iterable[str], items: list[Item], left_out: dict[str, str]) -> None:
    """Say what is allowed but seldom meant."""
    for line in found:
        log.warning("warning: %s", line)
    num_blank = sum(not item.caption.strip() for item in items)
    if num_blank:
        empty = plural(num_blank, "caption is", "captions are")
        log.warning("warning: %s empty and will be learned without a prompt", empty)
    if left_out:
        log.warning("warning: %s left out:", plural(len(left_out), "picture is", "pictures are"))
        for name, reason in list(left_out.items())[:5]:
            log.warning("  %s", reason if name in reason else f"{name}: {reason}")


def log_end(manifest: Manifest, prepared: Path, reports: Path) -> None:
    counts = Counter(item.split for item in manifest.items)
    sizes = Counter((item.width, item.height) for item in manifest.items)
    shown = ", ".join(f"{width} x {height}" for (width, height), _ in sizes.most_common(3)) + more(len(sizes) - 3)
    log.info("pictures    %d from %s, as %s pixels", len(manifest.items), manifest.source, shown)
    log.info("split       %d train, %d held out", counts["train"], counts["heldout"])
    log.info("written     %s, %s", prepared / "manifest.jsonl", reports / "contact.png")


def more(count: int) -> str:
    return f" and {count} more sizes" if count > 0 else ""


if __name__ == "__main__":
    run(main, kept="what the checks of images found is kept")
