"""Of the tests of validate."""

from __future__ import annotations

import pytest

from tests.helpers.workspace import Workspace


@pytest.fixture
def cached(workspace: Workspace) -> Workspace:
    """A workspace with data/latents."""
    workspace.run("prepare")
    workspace.run("cache_latents")
    return workspace
