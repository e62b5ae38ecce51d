"""Two color measures of a drawing: mean chroma, and the share of near-black pixels."""

from __future__ import annotations

import numpy as np

NEAR_WHITE = 240
DARK = 64


def chroma(array: np.ndarray) -> float:
    """Return the mean of (largest - smallest channel) over the foreground, 0 to 255.

    The foreground is every pixel with a channel below 240, that is, not near white. A blank image gives 0.

    Args:
        array: uint8 [..., 3].
    """
    pixels = foreground(array)
    return float(np.ptp(pixels, axis=-1).mean()) if len(pixels) else 0.0


def dark_share(array: np.ndarray) -> float:
    """Return the share of the foreground (see ``chroma``) whose largest channel is below 64, 0 to 1.

    Args:
        array: uint8 [..., 3].
    """
    pixels = foreground(array)
    return float((pixels.max(axis=-1) < DARK).mean()) if len(pixels) else 0.0


def foreground(array: np.ndarray) -> np.ndarray:
    """Return uint8 [N, 3]: the pixels that are not near white."""
    pixels = np.asarray(array).reshape(-1, 3)
    return pixels[pixels.min(axis=-1) < NEAR_WHITE]
