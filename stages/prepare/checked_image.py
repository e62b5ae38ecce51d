"""CheckedImage: the result of the inspection of one image, for warnings, the split and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.prepare.listing import Entry


@dataclass(frozen=True)
class CheckedImage:
    """One image that passed every check."""

    entry: Entry
    sha256: str
    """Digest of the file's bytes."""
    width: int
    """Pixels after EXIF rotation, as the height."""
    height: int
    target_width: int
    """Pixels after scaling, as the model sees the image."""
    target_height: int
    has_alpha: bool
    """Whether some pixel is not fully opaque."""
    thumbnail: str
    """``ImageFacts.thumbnail``"""
    mask_sha256: str | None = None
    """Digest of the mask file's bytes."""
    detail: str = ""
    """``ImageFacts.detail``"""
