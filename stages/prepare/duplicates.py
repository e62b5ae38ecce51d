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

3. Of drawings whose thumbnail is nearly flat (at most 24 bits of the hash are set), the details of 256 x 256 pixels
   differ by at most 0.2 standard deviations as well.

Measured on 40 words of 4 or 5 letters, black on white in the middle: of the 780 pairs 380 pass 1 and 2 at 512 pixels
with letters of 28, and 780 at 1024. Their details differ by at least 0.5 and 0.3; those of copies (JPEG of quality 75,
half the size, brighter, cropped by 1 %) by at most 0.16. Words whose letters are smaller than a hundredth of the
picture are still taken for copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lora_dag.pictures.likeness import SPARSE_BITS, detail_pixels, gradient_bits, thumbnail_pixels

MAX_DISTANCE = 0.15  # copies as above stay below 0.14 (cropped ones 0.24), different icons begin at 0.17
MIN_DEVIATION = 4.0  # of 255: the rounding of flatter thumbnails would count as contrast
MAX_DETAIL_DISTANCE = 0.2
DETAIL_BLOCK = 256  # sparse pictures compared at a time: 50 MB on either side
BLOCK = 1024  # rows compared at a time with all others: 40 MB each for 10,000 pictures


def components(
    thumbnails: Sequence[str], max_bits: int, mirrored: bool, details: Sequence[str] | None = None
) -> list[int]:
    """A number per picture, the same for all that near-duplicates connect, however many steps away.

    Args:
        thumbnails: ``Checked.thumbnail`` of each.
        details: ``Checked.detail`` of each; None where no picture has one.
        mirrored: a picture is also compared with the mirror images of the others.
    """
    labels = np.arange(len(thumbnails))
    for row, found in _matches(thumbnails, details or [""] * len(thumbnails), max_bits, mirrored):
        first, *others = np.unique(labels[[row, *found]])
        for other in others:
            labels[labels == other] = first
    return labels.tolist()


def _matches(
    thumbnails: Sequence[str], details: Sequence[str], max_bits: int, mirrored: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """(a picture, its near-duplicates, which may include itself)"""
    if not thumbnails:
        return
    pixels = np.stack([thumbnail_pixels(thumbnail) for thumbnail in thumbnails])  # [N, 16, 17, 3]
    signs, colours = _signs(pixels), _colours(pixels)
    sparse = (signs > 0).sum(axis=1) <= SPARSE_BITS
    views = [(pixels, False), (pixels[:, :, ::-1], True)] if mirrored else [(pixels, False)]
    for view, is_mirror in views:
        other_signs, other_colours = _signs(view), _colours(view)
        for start in range(0, len(pixels), BLOCK):
            near = signs[start : start + BLOCK] @ other_signs.T >= 256 - 2 * max_bits  # [R, N]
            np.fill_diagonal(near[:, start:], False)  # itself; and a picture is no copy of its own mirror image
            rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
            alike = _distances(colours[start + rows], other_colours[columns]) <= MAX_DISTANCE
            alike &= near[np.ix_(rows, columns)]
            _compare_details(alike, details, start + rows, columns, sparse, is_mirror)
            for row in np.flatnonzero(alike.any(axis=1)):
                yield start + int(rows[row]), columns[alike[row]]


def _compare_details(
    alike: np.ndarray, details: Sequence[str], rows: np.ndarray, columns: np.ndarray, sparse: np.ndarray, mirror: bool
) -> None:
    """Take out of ``alike`` [R, C] the pairs with a sparse picture whose details differ, as far as both have one."""
    has = np.array([bool(detail) for detail in details])
    asked = alike & has[rows][:, None] & has[columns] & (sparse[rows][:, None] | sparse[columns])
    rows_asked, columns_asked = np.flatnonzero(asked.any(axis=1)), np.flatnonzero(asked.any(axis=0))
    for i in range(0, len(rows_asked), DETAIL_BLOCK):
        block = rows_asked[i : i + DETAIL_BLOCK]
        ours = _details([details[row] for row in rows[block]], False)
        for j in range(0, len(columns_asked), DETAIL_BLOCK):
            others = columns_asked[j : j + DETAIL_BLOCK]
            pairs = np.ix_(block, others)
            if asked[pairs].any():
                theirs = _details([details[column] for column in columns[others]], mirror)
                drawn = np.flatnonzero(ours.any(axis=0) | theirs.any(axis=0))  # few of all pixels; the others are 0
                a, b = (stack[:, drawn].astype(np.float32) for stack in (ours, theirs))
                alike[pairs] &= ~asked[pairs] | (_distances(a, b, 0.0, ours.shape[1]) <= MAX_DETAIL_DISTANCE)


def _details(details: Sequence[str], mirror: bool) -> np.ndarray:
    """int8 [N, 196608] from -8 to 8: in float32, sums of their products are exact."""
    pixels = [detail_pixels(detail)[:, ::-1] if mirror else detail_pixels(detail) for detail in details]
    return np.stack(pixels).reshape(len(details), -1)


def _signs(pixels: np.ndarray) -> np.ndarray:
    """Difference hashes as float32 [N, 256] of -1 and 1: a product of two is 256 less twice the bits that differ."""
    return gradient_bits(pixels).astype(np.float32) * 2 - 1


def _colours(pixels: np.ndarray) -> np.ndarray:
    """float64 [N, 816]: integers, whose sums and products are exact in any order, on any processor."""
    return pixels.reshape(len(pixels), -1).astype(np.float64)


def _distances(a: np.ndarray, b: np.ndarray, least: float = MIN_DEVIATION, num_values: int | None = None) -> np.ndarray:
    """Root mean square difference of colours less their mean, in standard deviations: [R, C].

    With n values in a row, n squared times (co)variances are integers below 2^53; the few operations after them are
    rounded alike everywhere, so that no other picture and no machine decides on which side of a threshold a pair is.

    Args:
        a, b: ``_colours`` or ``_details`` of R and of C pictures.
        least: smallest standard deviation; a row of one value has 1.
        num_values: of a picture; those that a and b lack are 0.
    """
    count = num_values or a.shape[1]
    (sums_a, variances_a), (sums_b, variances_b) = _moments(a, count), _moments(b, count)
    floor = (count * least) ** 2
    scale_a, scale_b = (np.sqrt(np.where(v > 0, np.maximum(v, floor), floor or 1)) for v in (variances_a, variances_b))
    covariances = count * (a @ b.T).astype(np.float64) - np.outer(sums_a, sums_b)  # [R, C]
    own = (variances_a / scale_a**2)[:, None] + (variances_b / scale_b**2)[None]  # 2, if less than that is flat
    return np.sqrt(np.maximum(own - 2 * covariances / np.outer(scale_a, scale_b), 0))


def _moments(colours: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums [N], and variances times n squared [N], of n values each."""
    sums, squares = (values.sum(axis=1, dtype=np.float64) for values in (colours, colours**2))
    return sums, count * squares - sums**2
