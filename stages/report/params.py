"""Section ``report``."""

from __future__ import annotations

from pydantic import Field

from stages.core.params import Params


class ReportParams(Params):
    """Section ``report``."""

    title: str = Field(min_length=1)
    """First heading of the page."""
