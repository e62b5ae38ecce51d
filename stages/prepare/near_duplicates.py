"""Near-duplicates: re-encoded, resized, brightened and slightly cropped copies, found by thumbnails of 17 x 16 pixels.

Two images are near-duplicates if
1. their difference hashes (``gradient_bits``) differ in at most ``dataset.near_duplicate_bits`` of 256 bits, and
2. their colors differ by at most 0.15 standard deviations (root mean square, brightness and contrast normalized),
   because flat icons with the same outline and other colors have the same hash.

Measured on 96 photographs and parts of them (Debian's mate-backgrounds, scikit-image's and scikit-learn's data): share
of the copies found with 16 bits, and with 6

    JPEG of quality 75       99 %  84 %        10 % brighter            96 %  70 %
    half the size           100 %  99 %        cropped by 1 %           95 %  44 %   (half of it on each side)
    a quarter, quality 80    97 %  71 %        cropped by 2 %           78 %  12 %
    5 % brighter             98 %  69 %        10 % more contrast       98 %  75 %

and none of the different photographs, none of the demo's 300 icons in ink or in color, and one pair of 603 application
icons (Papirus: two terminals). By the hash alone it would be 23 pairs of the color icons, such as hearts in different
colors. Mirrored, six of the ink hearts are three pairs: their hatching is the other's mirror image.

3. if their thumbnails are nearly flat (at most 24 bits of the hash are set), their details of 256 x 256 pixels differ
   by at most 0.2 standard deviations as well.

Measured on 40 words of 4 or 5 letters, black on white in the middle: of the 780 pairs 380 pass 1 and 2 at 512 pixels
with letters of 28, and 780 at 1024. Their details differ by at least 0.5 and 0.3; those of copies (JPEG of quality 75,
half the size, brighter, cropped by 1 %) by at most 0.16. Words whose letters are smaller than a hundredth of the
image are still counted as copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lora_dag.images.perceptual_hash import SPARSE_BITS, detail_pixels, gradient_bits, thumbnail_pixels

MAX_DISTANCE = 0.15  # copies as above stay below 0.14 (cropped ones 0.24), different icons begin at 0.17
MIN_DEVIATION = 4.0  # of 255: the rounding of flatter thumbnails would count as contrast
MAX_DETAIL_DISTANCE = 0.2
DETAIL_BLOCK = 256  # sparse images compared at a time: 50 MB on either side
BLOCK = 1024  # rows compared at a time with all others: 40 MB each for 10,000 images


def group_labels(
    thumbnails: Sequence[str], max_bits: int, mirrored: bool, details: Sequence[str] | None = None
) -> list[int]:
    """Return the number of its group for each image. Images connected by a chain of near-duplicates share a group.

    Args:
        thumbnails: ``ImageFacts.thumbnail`` of each image.
        details: ``ImageFacts.detail`` of each image, or None if no image has one.
        mirrored: compare each image also with the mirror images of the others.
    """
    labels = np.arange(len(thumbnails))
    for row, matches in _matches(thumbnails, details or [""] * len(thumbnails), max_bits, mirrored):
        first, *others = np.unique(labels[[row, *matches]])
        for other in others:
            labels[labels == other] = first
    return labels.tolist()


def _matches(
    thumbnails: Sequence[str], details: Sequence[str], max_bits: int, mirrored: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (an image, its near-duplicates, which may include itself)."""
    if not thumbnails:
        return
    pixels = np.stack([thumbnail_pixels(thumbnail) for thumbnail in thumbnails])  # [N, 16, 17, 3]
    signs, colors = _signs(pixels), _colors(pixels)
    sparse = (signs > 0).sum(axis=1) <= SPARSE_BITS
    views = [(pixels, False), (pixels[:, :, ::-1], True)] if mirrored else [(pixels, False)]
    for view, is_mirror in views:
        other_signs, other_colors = _signs(view), _colors(view)
        for start in range(0, len(pixels), BLOCK):
            near = signs[start : start + BLOCK] @ other_signs.T >= 256 - 2 * max_bits  # [R, N]
            np.fill_diagonal(near[:, start:], False)  # neither itself nor its own mirror image
            rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
            alike = _distances(colors[start + rows], other_colors[columns]) <= MAX_DISTANCE
            alike &= near[np.ix_(rows, columns)]
            _compare_details(alike, details, start + rows, columns, sparse, is_mirror)
            for row in np.flatnonzero(alike.any(axis=1)):
                yield start + int(rows[row]), columns[alike[row]]


