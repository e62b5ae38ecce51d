from __future__ import annotations

import math
import random

import pytest

from lora_dag.artifacts.manifest import Augmentation, Item
from lora_dag.core.console import Problem, UserError
from stages.prepare.geometry import buckets, fit
from stages.prepare.params import DatasetParams
from tests.helpers.errors import assert_is
from tests.helpers.images import dataset

SD15 = {"resolution": 512, "bucket_step": 64, "aspect_buckets": True}


def refusal(width: int, height: int, params: DatasetParams) -> Problem:
    with pytest.raises(UserError) as caught:
        fit(width, height, params)
    (problem,) = caught.value.problems
    return problem


def test_without_buckets_there_is_one_square() -> None:
    params = dataset(resolution=96, aspect_buckets=False)
    assert buckets(params) == ((96, 96),)
    assert {fit(width, height, params) for width, height in ((96, 96), (960, 97), (96, 5000))} == {(96, 96)}


@pytest.mark.parametrize(
    ("resolution", "step", "widest"), [(512, 64, 2.0), (64, 8, 2.0), (64, 8, 4.0), (1024, 64, 2.5), (96, 32, 1.0)]
)
def test_bounds_of_buckets(resolution: int, step: int, widest: float) -> None:
    params = dataset(resolution=resolution, bucket_step=step, max_aspect_ratio=widest, aspect_buckets=True)
    found = buckets(params)
    assert len(set(found)) == len(found) and (resolution, resolution) in found
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= widest
        assert (height, width) in found
        # No larger one would fit: the shorter side could not grow, nor the longer one.
        assert (
            (min(width, height) + step) * max(width, height) > resolution**2
            or width == height
            or ((max(width, height) + step) * min(width, height) > resolution**2)
        )


def test_the_usual_buckets() -> None:
    assert buckets(dataset(**SD15)) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


def test_the_bucket_is_the_nearest_one() -> None:
    params = dataset(**SD15, max_upscale=100.0)
    draw = random.Random(0)
    for _ in range(300):
        width, height = draw.randint(200, 900), draw.randint(200, 900)
        if max(width, height) > 2 * min(width, height):
            continue
        chosen = fit(width, height, params)

        def distance(size: tuple[int, int], shape: float = width / height) -> float:
            return abs(math.log(size[0] / size[1] / shape))

        assert distance(chosen) <= min(map(distance, buckets(params))) + 1e-9
    assert fit(1000, 1000, params) == (512, 512)
    assert fit(1000, 500, params)[0] > fit(1000, 500, params)[1]


def test_of_equally_near_buckets_the_larger_is_taken() -> None:
    params = dataset(resolution=64, bucket_step=8, aspect_buckets=True, max_aspect_ratio=4.0)
    for side in range(100, 1000, 100):
        assert fit(side, side, params) == (64, 64)


def test_small_images_are_refused() -> None:
    small = dataset(resolution=64)
    assert_is(
        refusal(60, 30, small), "image-too-small", "60 x 30", "2.14 times", "64 x 64", "dataset.max_upscale to 2.14"
    )
    assert fit(60, 30, dataset(resolution=64, max_upscale=2.14)) == (64, 64)
    assert fit(64, 64, small) == (64, 64)
    assert_is(refusal(1, 1, small), "image-too-small", "64.0 times")
    assert_is(refusal(1, 10_000, small), "image-too-small", "64.0 times")


def test_the_suggested_max_upscale_suffices() -> None:
    draw = random.Random(1)
    for _ in range(200):
        width, height = draw.randint(1, 100), draw.randint(1, 100)
        if min(width, height) < 64:
            advised = float(refusal(width, height, dataset(resolution=64)).rpartition(" ")[2].rstrip("."))
            assert fit(width, height, dataset(resolution=64, max_upscale=advised)) == (64, 64)


def test_images_wider_than_all_buckets_are_refused() -> None:
    params = dataset(**SD15)
    assert_is(refusal(3000, 1000, params), "image-too-long", "3000 x 1000", "3.0 times", "from 2.0 to 3.0")
    assert_is(refusal(1, 10_000, params), "image-too-long", "10000.0 times")
    assert fit(3000, 1000, dataset(resolution=512, aspect_buckets=False)) == (512, 512)


def test_views_are_the_same_however_many_there_are() -> None:
    draw = random.Random(2)
    for flip in (False, True):
        augmentation = Augmentation("random", flip=flip, seed=5)
        for _ in range(20):
            width, height = draw.randint(64, 300), draw.randint(64, 300)
            size = fit(width, height, dataset(aspect_buckets=True, max_aspect_ratio=8.0))
            item = Item("x", f"{draw.random()}", "", ("",), "train", width, height, *size)
            many = augmentation.views(item, 12)
            for number in range(1, 12):
                fewer = augmentation.views(item, number)
                assert many[: len(fewer)] == fewer
            for view in many:
                left, top, right, bottom = view.crop
                assert 0 <= left < right <= width and 0 <= top < bottom <= height
                assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=0.02)
