"""Unpack a dataset into a folder of images: Parquet or WebDataset (.tar) files,
or a dataset of the Hugging Face Hub.

The stages read only folders of images with metadata.jsonl or caption files. The
bytes of images stay the same, so that cached latents are used again.
FOLDER/provenance.json has the commit of a Hub dataset, its license, and the
SHA-256 of every file that was read. After a kill the same command resumes.
Run: ``lora-dag import owner/name@main data/mine``
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lora_dag.commands.import_dataset.image_folder import PROVENANCE, ImageFolder, unfinished, write_once
from lora_dag.commands.import_dataset.samples import Columns, Shard
from lora_dag.commands.import_dataset.source import Source, open_source
from lora_dag.core.console import Problem, UserError, as_path, log, plural, warn
from lora_dag.core.files import sha256_file, write_json
from lora_dag.core.progress import Bar, counted
from stages.prepare.file_tree import IMAGE_SUFFIXES
from stages.prepare.listing import RowProblem, first_problems, row_problems

SHARDS = (".parquet", ".tar")
"""Suffixes, in lower case, of files that are unpacked."""
CODE_FOLDERS = ("lora_dag", "stages")
GLOB_MARKS = set("*?[]")
"""Characters of a path that ``datasets`` reads as a pattern."""
PARQUET_METADATA = "metadata.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=path_or_name, help="file or folder, or owner/name@REVISION of a dataset on the Hugging Face Hub"
    )
    parser.add_argument("folder", type=as_path, help="new folder of images, such as data/mine")
    parser.add_argument("--config", metavar="NAME", help="configuration of a dataset that has several")
    parser.add_argument("--files", nargs="+", default=[], metavar="PATTERN", help="files of a Hub dataset to download")
    parser.add_argument("--image-column", metavar="NAME", help="default: image, or the only column of images")
    parser.add_argument("--mask-column", metavar="NAME", help="default: mask, where there is one")
    caption = parser.add_mutually_exclusive_group()
    caption.add_argument("--caption-column", default="text", metavar="NAME", help="default: text")
    caption.add_argument("--no-captions", action="store_true", help="set dataset.instance_prompt instead")
    parser.add_argument("--number", action="store_true", help="name images by file and row")
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be used, with a warning")


def main(args: argparse.Namespace) -> None:
    require_apart(args.folder, Path(args.source))
    with unfinished(args.folder) as partial:
        source = open_source(args.source, args.files, partial / "download")
        files = shard_files(source, args.config)
        summary = (
            unpack(source, files, ImageFolder(partial / "images", args.folder, args.number), args)
            if files
            else copy_images(source, partial)
        )
    for line in summary:
        log.info(line)
    log.info("wrote       %s, %s", args.folder, args.folder / PROVENANCE)
    log.info("next        dvc add %s", shlex.quote(str(args.folder)))


def require_apart(folder: Path, source: Path) -> None:
    """Refuse to write inside the source, or inside the code, which is a dependency of every stage.

    Raises:
        UserError: the folder is inside one of them.
    """
    parents = folder.resolve().parents
    if source.resolve() in [folder.resolve(), *parents]:
        text = f"{folder}: the folder is inside of the source {source}. Name a folder outside of it."
        raise UserError(Problem("folder-in-source", text))
    code = next((name for name in CODE_FOLDERS if Path(name).resolve() in [folder.resolve(), *parents]), None)
    if code:
        text = f"{folder}: the folder is inside of {code}/, which is code. Name a folder for data, such as data/mine."
        raise UserError(Problem("folder-in-code", text))


def path_or_name(text: str) -> str:
    """Return a path as the caller sees it, or the name of a Hub dataset unchanged."""
    path = as_path(text)
    return str(path) if path.exists() else text


def shard_files(source: Source, config: str | None) -> dict[str, str]:
    """Return Parquet and .tar files -> their split by ``datasets``. Empty for a folder of images.

    Raises:
        UserError: the source has no files to import, files of both kinds, or several configurations.
    """
    shards = [name for name in source.files if is_shard(name) and Path(name).name != PARQUET_METADATA]
    compressed = [name for name in source.files if ".tar." in name.lower() or name.lower().endswith((".tgz", ".zip"))]
    if not shards and compressed:
        text = f"{source.place(compressed[0])}: the file is compressed. Unpack it, then import or use its content."
        raise UserError(Problem("archive-compressed", text))
    if not shards and not any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in source.files):
        listed = ", ".join(source.files[:5]) or "nothing"
        text = f"{source.name}: found {listed}, but Parquet, .tar or image files are expected."
        raise UserError(Problem("nothing-to-import", text))
    first = {Path(name).suffix.lower(): name for name in reversed(shards)}
    if len(first) > 1:
        text = (
            f"{source.name}: the source has both Parquet and .tar files ({', '.join(sorted(first.values()))})."
            f" Import each kind by itself, {'with --files' if source.revision else 'from a folder of its own'}."
        )
        raise UserError(Problem("shards-mixed", text))
    if not shards or source.is_file:
        return dict.fromkeys(shards, "train")
    return splits_by_datasets(source, config)


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARDS)


def splits_by_datasets(source: Source, config: str | None) -> dict[str, str]:
    """Return file -> split, by the names of files and folders, or by ``configs`` in the header of README.md."""
    from datasets import load_dataset_builder

    with names_for_datasets(source) as (folder, original_names):
        try:
            builder = load_dataset_builder(str(folder), name=config)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None):  # the machine's fault
                raise
            reason = " ".join(str(error).replace(str(folder), source.name).split()).rstrip(".")
            raise UserError(Problem("config-needed", f"{source.name}: {reason}. Choose one with --config.")) from None
    splits = {
        original_names[str(Path(file).relative_to(folder))]: str(split)
        for split, files in builder.config.data_files.items()
        for file in files
    }
    others = sorted(name for name in splits if not is_shard(name))
    if others:
        text = (
            f"{source.name}: the data files are {plural(len(others), 'file')} such as {others[0]}, but Parquet or .tar"
            " files are expected. Choose with --files or --config."
        )
        raise UserError(Problem("nothing-to-import", text))
    return splits


@contextmanager
def names_for_datasets(source: Source) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a folder with files whose names ``datasets`` understands, and their names -> names in the source.

    ``datasets`` reads some characters of the folder's path as a pattern, and knows only suffixes in lower case. For
    such sources the folder is a temporary one with empty files and README.md, which is all that decides the splits.
    """
    folder = source.folder.resolve()  # as ``datasets`` names the files
    lower = {name: str(PurePosixPath(name).with_suffix(PurePosixPath(name).suffix.lower())) for name in source.files}
    renamed = {name: new for name, new in lower.items() if is_shard(name) and new not in source.files}
    if not renamed and not GLOB_MARKS & set(str(folder)):
        yield folder, {name: name for name in source.files}
        return
    names = {renamed.get(name, name): name for name in source.files}
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary).resolve()
        for new, name in names.items():
            (copy / new).parent.mkdir(parents=True, exist_ok=True)
            (copy / new).write_bytes((folder / name).read_bytes() if name == "README.md" else b"")
        yield copy, names