def _compare_details(
    alike: np.ndarray, details: Sequence[str], rows: np.ndarray, columns: np.ndarray, sparse: np.ndarray, mirror: bool
) -> None:
    """Clear in ``alike`` [R, C] the pairs with a sparse image whose details differ, if both images have details."""
    has = np.array([bool(detail) for detail in details])
    is_compared = alike & has[rows][:, None] & has[columns] & (sparse[rows][:, None] | sparse[columns])
    compared_rows, compared_columns = np.flatnonzero(is_compared.any(axis=1)), np.flatnonzero(is_compared.any(axis=0))
    for i in range(0, len(compared_rows), DETAIL_BLOCK):
        block = compared_rows[i : i + DETAIL_BLOCK]
        ours = _details([details[row] for row in rows[block]], False)
        for j in range(0, len(compared_columns), DETAIL_BLOCK):
            others = compared_columns[j : j + DETAIL_BLOCK]
            pairs = np.ix_(block, others)
            if is_compared[pairs].any():
                theirs = _details([details[column] for column in columns[others]], mirror)
                nonzero = np.flatnonzero(ours.any(axis=0) | theirs.any(axis=0))  # a small part of all pixels
                a, b = (stack[:, nonzero].astype(np.float32) for stack in (ours, theirs))
                alike[pairs] &= ~is_compared[pairs] | (_distances(a, b, 0.0, ours.shape[1]) <= MAX_DETAIL_DISTANCE)


def _details(details: Sequence[str], mirror: bool) -> np.ndarray:
    """Return int8 [N, 196608] from -8 to 8. In float32, sums of their products are exact."""
    pixels = [detail_pixels(detail)[:, ::-1] if mirror else detail_pixels(detail) for detail in details]
    return np.stack(pixels).reshape(len(details), -1)


def _signs(pixels: np.ndarray) -> np.ndarray:
    """Return difference hashes as float32 [N, 256] of -1 and 1. A product of two is 256 - 2 x (bits that differ)."""
    return gradient_bits(pixels).astype(np.float32) * 2 - 1


def _colors(pixels: np.ndarray) -> np.ndarray:
    """Return float64 [N, 816] of integers, whose sums and products are exact in any order, on any processor."""
    return pixels.reshape(len(pixels), -1).astype(np.float64)


def _distances(a: np.ndarray, b: np.ndarray, least: float = MIN_DEVIATION, num_values: int | None = None) -> np.ndarray:
    """Return the root mean square difference of colors minus their mean, in standard deviations: [R, C].

    With n values in a row, n squared times (co)variances are integers below 2^53. The few operations after them are
    rounded equally everywhere, so the side of a threshold depends neither on other images nor on the machine.

    Args:
        a, b: ``_colors`` or ``_details`` of R and of C images.
        least: smallest standard deviation. If it is 0, a row of equal values has 1.
        num_values: number of values of an image. Values missing in a and b are 0.
    """
    count = num_values or a.shape[1]
    (sums_a, variances_a), (sums_b, variances_b) = _moments(a, count), _moments(b, count)
    floor = (count * least) ** 2
    scale_a, scale_b = (np.sqrt(np.where(v > 0, np.maximum(v, floor), floor or 1)) for v in (variances_a, variances_b))
    covariances = count * (a @ b.T).astype(np.float64) - np.outer(sums_a, sums_b)  # [R, C]
    own = (variances_a / scale_a**2)[:, None] + (variances_b / scale_b**2)[None]  # 2, or less for flat images
    return np.sqrt(np.maximum(own - 2 * covariances / np.outer(scale_a, scale_b), 0))


def _moments(colors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums [N], and the variances times n squared [N], of n values per row."""
    sums, squares = (values.sum(axis=1, dtype=np.float64) for values in (colors, colors**2))
    return sums, count * squares - sums**2
