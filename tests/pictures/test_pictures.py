from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_dag.artifacts.manifest import Augmentation, Item, View
from lora_dag.core.console import UserError
from lora_dag.pictures import decode, formats
from lora_dag.pictures.checks import Checked, check_picture
from lora_dag.pictures.decode import load_view, preprocessing
from lora_dag.pictures.formats import misnamed
from lora_dag.pictures.likeness import gradient_bits, thumbnail_pixels
from lora_dag.pictures.masks import load_mask
from lora_dag.pictures.measures import chroma, dark_share
from tests.conftest import picture
from tests.helpers.images import encoded, photo


def frames(form: str) -> bytes:
    """Red, then blue."""
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    return encoded(red, form, save_all=True, append_images=[blue])


def item(width: int, height: int, source: tuple[int, int] = (0, 0), mask: str | None = None) -> Item:
    return Item(
        "x.png", "ab" * 32, "", ("",), "train", *(source if source[0] else (width, height)), width, height, mask
    )


def seen(blob: bytes, size: int, crop: tuple[int, int, int, int], flip: bool = False, **changes: str) -> np.ndarray:
    made = preprocessing("#ffffff", "lanczos") | changes
    image = load_view(blob, item(size, size), View(crop, flip), made)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def checked(blob: bytes, first_frame: bool = False) -> Checked:
    return check_picture(blob, "x.png", first_frame)


