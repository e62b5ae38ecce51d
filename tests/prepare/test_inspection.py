from __future__ import annotations

import errno
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dag.core.console import Problem, UserError
from lora_dag.images import checks as image_checks
from stages.prepare import inspection
from stages.prepare.inspection import Inspected, inspect
from stages.prepare.inspection_cache import InspectionCache
from stages.prepare.listing import Entry
from tests.helpers.errors import assert_are, assert_is
from tests.helpers.images import dataset, encoded
from tests.helpers.workspace import make_image


class Blobs:
    """A dataset in memory that counts what is read."""

    def __init__(self, **blobs: bytes | BaseException) -> None:
        self.blobs = {name.replace("__", "."): blob for name, blob in blobs.items()}
        self.reads: Counter[str] = Counter()

    def read(self, file_name: str) -> bytes:
        self.reads[file_name] += 1
        blob = self.blobs[file_name]
        if isinstance(blob, BaseException):
            raise blob
        return blob


def entry(name: str, mask: str | None = None) -> Entry:
    return Entry(name, ("",), f"meta.jsonl:{name[:2]}", mask=mask)


def inspected(files: Blobs, masks: dict[str, str] | None = None, **changes: Any) -> Inspected:
    names = [name for name in files.blobs if name not in (masks or {}).values()]
    return inspect([entry(name, (masks or {}).get(name)) for name in names], dataset(**changes), files.read)


