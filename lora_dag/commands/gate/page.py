"""Page of the gate for a pull request: the verdict, the checks, the comparison, and the sample sheets by commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lora_dag.commands.gate.comparison import Comparison
from lora_dag.commands.gate.limits import GateResult
from lora_dag.commands.gate.recomputed_metrics import CHECKED
from lora_dag.commands.gate.rule_changes import RuleChange
from lora_dag.pages.markdown import bullets, code, table
from lora_dag.pipeline.git import git

MAX_FILES = 8  # named of a change
ONE_RUN = (
    "Parameters, code, dvc.lock and reports/ have the digests of one run. The run can have older code: "
    "`lora-dag relock` accepts edits that keep the number RESULTS."
)
NOT_CHECKED = (
    "Nothing was run again. Images, weights and tables are the files of the branch.",
    "A table that was invented, together with its digest in dvc.lock, can only be found by a rerun: "
    "`dvc repro --force --no-run-cache`, or the label `rerun` in CI.",
)
SHEETS = {"Samples": "reports/samples.png", "Progress": "reports/progress.png"}
MAX_BYTES = 60_000  # GitHub takes 65,536 characters in a comment, Linux 131,072 bytes in a variable


@dataclass(frozen=True)
class PageContext:
    """Commits that the page is about, and the repository in which people read it."""

    repository: str | None
    """Address, such as https://github.com/owner/name; None: images are linked by their path."""
    commit: str | None
    """Reviewed commit; None outside of a repository."""
    against: str | None
    """Name of the revision to compare with."""
    against_commit: str | None
    own_gate: bool = True
    """Whether the code of the gate is the code of the reviewed files."""
    uncommitted: bool = False
    """Whether the reviewed files differ from the commit."""


def write_page(
    context: PageContext,
    problems: Sequence[str],
    results: Sequence[GateResult],
    comparison: Comparison | None,
    changes: Sequence[RuleChange],
    unshared: Sequence[str] = (),
) -> str:
    """Return Markdown of at most MAX_BYTES.

    Args:
        problems: all problems except failed gates.
        unshared: warnings about data that is on no remote.
    """
    parts = [title(context, problems, results, changes), subject(context), *changed_rules(context, changes)]
    if problems:
        doubt = "The numbers below come from files that may not belong to one run."
        parts += ["## Problems", bullets(in_line(line) for line in problems), doubt]
    parts += ["## Gates", gates_table(results), *(f"**Data not shared:** {in_line(line)}" for line in unshared)]
    if not problems:
        parts += ["## Checked", bullets([ONE_RUN, *CHECKED])]
    parts += ["## Not checked", bullets(NOT_CHECKED)]
    parts += [re.sub("^#", "##", comparison.page, flags=re.MULTILINE)] if comparison else []
    return shortened("\n\n".join(part.strip() for part in parts if part), sheets(context))


def title(
    context: PageContext, problems: Sequence[str], results: Sequence[GateResult], changes: Sequence[RuleChange]
) -> str:
    """Return the verdict, and the rules that the branch changes."""
    neutral = any(result.neutral for result in results)
    if problems or not all(result.passed for result in results):
        word = "failed"
    else:
        word = f"neutral, not comparable with {context.against}" if neutral else "passed"
    rules = ", ".join(change.rule for change in changes)
    return f"# Experiment: {word}{f' (this branch changes {rules})' if rules else ''}"


def write_unread(context: PageContext, problems: Sequence[str]) -> str:
    """Return the page of a commit whose files could not be read."""
    return "\n\n".join(["# Experiment: failed", subject(context), bullets(in_line(line) for line in problems)]) + "\n"


def changed_rules(context: PageContext, changes: Sequence[RuleChange]) -> list[str]:
    """Return the section on changed rules, which a person has to review."""
    if not changes:
        return []
    lines = [f"**{change.rule}**: {in_line(listed(change.details))}" for change in changes]
    own = "this branch" if context.own_gate else "the target branch"
    note = f"A person has to review these changes. The gate that ran has the code of {own}."
    return ["## This branch changes the rules of the gate", bullets(lines), note]


def listed(details: Sequence[str]) -> str:
    more = len(details) - MAX_FILES
    return ", ".join(details[:MAX_FILES]) + (f" and {more} more" if more > 0 else "")


def subject(context: PageContext) -> str:
    """Return the commits that the page is about, so that nobody takes an old page for a new one."""
    words = [f"Commit `{context.commit[:10]}`"] if context.commit else []
    if context.against and context.against_commit:
        words.append(f"against `{context.against}` (`{context.against_commit[:10]}`)")
    if not words:
        return ""
    note = (
        " **With uncommitted changes:** a pull request contains commits only, so commit them."
        if context.uncommitted
        else ""
    )
    return " ".join(words) + "." + note


def in_line(text: str) -> str:
    """Return text of a file or a parameter as code, so that it is never read as markup."""
    return code(text, max_length=400)


def gates_table(results: Sequence[GateResult]) -> str:
    if not results:
        return "None is set: see `report.gates` in params.yaml."
    rows = [(a.gate, a.limit_text, a.measured, a.word) for a in results]
    rows_table = table(("Gate", "limit", "measured", "result"), rows, align=":---")
    if any("[" in a.measured or " bound of " in a.measured for a in results):
        return f"{rows_table}\n\nA gate with an interval fails only if the whole interval is worse than the limit."
    return rows_table


def sheets(context: PageContext) -> str:
    """Return each sample sheet, beside the sheet of the other revision if the two differ."""
    parts = []
    for title, path in SHEETS.items():
        if not Path(path).is_file():
            continue
        own, other = link(context, path), pinned(context.repository, context.against_commit, path)
        same = bool(context.against_commit) and read(context.against_commit, path) == Path(path).read_bytes()
        if other and not same:
            parts += [f"## {title}", table((f"{context.against}", "this branch"), [(f"![]({other})", f"![]({own})")])]
        else:
            parts += [f"## {title}{' (unchanged)' if same else ''}", f"![{title}]({own})"]
    return "\n\n".join(parts)


def link(context: PageContext, path: str) -> str:
    """Return a link by a commit that has the same bytes, so that the page shows the image that was checked."""
    for commit in (context.commit, context.against_commit):
        if commit and read(commit, path) == Path(path).read_bytes():
            return pinned(context.repository, commit, path) or quote(path)
    return quote(path)


def pinned(repository: str | None, commit: str | None, path: str) -> str | None:
    """Return a link that GitHub shows in rendered Markdown to everybody who may read the repository."""
    if not (repository and commit and read(commit, path)):
        return None
    below = (git("rev-parse", "--show-prefix") or b"").decode().rstrip("\n")  # the repository's top
    return f"{repository}/blob/{commit}/{quote(below + path)}?raw=true"


def read(commit: str | None, path: str) -> bytes | None:
    return git("show", f"{commit}:./{path}")


def shortened(text: str, end: str) -> str:
    """Cut the text at a line so that ``end`` fits behind it."""
    room = MAX_BYTES - len(end.encode())
    if len(text.encode()) > room:
        text = text.encode()[: room - 200].decode(errors="ignore").rpartition("\n")[0]
        text += "\n\n(cut: `lora-dag compare` prints the whole page)"
    return f"{text}\n\n{end}".strip() + "\n"