def refusal(blob: bytes, first_frame: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        checked(blob, first_frame)
    (problem,) = caught.value.problems
    assert "\n" not in problem and len(problem) < 240
    return problem


def rgba() -> Image.Image:
    """60 x 40, opaque on the right and transparent on the left."""
    image = picture(3, 60, 40)
    image.putalpha(Image.fromarray((np.mgrid[0:40, 0:60][1] * 4).astype(np.uint8)))
    return image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def grey16() -> Image.Image:
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray((x * 1000 + y * 7).astype(np.uint16))


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def grey_profile(gamma: float = 1.0) -> bytes:
    """An ICC profile for one grey channel; Little CMS makes none through Pillow."""
    white = struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + white,
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + table + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of a few bytes that claims any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((width // 8 + 1) * min(height, 100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def deep_tiff(photometric: int, planes: np.ndarray, planar: bool = False) -> bytes:
    """A TIFF of 16 bits per channel, uint16 [channels, height, width]; Pillow itself writes neither of its kinds."""
    count, height, width = planes.shape
    data = (planes if planar else np.moveaxis(planes, 0, -1)).astype("<u2").tobytes()
    parts = count if planar else 1
    values = {
        **{256: [width], 257: [height], 258: [16] * count, 259: [1], 262: [photometric], 273: [0] * parts},
        **{277: [count], 278: [height], 279: [len(data) // parts] * parts, 284: [2 if planar else 1]},
    }
    end = 8 + 2 + 12 * len(values) + 4
    start = end + sum(4 * len(numbers) for numbers in values.values() if len(numbers) > 1)
    values[273] = [start + index * (len(data) // parts) for index in range(parts)]
    entries, more = b"", b""
    for tag, numbers in values.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack("<I", end + len(more))
        more += packed if len(numbers) > 1 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + more + data


def deep_png(*more: bytes) -> bytes:
    """One pixel of 16-bit colours."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32768, 257)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixel + chunk(b"IEND", b"")


RAMP16 = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)

# check_picture


@pytest.mark.parametrize("form", formats.FORMATS)
def test_formats_are_told_by_content(form: str) -> None:
    found = checked(encoded(picture(1, 30, 20), form))
    assert (found.format, found.width, found.height, found.warnings) == (form, 30, 20, ())
    assert (found.alpha, found.has_alpha) == (None, False)
    assert misnamed("a/b.PNG", found.format) == (form != "PNG")
    assert not misnamed("a", found.format)


def test_mpo_is_a_jpeg_and_no_animation() -> None:
    found = checked(frames("MPO"))
    assert (found.format, found.warnings) == ("JPEG", ())
    assert not misnamed("x.jpg", found.format)


def corrupt(blob: bytes, place: float = 0.5) -> bytes:
    index = int(len(blob) * place)
    return blob[:index] + bytes([blob[index] ^ 0x10]) + blob[index + 1 :]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "'x.png' is an empty file; restore it or remove it"),
        (b"\xef\xbb\xbf <!DOCTYPE html><html>", " but seems to be HTML; convert it or remove it"),
        (b'<?xml version="1.0"?><svg/>', " but seems to be SVG; convert it or remove it"),
        (b"version https://git-lfs.github.com/spec/v1\n", " but seems to be Git LFS pointer; "),
        (b"\0\0\0\x1cftypheic", " but seems to be HEIC or AVIF; "),
        (b"just text", "'x.png' is no JPEG, PNG, WebP, GIF, TIFF or BMP picture; convert it or remove it"),
        (encoded(NOISE, "JPEG")[:3], "'x.png' is a damaged JPEG: its header cannot be read; restore it or remove it"),
        (encoded(NOISE, "JPEG")[:-200], "'x.png' is damaged (image file is truncated"),
        (encoded(NOISE)[:-200], "'x.png' is damaged ("),
        (encoded(NOISE, "WEBP", lossless=True)[:-200], "'x.png' is damaged ("),
        (encoded(NOISE, "GIF")[:-200], "'x.png' is damaged ("),
        (encoded(NOISE, "TIFF")[:-2000], "'x.png' is damaged ("),
        (encoded(NOISE, "BMP")[:-200], "'x.png' is damaged ("),
        (corrupt(encoded(NOISE)), "'x.png' is damaged (broken PNG file (bad header checksum in b'IDAT'))"),
        (png(20_000, 20_000), "'x.png' claims too many pixels; at most 80,000,000 are read, scale it down"),
        (png(10_000, 10_000), "'x.png' has 10000 x 10000 pixels; at most 80,000,000 and 65,535 a side are read"),
        (png(9_000, 9_000), "'x.png' has 9000 x 9000 pixels; at most 80,000,000"),
        (png(100, 70_000), "'x.png' has 100 x 70000 pixels; at most 80,000,000 and 65,535 a side are read"),
        (png(8, 8, chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(10**8)))), "'x.png' is damaged (Decompressed data"),
        (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "'x.png' has pixels of type F; save it with 8"),
        (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "'x.png' has pixels of type I of 32 bits; "),
        (encoded(Image.new("LAB", (8, 8)), "TIFF"), "'x.png' has pixels of type LAB; save it as RGB"),
        (encoded(grey16(), transparency=7), "'x.png' is 16-bit grey with a transparent shade; save it with 8 bits"),
        (
            deep_png(chunk(b"tRNS", struct.pack(">HHH", 65535, 32768, 257))),
            "'x.png' is 16-bit colour with a transparent shade; save it with 8 bits",
        ),
        (
            deep_tiff(2, np.stack([RAMP16] * 3), planar=True),
            "'x.png' is a TIFF with 16-bit colours in separate planes; save it with 8 bits",
        ),
        (
            deep_tiff(0, RAMP16[None]),
            "'x.png' is a TIFF of 16-bit grey in which 0 is white; save it with 8 bits",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(
    blob: bytes, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    assert message in refusal(blob)
    assert not [warning for warning in recwarn if "PIL" not in warning.filename]


def test_a_flipped_byte_in_a_png_is_seen_by_verify_alone() -> None:
    """The case that makes verify() necessary: the decoder itself shows some other picture."""
    blob = encoded(Image.new("RGB", (64, 64), (94, 94, 94)), compress_level=0)
    broken = corrupt(blob)
    assert "checksum" in refusal(broken)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused_or_the_first_is_taken(form: str) -> None:
    blob = frames(form)
    assert refusal(blob) == (
        "'x.png' is animated or has several pages; "
        "save one as a picture, or set dataset.first_frame to true for the first"
    )
    assert checked(blob, first_frame=True).warnings == ("have several frames or pages, of which the first is taken",)
    array = seen(blob, 8, (0, 0, 8, 8))
    assert array[..., 0].min() > 200 and array[..., 2].max() < 60


def test_12_bit_grey_would_be_dark() -> None:
    blob = encoded(Image.new("L", (8, 8), 200), "TIFF", compression="raw")
    entry = struct.pack("<HHI", 258, 3, 1)
    at = blob.index(entry)
    data = blob[: at + 8] + struct.pack("<I", 12) + blob[at + 12 :] + bytes(64)
    assert "has pixels of type I;16 of 12 bits; save it with 8 or 16 bits per channel" in refusal(data)


@pytest.mark.parametrize(
    ("image", "form", "warning"),
    [
        (Image.new("CMYK", (8, 8)), "JPEG", "are CMYK and converted to sRGB"),
        (Image.new("1", (8, 8), 1), "PNG", "have 1 bit per pixel, black or white"),
        (
            Image.new("RGBA", (8, 8)),
            "PNG",
            "are transparent all over, so that only dataset.background is seen",
        ),
    ],
)
def test_what_is_allowed_but_seldom_meant(image: Image.Image, form: str, warning: str) -> None:
    assert checked(encoded(image, form)).warnings == (warning,)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_upright_picture(form: str) -> None:
    for orientation in range(1, 9):
        found = checked(encoded(picture(1, 30, 20), form, exif=turned(orientation)))
        assert (found.width, found.height) == ((30, 20) if orientation < 5 else (20, 30))


def test_opacity() -> None:
    assert (checked(encoded(rgba())).alpha, checked(encoded(rgba())).has_alpha) == ((0, 236), True)
    opaque = checked(encoded(picture(1).convert("RGBA")))
    assert (opaque.alpha, opaque.has_alpha) == ((255, 255), False)
    key = checked(encoded(Image.new("RGB", (8, 8), "red"), transparency=(255, 0, 0)))
    assert key.alpha == (0, 0)
    assert checked(encoded(rgba().convert("LA"))).has_alpha and checked(encoded(rgba().quantize(9))).has_alpha


def test_lightest_is_laid_on_black() -> None:
    assert checked(encoded(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))).lightest == 0
    dot = Image.new("L", (999, 999))
    dot.putpixel((500, 3), 255)
    assert checked(encoded(dot)).lightest == 255
    assert checked(encoded(Image.new("L", (8, 8)))).lightest == 0


# Likeness


def test_gradient_bits_against_a_plain_loop() -> None:
    thumbnail = checked(encoded(photo(1))).thumbnail
    grey = Image.fromarray(thumbnail_pixels(thumbnail)).convert("L")
    bits = [grey.getpixel((x + 1, y)) > grey.getpixel((x, y)) for y in range(16) for x in range(16)]  # type: ignore[operator]
    assert gradient_bits(thumbnail_pixels(thumbnail)).tolist() == bits
    assert not gradient_bits(thumbnail_pixels(checked(encoded(Image.new("RGB", (50, 50), "red"))).thumbnail)).any()


def test_thumbnails_show_what_is_seen() -> None:
    def thumbnail(blob: bytes) -> np.ndarray:
        return thumbnail_pixels(checked(blob).thumbnail).astype(int)

    image = photo(2, 170, 160)
    expected = np.asarray(image.resize((17, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(thumbnail(encoded(image)), expected)
    np.testing.assert_array_equal(thumbnail(encoded(image, icc_profile=srgb())), expected)
    upright = image.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(thumbnail(encoded(upright, exif=turned(6))), expected)
    on_white = Image.alpha_composite(Image.new("RGBA", (60, 40), "white"), rgba()).convert("RGB")
    np.testing.assert_allclose(thumbnail(encoded(rgba())), thumbnail(encoded(on_white)), atol=3)
    np.testing.assert_allclose(thumbnail(encoded(grey16()))[0, -1], 59_000 // 257, atol=8)


# load_view


@pytest.mark.parametrize(
    ("image", "form", "options", "digest"),
    [
        (lambda: picture(3, 60, 40), "PNG", {}, "7ddce8be333dc0bb"),
        (rgba, "PNG", {}, "5435db133b41117c"),
        (rgba, "WEBP", {"lossless": True}, "5435db133b41117c"),
        (lambda: rgba().convert("LA"), "PNG", {}, "a8a01c343a23afff"),
        (lambda: picture(3, 60, 40).convert("L"), "PNG", {}, "f130f496b5c56745"),
        (lambda: rgba().quantize(16), "PNG", {}, "8c00ecbb00708db3"),
        (lambda: picture(3, 60, 40).convert("1"), "PNG", {}, "e0873bedf141ac32"),
        (grey16, "PNG", {}, "443452234dd73052"),
        (lambda: picture(3, 60, 40), "PNG", {"exif": turned(6)}, "313b4a93b76267c2"),
        (lambda: picture(3, 60, 40), "PNG", {"icc_profile": srgb()}, "7ddce8be333dc0bb"),
        (lambda: picture(3, 60, 40), "PNG", {"transparency": (0, 0, 111)}, "2200c72af87bd4a7"),
    ],
    ids=["RGB", "RGBA", "WebP", "LA", "L", "P", "1", "I;16", "turned", "profile", "key"],
)
def test_pixels_are_those_of_version_2(
    image: Callable[[], Image.Image], form: str, options: dict[str, Any], digest: str
) -> None:
    """Stored latents are of these pixels: who changes them raises ``decode.VERSION`` and these digests."""
    assert decode.VERSION == 2
    view = View((0, 0, 38, 38), True)
    shown = load_view(encoded(image(), form, **options), item(32, 32), view, preprocessing("#FF8000", "lanczos"))
    assert hashlib.sha256(shown.tobytes()).hexdigest()[:16] == digest


def test_preprocessing_of_this_version_stays() -> None:
    """It is in the key of every cached latent."""
    assert preprocessing("#FFFFFF", "lanczos") == {"background": "#ffffff", "filter": "lanczos", "version": 2}


def test_view_is_the_cropped_and_resized_picture() -> None:
    whole = picture(3, 60, 40)
    blob = encoded(whole)
    expected = whole.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    actual = seen(blob, 32, (10, 0, 50, 40))
    # At the crop's edge the filter also sees the pixels beyond it.
    np.testing.assert_allclose(actual[:, 3:-3], np.asarray(expected)[:, 3:-3], atol=1)
    same = seen(blob, 40, (10, 0, 50, 40))
    np.testing.assert_array_equal(same, np.asarray(whole)[:, 10:50])
    np.testing.assert_array_equal(seen(blob, 40, (10, 0, 50, 40), flip=True), same[:, ::-1])


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear"])
def test_filters(name: str) -> None:
    expected = picture(3, 40).resize((16, 16), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(seen(encoded(picture(3, 40)), 16, (0, 0, 40, 40), filter=name), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    blob = encoded(image.quantize(4) if mode == "P" else image.convert(mode))
    array = seen(blob, 8, (0, 0, 8, 8), background="#ff0000")
    assert array[0, 0].tolist() == [0, 0, 0]
    assert array[0, 7].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    array = seen(encoded(Image.fromarray(ramp), form), 8, (0, 0, 8, 8))
    np.testing.assert_array_equal(array[..., 0], np.round(ramp / 257))
    assert checked(encoded(Image.fromarray(ramp), form)).format == form


def test_16_bit_grey_of_the_other_byte_order_is_scaled() -> None:
    """As programs on Motorola's and IBM's processors wrote TIFF; Pillow's mode is I;16B."""
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    blob = encoded(Image.frombytes("I;16B", (8, 8), ramp.astype(">u2").tobytes()), "TIFF")
    assert blob.startswith(b"MM")
    np.testing.assert_array_equal(seen(blob, 8, (0, 0, 8, 8))[..., 0], np.round(ramp / 257))
    assert checked(blob).lightest == 251


def test_16_bit_colours_keep_their_brightness() -> None:
    blob = deep_png()
    assert seen(blob, 1, (0, 0, 1, 1))[0, 0].tolist() == [255, 128, 1]
    assert checked(blob).warnings == ()


def test_16_bit_tiffs_that_are_read_right() -> None:
    """What tells those that are not from these."""
    np.testing.assert_array_equal(seen(deep_tiff(1, RAMP16[None]), 8, (0, 0, 8, 8))[..., 0], np.round(RAMP16 / 257))
    interleaved = seen(deep_tiff(2, np.stack([RAMP16, RAMP16 // 2, RAMP16 * 0])), 8, (0, 0, 8, 8))
    np.testing.assert_allclose(interleaved[..., 1], RAMP16 / 2 / 257, atol=1)
    for planes in (RAMP16[None], np.stack([RAMP16] * 3)):
        assert checked(deep_tiff(1 if len(planes) == 1 else 2, planes)).warnings == ()


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("1", 255), ("CMYK", 128)])
def test_other_modes_become_rgb(mode: str, value: int) -> None:
    colour = (0, 0, 0, 255 - value) if mode == "CMYK" else value
    blob = encoded(Image.new(mode, (8, 8), colour), "JPEG" if mode == "CMYK" else "PNG")
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8)), value, atol=2)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))
    array = seen(encoded(image, exif=turned(6)), 8, (0, 0, 8, 8))  # shown turned clockwise by a quarter
    assert array[:, 7].max() == 0
    assert array[:, 0].min() == 255


def test_embedded_profile_is_converted_to_srgb() -> None:
    image = Image.new("RGB", (8, 8), (200, 60, 60))
    np.testing.assert_allclose(seen(encoded(image, icc_profile=srgb()), 8, (0, 0, 8, 8))[0, 0], (200, 60, 60), atol=1)
    assert seen(encoded(image, icc_profile=b"no profile"), 8, (0, 0, 8, 8))[0, 0].tolist() == [200, 60, 60]


def from_linear(linear: float) -> float:
    """The sRGB shade, 0 to 255, of a linear one (IEC 61966-2-1)."""
    share = linear / 255
    return 255 * (12.92 * share if share <= 0.0031308 else 1.055 * share ** (1 / 2.4) - 0.055)


def deep(shade: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), shade * 257, np.uint16))


@pytest.mark.parametrize("shade", [2, 20, 64, 200])
@pytest.mark.parametrize(
    ("image", "form", "options"),
    [
        (lambda shade: Image.new("L", (8, 8), shade), "PNG", {}),
        (lambda shade: Image.new("L", (8, 8), shade), "TIFF", {}),
        (lambda shade: Image.new("L", (8, 8), shade), "JPEG", {"quality": 100}),
        (lambda shade: Image.new("LA", (8, 8), (shade, 255)), "PNG", {}),
        (lambda shade: Image.new("LA", (8, 8), (shade, 255)), "TIFF", {}),
        (lambda shade: Image.new("L", (8, 8), shade), "PNG", {"transparency": 77}),
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
    ],
    ids=["L", "L TIFF", "L JPEG", "LA", "LA TIFF", "L with tRNS", "16-bit PNG", "16-bit TIFF"],
)
def test_a_grey_profile_is_applied_whatever_the_mode(
    image: Callable[[int], Image.Image], form: str, options: dict[str, Any], shade: int
) -> None:
    blob = encoded(image(shade), form, icc_profile=grey_profile(), **options)
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8)), from_linear(shade), atol=1)
    np.testing.assert_allclose(thumbnail_pixels(checked(blob).thumbnail), from_linear(shade), atol=1)
    assert checked(blob).warnings == ()
    assert shade != 64 or round(from_linear(shade)) == 137


