"""What the README and the pages of docs/ contain: links, headings, code blocks, code spans, commands, settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.helpers.workspace import REPOSITORY

NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "base/README.md", "benchmarks/README.md")
PAGES = sorted([*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / name for name in NAMES)])
OPERATORS = {"&&", "||", ";", "|", "&"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    text: str
    line: int
    """Line of its first line in the file."""


@dataclass(frozen=True)
class Command:
    """One simple command of a shell block or a code span."""

    words: tuple[str, ...]
    place: str
    """``file:line`` for messages."""
    complete: bool = True
    """False for a code span, which may name a command without its arguments."""

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


class Page:
    """A Markdown file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(REPOSITORY).as_posix()
        self.text = path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(match[2], match[3], self.text[: match.start(3)].count("\n") + 1)
            for match in FENCE.finditer(self.text)
        ]

    @property
    def prose(self) -> str:
        """The text with code blocks and comments blanked; line numbers stay."""
        text = FENCE.sub(blank, self.text)
        return re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)

    @property
    def spans(self) -> Iterator[tuple[int, str]]:
        """Line and content of each code span."""
        for number, line in enumerate(self.prose.splitlines(), 1):
            for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
                yield number, span

    @property
    def links(self) -> Iterator[tuple[int, str]]:
        """Line and target of each link and image that is no web address."""
        for number, line in enumerate(self.prose.splitlines(), 1):
            line = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda match: "x" * len(match[0]), line)
            targets = re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", line) + re.findall(r'(?:src|href)="([^"]+)"', line)
            yield from ((number, target) for target in targets if not re.match(r"\w+:", target))

    @property
    def anchors(self) -> set[str]:
        """Anchors of headings as GitHub makes them."""
        found: dict[str, int] = {}
        anchors = set(re.findall(r'<a (?:id|name)="([^"]+)"', self.text))
        for heading in re.findall(r"^#+ +(.*?) *#*$", self.prose, re.MULTILINE):
            slug = anchor(heading)
            count = found.get(slug, 0)
            found[slug] = count + 1
            anchors.add(f"{slug}-{count}" if count else slug)
        return anchors

    @property
    def commands(self) -> Iterator[Command]:
        """Commands of the ``sh`` blocks, and of code spans that begin with one of ours or of the two DAG tools."""
        for block in self.blocks:
            if block.language == "sh":
                for offset, line in logical_lines(block.text):
                    yield from simple_commands(line, f"{self.name}:{block.line + offset}")
        for number, span in self.spans:
            if re.match(r"(lora-dag|dvc|snakemake|python|pytest) [\w-]", span):
                try:
                    yield from simple_commands(span, f"{self.name}:{number}", complete=False)
                except ValueError:
                    continue  # an unfinished quote is no command line


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line, joined where it ends in a backslash."""
    start, parts = 0, []
    for number, line in enumerate(text.splitlines()):
        start = start if parts else number
        if line.endswith("\\"):
            parts.append(line[:-1])
        else:
            yield start, " ".join([*parts, line])
            parts = []


def simple_commands(line: str, place: str, complete: bool = True) -> Iterator[Command]:
    """Yield the commands that ``&&``, ``;`` and ``|`` join in a line, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in OPERATORS:
            if words:
                yield Command(tuple(words), place, complete)
            words = []
        else:
            words.append(word)


def settings_of(command: Command) -> list[str]:
    """Return the ``section.key=value`` that a command passes by -S, --set or --set-param."""
    found = []
    for option, value in zip(command.words, command.words[1:], strict=False):
        if option in ("-S", "--set-param", "--set"):
            found.append(value)
    return found
