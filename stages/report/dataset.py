"""reports/dataset.md: the dataset by itself. And what report.md says of it: the key facts, and what to look into."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_dag.artifacts import picture_table
from lora_dag.artifacts.picture_table import LEFT_OUT, MAX_CUT, Row
from lora_dag.core.console import plural
from lora_dag.pages import marks
from lora_dag.pages.findings import number
from lora_dag.pages.markdown import bullets, code, codes, facts, image, link, table
from stages.report.inputs import Inputs

MAX_ROWS = 40  # of a table
MAX_NAMES = 10  # in a cell
MAX_REASON = 300  # characters


# In report.md


def section(inputs: Inputs, folder: Path) -> list[str]:
    page = link("The dataset page", folder / "dataset.md", folder)
    found = remarks(inputs)
    return [
        image("Contact sheet", inputs.pictures["contact"], folder),
        f"{page} shows sizes, captions, duplicates and what is left out.",
        *(["Worth a look:\n\n" + bullets(found)] if found else []),
        facts("Pictures and captions", key_facts(inputs)),
    ]


def key_facts(inputs: Inputs) -> dict[str, object]:
    dataset, latents = inputs.dataset, inputs.latents
    labels = {
        "Pictures": dataset.get("num_pictures"),
        "to train on": dataset.get("num_train"),
        "of them for regularization": dataset.get("num_regularization"),
        "held out": dataset.get("num_heldout"),
        "left out": dataset.get("num_left_out") or None,
        "Sizes that the model sees": sizes(inputs),
        "Views (crops, mirrors)": latents.get("latents.num_views"),
        "Masks": latents.get("latents.num_masks") or None,
        "Words per caption, median": whole(dataset.get("caption_words_median")),
        "Tokens per caption, median": whole(latents.get("captions.tokens_median")),
    }
    return {label: value for label, value in labels.items() if value is not None}


def to_train_on(inputs: Inputs) -> str:
    """``275 pictures``"""
    return plural(int(inputs.dataset.get("num_train") or 0), "picture")


def sizes(inputs: Inputs) -> str:
    counts = Counter(row["bucket"] for row in kept(inputs))
    return shown_size(next(iter(counts))) if len(counts) == 1 else str(len(counts))


def remarks(inputs: Inputs) -> list[str]:
    """What a person may want to mend, a line each; empty for a clean dataset."""
    rows, lost = kept(inputs), left_out(inputs)
    withheld = sum(bool(row["near_duplicates"]) for row in lost)
    twins = sum(len(group) - 1 for group in same_bytes(rows))
    blank = sum(not row["captions"].strip() for row in rows)
    unlisted = number(inputs.dataset, "num_unlisted")
    cropped = [row for row in rows if cut_off(row) > MAX_CUT]
    most = f"{max(map(cut_off, cropped), default=0):.0%}"
    marked = sum(marks.has_any(row["captions"]) for row in rows)
    cut, total, limit = (number(inputs.latents, f"captions.{name}") for name in ("num_cut", "num", "tokens_limit"))
    found = (
        (cut, f"Captions cut at {limit:.0f} tokens: {cut:.0f} of {total:.0f}. The model never sees the rest of them."),
        (blank, f"Empty captions: {blank}. Those pictures are learned without a prompt."),
        (
            len(cropped),
            f"Pictures that lose over a third of their area to the crop: {len(cropped)}; the largest loss is {most}.",
        ),
        (marked, f"Captions with marks that other programs act on: {marked}. They are learned as words."),
        (len(lost) - withheld, f"Pictures left out because something is wrong with them: {len(lost) - withheld}."),
        (withheld, f"Near-duplicates withheld: {withheld}. They look like pictures on the other side of the split."),
        (twins, f"Pictures with the same bytes as another one: {twins}. They weigh double."),
        (unlisted, f"Pictures in the source that no row names: {unlisted:.0f}. They are left out."),
    )
    return [line for count, line in found if count > 0]


# The page


def write_page(title: str, inputs: Inputs, folder: Path) -> str:
    """Markdown; sections that would be empty are left out."""
    found = remarks(inputs)
    sections = {
        "Sizes": size_table(inputs),
        "Cut off": cut_table(inputs, folder),
        "Repeats": repeats_table(inputs),
        "Captions": facts("What the text encoder reads", caption_facts(inputs)),
        "Duplicates": duplicates(inputs),
        "Left out": left_out_table(inputs, folder),
    }
    parts = [
        f"# The dataset of {title}",
        summary(inputs),
        bullets(found) if found else "No caption is cut or empty; no picture is double or left out.",
        image("Contact sheet", inputs.pictures["contact"], folder),
        "A sample of the pictures as the model sees them, after resize and crop. "
        f"All pictures, one a row: {link('pictures.csv', inputs.pictures['table'], folder)}.",
        *(f"## {head}\n\n{body}" for head, body in sections.items() if body),
    ]
    return "\n\n".join(parts) + "\n"


def summary(inputs: Inputs) -> str:
    dataset = inputs.dataset
    regularization = dataset.get("num_regularization")
    among = f", {regularization} of them for regularization" if regularization else ""
    return (
        f"**{plural(int(number(dataset, 'num_pictures')), 'picture')}: {dataset.get('num_train')} to train on{among}, "
        f"{dataset.get('num_heldout')} held out.**"
    )


def size_table(inputs: Inputs) -> str:
    """Pictures per size that the model sees, and how many are enlarged to it."""
    rows = kept(inputs)
    counts = Counter((row["bucket"], row["split"]) for row in rows)
    enlarged = Counter(row["bucket"] for row in rows if scale(row) > 1)
    largest = Counter(row["bucket"] for row in rows).most_common()
    shown = sorted(largest[:MAX_ROWS], key=lambda pair: (-aspect(pair[0]), pair[0]))
    lines = [
        (
            shown_size(size),
            f"{aspect(size):.2f}",
            str(counts[size, "train"]),
            str(counts[size, "heldout"]),
            str(enlarged[size]),
        )
        for size, _ in shown
    ]
    head = ("Size that the model sees", "width / height", "to train on", "held out", "enlarged")
    body = table(head, lines) + and_more(len(largest) - len(shown), "sizes")
    most = max((scale(row) for row in rows), default=1.0)
    return body + (f"\n\nThe most enlarged picture grows by a factor of {most:.2f}." if most > 1 else "")


def cut_table(inputs: Inputs, folder: Path) -> str:
    """Pictures of which the model sees less than two thirds, those that lose most first."""
    rows = sorted((row for row in kept(inputs) if cut_off(row) > MAX_CUT), key=lambda row: -cut_off(row))
    if not rows:
        return ""
    lines = [
        (code(row["file_name"]), f"{row['width']} x {row['height']}", shown_size(row["bucket"]), f"{cut_off(row):.0%}")
        for row in rows[:MAX_ROWS]
    ]
    rest = and_more(len(rows) - MAX_ROWS, f"in {link('pictures.csv', inputs.pictures['table'], folder)}")
    return table(("Picture", "its size", "as the model sees it", "cut off"), lines) + rest


def repeats_table(inputs: Inputs) -> str:
    """Only where pictures repeat."""
    counts = Counter(int(row["repeats"] or 1) for row in kept(inputs) if row["split"] == "train")
    if set(counts) <= {1}:
        return ""
    lines = [(str(n), str(counts[n]), str(n * counts[n])) for n in sorted(counts, reverse=True)]
    lines.append(("all", str(counts.total()), str(sum(n * num for n, num in counts.items()))))
    return table(("Times per epoch", "pictures", "drawn per epoch"), lines)


def caption_facts(inputs: Inputs) -> dict[str, object]:
    dataset, latents = inputs.dataset, inputs.latents
    limit = whole(latents.get("captions.tokens_limit"))
    labels = {
        "Captions that training draws from": dataset.get("num_captions"),
        "Captions per picture, median and most": per_picture(inputs),
        "Words per caption, median and longest": pair(
            dataset.get("caption_words_median"), dataset.get("caption_words_max")
        ),
        "Tokens per caption, median and longest": pair(
            latents.get("captions.tokens_median"), latents.get("captions.max_tokens")
        ),
        "Tokens that the text encoder reads": limit,
        "Captions that are cut there": latents.get("captions.num_cut"),
        **{
            f"Captions with {code(mark)}": n for mark, n in marks.count(row["captions"] for row in kept(inputs)).items()
        },
        "Empty captions": sum(not row["captions"].strip() for row in kept(inputs)),
    }
    return {label: value for label, value in labels.items() if value is not None}


def per_picture(inputs: Inputs) -> str | None:
    """None where each has one; lines of a .txt and variants count."""
    counts = [int(row["num_captions"] or 1) for row in kept(inputs)]
    return pair(statistics.median(counts), max(counts)) if max(counts, default=1) > 1 else None


def duplicates(inputs: Inputs) -> str:
    """Groups of the same bytes, and of near-duplicates with the side that each of them is on."""
    same = [("the same bytes", ", ".join(names)) for names in map(shown_names, same_bytes(kept(inputs)))]
    near = defaultdict(list)
    for row in inputs.rows:
        if row["near_duplicates"]:
            near[row["near_duplicates"]].append(row)
    alike = [("near-duplicates", ", ".join(shown_names(group))) for _, group in sorted(near.items())]
    found = same + alike
    if not found:
        return ""
    return table(("", "Pictures"), found[:MAX_ROWS], align=":---") + and_more(len(found) - MAX_ROWS, "groups")


def left_out_table(inputs: Inputs, folder: Path) -> str:
    rows = left_out(inputs)
    if not rows:
        return ""
    names = codes([row["file_name"] for row in rows[:MAX_ROWS]])
    lines = [(name, code(row["reason"], MAX_REASON)) for name, row in zip(names, rows, strict=False)]
    rest = and_more(len(rows) - MAX_ROWS, f"in {link('pictures.csv', inputs.pictures['table'], folder)}")
    return table(("Picture", "Why"), lines, align=":---") + rest


# Rows


def kept(inputs: Inputs) -> list[Row]:
    return [row for row in inputs.rows if row["split"] != LEFT_OUT]


def left_out(inputs: Inputs) -> list[Row]:
    return [row for row in inputs.rows if row["split"] == LEFT_OUT]


def same_bytes(rows: Iterable[Row]) -> list[list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["sha256"]].append(row)
    return [group for group in groups.values() if len(group) > 1]


def shown_names(rows: Sequence[Row]) -> list[str]:
    """``a.png` (train)``, with those beyond MAX_NAMES counted."""
    splits = {"heldout": "held out"}
    spans = codes([row["file_name"] for row in rows[:MAX_NAMES]])
    names = [f"{span} ({splits.get(row['split'], row['split'])})" for span, row in zip(spans, rows, strict=False)]
    return names + ([f"and {len(rows) - MAX_NAMES} more"] if len(rows) > MAX_NAMES else [])


def scale(row: Row) -> float:
    """Factor between a picture and what the model sees of it."""
    return picture_table.enlargement(*geometry(row))


def cut_off(row: Row) -> float:
    """Share of a picture's area that the model does not see."""
    return picture_table.cut_off(*geometry(row))


def geometry(row: Row) -> tuple[int, int, tuple[int, int]]:
    """Width, height, and the size that the model sees, in pixels."""
    return int(row["width"]), int(row["height"]), size_of(row["bucket"])


def size_of(bucket: str) -> tuple[int, int]:
    width, height = bucket.split("x")
    return int(width), int(height)


def aspect(bucket: str) -> float:
    width, height = size_of(bucket)
    return width / height


def shown_size(bucket: str) -> str:
    return bucket.replace("x", " x ")


def whole(value: object) -> object:
    """3.0 as 3."""
    return f"{value:g}" if isinstance(value, float) else value


def pair(first: object, second: object) -> str | None:
    return None if first is None or second is None else f"{whole(first)} and {whole(second)}"


def and_more(count: int, what: str) -> str:
    return f"\n\nAnd {count} more {what}." if count > 0 else ""