# Parquet and .tar files


def unpack(source: Source, files: dict[str, str], folder: ImageFolder, args: argparse.Namespace) -> list[str]:
    """Write every sample and return the lines of a summary.

    Raises:
        UserError: files are damaged or lack columns, or samples cannot be used without --skip-bad.
    """
    refuse_column_options(files, args)
    columns = Columns(args.image_column, None if args.no_captions else args.caption_column, args.mask_column)
    shards = open_shards(source, files, columns)
    problems = list(write_samples(shards, folder))
    if problems and not args.skip_bad:
        count = plural(len(problems), "sample")
        text = f"{source.name}: {count} cannot be used. Correct the source, or use --skip-bad to import the others."
        raise UserError(*first_problems(problems), Problem("bad-samples", text))
    if not folder.rows:
        raise UserError(Problem("nothing-to-import", f"{source.name}: the files hold no image that can be imported."))
    for problem in first_problems(problems):
        warn(problem.code, problem)
    if problems:
        warn("bad-samples", f"{plural(len(problems), 'sample is', 'samples are')} left out.")
    folder.finish(provenance(source, list(files)) | {"num_left_out": len(problems)})
    return summary_of(folder, args.no_captions)


def refuse_column_options(files: dict[str, str], args: argparse.Namespace) -> None:
    """Raise UserError for options of columns of Parquet files where the files are .tar files."""
    options = {"--image-column": args.image_column, "--mask-column": args.mask_column}
    ineffective = [f"{option} {value}" for option, value in options.items() if value is not None]
    if ineffective and not next(iter(files)).lower().endswith(".parquet"):
        text = f"{ineffective[0]} has no effect on .tar files, whose members have no columns. Leave it out."
        raise UserError(Problem("option-without-effect", text))


