"""Near-duplicates: re-encoded, resized, brightened and slightly cropped copies, told by thumbnails of 17 x 16 pixels.

Two pictures are near-duplicates if
1. their difference hashes (``gradient_bits``) differ in at most ``dataset.near_duplicate_bits`` of 256 bits, and
2. their colours differ by at most 0.15 standard deviations (root mean square, brightness and contrast evened out),
   because flat icons with one outline and other colours have one hash.

Measured on 96 photographs and parts of them (Debian's mate-backgrounds, scikit-image's and scikit-learn's data): share
of the copies found with 16 bits, and with 6

    JPEG of quality 75       99 %  84 %        10 % brighter            96 %  70 %
    half the size           100 %  99 %        cropped by 1 %           95 %  44 %   (half of it on each side)
    a quarter, quality 80    97 %  71 %        cropped by 2 %           78 %  12 %
    5 % brighter             98 %  69 %        10 % more contrast       98 %  75 %

and none of the different photographs, none of the demo's 300 icons in ink or in colour, and one pair of 603 application
icons (Papirus: two terminals). By the hash alone it would be 23 pairs of the colour icons, such as hearts in different
colours. Mirrored, six of the ink hearts are three pairs: their hatching is the other's mirror image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stages.core.pictures import gradient_bits, thumbnail_pixels

MAX_DISTANCE = 0.15  # copies as above stay below 0.14 (cropped ones 0.24), different icons begin at 0.17
MIN_DEVIATION = 4.0  # of 255: the rounding of flatter thumbnails would count as contrast
BLOCK = 1024  # rows compared at a time with all others: 40 MB each for 10,000 pictures


def components(thumbnails: Sequence[str], max_bits: int, mirrored: bool) -> list[int]:
    """A number per picture, the same for all that near-duplicates connect, however many steps away.

    Args:
        thumbnails: ``Checked.thumbnail`` of each.
        mirrored: a picture is also compared with the mirror images of the others.
    """
    labels = np.arange(len(thumbnails))
    for row, found in _matches(thumbnails, max_bits, mirrored):
        first, *others = np.unique(labels[[row, *found]])
        for other in others:
            labels[labels == other] = first
    return labels.tolist()


def _matches(thumbnails: Sequence[str], max_bits: int, mirrored: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(a picture, its near-duplicates, which may include itself)"""
    if not thumbnails:
        return
    pixels = np.stack([thumbnail_pixels(thumbnail) for thumbnail in thumbnails])  # [N, 16, 17, 3]
    signs, colours = _signs(pixels), _even(pixels)
    views = [pixels, pixels[:, :, ::-1]] if mirrored else [pixels]
    for other_signs, other_colours in [(_signs(view), _even(view)) for view in views]:
        for start in range(0, len(pixels), BLOCK):
            near = signs[start : start + BLOCK] @ other_signs.T >= 256 - 2 * max_bits  # [R, N]
            np.fill_diagonal(near[:, start:], False)  # itself; and a picture is no copy of its own mirror image
            rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
            alike = _distances(colours[start + rows], other_colours[columns]) <= MAX_DISTANCE
            alike &= near[np.ix_(rows, columns)]
            for row in np.flatnonzero(alike.any(axis=1)):
                yield start + int(rows[row]), columns[alike[row]]


def _signs(pixels: np.ndarray) -> np.ndarray:
    """Difference hashes as float32 [N, 256] of -1 and 1: a product of two is 256 less twice the bits that differ."""
    return gradient_bits(pixels).astype(np.float32) * 2 - 1


def _even(pixels: np.ndarray) -> np.ndarray:
    """Colours less their mean, in standard deviations: float32 [N, 816]."""
    colours = pixels.reshape(len(pixels), -1).astype(np.float32)
    colours = colours - colours.mean(axis=1, keepdims=True)
    return colours / np.maximum(colours.std(axis=1, keepdims=True), MIN_DEVIATION)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square difference of every row of ``a`` [R, 816] and of ``b`` [C, 816]: [R, C]."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * (a @ b.T)
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])
