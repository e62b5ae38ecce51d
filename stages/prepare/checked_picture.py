"""What the inspection hands on of each picture: to warnings, the split and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.prepare.listing import Entry


@dataclass(frozen=True)
class CheckedPicture:
    """One picture that passed every check."""

    entry: Entry
    sha256: str
    """Of its bytes."""
    width: int
    """After EXIF rotation, as is the height."""
    height: int
    target_width: int
    """What the model sees."""
    target_height: int
    has_alpha: bool
    """Some pixel lets the background through."""
    thumbnail: str
    """``Checked.thumbnail``"""
    mask_sha256: str | None = None
    """Of the bytes of its mask's file."""
    detail: str = ""
    """``Checked.detail``"""
