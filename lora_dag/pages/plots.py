"""Style of plots: ink, grid and font."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#24292f", "#d8dee4"
LOOK: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.edgecolor": GRID}
"""For ``matplotlib.rc_context``."""


def style(axes: Axes, label: str) -> None:
    """Add a grid and the label of the y axis, and remove the upper and right frame."""
    axes.set_ylabel(label, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GRID, labelcolor=INK)
