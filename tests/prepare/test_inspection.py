from __future__ import annotations

import errno
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dag.core.console import UserError
from lora_dag.pictures import checks as picture_checks
from stages.prepare import inspection
from stages.prepare.inspection import Inspected, inspect
from stages.prepare.inspection_cache import InspectionCache
from stages.prepare.listing import Entry, Problem
from tests.conftest import picture
from tests.helpers.images import dataset, encoded


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


def look(files: Blobs, masks: dict[str, str] | None = None, **changes: Any) -> Inspected:
    names = [name for name in files.blobs if name not in (masks or {}).values()]
    return inspect([entry(name, (masks or {}).get(name)) for name in names], dataset(**changes), files.read)


def many(number: int) -> Blobs:
    return Blobs(**{f"{index:03}__png": encoded(picture(index, 70, 64)) for index in range(number)})


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    return tmp_path / "store"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that are decoded."""
    names: list[str] = []
    real = picture_checks.check_picture

    def check_picture(blob: bytes, name: str, first_frame: bool) -> picture_checks.Checked:
        names.append(name)
        return real(blob, name, first_frame)

    monkeypatch.setattr(picture_checks, "check_picture", check_picture)
    return names


def test_rows_say_what_was_found() -> None:
    image = picture(1, 90, 64)
    image.putalpha(128)
    files = Blobs(a__png=encoded(image), b__jpg=encoded(picture(2, 64, 100), "JPEG"))
    first, second = look(files, resolution=64, aspect_buckets=True).rows
    assert (first.entry, first.width, first.height) == (entry("a.png"), 90, 64)
    assert (first.target_width, first.target_height, first.has_alpha) == (80, 48, True)
    assert first.sha256 == hashlib.sha256(files.blobs["a.png"]).hexdigest()  # type: ignore[arg-type]
    assert first.mask_sha256 is None
    assert (second.target_width, second.target_height, second.has_alpha) == (48, 80, False)


def test_order_is_that_of_the_source_and_each_picture_is_read_once() -> None:
    files = many(60)
    found = look(files)
    assert [row.entry.file_name for row in found.rows] == [f"{index:03}.png" for index in range(60)]
    assert set(files.reads.values()) == {1}
    assert (found.problems, found.warnings) == ([], [])


def test_all_problems_are_reported_in_one_pass() -> None:
    files = Blobs(
        a__png=encoded(picture(1, 64)),
        b__png=b"",
        c__png=encoded(picture(1, 20)),
        d__png=UserError("'d.png' is no file any more"),
        e__png=IsADirectoryError(21, "Is a directory"),
        f__png=encoded(picture(2, 64)),
        g__png=encoded(picture(3))[:-30],
    )
    found = look(files)
    assert [row.entry.file_name for row in found.rows] == ["a.png", "f.png"]
    assert found.problems[:4] == [
        Problem("meta.jsonl:b.", "'b.png' is an empty file; restore it or remove it", "b.png"),
        Problem(
            "meta.jsonl:c.",
            "'c.png' has 20 x 20 pixels and would be enlarged 3.2 times to 64 x 64; use a larger picture or a smaller "
            "dataset.resolution, or allow it: dataset.max_upscale 3.2",
            "c.png",
        ),
        Problem("meta.jsonl:d.", "'d.png' is no file any more", "d.png"),
        Problem(
            "meta.jsonl:e.", "'e.png' cannot be read (Is a directory); restore it or remove it", "e.png"
        ),
    ]  # fmt: skip
    assert found.problems[4].text.startswith("'g.png' is damaged (")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_the_machines_faults_are_no_bad_pictures(number: int) -> None:
    """With on_bad skip, a hiccup of a network drive would change the dataset."""
    for on_bad in ("error", "skip"):
        files = Blobs(a__png=encoded(picture(1, 64)), b__png=OSError(number, "it says no", "/mnt/b.png"))
        with pytest.raises(OSError, match="it says no"):
            look(files, on_bad=on_bad)


def test_a_full_memory_is_no_bad_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError):
        look(Blobs(a__png=MemoryError()), on_bad="skip")
    for error in (MemoryError(), OSError("out of memory error when reading image file")):  # so says Pillow
        monkeypatch.setattr(Image.Image, "resize", raising(error))
        with pytest.raises(MemoryError, match="out of memory while 'a.png' was decoded"):
            look(Blobs(a__png=encoded(picture(1, 64))), on_bad="skip")


def raising(error: BaseException) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        raise error

    return call


def test_warnings_are_one_line_for_all_pictures() -> None:
    blobs = {f"{index}__jpg": encoded(Image.new("CMYK", (64, 64), (index, 0, 0, 0)), "JPEG") for index in range(5)}
    found = look(Blobs(**blobs, x__jpg=encoded(picture(1, 64))))
    assert found.warnings == [
        "5 pictures are CMYK and converted to sRGB (0.jpg, 1.jpg, 2.jpg, ...)",
        "1 picture holds PNG data under another format's suffix (x.jpg)",
    ]


def test_settings_that_do_nothing_are_warned_about() -> None:
    files = Blobs(a__png=encoded(picture(1, 64)), b__png=encoded(picture(2, 90, 64)))
    assert look(files, crop="random").warnings == [
        "1 picture has the shape that the model sees, so that dataset.crop random changes nothing (a.png)"
    ]
    assert look(files, mask="alpha").warnings == [
        "2 pictures have no transparent pixel, so that with dataset.mask alpha the loss looks at all of them "
        "(a.png, b.png)"
    ]
    assert look(files, max_upscale=2.0, resolution=96).warnings == [
        "2 pictures are enlarged, as dataset.max_upscale allows (a.png, b.png)"
    ]


# Masks


def masked(mask: Image.Image | bytes, **changes: Any) -> Inspected:
    blob = mask if isinstance(mask, bytes) else encoded(mask)
    files = Blobs(a__png=encoded(picture(1, 90, 60)), m__png=blob)
    return look(files, {"a.png": "m.png"}, resolution=32, mask="masks", **changes)


def test_masks_are_checked_with_their_pictures() -> None:
    (row,) = masked(Image.new("L", (45, 30), 9)).rows
    assert row.mask_sha256 == hashlib.sha256(encoded(Image.new("L", (45, 30), 9))).hexdigest()
    assert not masked(Image.new("L", (901, 601), 9)).problems  # rounded when it was scaled


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Image.new("L", (60, 90), 9),
            "mask 'm.png' has 60 x 90 pixels, another shape than the 90 x 60 of 'a.png'; turn it as the picture's EXIF",
        ),
        (
            Image.new("L", (92, 60), 9),
            "mask 'm.png' has 92 x 60 pixels, another shape than the 90 x 60 of 'a.png'; make",
        ),
        (Image.new("L", (90, 60)), "mask 'm.png' is black all over, so that the loss would look at nothing; mend it"),
        (Image.new("L", (90, 60), 1), "mask 'm.png' holds 0 and 1, and white is 255; multiply it by 255"),
        (b"text", "'m.png' is no JPEG, PNG, WebP, GIF, TIFF or BMP picture"),
    ],
)
def test_masks_that_cannot_be_used(mask: Image.Image | bytes, message: str) -> None:
    found = masked(mask)
    assert found.rows == []
    (problem,) = found.problems
    assert (problem.place, problem.file_name) == ("meta.jsonl:a.", "a.png")
    assert problem.text.startswith(message)


def right_half(mode: str, colour: Any) -> Image.Image:
    """160 x 40, of which the centred square sees nothing."""
    image = Image.new(mode, (160, 40))
    image.paste(colour, (110, 0, 160, 40))
    return image


def test_masks_that_show_only_what_is_cut_off(checks: list[str]) -> None:
    nothing = "all over the centred crop that the model sees, so that the loss would look at nothing; mend it, or set"
    files = Blobs(a__png=encoded(picture(1, 160, 40)), m__png=encoded(right_half("L", 255)))
    for _ in ("found", "remembered"):
        found = look(files, {"a.png": "m.png"}, resolution=32, mask="masks")
        assert [problem.text for problem in found.problems] == [
            f"mask 'm.png' is black {nothing} dataset.unmasked_weight above 0"
        ]
    assert files.reads["m.png"] == 3  # the second time for its digest alone
    see_through = Blobs(a__png=encoded(right_half("RGBA", (9, 9, 9, 255))))
    (problem,) = look(see_through, resolution=32, mask="alpha").problems
    assert problem.text.startswith(f"'a.png' is transparent {nothing}")
    for changes in ({"crop": "random"}, {"unmasked_weight": 0.1}, {"aspect_buckets": True, "max_aspect_ratio": 4.0}):
        sizes = {"resolution": 32, "bucket_step": 8} | changes
        assert not look(files, {"a.png": "m.png"}, mask="masks", **sizes).problems


def test_a_black_mask_is_fine_where_what_is_masked_counts_a_little() -> None:
    assert not masked(Image.new("L", (90, 60)), unmasked_weight=0.1).problems


def test_pictures_that_alpha_hides_altogether_are_refused() -> None:
    files = Blobs(a__png=encoded(Image.new("RGBA", (64, 64))))
    (problem,) = look(files, mask="alpha").problems
    assert problem.text.startswith("'a.png' is transparent all over, so that the loss would look at nothing; mend it")
    assert not look(files, mask="alpha", unmasked_weight=0.5).problems
    assert not look(files).problems


# What is remembered


def test_a_second_run_decodes_nothing(state: Path, checks: list[str]) -> None:
    files = many(20)
    first = look(files)
    assert len(checks) == 20
    (path,) = state.iterdir()
    before = path.stat()
    assert look(files) == first
    assert len(checks) == 20
    assert path.stat() == before  # nor writes anything


def test_only_what_is_new_is_decoded_whatever_its_name(checks: list[str]) -> None:
    files = many(6)
    look(files)
    files.blobs = {f"renamed-{name}": blob for name, blob in files.blobs.items()}
    files.blobs["renamed-002.png"] = encoded(picture(77, 64))
    checks.clear()
    look(files)
    assert checks == ["renamed-002.png"]


def test_first_frame_is_another_check(checks: list[str]) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    files = Blobs(a__gif=encoded(red, "GIF", save_all=True, append_images=[blue]))
    assert look(files, first_frame=True).warnings == [
        "1 picture has several frames or pages, of which the first is taken (a.gif)"
    ]
    (problem,) = look(files).problems
    assert "is animated or has several pages" in problem.text
    assert len(checks) == 2


def test_refused_pictures_are_not_remembered(checks: list[str]) -> None:
    files = Blobs(a__png=b"text")
    assert "'a.png'" in look(files).problems[0].text
    files.blobs = {"b.png": b"text"}
    assert "'b.png'" in look(files).problems[0].text
    assert len(checks) == 2


def test_what_was_remembered_is_the_same_as_what_is_found(checks: list[str]) -> None:
    image = picture(1, 64)
    image.putalpha(Image.fromarray(np.full((64, 64), 7, np.uint8)))
    files = Blobs(a__png=encoded(image), b__jpg=encoded(Image.new("CMYK", (64, 64)), "JPEG"))
    first = look(files)
    assert look(files) == first
    assert checks == ["a.png", "b.jpg"]


def test_an_interrupted_check_is_remembered(monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> None:
    files = many(30)
    files.blobs["025.png"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        look(files)
    num_checked = len(checks)
    assert num_checked > 20
    files.blobs["025.png"] = encoded(picture(25, 64))
    checks.clear()
    look(files)
    assert len(checks) <= 30 - num_checked + inspection.NUM_READERS


def test_few_pictures_are_read_ahead() -> None:
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
    return Blobs(**{f"{index}__png": encoded(picture(index, width, height)) for index in range(number)})


def test_pictures_that_lose_much_to_the_crop_are_named_with_what_keeps_them() -> None:
    (warning,) = look(pano(3)).warnings
    assert warning == (
        "3 pictures lose more than a third of the area to the crop, up to 90% (0.png, 1.png, 2.png); "
        "dataset.aspect_buckets=true with dataset.max_aspect_ratio=10 keeps them"
    )
    assert look(pano(3), aspect_buckets=True, max_aspect_ratio=10.0).warnings == []
    (warning,) = look(pano(1, 120, 64)).warnings
    assert warning.startswith("1 picture loses more than a third of the area to the crop, up to 47% (0.png); ")
    assert warning.endswith("dataset.aspect_buckets=true keeps them")
    assert look(pano(1, 120, 64), aspect_buckets=True).warnings == []
    assert look(pano(2, 96, 64)).warnings == []  # 3:2 loses a third
    (warning,) = look(pano(1, 120, 64), bucket_step=24).warnings
    assert warning.endswith("cut them to shape yourself, so that the caption fits what is left")


def test_settings_that_change_nothing_on_these_pictures() -> None:
    square = Blobs(a__png=encoded(picture(1, 64)), b__png=encoded(picture(2, 64)))
    assert look(square, background="#000000").warnings == [
        "dataset.background #000000 changes nothing: no picture has a transparent pixel"
    ]
    assert look(square, aspect_buckets=True).warnings == [
        "dataset.aspect_buckets changes nothing: every picture is seen as 64 x 64"
    ]
    assert look(square, subsets=[{"path": ".", "repeats": 4}]).warnings == [
        "repeats 4 in dataset.subsets changes nothing: it is the same for all pictures"
    ]
    assert look(square, first_frame=True).warnings == [
        "dataset.first_frame changes nothing: no picture has several frames or pages"
    ]
    assert look(square, max_aspect_ratio=3.0).warnings == [
        "dataset.max_aspect_ratio 3 changes nothing without dataset.aspect_buckets"
    ]
    clear = Image.new("RGBA", (64, 64), (9, 9, 9, 99))
    assert look(Blobs(a__png=encoded(clear)), background="#000000").warnings == []


# Grey pictures beside colour ones


def test_grey_pictures_that_are_named_like_colour_ones_are_told() -> None:
    grey = encoded(picture(1, 64).convert("L").convert("RGB"))
    files = Blobs(x__png=encoded(picture(1, 64)), y__png=encoded(picture(2, 64)), z__png=grey)
    assert look(files).warnings == []
    said = "and named like a colour picture of the same size and caption"
    files.blobs["x_foo.png"] = grey
    assert look(files).warnings[0].startswith(f"1 picture is grey {said} (x_foo.png); if they are masks or control")
    files.blobs["other/y.png"] = encoded(picture(5, 64).convert("L"))
    assert look(files).warnings[0].startswith(f"2 pictures are grey {said} (x_foo.png, other/y.png); ")
    files.blobs["x_foo.png"] = encoded(picture(1, 65, 64).convert("L"))  # of another size
    assert look(files).warnings[0].startswith(f"1 picture is grey {said} (other/y.png)")


def test_a_set_of_grey_pictures_is_no_set_of_masks() -> None:
    blobs = {f"a{ending}__png": encoded(picture(i, 64).convert("L")) for i, ending in enumerate(["", "_1", "_2", "-b"])}
    assert look(Blobs(**blobs)).warnings == []


def test_looking_stops_when_the_time_is_up() -> None:
    found = inspect([entry(name) for name in many(9).blobs], dataset(), many(9).read, seconds=-1)
    assert (found.rows, found.num_seen) == ([], 0)
