"""Raw pictures and captions -> a checked manifest: crops, mirrors, held-out split; and a contact sheet.

In: dataset.source (metadata.jsonl and pictures).  Out: data/prepared/{manifest.jsonl,dataset.json}, reports/dataset/.
Run: ``python -m stages.prepare``
"""

from __future__ import annotations

import json
import statistics
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from tqdm import tqdm

from stages.artifacts import metrics
from stages.artifacts.manifest import Item, Manifest, Split, View
from stages.core import params, seeding
from stages.core.console import UserError, log, parser, run
from stages.core.files import sha256_file
from stages.core.pictures import check_picture, chroma, dark_share, load_view, preprocessing, save_png, sheet

METADATA = "metadata.jsonl"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SHEET_COLUMNS, SHEET_ROWS, SHEET_CELL = 8, 6, 80
SHEET_MAX_BYTES = 200_000


class DatasetParams(params.Params):
    """Section ``dataset``: which pictures and captions, and how a picture is brought to the model's size."""

    source: str = Field(min_length=1)
    """Folder with metadata.jsonl and the pictures that it names."""
    caption_column: str = Field(min_length=1)
    """Key of the caption in a row of metadata.jsonl."""
    resolution: int = Field(ge=8, le=4096)
    """Side, in pixels, of the square that the model sees."""
    crop: Literal["center", "random"]
    """Which square of a picture's short side: the middle one, or seeded random ones."""
    num_crops: int = Field(ge=1, le=64)
    """Squares per picture; more than one needs crop random."""
    flip: bool
    """Add each square mirrored."""
    background: str = Field(pattern="^#[0-9a-fA-F]{6}$")
    """Colour #rrggbb that transparent pixels are laid on."""
    heldout_fraction: float = Field(gt=0, lt=1)
    """Share of the pictures that is never trained on."""
    seed: int = Field(ge=0)
    """Decides split and random crops."""

    @model_validator(mode="after")
    def _check(self) -> DatasetParams:
        if self.num_crops > 1 and self.crop == "center":
            raise ValueError(f"num_crops {self.num_crops} needs crop: random; there is one center crop only")
        if self.caption_column == "file_name":
            raise ValueError("caption_column 'file_name' is the column of file names; name the one with the captions")
        return self


@dataclass(frozen=True)
class Listed:
    """One row of metadata.jsonl that names a file of the folder."""

    line: int
    file_name: str
    caption: str


@dataclass(frozen=True)
class Row:
    """One picture of metadata.jsonl that passed every check."""

    file_name: str
    caption: str
    sha256: str
    width: int
    """After EXIF rotation, as are all sizes here."""
    height: int


def main() -> None:
    args = parser(__doc__, ("prepared", "dataset_reports")).parse_args()
    config = params.load(args.params, args.overrides)
    dataset = config.section(DatasetParams)

    source = Path(dataset.source)
    rows = read_dataset(source, dataset)
    manifest = Manifest([to_item(row, dataset) for row in rows], preprocessing(dataset.background), dataset.source)
    require_both_splits(manifest.items, dataset)
    num_unlisted = count_unlisted(source, rows)
    warn(rows, num_unlisted, source, dataset)

    manifest.save(args.prepared)
    metrics.save(args.dataset_reports / "metrics.json", measure(manifest, num_unlisted))
    save_png(args.dataset_reports / "contact.png", contact_sheet(manifest, dataset), SHEET_MAX_BYTES)
    log_end(manifest, args.prepared, args.dataset_reports)


# Reading and checking


def read_dataset(source: Path, dataset: DatasetParams) -> list[Row]:
    """Every row of the folder's metadata.jsonl, with its picture decoded once.

    Raises:
        UserError: every problem of every row and picture, one line each.
    """
    listed, problems = read_metadata(source, dataset)
    rows: list[Row] = []
    for entry in tqdm(listed, desc="pictures", disable=None, leave=False):
        try:
            rows.append(check_listed(source, entry, dataset))
        except UserError as error:
            problems += [f"{source / METADATA}:{entry.line}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*sorted(problems, key=line_number))
    return rows


def read_metadata(source: Path, dataset: DatasetParams) -> tuple[list[Listed], list[str]]:
    """Rows of metadata.jsonl and what is wrong with them, one line each; opens no picture, so check can afford it.

    The rows are complete, captions included, only where there are no problems.

    Raises:
        UserError: there is nothing to read rows from, or every row lacks the caption column.
    """
    metadata = source / METADATA
    if not source.is_dir():
        raise UserError(
            f"params.yaml dataset.source: '{source}' is no folder; "
            "`dvc pull` brings tracked data, or name a folder of your own"
        )
    if not metadata.is_file():
        example = json.dumps({"file_name": "red-apple.png", dataset.caption_column: "red apple"})
        raise UserError(f"{metadata}: no such file; expected one JSON row per picture, such as {example}")
    listed: list[Listed] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    lines = parse_lines(metadata, problems)
    require_column(metadata, lines, dataset)
    for number, value in lines:
        found = caption_problems(value, dataset.caption_column)
        try:
            name = check_name(source, value.get("file_name"))
        except UserError as error:
            found += error.problems
        else:
            first = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), number)
            if first != number:
                found.append(f"'{name}' is named on line {first} already; remove one of the two rows")
            listed.append(Listed(number, name, value.get(dataset.caption_column, "")))
        problems += [f"{metadata}:{number}: {problem}" for problem in found]
    if not listed and not problems:
        raise UserError(f"{metadata}: no rows; the dataset is empty")
    return listed, sorted(problems, key=line_number)


