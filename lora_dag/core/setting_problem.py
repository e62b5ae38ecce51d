"""Errors that a params class raises in its validators, with the code of a ``Problem``."""

from __future__ import annotations

from pydantic_core import PydanticCustomError


def setting_problem(code: str, text: str, key: str = "") -> PydanticCustomError:
    """Return the error to raise in a validator; ``param_errors.explain`` puts file and setting before its text.

    Args:
        code: identity of the problem, such as ``needs-snr``.
        text: what was found, what is expected and what to do.
        key: setting in the section. A validator of the whole section must name it; others have it by pydantic.
    """
    return PydanticCustomError("problem", "{text}", {"code": code, "text": text, "key": key})
