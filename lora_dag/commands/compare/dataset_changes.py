"""Two versions of a dataset, each as the rows of its pictures.csv: which pictures came, went and changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from lora_dag.commands.compare.sides import Side
from lora_dag.pages.markdown import code, codes

Row = Mapping[str, str]
Pair = tuple[Row, Row]

MAX_LISTED = 20  # lines per kind of change
MAX_REASON = 300  # characters
CAPTION_COLUMNS = ("captions", "num_captions", "captions_digest")
SPLITS = {"train": "training", "heldout": "held-out", "left out": "left out"}


@dataclass(frozen=True)
class Changes:
    """Rows in the order of their names. A picture can stand in several lists: edited and recaptioned, say."""

    added: list[Row] = field(default_factory=list)
    removed: list[Row] = field(default_factory=list)
    edited: list[Pair] = field(default_factory=list)
    """The same name, other bytes."""
    recaptioned: list[Pair] = field(default_factory=list)
    renamed: list[Pair] = field(default_factory=list)
    """The same bytes, another name."""
    moved: list[Pair] = field(default_factory=list)
    """The same bytes on the other side of the split."""
    left_out: list[Row] = field(default_factory=list)
    """Part of the dataset no more, or not yet, though the source has them."""
    taken_back: list[Row] = field(default_factory=list)
    """Left out before."""

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))

    def summary(self) -> str:
        """``2 added, 1 edited, 3 recaptioned``, or ``none``."""
        words = {each.name: each.name.replace("_", " ") for each in fields(self)} | {"moved": "moved across the split"}
        counts = [f"{len(getattr(self, name))} {word}" for name, word in words.items() if getattr(self, name)]
        return ", ".join(counts) or "none"

    def markdown(self) -> str:
        """One list per kind of change, each cut at MAX_LISTED lines."""
        parts = [
            bullets("added", map(name_and_caption, self.added)),
            bullets("removed", map(name_and_caption, self.removed)),
            bullets("edited: other pixels, or saved anew", (code(new["file_name"]) for _, new in self.edited)),
            bullets(
                "recaptioned", (f"{code(new['file_name'])}: {captions(old, new)}" for old, new in self.recaptioned)
            ),
            bullets("renamed", (became(old["file_name"], new["file_name"]) for old, new in self.renamed)),
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
            bullets("taken back", map(name_and_caption, self.taken_back)),
        ]
        return "\n\n".join(part for part in parts if part)


def changes_between(a: Side, b: Side) -> Changes:
    """None where a revision has no table of its pictures."""
    return Changes() if a.pictures is None or b.pictures is None else compare_tables(a.pictures, b.pictures)


def compare_tables(old: Iterable[Row], new: Iterable[Row]) -> Changes:
    """What has to happen to the rows ``old`` to become ``new``."""
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
        taken_back=[after[name] for name in sorted(after.keys() & out_before.keys() - before.keys())],
    )


def by_name(rows: Iterable[Row]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Pictures of the dataset, and those left out that are not also in it."""
    inside: dict[str, Row] = {}
    out: dict[str, Row] = {}
    for row in rows:
        (out if row["split"] == "left out" else inside)[row["file_name"]] = row
    return inside, {name: row for name, row in out.items() if name not in inside}


def same_bytes(gone: list[Row], come: list[Row]) -> list[Pair]:
    """Each picture that went beside one that came with its bytes, in the order of their names."""
    waiting = defaultdict(list)
    for row in gone:
        waiting[row["sha256"]].append(row)
    return [(waiting[row["sha256"]].pop(0), row) for row in come if row["sha256"] and waiting[row["sha256"]]]


def bullets(what: str, lines: Iterable[str]) -> str:
    """``**3 added**`` and its list; empty where there is none."""
    listed = list(lines)
    if not listed:
        return ""
    rest = [f"and {len(listed) - MAX_LISTED} more"] if len(listed) > MAX_LISTED else []
    return f"**{len(listed)} {what}**\n\n" + "\n".join(f"- {line}" for line in listed[:MAX_LISTED] + rest)


def name_and_caption(row: Row) -> str:
    return f"{code(row['file_name'])}: {code(row.get('captions', ''))}"


def became(old: str, new: str) -> str:
    return " → ".join(codes((old, new)))


def captions(old: Row, new: Row) -> str:
    """What a caption became; where only other ones of a list changed, that."""
    if old.get("captions") != new.get("captions"):
        return became(old.get("captions", ""), new.get("captions", ""))
    before, after = old.get("num_captions"), new.get("num_captions")
    return f"{before} → {after} captions" if before != after else f"another of its {after} captions"
