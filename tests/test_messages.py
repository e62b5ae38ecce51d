"""Every error and warning has a code, and tests/messages.txt has their texts for a reader who reviews the language."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lora_dag.core.console import Problem, UserError
from tests import messages
from tests.helpers.workspace import REPOSITORY

SOURCES = sorted([*(REPOSITORY / "lora_dag").rglob("*.py"), *(REPOSITORY / "stages").rglob("*.py")])
RIDDLES = (
    r"\b(goes|go) without\b",
    r"\b(stands?|stood) (in|for|beside|there|on)\b",
    r"\bwants? (a|an|the|to|one)\b",
    r"\b(is|are|be) (told|asked)\b",
    r"\basks? (for|of)\b",
    r"\bwhat (it|they) (is|are|was|were|has|have|takes?|gives?)\b",
    r"\bbegun anew\b",
    r"\bpictures?\b",
)


def test_the_catalog_is_current() -> None:
    assert messages.FILE.read_text(encoding="utf-8") == messages.catalog(), (
        "the texts of errors or warnings have changed: read them, then run `python -m tests.messages --write`"
    )


def test_codes_are_words_with_hyphens() -> None:
    codes = {code for path in SOURCES for code, _ in messages.messages(path)}
    assert len(codes) > 100
    assert [code for code in codes if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+){0,4}", code)] == []


def test_a_text_without_a_code_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="Problem"):
        UserError("no code")  # type: ignore[arg-type]
    assert UserError(Problem("no-code", "a.txt: empty.")).codes == ("no-code",)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_warnings_have_a_code(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    raw = [
        ast.unparse(call)
        for call in calls
        if messages.maker(call) == "warning" and path.name != "console.py" and "warning: " in ast.unparse(call)
    ]
    assert raw == []


@pytest.mark.parametrize("riddle", RIDDLES)
def test_texts_have_no_riddles(riddle: str) -> None:
    lines = messages.catalog().splitlines()
    assert [line for line in lines if re.search(riddle, line, re.IGNORECASE)] == []