def test_16_bit_grey_keeps_its_depth_until_the_profile_is_applied() -> None:
    """Between the linear shades 0 and 1 of 8 bits lie 13 of sRGB."""
    ramp = np.arange(0, 640, 10, dtype=np.uint16).reshape(8, 8)
    array = seen(encoded(Image.fromarray(ramp), icc_profile=grey_profile()), 8, (0, 0, 8, 8))[..., 0]
    expected = np.vectorize(from_linear)(ramp / 257)
    np.testing.assert_allclose(array, expected, atol=1)
    assert len(np.unique(array)) > 20


def test_opacity_is_kept_aside_of_the_profile() -> None:
    half = Image.new("LA", (8, 8), (64, 128))
    array = seen(encoded(half, icc_profile=grey_profile()), 8, (0, 0, 8, 8))
    np.testing.assert_allclose(array, 137 * 128 / 255 + 255 * 127 / 255, atol=1.5)  # on white
    assert checked(encoded(half, icc_profile=grey_profile())).alpha == (128, 128)


def swapped() -> bytes:
    """A profile in which blue is red."""
    return srgb().replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (lambda: Image.new("RGB", (8, 8), (200, 60, 60)), "PNG"),
        (lambda: Image.new("RGB", (8, 8), (200, 60, 60)), "TIFF"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)), "PNG"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)), "TIFF"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)), "WEBP"),
        (lambda: Image.new("RGB", (8, 8), (200, 60, 60)).quantize(4), "PNG"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)).quantize(4), "PNG"),
    ],
    ids=["RGB", "TIFF", "RGBA", "RGBA TIFF", "WebP", "P", "P with tRNS"],
)
def test_a_colour_profile_is_applied_whatever_the_mode(image: Callable[[], Image.Image], form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    blob = encoded(image(), form, icc_profile=swapped(), **options)
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8))[0, 0], (60, 60, 200), atol=1)


