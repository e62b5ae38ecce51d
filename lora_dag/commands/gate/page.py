"""The page that a pull request shows: the gate's verdict first, then the comparison, then the sheets by commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lora_dag.commands.gate.against import Comparison
from lora_dag.commands.gate.figures import CHECKED
from lora_dag.commands.gate.limits import Answer
from lora_dag.commands.gate.rules import Change
from lora_dag.pages.markdown import bullets, code, table
from lora_dag.pipeline.git import git

MAX_FILES = 8  # named of a change
ONE_RUN = (
    "Checked: parameters, code, dvc.lock and reports/ have the digests of one run (its code may be older: "
    "`lora-dag relock` accepts edits where RESULTS is the same number, and runs nothing); and"
)
NOT_CHECKED = (
    "Not checked: nothing was run again here. Pictures, weights and tables are those that the branch brings. One that "
    "was invented, together with its digest in dvc.lock and all that follows from it, is found by a rerun alone "
    "(`dvc repro --force --no-run-cache`; in CI the label `rerun`)."
)
SHEETS = {"Samples": "reports/samples.png", "Progress": "reports/progress.png"}
MAX_BYTES = 60_000  # GitHub takes 65,536 characters in a comment, Linux 131,072 bytes in a variable


@dataclass(frozen=True)
class Place:
    """Where the page will be read."""

    repository: str | None
    """Its address, such as https://github.com/owner/name; None: pictures are linked by their path."""
    commit: str | None
    """The reviewed commit; None where none is named."""
    against: str | None
    """Revision compared with."""
    against_commit: str | None
    own_gate: bool = True
    """The gate that ran is of the files that it judged."""


def write_page(
    place: Place,
    problems: Sequence[str],
    answers: Sequence[Answer],
    comparison: Comparison | None,
    changes: Sequence[Change],
    unshared: Sequence[str] = (),
) -> str:
    """Markdown of at most MAX_BYTES.

    Args:
        problems: all that is wrong but for closed gates.
        unshared: lines about data that nobody else can get.
    """
    parts = [title(place, problems, answers, changes), subject(place), *changed_rules(place, changes)]
    if problems:
        doubt = "The figures below are those of the files as they are; nobody can vouch for them."
        parts += ["## Not of one run", bullets(in_line(line) for line in problems), doubt]
    else:
        parts += [ONE_RUN, bullets(CHECKED)]
    parts += [NOT_CHECKED, *(f"**Not shared:** {in_line(line)}" for line in unshared)]
    parts += ["## Gates", gates_table(answers)]
    parts += [re.sub("^#", "##", comparison.page, flags=re.MULTILINE)] if comparison else []
    return shortened("\n\n".join(part.strip() for part in parts if part), sheets(place))


def title(place: Place, problems: Sequence[str], answers: Sequence[Answer], changes: Sequence[Change]) -> str:
    """The outcome, and each rule that the branch changes for itself."""
    neutral = any(answer.neutral for answer in answers)
    if problems or not all(answer.passed for answer in answers):
        word = "not passed"
    else:
        word = f"neutral, not comparable with {place.against}" if neutral else "passed"
    rules = ", ".join(change.rule for change in changes)
    return f"# Experiment: {word}{f'; changes {rules}' if rules else ''}"


def write_unread(place: Place, problems: Sequence[str]) -> str:
    """The page of a commit whose files nobody could look at."""
    return "\n\n".join(["# Experiment: not passed", subject(place), bullets(in_line(line) for line in problems)]) + "\n"


def changed_rules(place: Place, changes: Sequence[Change]) -> list[str]:
    """What is to be reviewed by eye: the gate's verdict says nothing of it."""
    if not changes:
        return []
    lines = [f"**{change.rule}**: {in_line(named(change.details))}" for change in changes]
    own = "is" if place.own_gate else "is not"
    by_eye = f"Review these by eye. The gate that ran {own} the branch's own."
    return ["## This branch changes the rules that it is judged by", bullets(lines), by_eye]


def named(details: Sequence[str]) -> str:
    more = len(details) - MAX_FILES
    return ", ".join(details[:MAX_FILES]) + (f" and {more} more" if more > 0 else "")


def subject(place: Place) -> str:
    """Which commit this is about, so that an older page does not pass for a newer one."""
    words = [f"Commit `{place.commit[:10]}`"] if place.commit else []
    if place.against and place.against_commit:
        words.append(f"against `{place.against}` (`{place.against_commit[:10]}`)")
    return " ".join(words) + "." if words else ""


def in_line(text: str) -> str:
    """Text of a file or a parameter, where no page takes it for markup."""
    return code(text, max_length=400)


def gates_table(answers: Sequence[Answer]) -> str:
    if not answers:
        return "None is set: see `report.gates` in params.yaml."
    rows = [(a.gate, a.shown_limit, a.measured, a.word) for a in answers]
    answered = table(("Gate", "limit", "measured", ""), rows, align=":---")
    if any("[" in a.measured or " bound of " in a.measured for a in answers):
        return f"{answered}\n\nAn interval passes unless the whole of it is worse than the limit."
    return answered


def sheets(place: Place) -> str:
    """Each sheet beside the other revision's, where the two differ."""
    parts = []
    for title, path in SHEETS.items():
        if not Path(path).is_file():
            continue
        here, there = link(place, path), pinned(place.repository, place.against_commit, path)
        same = bool(place.against_commit) and read(place.against_commit, path) == Path(path).read_bytes()
        if there and not same:
            parts += [f"## {title}", table((f"{place.against}", "this branch"), [(f"![]({there})", f"![]({here})")])]
        else:
            parts += [f"## {title}{' (unchanged)' if same else ''}", f"![{title}]({here})"]
    return "\n\n".join(parts)


def link(place: Place, path: str) -> str:
    """By a commit that has the very bytes of the file here, so that the picture is the one that was judged."""
    for commit in (place.commit, place.against_commit):
        if commit and read(commit, path) == Path(path).read_bytes():
            return pinned(place.repository, commit, path) or quote(path)
    return quote(path)


def pinned(repository: str | None, commit: str | None, path: str) -> str | None:
    """GitHub shows it wherever Markdown is rendered, to whoever may read the repository."""
    if not (repository and commit and read(commit, path)):
        return None
    below = (git("rev-parse", "--show-prefix") or b"").decode().rstrip("\n")  # the repository's top
    return f"{repository}/blob/{commit}/{quote(below + path)}?raw=true"


def read(commit: str | None, path: str) -> bytes | None:
    return git("show", f"{commit}:./{path}")


def shortened(text: str, end: str) -> str:
    """Cut at a line so that ``end`` fits behind it."""
    room = MAX_BYTES - len(end.encode())
    if len(text.encode()) > room:
        text = text.encode()[: room - 200].decode(errors="ignore").rpartition("\n")[0]
        text += "\n\n(cut: `lora-dag compare` shows all of it)"
    return f"{text}\n\n{end}".strip() + "\n"
