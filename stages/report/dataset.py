"""Write reports/dataset.md, and the section of report.md on the dataset: key facts and remarks."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_dag.artifacts import image_table
from lora_dag.artifacts.image_table import LEFT_OUT, MAX_CUT, Row
from lora_dag.core.console import plural
from lora_dag.pages import caption_syntax
from lora_dag.pages.findings import number
from lora_dag.pages.markdown import bullets, code, codes, facts, image, link, table
from stages.report.inputs import Inputs

MAX_ROWS = 40  # rows of a table
MAX_NAMES = 10  # names in a cell
MAX_REASON = 300  # characters


# In report.md


def section(inputs: Inputs, folder: Path) -> list[str]:
    page = link("The dataset page", folder / "dataset.md", folder)
    lines = remarks(inputs)
    return [
        image("Contact sheet", inputs.images["contact"], folder),
        f"{page} has sizes, captions, duplicates and left-out images.",
        *(["To check:\n\n" + bullets(lines)] if lines else []),
        facts("Images and captions", key_facts(inputs)),
    ]


def key_facts(inputs: Inputs) -> dict[str, object]:
    dataset, latents = inputs.dataset, inputs.latents
    labels = {
        "Images": dataset.get("num_images"),
        "for training": dataset.get("num_train"),
        "for regularization, among these": dataset.get("num_regularization"),
        "held out": dataset.get("num_heldout"),
        "left out": dataset.get("num_left_out") or None,
        "Sizes after resize and crop": sizes(inputs),
        "Views (crops, mirrors)": latents.get("latents.num_views"),
        "Masks": latents.get("latents.num_masks") or None,
        "Words per caption, median": whole(dataset.get("caption_words_median")),
        "Tokens per caption, median": whole(latents.get("captions.tokens_median")),
    }
    return {label: value for label, value in labels.items() if value is not None}


def to_train_on(inputs: Inputs) -> str:
    """Return ``275 images``."""
    return plural(int(inputs.dataset.get("num_train") or 0), "image")


def sizes(inputs: Inputs) -> str:
    counts = Counter(row["bucket"] for row in used(inputs))
    return size_text(next(iter(counts))) if len(counts) == 1 else str(len(counts))


def remarks(inputs: Inputs) -> list[str]:
    """Return a line per possible problem of the dataset; empty for a clean one."""
    rows, others = used(inputs), left_out(inputs)
    near = sum(bool(row["near_duplicates"]) for row in others)
    twins = sum(len(group) - 1 for group in same_bytes(rows))
    blank = sum(not row["captions"].strip() for row in rows)
    unlisted = number(inputs.dataset, "num_unlisted")
    cropped = [row for row in rows if cropped_fraction(row) > MAX_CUT]
    most = f"{max(map(cropped_fraction, cropped), default=0):.0%}"
    with_syntax = sum(caption_syntax.contains_any(row["captions"]) for row in rows)
    cut, total, limit = (number(inputs.latents, f"captions.{name}") for name in ("num_cut", "num", "tokens_limit"))
    found = (
        (cut, f"Captions cut at {limit:.0f} tokens: {cut:.0f} of {total:.0f}. The model never sees the rest."),
        (blank, f"Empty captions: {blank}. These images are learned without a prompt."),
        (
            len(cropped),
            f"Images that lose over a third of their area to the crop: {len(cropped)}. The largest loss is {most}.",
        ),
        (with_syntax, f"Captions with special syntax of other programs: {with_syntax}. It is learned as plain text."),
        (len(others) - near, f"Images left out because of a problem: {len(others) - near}."),
        (near, f"Near-duplicates left out: {near}. They look like images of the other split."),
        (twins, f"Images with the same bytes as another image: {twins}. They count twice."),
        (unlisted, f"Images in the source without a row: {unlisted:.0f}. They are left out."),
    )
    return [line for count, line in found if count > 0]


# The page


def write_page(title: str, inputs: Inputs, folder: Path) -> str:
    """Return Markdown without empty sections."""
    lines = remarks(inputs)
    sections = {
        "Sizes": size_table(inputs),
        "Cropped": cut_table(inputs, folder),
        "Repeats": repeats_table(inputs),
        "Captions": facts("Captions", caption_facts(inputs)),
        "Duplicates": duplicates(inputs),
        "Left out": left_out_table(inputs, folder),
    }
    parts = [
        f"# The dataset of {title}",
        summary(inputs),
        bullets(lines) if lines else "No problems: no cut or empty captions, no duplicates, no left-out images.",
        image("Contact sheet", inputs.images["contact"], folder),
        "A sample of the images after resize and crop. "
        f"All images are in {link('images.csv', inputs.images['table'], folder)}.",
        *(f"## {head}\n\n{body}" for head, body in sections.items() if body),
    ]
    return "\n\n".join(parts) + "\n"


def summary(inputs: Inputs) -> str:
    dataset = inputs.dataset
    regularization = dataset.get("num_regularization")
    among = f" ({regularization} of them for regularization)" if regularization else ""
    return (
        f"**{plural(int(number(dataset, 'num_images')), 'image')}: {dataset.get('num_train')} for training{among}, "
        f"{dataset.get('num_heldout')} held out.**"
    )


def size_table(inputs: Inputs) -> str:
    """Return a table of image counts per size after resize and crop, and of enlarged images."""
    rows = used(inputs)
    counts = Counter((row["bucket"], row["split"]) for row in rows)
    enlarged = Counter(row["bucket"] for row in rows if scale(row) > 1)
    largest = Counter(row["bucket"] for row in rows).most_common()
    listed = sorted(largest[:MAX_ROWS], key=lambda pair: (-aspect(pair[0]), pair[0]))
    lines = [
        (
            size_text(size),
            f"{aspect(size):.2f}",
            str(counts[size, "train"]),
            str(counts[size, "heldout"]),
            str(enlarged[size]),
        )
        for size, _ in listed
    ]
    head = ("Size after resize and crop", "width / height", "training", "held out", "enlarged")
    body = table(head, lines) + and_more(len(largest) - len(listed), "sizes")
    most = max((scale(row) for row in rows), default=1.0)
    return body + (f"\n\nThe largest enlargement is by a factor of {most:.2f}." if most > 1 else "")


def cut_table(inputs: Inputs, folder: Path) -> str:
    """Return a table of images that lose over a third of their area, the largest losses first."""
    rows = sorted(
        (row for row in used(inputs) if cropped_fraction(row) > MAX_CUT), key=lambda row: -cropped_fraction(row)
    )
    if not rows:
        return ""
    lines = [
        (
            code(row["file_name"]),
            f"{row['width']} x {row['height']}",
            size_text(row["bucket"]),
            f"{cropped_fraction(row):.0%}",
        )
        for row in rows[:MAX_ROWS]
    ]
    rest = and_more(len(rows) - MAX_ROWS, f"in {link('images.csv', inputs.images['table'], folder)}")
    return table(("Image", "size", "after resize and crop", "cut off"), lines) + rest


def repeats_table(inputs: Inputs) -> str:
    """Return a table of repeats; empty if no image repeats."""
    counts = Counter(int(row["repeats"] or 1) for row in used(inputs) if row["split"] == "train")
    if set(counts) <= {1}:
        return ""
    lines = [(str(n), str(counts[n]), str(n * counts[n])) for n in sorted(counts, reverse=True)]
    lines.append(("all", str(counts.total()), str(sum(n * num for n, num in counts.items()))))
    return table(("Repeats per epoch", "images", "images per epoch"), lines)


def caption_facts(inputs: Inputs) -> dict[str, object]:
    dataset, latents = inputs.dataset, inputs.latents
    limit = whole(latents.get("captions.tokens_limit"))
    labels = {
        "Captions for training": dataset.get("num_captions"),
        "Captions per image, median and maximum": per_image(inputs),
        "Words per caption, median and maximum": pair(
            dataset.get("caption_words_median"), dataset.get("caption_words_max")
        ),
        "Tokens per caption, median and maximum": pair(
            latents.get("captions.tokens_median"), latents.get("captions.max_tokens")
        ),
        "Token limit of the text encoder": limit,
        "Captions cut at this limit": latents.get("captions.num_cut"),
        **{
            f"Captions with {code(syntax)}": n
            for syntax, n in caption_syntax.count_captions(row["captions"] for row in used(inputs)).items()
        },
        "Empty captions": sum(not row["captions"].strip() for row in used(inputs)),
    }
    return {label: value for label, value in labels.items() if value is not None}


def per_image(inputs: Inputs) -> str | None:
    """Return median and maximum; None if each image has one. Lines of a .txt file and variants count."""
    counts = [int(row["num_captions"] or 1) for row in used(inputs)]
    return pair(statistics.median(counts), max(counts)) if max(counts, default=1) > 1 else None


def duplicates(inputs: Inputs) -> str:
    """Return a table of groups of equal images and of near-duplicates, with the split of each image."""
    same = [("same bytes", ", ".join(names)) for names in map(listed_names, same_bytes(used(inputs)))]
    near = defaultdict(list)
    for row in inputs.rows:
        if row["near_duplicates"]:
            near[row["near_duplicates"]].append(row)
    alike = [("near-duplicates", ", ".join(listed_names(group))) for _, group in sorted(near.items())]
    groups = same + alike
    if not groups:
        return ""
    return table(("Kind", "images"), groups[:MAX_ROWS], align=":---") + and_more(len(groups) - MAX_ROWS, "groups")


def left_out_table(inputs: Inputs, folder: Path) -> str:
    rows = left_out(inputs)
    if not rows:
        return ""
    names = codes([row["file_name"] for row in rows[:MAX_ROWS]])
    lines = [(name, code(row["reason"], MAX_REASON)) for name, row in zip(names, rows, strict=False)]
    rest = and_more(len(rows) - MAX_ROWS, f"in {link('images.csv', inputs.images['table'], folder)}")
    return table(("Image", "reason"), lines, align=":---") + rest


# Rows


def used(inputs: Inputs) -> list[Row]:
    return [row for row in inputs.rows if row["split"] != LEFT_OUT]


def left_out(inputs: Inputs) -> list[Row]:
    return [row for row in inputs.rows if row["split"] == LEFT_OUT]


def same_bytes(rows: Iterable[Row]) -> list[list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["sha256"]].append(row)
    return [group for group in groups.values() if len(group) > 1]


def listed_names(rows: Sequence[Row]) -> list[str]:
    """Return names like ``a.png (train)``; images beyond MAX_NAMES are counted."""
    splits = {"heldout": "held out"}
    spans = codes([row["file_name"] for row in rows[:MAX_NAMES]])
    names = [f"{span} ({splits.get(row['split'], row['split'])})" for span, row in zip(spans, rows, strict=False)]
    return names + ([f"and {len(rows) - MAX_NAMES} more"] if len(rows) > MAX_NAMES else [])


def scale(row: Row) -> float:
    """Return the factor by which an image is enlarged (above 1) or reduced."""
    return image_table.enlargement(*geometry(row))


def cropped_fraction(row: Row) -> float:
    """Return the share of an image's area that the crop removes."""
    return image_table.cropped_fraction(*geometry(row))


def geometry(row: Row) -> tuple[int, int, tuple[int, int]]:
    """Return width, height, and the size after resize and crop, in pixels."""
    return int(row["width"]), int(row["height"]), size_of(row["bucket"])


def size_of(bucket: str) -> tuple[int, int]:
    width, height = bucket.split("x")
    return int(width), int(height)


def aspect(bucket: str) -> float:
    width, height = size_of(bucket)
    return width / height


def size_text(bucket: str) -> str:
    return bucket.replace("x", " x ")


def whole(value: object) -> object:
    """Return 3.0 as 3."""
    return f"{value:g}" if isinstance(value, float) else value


def pair(first: object, second: object) -> str | None:
    return None if first is None or second is None else f"{whole(first)} and {whole(second)}"


def and_more(count: int, noun: str) -> str:
    return f"\n\nAnd {count} more {noun}." if count > 0 else ""
