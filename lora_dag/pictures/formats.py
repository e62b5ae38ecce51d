"""Which bytes are an image that is read, and of which format: by content, never by name."""

from __future__ import annotations

import io
from pathlib import PurePosixPath

from PIL import Image

from lora_dag.core.console import UserError

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
}
FORMATS = tuple(SUFFIXES)
SIGNATURES = {  # how files start that a person may take for a picture, and pictures too broken to be opened
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF8",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
    "HTML": (b"<!doctype html", b"<html"),
    "SVG": (b"<svg", b"<?xml"),
    "PDF": (b"%PDF",),
    "Photoshop": (b"8BPS",),
    "Git LFS pointer": (b"version https://git-lfs",),
}


def misnamed(name: str, format: str) -> bool:
    """Whether the name's suffix belongs to another format."""
    suffix = PurePosixPath(name).suffix.lower()
    return any(suffix in suffixes for other, suffixes in SUFFIXES.items() if other != format)


def format_of(blob: bytes) -> str:
    """Key of ``SUFFIXES``, by the start of the bytes; the rest is not decoded.

    Raises:
        UserError: a predicate, for the caller to put the name before.
    """
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            return "JPEG" if image.format == "MPO" else str(image.format)  # phones write a preview behind the picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's readers raise all of these
        raise UserError(unidentified(blob)) from None


def unidentified(blob: bytes) -> str:
    """A predicate of bytes that no reader takes for an image."""
    start = blob[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = "HEIC or AVIF" if blob[4:8] == b"ftyp" else ""
    for name, starts in SIGNATURES.items():
        kind = name if start.startswith(tuple(map(bytes.lower, starts))) else kind
    if kind in FORMATS:
        return f"is a damaged {kind}: its header cannot be read; restore it or remove it"
    seems = f" but seems to be {kind}" if kind else ""
    return f"is no JPEG, PNG, WebP, GIF, TIFF or BMP picture{seems}; convert it or remove it"