def many(number: int) -> Blobs:
    return Blobs(**{f"{index:03}__png": encoded(make_image(index, 70, 64)) for index in range(number)})


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    return tmp_path / "store"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are decoded."""
    names: list[str] = []
    real = image_checks.check_image

    def check_image(blob: bytes, name: str, first_frame: bool) -> image_checks.ImageFacts:
        names.append(name)
        return real(blob, name, first_frame)

    monkeypatch.setattr(image_checks, "check_image", check_image)
    return names


def test_rows_hold_sizes_digest_and_alpha() -> None:
    image = make_image(1, 90, 64)
    image.putalpha(128)
    files = Blobs(a__png=encoded(image), b__jpg=encoded(make_image(2, 64, 100), "JPEG"))
    first, second = inspected(files, resolution=64, aspect_buckets=True).rows
    assert (first.entry, first.width, first.height) == (entry("a.png"), 90, 64)
    assert (first.target_width, first.target_height, first.has_alpha) == (80, 48, True)
    assert first.sha256 == hashlib.sha256(files.blobs["a.png"]).hexdigest()  # type: ignore[arg-type]
    assert first.mask_sha256 is None
    assert (second.target_width, second.target_height, second.has_alpha) == (48, 80, False)


def test_order_is_that_of_the_source_and_each_image_is_read_once() -> None:
    files = many(60)
    found = inspected(files)
    assert [row.entry.file_name for row in found.rows] == [f"{index:03}.png" for index in range(60)]
    assert set(files.reads.values()) == {1}
    assert (found.problems, found.warnings) == ([], [])


def test_all_problems_are_reported_in_one_pass() -> None:
    files = Blobs(
        a__png=encoded(make_image(1, 64)),
        b__png=b"",
        c__png=encoded(make_image(1, 20)),
        d__png=UserError(Problem("file-missing", "'d.png' no longer exists.")),
        e__png=IsADirectoryError(21, "Is a directory"),
        f__png=encoded(make_image(2, 64)),
        g__png=encoded(make_image(3))[:-30],
    )
    found = inspected(files)
    assert [row.entry.file_name for row in found.rows] == ["a.png", "f.png"]
    assert_are(
        found.problems,
        ("image-empty", "meta.jsonl:b.: 'b.png'"),
        ("image-too-small", "meta.jsonl:c.: 'c.png'", "20 x 20", "3.2 times", "dataset.max_upscale to 3.2"),
        ("file-missing", "meta.jsonl:d.: 'd.png'"),
        ("file-missing", "meta.jsonl:e.: 'e.png'", "Is a directory"),
        ("image-damaged", "meta.jsonl:g.: 'g.png'"),
    )
    assert [problem.file_name for problem in found.problems] == [f"{letter}.png" for letter in "bcdeg"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_io_errors_are_not_bad_images(number: int) -> None:
    """With on_bad skip, a hiccup of a network drive would change the dataset."""
    for on_bad in ("error", "skip"):
        files = Blobs(a__png=encoded(make_image(1, 64)), b__png=OSError(number, "the drive fails", "/mnt/b.png"))
        with pytest.raises(OSError, match="the drive fails"):
            inspected(files, on_bad=on_bad)


def test_out_of_memory_is_not_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError):
        inspected(Blobs(a__png=MemoryError()), on_bad="skip")
    for error in (MemoryError(), OSError("out of memory error when reading image file")):  # so says Pillow
        monkeypatch.setattr(Image.Image, "resize", raising(error))
        with pytest.raises(MemoryError, match="out of memory while 'a.png' was decoded"):
            inspected(Blobs(a__png=encoded(make_image(1, 64))), on_bad="skip")


def raising(error: BaseException) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        raise error

    return call


def test_warnings_are_one_line_for_all_images() -> None:
    blobs = {f"{index}__jpg": encoded(Image.new("CMYK", (64, 64), (index, 0, 0, 0)), "JPEG") for index in range(5)}
    found = inspected(Blobs(**blobs, x__jpg=encoded(make_image(1, 64))))
    assert_are(
        found.warnings,
        ("image-cmyk", "5 images (0.jpg, 1.jpg, 2.jpg, ...) are CMYK"),
        ("image-wrong-suffix", "1 image (x.jpg) holds PNG"),
    )


def test_settings_without_effect_on_some_images() -> None:
    files = Blobs(a__png=encoded(make_image(1, 64)), b__png=encoded(make_image(2, 90, 64)))
    assert_are(inspected(files, crop="random").warnings, ("image-never-cropped", "1 image (a.png) has", "dataset.crop"))
    assert_are(
        inspected(files, mask="alpha").warnings, ("image-opaque", "2 images (a.png, b.png)", "dataset.mask alpha")
    )
    assert_are(
        inspected(files, max_upscale=2.0, resolution=96).warnings,
        ("image-enlarged", "2 images (a.png, b.png)", "dataset.max_upscale"),
    )


# Masks


def masked(mask: Image.Image | bytes, **changes: Any) -> Inspected:
    blob = mask if isinstance(mask, bytes) else encoded(mask)
    files = Blobs(a__png=encoded(make_image(1, 90, 60)), m__png=blob)
    return inspected(files, {"a.png": "m.png"}, resolution=32, mask="masks", **changes)


def test_masks_are_checked_with_their_images() -> None:
    (row,) = masked(Image.new("L", (45, 30), 9)).rows
    assert row.mask_sha256 == hashlib.sha256(encoded(Image.new("L", (45, 30), 9))).hexdigest()
    assert not masked(Image.new("L", (901, 601), 9)).problems  # rounded when it was scaled


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Image.new("L", (60, 90), 9), ("mask-shape", "60 x 90", "90 x 60 of 'a.png'", "EXIF")),
        (Image.new("L", (92, 60), 9), ("mask-shape", "92 x 60", "90 x 60 of 'a.png'", "aspect ratio")),
        (Image.new("L", (90, 60)), ("mask-empty", "dataset.unmasked_weight")),
        (Image.new("L", (90, 60), 1), ("mask-range", "255")),
        (b"text", ("image-format-unsupported",)),
    ],
)
def test_unusable_masks(mask: Image.Image | bytes, expected: tuple[str, ...]) -> None:
    found = masked(mask)
    assert found.rows == []
    (problem,) = found.problems
    assert (problem.place, problem.file_name) == ("meta.jsonl:a.", "a.png")
    assert_is(problem, *expected, "'m.png'")


def right_half(mode: str, color: Any) -> Image.Image:
    """160 x 40, of which the centered square sees nothing."""
    image = Image.new(mode, (160, 40))
    image.paste(color, (110, 0, 160, 40))
    return image


def test_masks_empty_inside_the_center_crop(checks: list[str]) -> None:
    files = Blobs(a__png=encoded(make_image(1, 160, 40)), m__png=encoded(right_half("L", 255)))
    for _ in ("found", "remembered"):
        found = inspected(files, {"a.png": "m.png"}, resolution=32, mask="masks")
        assert_are(found.problems, ("mask-empty", "mask 'm.png'", "center crop", "dataset.unmasked_weight"))
    assert files.reads["m.png"] == 3  # the second time for its digest alone
    see_through = Blobs(a__png=encoded(right_half("RGBA", (9, 9, 9, 255))))
    (problem,) = inspected(see_through, resolution=32, mask="alpha").problems
    assert_is(problem, "mask-empty", "'a.png'", "center crop")
    for changes in ({"crop": "random"}, {"unmasked_weight": 0.1}, {"aspect_buckets": True, "max_aspect_ratio": 4.0}):
        sizes = {"resolution": 32, "bucket_step": 8} | changes
        assert not inspected(files, {"a.png": "m.png"}, mask="masks", **sizes).problems


def test_black_mask_is_allowed_with_unmasked_weight() -> None:
    assert not masked(Image.new("L", (90, 60)), unmasked_weight=0.1).problems


def test_images_that_alpha_hides_altogether_are_refused() -> None:
    files = Blobs(a__png=encoded(Image.new("RGBA", (64, 64))))
    (problem,) = inspected(files, mask="alpha").problems
    assert_is(problem, "mask-empty", "'a.png'", "dataset.unmasked_weight")
    assert not inspected(files, mask="alpha", unmasked_weight=0.5).problems
    assert not inspected(files).problems


# What is remembered


def test_a_second_run_decodes_nothing(state: Path, checks: list[str]) -> None:
    files = many(20)
    first = inspected(files)
    assert len(checks) == 20
    (path,) = state.iterdir()
    before = path.stat()
    assert inspected(files) == first
    assert len(checks) == 20
    assert path.stat() == before  # nor writes anything


def test_only_new_content_is_decoded(checks: list[str]) -> None:
    files = many(6)
    inspected(files)
    files.blobs = {f"renamed-{name}": blob for name, blob in files.blobs.items()}
    files.blobs["renamed-002.png"] = encoded(make_image(77, 64))
    checks.clear()
    inspected(files)
    assert checks == ["renamed-002.png"]


def test_first_frame_is_another_check(checks: list[str]) -> None:
    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    files = Blobs(a__gif=encoded(red, "GIF", save_all=True, append_images=[blue]))
    assert_are(inspected(files, first_frame=True).warnings, ("image-first-frame", "1 image (a.gif) has"))
    assert_are(inspected(files).problems, ("image-animated", "'a.gif'", "dataset.first_frame"))
    assert len(checks) == 2


def test_refusals_are_not_cached(checks: list[str]) -> None:
    files = Blobs(a__png=b"text")
    assert "'a.png'" in inspected(files).problems[0].text
    files.blobs = {"b.png": b"text"}
    assert "'b.png'" in inspected(files).problems[0].text
    assert len(checks) == 2


def test_cached_results_equal_computed_ones(checks: list[str]) -> None:
    image = make_image(1, 64)
    image.putalpha(Image.fromarray(np.full((64, 64), 7, np.uint8)))
    files = Blobs(a__png=encoded(image), b__jpg=encoded(Image.new("CMYK", (64, 64)), "JPEG"))
    first = inspected(files)
    assert inspected(files) == first
    assert checks == ["a.png", "b.jpg"]


def test_an_interrupted_inspection_keeps_its_results(monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> None:
    files = many(30)
    files.blobs["025.png"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        inspected(files)
    num_checked = len(checks)
    assert num_checked > 20
    files.blobs["025.png"] = encoded(make_image(25, 64))
    checks.clear()
    inspected(files)
    assert len(checks) <= 30 - num_checked + inspection.NUM_READERS


def test_few_images_are_read_ahead() -> None:
    """A dataset is never in memory as a whole."""
    files = many(60)
    params = dataset()
    inspector = inspection.Inspector(params, files.read, InspectionCache("checked"))
    outcomes = inspection.in_order([entry(name) for name in files.blobs], inspector)
    for _ in range(10):
        next(outcomes)
    assert sum(files.reads.values()) <= 10 + inspection.AHEAD
    outcomes.close()  # type: ignore[attr-defined]


# Crops


def pano(number: int, width: int = 640, height: int = 64) -> Blobs:
    return Blobs(**{f"{index}__png": encoded(make_image(index, width, height)) for index in range(number)})


def test_heavy_crops_suggest_sufficient_buckets() -> None:
    (warning,) = inspected(pano(3)).warnings
    fix = "dataset.aspect_buckets=true with dataset.max_aspect_ratio=10 "
    assert_is(warning, "image-heavily-cropped", "3 images", "90%", "(0.png, 1.png, 2.png)", fix)
    assert inspected(pano(3), aspect_buckets=True, max_aspect_ratio=10.0).warnings == []
    (warning,) = inspected(pano(1, 120, 64)).warnings
    assert_is(warning, "image-heavily-cropped", "1 image loses", "47%", "(0.png)", "dataset.aspect_buckets=true to")
    assert inspected(pano(1, 120, 64), aspect_buckets=True).warnings == []
    assert inspected(pano(2, 96, 64)).warnings == []  # 3:2 loses a third
    (warning,) = inspected(pano(1, 120, 64), bucket_step=24).warnings
    assert_is(warning, "image-heavily-cropped")
    assert "aspect_buckets" not in warning


def test_ineffective_settings() -> None:
    square = Blobs(a__png=encoded(make_image(1, 64)), b__png=encoded(make_image(2, 64)))
    for changes, text in (
        ({"background": "#000000"}, "background: #000000 "),
        ({"aspect_buckets": True}, "aspect_buckets: true "),
        ({"subsets": [{"path": ".", "repeats": 4}]}, "subsets: repeats 4 "),
        ({"first_frame": True}, "first_frame: true "),
        ({"max_aspect_ratio": 3.0}, "max_aspect_ratio: 3 "),
    ):
        assert_are(inspected(square, **changes).warnings, ("setting-ignored", f"params.yaml dataset.{text}"))
    clear = Image.new("RGBA", (64, 64), (9, 9, 9, 99))
    assert inspected(Blobs(a__png=encoded(clear)), background="#000000").warnings == []


# Gray images beside color ones


def test_gray_images_named_like_color_ones_are_warned_about() -> None:
    gray = encoded(make_image(1, 64).convert("L").convert("RGB"))
    files = Blobs(x__png=encoded(make_image(1, 64)), y__png=encoded(make_image(2, 64)), z__png=gray)
    assert inspected(files).warnings == []
    files.blobs["x_foo.png"] = gray
    assert_is(inspected(files).warnings[0], "gray-twins", "1 image is gray", "(x_foo.png)", "dataset.mask")
    files.blobs["other/y.png"] = encoded(make_image(5, 64).convert("L"))
    assert_is(inspected(files).warnings[0], "gray-twins", "2 images are gray", "(x_foo.png, other/y.png)")
    files.blobs["x_foo.png"] = encoded(make_image(1, 65, 64).convert("L"))  # of another size
    assert_is(inspected(files).warnings[0], "gray-twins", "1 image is gray", "(other/y.png)")


def test_a_gray_dataset_is_not_taken_for_masks() -> None:
    blobs = {
        f"a{ending}__png": encoded(make_image(i, 64).convert("L")) for i, ending in enumerate(["", "_1", "_2", "-b"])
    }
    assert inspected(Blobs(**blobs)).warnings == []


def test_inspection_stops_at_the_time_limit() -> None:
    found = inspect([entry(name) for name in many(9).blobs], dataset(), many(9).read, seconds=-1)
    assert (found.rows, found.num_inspected) == ([], 0)