def open_shards(source: Source, files: dict[str, str], columns: Columns) -> list[Shard]:
    """Return all files, each checked as far as possible without reading images.

    Raises:
        UserError: the problems of all files.
    """
    from lora_dag.commands.import_dataset.parquet import open_parquet
    from lora_dag.commands.import_dataset.webdataset import open_tar

    shards: list[Shard] = []
    problems: list[Problem] = []
    for name, split in sorted(files.items()):
        open_shard = open_parquet if name.lower().endswith(".parquet") else open_tar
        try:
            shards.append(open_shard(source.folder / name, source.place(name), split, columns))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return shards


def write_samples(shards: list[Shard], folder: ImageFolder) -> Iterator[RowProblem]:
    """Write all samples and yield the problems of those that cannot be used."""
    with Bar("images", sum(map(len, shards))) as bar:
        for shard in shards:
            for sample in shard.samples():
                if isinstance(sample, RowProblem):
                    yield sample
                    continue
                bar.add()
                try:
                    folder.add(sample)
                except UserError as error:
                    yield from row_problems(error.problems, sample.place)


def summary_of(folder: ImageFolder, no_captions: bool) -> list[str]:
    counts = {split: len(rows) for split, rows in sorted(folder.rows.items())}
    splits = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    summary = [f"images      {sum(counts.values()):,} ({splits})"]
    if len(counts) > 1:
        heldout = next(split for split in ("test", "validation", *counts) if split in counts and split != "train")
        summary.append(f"splits      to hold one out: dataset.heldout_split={heldout} dataset.heldout_fraction=null")
    if folder.num_masks:
        summary.append(f"masks       {folder.num_masks:,} masks. To use them: dataset.mask=masks")
        num_without = sum(counts.values()) - folder.num_masks
        if num_without:
            have = plural(num_without, "image has", "images have")
            warn("mask-missing", f"{have} no mask, but dataset.mask=masks requires one for each image.")
    if no_captions:
        summary.append("captions    none. Set dataset.instance_prompt to one caption for all")
    return summary


# A folder of images


def copy_images(source: Source, partial: Path) -> list[str]:
    """Copy images with metadata or caption files beside them. metadata.parquet becomes metadata.jsonl.

    Raises:
        UserError: the folder is on this machine and needs no import.
    """
    images = partial / "images"
    if source.revision is None and not any(Path(name).name == PARQUET_METADATA for name in source.files):
        text = f"{source.name}: this is a folder of images already. Set dataset.source={source.name} without import."
        raise UserError(Problem("import-unneeded", text))
    origin = provenance(source, list(source.files))
    for name in counted("files", source.files, len(source.files)):
        write_once(images / name, (source.folder / name).read_bytes())
    for name in source.files:
        if Path(name).name == PARQUET_METADATA:
            as_jsonl(images / name)
    write_json(images / PROVENANCE, origin)
    counts = Counter(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in source.files)
    return [f"images      {counts[True]:,}, copied from {source.name}"]


def as_jsonl(table: Path) -> None:
    import pandas

    pandas.read_parquet(table).to_json(table.with_suffix(".jsonl"), orient="records", lines=True, force_ascii=False)
    table.unlink()


def provenance(source: Source, files: list[str]) -> dict[str, Any]:
    """Return the origin of the images, without paths or times of this machine, since DVC hashes it with them."""
    digests = {name: sha256_file(source.folder / name) for name in sorted(files)}
    origin: dict[str, Any] = {"files": digests, "license": source.license}
    return origin | ({"hub": source.name, "revision": source.revision} if source.revision else {})