def parse_lines(metadata: Path, problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of each line; lines that are none go to ``problems``."""
    lines = []
    for number, blob in enumerate(metadata.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not blob.strip():
            continue
        try:
            value = json.loads(blob.decode("utf-8"))
        except UnicodeDecodeError:
            problems.append(f"{metadata}:{number}: not UTF-8 text; save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            problems.append(f"{metadata}:{number}: no valid JSON ({error}); expected one object per line")
        else:
            if isinstance(value, dict):
                lines.append((number, value))
            else:
                problems.append(f"{metadata}:{number}: got {type(value).__name__}; expected one JSON object per line")
    return lines


def require_column(metadata: Path, lines: list[tuple[int, dict[str, Any]]], dataset: DatasetParams) -> None:
    """One line instead of one per row where the caption column is merely named wrong."""
    if lines and not any(dataset.caption_column in value for _, value in lines):
        found = sorted({key for _, value in lines for key in value} - {"file_name"})
        there = f"it has {', '.join(found)}" if found else "it has file_name only"
        raise UserError(
            f"params.yaml dataset.caption_column: '{dataset.caption_column}' is no column of {metadata}; {there}"
        )


def check_listed(source: Path, entry: Listed, dataset: DatasetParams) -> Row:
    """A row with its picture decoded.

    Raises:
        UserError: the picture cannot be used; the place in metadata.jsonl is the caller's to add.
    """
    path = source / entry.file_name
    width, height = check_picture(path)
    if min(width, height) < dataset.resolution:
        raise UserError(
            f"'{entry.file_name}' has {width} x {height} pixels, less than dataset.resolution {dataset.resolution};"
            " use a larger picture or a smaller resolution"
        )
    return Row(entry.file_name, entry.caption, sha256_file(path), width, height)


def caption_problems(value: dict[str, Any], column: str) -> list[str]:
    if column not in value:
        return [f"no '{column}' column; write the caption, or \"\" for none"]
    if not isinstance(value[column], str):
        return [f'{column}: got {json.dumps(value[column])}; expected a string, "" for no caption']
    if any(unicodedata.category(character) == "Cs" for character in value[column]):
        return [f"{column}: {json.dumps(value[column])[:80]} holds half a character (a lone surrogate); write it again"]
    return []


def check_name(source: Path, name: Any) -> str:
    """The file's name, relative to the folder.

    Raises:
        UserError: no name, a name that leaves the folder, or no file there.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"file_name: got {json.dumps(name)}; expected the name of a picture in {source}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise UserError(f"file_name: {json.dumps(name)} holds a control character; rename the file")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(f"file_name: '{name}' leaves {source}; expected a name relative to that folder")
    path = source / pure
    if not path.exists():
        raise UserError(f"file_name: '{name}' is no file in {source}; add it or remove the row")
    if not path.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"file_name: '{name}' is a link that leaves {source}; put the picture itself there"
            " (pictures linked by DVC: dvc config cache.type reflink,copy)"
        )
    if not path.is_file():
        raise UserError(f"file_name: '{name}' is not a regular file; expected a picture")
    return str(pure)


def line_number(problem: str) -> int:
    return int(problem.split(".jsonl:")[1].split(":")[0])


def require_both_splits(items: list[Item], dataset: DatasetParams) -> None:
    present = {item.split for item in items}
    for split, advice in (("heldout", "raise"), ("train", "lower")):
        if split not in present:
            raise UserError(
                f"params.yaml dataset.heldout_fraction: {dataset.heldout_fraction} of {len(items)} pictures leaves the"
                f" {split} split empty; {advice} it, add pictures, or try another dataset.seed"
            )


