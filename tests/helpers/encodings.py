"""Runs of prepare and cache_latents with counted calls of the encoders, and masks for the images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_dag.core.console import Problem, UserError
from lora_dag.families import sd
from tests.helpers.workspace import Workspace, make_image

LATENTS = Path("data/latents")
MASKED = ("dataset.mask=masks", "dataset.unmasked_weight=0.2")


def words(changes: tuple[str, ...]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def encode(workspace: Workspace, *changes: str) -> tuple[str, str]:
    """Run prepare and cache_latents; return the lines with the numbers of images and of captions."""
    workspace.run("prepare", *words(changes))
    lines = workspace.run("cache_latents", *words(changes))
    return lines[-3], lines[-4]


class Calls:
    """Distinct images and captions that reached the encoders, without the padding of batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: set[bytes] = set()
        self.captions: set[str] = set()
        self.loaded: list[str] = []
        encode_images, encode_prompts = sd.encode_images, sd.encode_prompts

        def images(vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.images |= {value.numpy().tobytes() for value in pixel_values if value.any()}
            return encode_images(vae, pixel_values)

        def prompts(text: Any, captions: list[str]) -> dict[str, torch.Tensor]:
            self.captions |= set(captions) - {""}
            return encode_prompts(text, captions)

        monkeypatch.setattr(sd, "encode_images", images)
        monkeypatch.setattr(sd, "encode_prompts", prompts)
        for name in ("load_vae", "load_text"):
            monkeypatch.setattr(sd, name, self._counted(name, getattr(sd, name)))

    def _counted(self, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any) -> Any:
            self.loaded.append(name)
            return load(*args)

        return loaded

    def take(self) -> tuple[int, int]:
        """Return the numbers of images and captions since the last call."""
        found = len(self.images), len(self.captions)
        self.images.clear(), self.captions.clear(), self.loaded.clear()
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def cached(workspace: Workspace, calls: Calls) -> Workspace:
    assert encode(workspace) == ("images      encoded 8, reused 0", "captions    encoded 9, reused 0")
    assert calls.take() == (8, 8)  # and the empty caption
    return workspace


def from_empty_store(workspace: Workspace, *changes: str) -> dict[str, bytes]:
    """Run cache_latents with an empty store and return data/latents."""
    shutil.rmtree(".state")
    shutil.rmtree(LATENTS)
    workspace.run("cache_latents", *words(changes))
    return workspace.tree("data/latents")


def changed_shards(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    names = (before.keys() | after.keys()) - {"manifest.json"}
    return sorted(name for name in names if before.get(name) != after.get(name))


@pytest.fixture
def masked(workspace: Workspace) -> Workspace:
    """Write masks whose left part is white: two latent pixels and three quarters of the third."""
    folder = Path("data/raw/masks")
    folder.mkdir()
    for index in range(8):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 11, 32))
        mask.save(folder / f"{index:02}.png")
        make_image(index, 32).save(f"data/raw/{index:02}.png")
    return workspace


def refusal(workspace: Workspace, *changes: str) -> tuple[Problem, ...]:
    """Return the problems that cache_latents raises; it writes nothing."""
    with pytest.raises(UserError) as caught:
        workspace.run("cache_latents", *words(changes))
    assert not LATENTS.exists()
    return caught.value.problems
