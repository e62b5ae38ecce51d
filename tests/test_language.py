"""Docstrings and comments follow the rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.workspace import REPOSITORY

FOLDERS = ("lora_dag", "stages", "base", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
FRAGMENT = re.compile(r"(Of|As|By|What|Where|Which|Whose|The same|Likewise|Here|There)\b")
RIDDLES = re.compile(
    r"\b("
    r"go(es)? without|stand(s|ing)? (in|for|beside|there|where)|stood|wants?|"
    r"(is|are|be|being) (told|asked)|asks?|tells?|answer(s|ed)?|"
    r"what (it|they) (is|are|was|were|has|have)|pictures?|begun anew|to the bit|"
    r"colour|grey|behaviour|licence|neighbour|[a-z]+isation"
    r")\b",
    re.IGNORECASE,
)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring, those of fields included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield statement.lineno, value.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def faults(path: Path) -> Iterator[str]:
    """Yield place and fault of each docstring or comment that breaks a rule."""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY)
    for line, text in docstrings(ast.parse(source)):
        if FRAGMENT.match(text):
            yield f"{name}:{line}: begins with '{text.split()[0]}': {text.splitlines()[0]}"
    for line, text in [*docstrings(ast.parse(source)), *comments(source)]:
        if riddle := RIDDLES.search(text):
            yield f"{name}:{line}: '{riddle[0]}' in: {' '.join(text.split())[:100]}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_comments_are_plain(folder: str) -> None:
    lines = [line for path in SOURCES if path.is_relative_to(REPOSITORY / folder) for line in faults(path)]
    assert lines == [], "\n".join(lines)
