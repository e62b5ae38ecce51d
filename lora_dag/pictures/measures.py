"""Two measures of pixels: how colourful a drawing is, and how much of it is near black."""

from __future__ import annotations

import numpy as np

NEAR_WHITE = 240
DARK = 64


def chroma(array: np.ndarray) -> float:
    """How colourful the drawing is: mean of (largest - smallest channel) over the foreground, 0 to 255.

    The foreground is every pixel with a channel below 240, that is, not near white; a blank picture gives 0.

    Args:
        array: uint8 [..., 3].
    """
    pixels = foreground(array)
    return float(np.ptp(pixels, axis=-1).mean()) if len(pixels) else 0.0


def dark_share(array: np.ndarray) -> float:
    """Share of the foreground (see ``chroma``) whose largest channel is below 64: near black. 0 to 1.

    Args:
        array: uint8 [..., 3].
    """
    pixels = foreground(array)
    return float((pixels.max(axis=-1) < DARK).mean()) if len(pixels) else 0.0


def foreground(array: np.ndarray) -> np.ndarray:
    pixels = np.asarray(array).reshape(-1, 3)
    return pixels[pixels.min(axis=-1) < NEAR_WHITE]
