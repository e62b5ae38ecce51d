"""Checks of what a person sees: a problem's code, its place and the values in it, never the words around them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import pytest
from pydantic import ValidationError

from lora_dag.core.console import UserError


class HasCode(Protocol):
    """A Problem, or a RowProblem of stage prepare."""

    @property
    def code(self) -> str: ...


@contextmanager
def refused(code: str, *values: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError whose only problem has this code, and a text with each of the values.

    Args:
        values: the place, such as ``params.yaml lora.rank``, what was found, and what the text suggests.
    """
    with pytest.raises(UserError) as raised:
        yield raised
    assert raised.value.codes == (code,), raised.value.problems
    assert_has(raised.value.problems[0], values)


def assert_problem(error: UserError, code: str, *values: str) -> None:
    """Assert that one of the error's problems has this code and, in its text, each of the values."""
    texts = [problem for problem in error.problems if problem.code == code]
    assert any(all(value in text for value in values) for text in texts), error.problems


def assert_is(problem: HasCode, code: str, *values: str) -> None:
    """Assert that one problem or warning has this code and, in its text, each of the values."""
    assert problem.code == code, (problem.code, str(problem))
    assert_has(str(problem), values)


def assert_are(problems: Sequence[HasCode], *expected: tuple[str, ...]) -> None:
    """Assert that there are these problems or warnings in this order, each given by its code and values."""
    assert [problem.code for problem in problems] == [code for code, *_ in expected], [*map(str, problems)]
    for problem, (code, *values) in zip(problems, expected, strict=True):
        assert_is(problem, code, *values)


@contextmanager
def invalid_setting(code: str, *values: str) -> Iterator[None]:
    """Expect a params class to refuse its values by ``setting_problem`` with this code.

    Args:
        values: parts of ``SETTING: TEXT``, such as ``keep_tags: 2``.
    """
    with pytest.raises(ValidationError) as raised:
        yield
    (error,) = raised.value.errors()
    context = error.get("ctx", {})
    assert context.get("code") == code, error
    setting = ".".join([*map(str, error["loc"]), *filter(None, [context["key"]])])
    assert_has(f"{setting}: {error['msg']}", values)


def assert_line(output: str, code: str, *values: str) -> None:
    """Assert that one line of a terminal's output has this code at its end and each of the values."""
    lines = [line for line in output.splitlines() if line.endswith(f"[{code}]")]
    assert any(all(value in line for value in values) for line in lines), output


def codes_of(output: str) -> list[str]:
    """Return the codes of the lines of an output that are errors or warnings, in order."""
    return re.findall(r"^(?:error|warning): .* \[([a-z0-9-]+)\]$", output, re.MULTILINE)


def assert_has(text: str, values: tuple[str, ...]) -> None:
    missing = [value for value in values if value not in text]
    assert not missing, f"{missing} not in {text!r}"
