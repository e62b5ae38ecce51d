"""Compare two versions of a dataset by their images.csv: added, removed and changed images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from lora_dag.commands.compare.revision_report import RevisionReport
from lora_dag.pages.markdown import code, codes

Row = Mapping[str, str]
Pair = tuple[Row, Row]

MAX_LISTED = 20  # lines per kind of change
MAX_REASON = 300  # characters
CAPTION_COLUMNS = ("captions", "num_captions", "captions_digest")
SPLITS = {"train": "training", "heldout": "held-out", "left out": "left out"}


@dataclass(frozen=True)
class Changes:
    """Changed rows, sorted by name. An image can be in several lists, such as edited and recaptioned."""

    added: list[Row] = field(default_factory=list)
    removed: list[Row] = field(default_factory=list)
    edited: list[Pair] = field(default_factory=list)
    """Same name, other bytes."""
    recaptioned: list[Pair] = field(default_factory=list)
    renamed: list[Pair] = field(default_factory=list)
    """Same bytes, another name."""
    moved: list[Pair] = field(default_factory=list)
    """Same bytes, other split (training or held-out)."""
    left_out: list[Row] = field(default_factory=list)
    """Images of the source that are not in the new dataset."""
    restored: list[Row] = field(default_factory=list)
    """Images that were left out before and are in the dataset now."""

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))

    def summary(self) -> str:
        """Return ``2 added, 1 edited, 3 recaptioned``, or ``none``."""
        words = {each.name: each.name.replace("_", " ") for each in fields(self)} | {"moved": "moved across the split"}
        counts = [f"{len(getattr(self, name))} {word}" for name, word in words.items() if getattr(self, name)]
        return ", ".join(counts) or "none"

    def markdown(self) -> str:
        """Return a list per kind of change, each cut at MAX_LISTED lines."""
        parts = [
            bullets("added", map(name_and_caption, self.added)),
            bullets("removed", map(name_and_caption, self.removed)),
            bullets("edited: other pixels, or saved again", (code(new["file_name"]) for _, new in self.edited)),
            bullets(
                "recaptioned", (f"{code(new['file_name'])}: {captions(old, new)}" for old, new in self.recaptioned)
            ),
            bullets("renamed", (arrow(old["file_name"], new["file_name"]) for old, new in self.renamed)),
            bullets(
                "moved across the split",
                (
                    f"{code(new['file_name'])}: {SPLITS[old['split']]} → {SPLITS[new['split']]}"
                    for old, new in self.moved
                ),
            ),
            bullets(
                "left out",
                (f"{code(row['file_name'])}: {code(row.get('reason', ''), MAX_REASON)}" for row in self.left_out),
            ),
            bullets("restored", map(name_and_caption, self.restored)),
        ]
        return "\n\n".join(part for part in parts if part)


def changes_between(a: RevisionReport, b: RevisionReport) -> Changes:
    """Return the changes from A to B; none if a revision has no table of its images."""
    return Changes() if a.images is None or b.images is None else compare_tables(a.images, b.images)


def compare_tables(old: Iterable[Row], new: Iterable[Row]) -> Changes:
    """Return the changes that turn the rows ``old`` into ``new``."""
    before, out_before = by_name(old)
    after, out_after = by_name(new)
    gone = [before[name] for name in sorted(before.keys() - after.keys() - out_after.keys())]
    come = [after[name] for name in sorted(after.keys() - before.keys() - out_before.keys())]
    renamed = same_bytes(gone, come)
    others = {id(row) for pair in renamed for row in pair}
    stayed = sorted(
        [*((before[name], after[name]) for name in before.keys() & after.keys()), *renamed],
        key=lambda pair: pair[1]["file_name"],
    )
    return Changes(
        added=[row for row in come if id(row) not in others],
        removed=[row for row in gone if id(row) not in others],
        edited=[(a, b) for a, b in stayed if a["sha256"] != b["sha256"]],
        recaptioned=[(a, b) for a, b in stayed if any(a.get(name) != b.get(name) for name in CAPTION_COLUMNS)],
        renamed=renamed,
        moved=[(a, b) for a, b in stayed if a["sha256"] == b["sha256"] and a["split"] != b["split"]],
        left_out=[out_after[name] for name in sorted(out_after.keys() - out_before.keys())],
        restored=[after[name] for name in sorted(after.keys() & out_before.keys() - before.keys())],
    )


def by_name(rows: Iterable[Row]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Return the images of the dataset, and the left-out images without a row in the dataset."""
    inside: dict[str, Row] = {}
    out: dict[str, Row] = {}
    for row in rows:
        (out if row["split"] == "left out" else inside)[row["file_name"]] = row
    return inside, {name: row for name, row in out.items() if name not in inside}


def same_bytes(gone: list[Row], come: list[Row]) -> list[Pair]:
    """Pair removed and added images with the same bytes, sorted by name."""
    waiting = defaultdict(list)
    for row in gone:
        waiting[row["sha256"]].append(row)
    return [(waiting[row["sha256"]].pop(0), row) for row in come if row["sha256"] and waiting[row["sha256"]]]


def bullets(what: str, lines: Iterable[str]) -> str:
    """Return ``**3 added**`` and its list; empty without lines."""
    listed = list(lines)
    if not listed:
        return ""
    rest = [f"and {len(listed) - MAX_LISTED} more"] if len(listed) > MAX_LISTED else []
    return f"**{len(listed)} {what}**\n\n" + "\n".join(f"- {line}" for line in listed[:MAX_LISTED] + rest)


def name_and_caption(row: Row) -> str:
    return f"{code(row['file_name'])}: {code(row.get('captions', ''))}"


def arrow(old: str, new: str) -> str:
    return " → ".join(codes((old, new)))


def captions(old: Row, new: Row) -> str:
    """Return the old and the new caption, or the change of an image's other captions."""
    if old.get("captions") != new.get("captions"):
        return arrow(old.get("captions", ""), new.get("captions", ""))
    before, after = old.get("num_captions"), new.get("num_captions")
    return f"{before} → {after} captions" if before != after else f"one of its {after} captions changed"
