"""Bar of a training on a terminal."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from stages.train.progress import BAR, bar_text


@pytest.mark.parametrize(("done", "total", "speed"), [(12, 800, 7.43), (1200, 8000, 128.4)])
def test_the_bar_has_all_numbers_at_80_columns(done: int, total: int, speed: float) -> None:
    text = bar_text(0.69412, 2e-4, 0.0312, speed, "2.5 min")
    line = tqdm.format_meter(done, total, 1.0, ncols=80, bar_format=BAR, prefix=text)
    assert len(line) <= 80 and line.startswith(f"step {done}/{total} ")
    assert line.endswith(f"loss 0.6941 lr 2.0e-04 grad_norm 0.03 {7.4 if speed < 10 else 128} images/s ETA 2.5 min")