def test_grey_under_a_profile_for_rgb() -> None:
    blob = encoded(Image.new("L", (8, 8), 64), icc_profile=srgb())
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8)), 64, atol=1)
    assert checked(blob).warnings == ()


@pytest.mark.parametrize(
    ("mode", "form", "profile"),
    [
        ("RGB", "PNG", grey_profile()),
        ("RGBA", "PNG", grey_profile()),
        ("P", "PNG", grey_profile()),
        ("CMYK", "TIFF", srgb()),
        ("CMYK", "TIFF", grey_profile()),
        ("L", "PNG", b"no profile"),
        ("RGB", "JPEG", b"no profile"),
    ],
)
def test_a_profile_that_does_not_fit_is_warned_of(mode: str, form: str, profile: bytes) -> None:
    said = "have a colour profile that is broken or of other colours than theirs, and is ignored"
    plain, with_profile = (encoded(Image.new(mode, (8, 8)), form, **options)
                           for options in ({}, {"icc_profile": profile}))  # fmt: skip
    assert checked(with_profile).warnings == (*checked(plain).warnings, said)
    np.testing.assert_array_equal(seen(with_profile, 8, (0, 0, 8, 8)), seen(plain, 8, (0, 0, 8, 8)))


@pytest.mark.parametrize(("gamma", "is_odd"), [(45455, False), (100_000, True)])
def test_a_gamma_without_a_profile(gamma: int, is_odd: bool) -> None:
    warnings = checked(deep_png(chunk(b"gAMA", struct.pack(">I", gamma)))).warnings
    assert any("state another gamma than sRGB's, which is ignored" in text for text in warnings) == is_odd


