"""Image file formats: which ones are read, and which one given bytes have. The content decides, never the name."""

from __future__ import annotations

import io
from pathlib import PurePosixPath

from PIL import Image

from lora_dag.core.console import Problem, UserError

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
}
FORMATS = tuple(SUFFIXES)
SIGNATURES = {  # first bytes of files that a person may take for an image, and of images too broken to be opened
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


def has_wrong_suffix(name: str, format: str) -> bool:
    """Return whether the suffix of a name belongs to another format."""
    suffix = PurePosixPath(name).suffix.lower()
    return any(suffix in suffixes for other, suffixes in SUFFIXES.items() if other != format)


def identify_format(blob: bytes) -> str:
    """Return the format of an image, a key of ``SUFFIXES``, from its header. The pixels are not decoded.

    Raises:
        UserError: no supported format. The text is a predicate: the caller puts the image's name before it.
    """
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            return "JPEG" if image.format == "MPO" else str(image.format)  # phones write a preview behind the image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's readers raise all of these
        raise UserError(unidentified_problem(blob)) from None


def unidentified_problem(blob: bytes) -> Problem:
    """Return the problem with bytes that are no supported image, as a predicate."""
    start = blob[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = "HEIC or AVIF" if blob[4:8] == b"ftyp" else ""
    for name, starts in SIGNATURES.items():
        kind = name if start.startswith(tuple(map(bytes.lower, starts))) else kind
    if kind in FORMATS:
        return Problem("image-damaged", f"is a damaged {kind}: its header cannot be read. Restore it or remove it.")
    guess = f", but seems to be {kind}" if kind else ""
    return Problem(
        "image-format-unsupported",
        f"is not a JPEG, PNG, WebP, GIF, TIFF or BMP image{guess}. Convert it or remove it.",
    )
