"""Unpack a dataset once into a folder of images: Parquet or WebDataset (.tar) files, or a dataset of the Hub.

The stages read one form alone, a folder of images with metadata.jsonl or caption files. The bytes of images stay as
they are, so that what was encoded of them before is used again. FOLDER/provenance.json has the commit of a Hub dataset,
its license, and the SHA-256 of every file that was read. After a kill the same command goes on.
Run: ``lora-dag import owner/name@main data/mine``
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dag.commands.import_dataset.image_folder import PROVENANCE, ImageFolder, unfinished, write_once
from lora_dag.commands.import_dataset.samples import Columns, Shard
from lora_dag.commands.import_dataset.source import Source, open_source
from lora_dag.core.console import UserError, as_path, log, plural
from lora_dag.core.files import sha256_file, write_json
from lora_dag.core.progress import Bar, counted
from stages.prepare.listing import Problem, lines
from stages.prepare.names import SUFFIXES

SHARDS = (".parquet", ".tar")
PARQUET_METADATA = "metadata.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=path_or_name, help="file or folder, or owner/name@REVISION of a dataset on the Hugging Face Hub"
    )
    parser.add_argument("folder", type=as_path, help="new folder of images, such as data/mine")
    parser.add_argument("--config", metavar="NAME", help="of a dataset that has several configurations")
    parser.add_argument("--files", nargs="+", default=[], metavar="PATTERN", help="files of a Hub dataset to download")
    parser.add_argument("--image-column", metavar="NAME", help="default: image, or the only column of images")
    parser.add_argument("--mask-column", metavar="NAME", help="default: mask, where there is one")
    caption = parser.add_mutually_exclusive_group()
    caption.add_argument("--caption-column", default="text", metavar="NAME", help="default: text")
    caption.add_argument("--no-captions", action="store_true", help="for one dataset.instance_prompt")
    parser.add_argument("--number", action="store_true", help="name images by file and row")
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be used")


def main(args: argparse.Namespace) -> None:
    if args.folder.resolve().is_relative_to(Path(args.source).resolve()):
        raise UserError(f"{args.folder}: is inside of {args.source}; name a folder outside of it")
    with unfinished(args.folder) as partial:
        source = open_source(args.source, args.files, partial / "download")
        files = shard_files(source, args.config)
        summary = (
            unpack(source, files, ImageFolder(partial / "images", args.folder, args.number), args)
            if files
            else take_over(source, partial)
        )
    for line in summary:
        log.info(line)
    log.info("written     %s, %s", args.folder, args.folder / PROVENANCE)
    log.info("next        dvc add %s", shlex.quote(str(args.folder)))


def path_or_name(text: str) -> str:
    """A path as the caller sees it; the name of a Hub dataset as it is."""
    path = as_path(text)
    return str(path) if path.exists() else text


def shard_files(source: Source, config: str | None) -> dict[str, str]:
    """Parquet and .tar files -> the split that ``datasets`` puts each in; empty for a folder of images.

    Raises:
        UserError: there are neither, or several configurations.
    """
    shards = [name for name in source.files if name.endswith(SHARDS) and Path(name).name != PARQUET_METADATA]
    compressed = [name for name in source.files if ".tar." in name or name.endswith((".tgz", ".zip"))]
    if not shards and compressed:
        raise UserError(f"{source.place(compressed[0])}: compressed; unpack it first, and import or use what it holds")
    if not shards and not any(Path(name).suffix.lower() in SUFFIXES for name in source.files):
        shown = ", ".join(source.files[:5]) or "nothing"
        raise UserError(f"{source.name}: no Parquet, .tar or image files; found {shown}")
    first = {Path(name).suffix: name for name in reversed(shards)}
    if len(first) > 1:
        raise UserError(
            f"{source.name}: holds Parquet and .tar files ({', '.join(sorted(first.values()))}); import each kind by"
            " itself, from a folder of its own or with --files"
        )
    if not shards or source.is_file:
        return dict.fromkeys(shards, "train")
    return splits_by_datasets(source, config)


def splits_by_datasets(source: Source, config: str | None) -> dict[str, str]:
    """By the names of files and folders, or by the ``configs`` in the header of README.md."""
    from datasets import load_dataset_builder

    folder = source.folder.resolve()  # as ``datasets`` names the files
    try:
        builder = load_dataset_builder(str(folder), name=config)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None):  # the machine's fault
            raise
        reason = " ".join(str(error).replace(str(folder), source.name).split())
        raise UserError(f"{source.name}: {reason}; see --config") from None
    found = {
        str(Path(file).relative_to(folder)): str(split)
        for split, files in builder.config.data_files.items()
        for file in files
    }
    others = sorted(name for name in found if not name.endswith(SHARDS))
    if others:
        raise UserError(
            f"{source.name}: the data files are {plural(len(others), 'file')} such as {others[0]}; expected Parquet or"
            " .tar files, so choose with --files or --config"
        )
    return found


# Parquet and .tar files


def unpack(source: Source, files: dict[str, str], folder: ImageFolder, args: argparse.Namespace) -> list[str]:
    """Write every sample; what to say of them.

    Raises:
        UserError: files are damaged or lack columns; or samples cannot be used, and --skip-bad is not given.
    """
    columns = Columns(args.image_column, None if args.no_captions else args.caption_column, args.mask_column)
    shards = open_shards(source, files, columns)
    problems = list(write_samples(shards, folder))
    if problems and not args.skip_bad:
        raise UserError(*lines(problems), "--skip-bad imports the others")
    if not folder.rows:
        raise UserError(f"{source.name}: no image to import")
    if problems:
        log.warning("warning: %s left out:", plural(len(problems), "sample is", "samples are"))
        for line in lines(problems):
            log.warning("  %s", line)
    folder.finish(provenance(source, list(files)) | {"num_left_out": len(problems)})
    return summary_of(folder, args.no_captions)


def open_shards(source: Source, files: dict[str, str], columns: Columns) -> list[Shard]:
    """All files, each checked as far as can be without reading images.

    Raises:
        UserError: what is wrong with any of them.
    """
    from lora_dag.commands.import_dataset.parquet import open_parquet
    from lora_dag.commands.import_dataset.webdataset import open_tar

    shards: list[Shard] = []
    problems: list[str] = []
    for name, split in sorted(files.items()):
        open_shard = open_parquet if name.endswith(".parquet") else open_tar
        try:
            shards.append(open_shard(source.folder / name, source.place(name), split, columns))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return shards


def write_samples(shards: list[Shard], folder: ImageFolder) -> Iterator[Problem]:
    """Write all samples; yields those that cannot be used."""
    with Bar("images", sum(map(len, shards))) as bar:
        for shard in shards:
            for sample in shard.samples():
                if isinstance(sample, Problem):
                    yield sample
                    continue
                bar.add()
                try:
                    folder.add(sample)
                except UserError as error:
                    yield from (Problem(sample.place, text) for text in error.problems)


def summary_of(folder: ImageFolder, no_captions: bool) -> list[str]:
    counts = {split: len(rows) for split, rows in sorted(folder.rows.items())}
    splits = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    said = [f"images      {sum(counts.values()):,} ({splits})"]
    if len(counts) > 1:
        heldout = next(split for split in ("test", "validation", *counts) if split in counts and split != "train")
        said.append(f"splits      dataset.heldout_split={heldout} dataset.heldout_fraction=null holds one of them out")
    if folder.num_masks:
        said.append(f"masks       {folder.num_masks:,}; dataset.mask=masks uses them")
        if folder.num_masks < sum(counts.values()):
            log.warning("warning: the other images have no mask, and dataset.mask=masks requires one of each")
    if no_captions:
        said.append("captions    none; set dataset.instance_prompt to one caption for all")
    return said


# A folder of images


def take_over(source: Source, partial: Path) -> list[str]:
    """Images with metadata or caption files beside them, as they are; metadata.parquet becomes metadata.jsonl.

    Raises:
        UserError: the folder is on this machine, and prepare reads it as it is.
    """
    images = partial / "images"
    if source.revision is None and not any(Path(name).name == PARQUET_METADATA for name in source.files):
        raise UserError(f"{source.name}: a folder of images already; set dataset.source={source.name} instead")
    found = provenance(source, list(source.files))
    for name in counted("files", source.files, len(source.files)):
        write_once(images / name, (source.folder / name).read_bytes())
    for name in source.files:
        if Path(name).name == PARQUET_METADATA:
            as_jsonl(images / name)
    write_json(images / PROVENANCE, found)
    counts = Counter(Path(name).suffix.lower() in SUFFIXES for name in source.files)
    return [f"images      {counts[True]:,}, as they are in {source.name}"]


def as_jsonl(table: Path) -> None:
    import pandas

    pandas.read_parquet(table).to_json(table.with_suffix(".jsonl"), orient="records", lines=True, force_ascii=False)
    table.unlink()


def provenance(source: Source, files: list[str]) -> dict[str, Any]:
    """Where the images are from. No path or time of this machine: DVC hashes it with them."""
    digests = {name: sha256_file(source.folder / name) for name in sorted(files)}
    found: dict[str, Any] = {"files": digests, "license": source.license}
    return found | ({"hub": source.name, "revision": source.revision} if source.revision else {})