def count_unlisted(source: Path, rows: list[Row]) -> int:
    """Pictures in the folder that no row names."""
    listed = {row.file_name for row in rows}
    pictures = (path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sum(path.relative_to(source).as_posix() not in listed for path in pictures)


def warn(rows: list[Row], num_unlisted: int, source: Path, dataset: DatasetParams) -> None:
    """Say what is allowed but seldom meant."""
    num_blank = sum(not row.caption.strip() for row in rows)
    num_twins = len(rows) - len({row.sha256 for row in rows})
    num_square = sum(row.width == row.height for row in rows)
    if num_unlisted:
        log.warning("warning: %d pictures in %s are not in metadata.jsonl and are left out", num_unlisted, source)
    if num_blank:
        log.warning("warning: %d captions are empty; those pictures are learned without a prompt", num_blank)
    if num_twins:
        log.warning("warning: %d pictures have the same bytes as another one and weigh double", num_twins)
    if dataset.crop == "random" and num_square:
        log.warning("warning: dataset.crop random changes nothing for %d square pictures", num_square)


# Views and split


def to_item(row: Row, dataset: DatasetParams) -> Item:
    size = dataset.resolution
    return Item(row.file_name, row.sha256, row.caption, split_of(row.sha256, dataset), size, size, views(row, dataset))


def split_of(sha256: str, dataset: DatasetParams) -> Split:
    """By content alone: more pictures never move one, and equal files land on one side."""
    draw = seeding.key(dataset.seed, "split", sha256) / 2**63  # [0, 1)
    return "heldout" if draw < dataset.heldout_fraction else "train"


def views(row: Row, dataset: DatasetParams) -> tuple[View, ...]:
    """Squares of the short side, each once, then mirrored."""
    crops = dict.fromkeys(crop_box(row, dataset, index) for index in range(dataset.num_crops))
    return tuple(View(crop, flip) for crop in crops for flip in ((False, True) if dataset.flip else (False,)))


def crop_box(row: Row, dataset: DatasetParams, index: int) -> tuple[int, int, int, int]:
    side = min(row.width, row.height)
    slack = max(row.width, row.height) - side
    if dataset.crop == "center":
        offset = slack // 2
    else:
        offset = seeding.key(dataset.seed, "crop", row.sha256, index) % (slack + 1)
    left, top = (offset, 0) if row.width > row.height else (0, offset)
    return left, top, left + side, top + side


# Reports


def measure(manifest: Manifest, num_unlisted: int) -> dict[str, metrics.Value]:
    """What a reviewer compares between two versions of a dataset."""
    train = [item for item in manifest.items if item.split == "train"]
    words = [len(item.caption.split()) for item in manifest.items]
    arrays = (np.asarray(first_view(manifest, item)) for item in train)  # one at a time: they may not fit in memory
    chromas, dark_shares = zip(*((chroma(array), dark_share(array)) for array in arrays), strict=True)
    return {
        "num_pictures": len(manifest.items),
        "num_train": len(train),
        "num_heldout": len(manifest.items) - len(train),
        "num_views": sum(len(item.views) for item in manifest.items),
        "num_unlisted": num_unlisted,
        "caption_words_median": statistics.median(words),
        "caption_words_max": max(words),
        "chroma": statistics.fmean(chromas),
        "dark_share": statistics.fmean(dark_shares),
    }


def contact_sheet(manifest: Manifest, dataset: DatasetParams) -> Image.Image:
    """A sample of what the model sees, drawn by content: rows to train on, then at most one held-out row."""
    by_split = {split: sample(manifest.items, split) for split in ("train", "heldout")}
    shown = [("held-out", by_split["heldout"][:SHEET_COLUMNS])]
    train = sorted(by_split["train"][: SHEET_COLUMNS * (SHEET_ROWS - 1)], key=lambda item: item.file_name)
    shown = [("train", train[i : i + SHEET_COLUMNS]) for i in range(0, len(train), SHEET_COLUMNS)] + shown
    counts = Counter(item.split for item in manifest.items)
    title = (
        f"{counts['train']} pictures to train on, {counts['heldout']} held out,"
        f" {dataset.resolution} x {dataset.resolution} pixels, {dataset.crop} crop"
    )
    return sheet(
        [[first_view(manifest, item) for item in row] for _, row in shown],
        [label for label, _ in shown],
        None,
        SHEET_CELL,
        title,
        [[item.caption for item in row] for _, row in shown],
    )


def sample(items: list[Item], split: Split) -> list[Item]:
    """The pictures of a split in an order that no file name decides, so that the sheet changes little with the data."""
    return sorted((item for item in items if item.split == split), key=lambda item: (item.sha256, item.file_name))


def first_view(manifest: Manifest, item: Item) -> Image.Image:
    return load_view(Path(manifest.source) / item.file_name, item, item.views[0], manifest.preprocessing)


def log_end(manifest: Manifest, prepared: Path, reports: Path) -> None:
    counts = Counter(item.split for item in manifest.items)
    num_views = sum(len(item.views) for item in manifest.items)
    size = f"{manifest.items[0].width} x {manifest.items[0].height}"
    log.info("pictures    %d from %s, %d views of %s pixels", len(manifest.items), manifest.source, num_views, size)
    log.info("split       %d train, %d held out", counts["train"], counts["heldout"])
    log.info("written     %s, %s", prepared / "manifest.jsonl", reports / "contact.png")
    log.info("next        python -m stages.cache_latents")


if __name__ == "__main__":
    run(main)