# load_mask


def patterned(width: int, height: int) -> Image.Image:
    """RGBA whose opacity is also its red channel: what the model sees of it tells what the mask should be."""
    red = np.asarray(photo(4, width, height))[..., 0]
    return Image.fromarray(np.stack([red, red // 2, red // 3, red], axis=-1))


@pytest.mark.parametrize("kind", ["alpha", "file"])
@pytest.mark.parametrize(("width", "height"), [(96, 72), (72, 96)])
def test_masks_line_up_with_views(kind: Any, width: int, height: int) -> None:
    image = patterned(width, height)
    colours = encoded(image.convert("RGB"))
    mask = encoded(image if kind == "alpha" else image.getchannel("R"))
    target = item(40, 32, (width, height), "alpha" if kind == "alpha" else "m.png")
    views = Augmentation("random", flip=True, seed=3).views(target, 4)
    assert len({view.crop for view in views}) == 2 and views[1].flip
    made = preprocessing("#ffffff", "bilinear")
    for view in views:
        array = load_mask(mask, target, view, made, kind)
        assert (array.dtype, array.shape) == (np.float32, (32, 40))
        expected = np.asarray(load_view(colours, target, view, made))[..., 0]
        np.testing.assert_allclose(array * 255, expected, atol=1)


def test_a_mask_of_another_size_is_scaled() -> None:
    target, made = item(32, 32, (96, 64), "m.png"), preprocessing("#ffffff", "lanczos")
    image = photo(5, 96, 64).convert("L")
    small = encoded(image.resize((48, 32), Image.Resampling.BOX))
    for view in Augmentation("random", flip=True, seed=0).views(target, 4):
        full = load_mask(encoded(image), target, view, made, "file")
        np.testing.assert_allclose(load_mask(small, target, view, made, "file"), full, atol=0.08)
    edge = View((32, 0, 96, 64), False)
    assert load_mask(encoded(Image.new("L", (97, 64), 255)), target, edge, made, "file").min() == 1


def test_masks_at_their_edges() -> None:
    target, made = item(8, 8, (16, 16), "m.png"), preprocessing("#ffffff", "lanczos")
    whole = View((0, 0, 16, 16), False)

    def mask(image: Image.Image, kind: Any, **options: Any) -> np.ndarray:
        return load_mask(encoded(image, **options), target, whole, made, kind)

    assert mask(Image.new("RGB", (16, 16)), "alpha").min() == 1
    assert mask(Image.new("RGBA", (16, 16), (255, 255, 255, 0)), "file").max() == 0  # nothing is there to look at
    half = Image.new("1", (16, 16))
    half.paste(1, (8, 0, 16, 16))
    sharp = mask(half, "file")
    assert (sharp[:, 0].max(), sharp[:, -1].min()) == (0, 1)
    assert mask(half, "file", exif=turned(6))[0].max() == 0  # turned clockwise: black above
    np.testing.assert_allclose(mask(Image.fromarray(np.full((16, 16), 32896, np.uint16)), "file"), 128 / 255)


def test_no_mask_rings() -> None:
    """Lanczos would give weights below 0 and above 1 beside an edge."""
    half = Image.new("L", (64, 64), 80)
    half.paste(160, (31, 0, 64, 64))
    array = load_mask(encoded(half), item(24, 24, (64, 64)), View((0, 0, 64, 64), False), {}, "file") * 255
    assert array.min() > 79.9 and array.max() < 160.1


# Measures


def test_measures_look_at_the_foreground_only() -> None:
    array = np.full((10, 10, 3), 255, np.uint8)
    array[:, :2] = (200, 100, 50)
    array[:, 2:4] = (10, 10, 30)
    assert chroma(array) == pytest.approx((150 + 20) / 2)
    assert dark_share(array) == pytest.approx(0.5)
    assert chroma(array[:, :2]) == pytest.approx(150)


def test_measures_at_their_edges() -> None:
    blank = np.full((4, 4, 3), 240, np.uint8)
    assert (chroma(blank), dark_share(blank)) == (0.0, 0.0)
    assert chroma(np.full((1, 1, 3), (255, 255, 239), np.uint8)) == 16
    assert dark_share(np.full((1, 1, 3), 63, np.uint8)) == 1
    assert dark_share(np.full((1, 1, 3), 64, np.uint8)) == 0
