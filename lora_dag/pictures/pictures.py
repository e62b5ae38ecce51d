"""Pictures: from bytes to what the model sees and what the loss looks at, and two pixel measures.

Everything here is Pillow and NumPy; the same input gives the same pixels.
"""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps

from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from lora_dag.artifacts.manifest import Item, View

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
}
FORMATS = tuple(SUFFIXES)
SIGNATURES = {  # how files start that a person may take for a picture, and pictures too broken to be opened
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF8",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
    "HTML": (b"<!doctype html", b"<html"),
    "SVG": (b"<svg", b"<?xml"),
    "PDF": (b"%PDF",),
    "Photoshop": (b"8BPS",),
    "Git LFS pointer": (b"version https://git-lfs",),
}
MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B"}
MAX_PIXELS = 80_000_000  # a few KB of PNG can claim more, and Pillow itself refuses from 179 million only
MAX_SIDE = 65_535  # of a JPEG
VERSION = 2  # of the way from bytes to pixels; part of every cache key, so raise it when load_view changes
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
THUMBNAIL = (17, 16)  # width, height: 16 x 16 differences of neighbours
DETAIL = 256  # pixels, both sides: what a thumbnail loses of a drawing of few thin strokes
SPARSE_BITS = 24  # of a thumbnail's 256: with fewer, different small words on white are near-duplicates of each other
MAX_SPARSE_BITS = 40  # up to which the detail is kept, so that a sparse picture's look-alikes have one too
DETAIL_LEVELS = 8  # either side of the background: products of two details are exact in float32
FLAT = 2.0  # of 255: the noise of a JPEG that shows nothing
MAX_DETAIL_BYTES = 8192  # a drawing's are a few hundred, those of a smooth photograph 30,000
NEAR_WHITE = 240
SEVERAL = "have several frames or pages, of which the first is taken"
DARK = 64

warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it, check_picture refuses in its own words


# Checking


@dataclass(frozen=True)
class Checked:
    """What one look at a picture's bytes tells; a function of the bytes alone."""

    width: int
    """After EXIF rotation, as is the height."""
    height: int
    format: str
    """By content: a key of ``SUFFIXES``."""
    alpha: tuple[int, int] | None
    """Smallest and largest opacity of a pixel, 0 to 255; None without an alpha channel."""
    lightest: int
    """Largest luminance, 0 to 255, laid on black where transparent: 0 for a mask that hides everything."""
    thumbnail: str
    """RGB of 17 x 16 pixels, laid on white, uint8 in base64: what near-duplicates are told by."""
    detail: str
    """For ``detail_pixels`` where the thumbnail shows almost nothing of a drawing; else empty."""
    warnings: tuple[str, ...]
    """What is allowed but seldom meant, as a predicate of several pictures: "are CMYK and converted to sRGB"."""

    @property
    def has_alpha(self) -> bool:
        """Some pixel lets the background through."""
        return self.alpha is not None and self.alpha[0] < 255


def check_picture(blob: bytes, name: str, first_frame: bool) -> Checked:
    """What the bytes hold, verified and decoded to the last pixel.

    A JPEG that was cut and then given an end mark is not told from a whole one, nor is one with some damaged blocks:
    libjpeg fills the rest with grey, warns, and Pillow drops the warning.

    Args:
        name: for messages; the format is told by content. See ``misnamed``.
        first_frame: take the first of several frames or pages.

    Raises:
        UserError: it cannot be read, has several frames, is too large, or has pixels that would be misread.
        MemoryError: the machine's fault or that of broken bytes, which cannot be told apart; names the picture.
    """
    if not blob:
        raise UserError(f"'{name}' is an empty file; restore it or remove it")
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            found = _refuse(image, first_frame)
            image.verify()  # a flipped byte in a PNG shows here only
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            image.load()
            return _describe(image, found)
    except UserError as error:
        raise UserError(f"'{name}' {error}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"'{name}' {_unidentified(blob)}") from None
    except Image.DecompressionBombError:
        raise UserError(f"'{name}' claims too many pixels; at most {MAX_PIXELS:,} are read, scale it down") from None
    except Exception as error:  # decoders raise what they like on broken bytes
        if isinstance(error, MemoryError) or "out of memory" in str(error):  # Pillow makes an OSError of it
            raise MemoryError(f"out of memory while '{name}' was decoded") from error
        what = " ".join(str(error).split()).rstrip(".")[:120]
        raise UserError(f"'{name}' is damaged ({what}); restore it or remove it") from None


def misnamed(name: str, checked: Checked) -> bool:
    """The name's suffix is another format's."""
    suffix = PurePosixPath(name).suffix.lower()
    return any(suffix in suffixes for form, suffixes in SUFFIXES.items() if form != checked.format)


def _refuse(image: Image.Image, first_frame: bool) -> list[str]:
    """Warnings about a picture that was opened but not decoded.

    Raises:
        UserError: a predicate, for the caller to put the name before.
    """
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UserError(
            f"has {width} x {height} pixels; at most {MAX_PIXELS:,} and {MAX_SIDE:,} a side are read, scale it down"
        )
    # Phones write JPEGs with a preview behind the picture (MPO); those are no animation.
    several = getattr(image, "is_animated", False) and image.format != "MPO"
    if several and not first_frame:
        raise UserError(
            "is animated or has several pages; save one as a picture, or set dataset.first_frame to true for the first"
        )
    if image.mode not in MODES or _odd_depth(image):
        cure = "save it with 8 or 16 bits per channel" if image.mode[0] in "IF" else "save it as RGB"
        raise UserError(f"has pixels of type {image.mode}{_odd_depth(image)}; {cure}")
    misread = _misread(image)
    if misread:
        raise UserError(f"is {misread}; save it with 8 bits")
    found = {
        "are CMYK and converted to sRGB": image.mode == "CMYK",
        "have 1 bit per pixel, black or white": image.mode == "1",
        SEVERAL: several,
        "state another gamma than sRGB's, which is ignored; save them with a colour profile": _odd_gamma(image),
    }
    return [text for text, applies in found.items() if applies]


def _odd_gamma(image: Image.Image) -> bool:
    """A PNG's gAMA chunk, which counts only where neither a profile nor an sRGB chunk does."""
    gamma = image.info.get("gamma")
    stronger = {"icc_profile", "srgb"} & image.info.keys()
    return gamma is not None and not stronger and abs(gamma * 2.2 - 1) > 0.05


def _odd_depth(image: Image.Image) -> str:
    """`` of 12 bits`` for a TIFF whose grey Pillow would show much too dark: it reads 12 bits as 16."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return f" of {bits[0]} bits" if image.mode.startswith("I") and tuple(bits) != (16,) else ""


def _misread(image: Image.Image) -> str | None:
    """Which of the pictures of 16 bits per channel it is that Pillow opens and shows wrong, as noise or a negative."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(284) == 2 and max(tags.get(258, (8,))[1:], default=8) > 8:
        return "a TIFF with 16-bit colours in separate planes"
    if tags.get(262) == 0 and image.mode.startswith("I"):
        return "a TIFF of 16-bit grey in which 0 is white"
    # A shade's 16 bits are compared with the 8 that are left of each pixel.
    if "transparency" in image.info and any("16" in str(tile.args) for tile in getattr(image, "tile", ())):
        return f"16-bit {'grey' if image.mode.startswith('I') else 'colour'} with a transparent shade"
    return None


def _describe(image: Image.Image, found: list[str]) -> Checked:
    full = _upright(image)
    alpha = _range(full.getchannel("A")) if full.mode in ("LA", "RGBA") else None
    if alpha == (0, 0):
        found = [*found, "are transparent all over, so that only dataset.background is seen"]
    # Before colours are converted, which takes long; bilinear weighs pixels by a triangle twice as wide as a cell.
    tiny = full.resize(THUMBNAIL, Image.Resampling.BILINEAR)
    small = _flat(tiny, "#ffffff")
    profile = full.info.get("icc_profile")
    if profile and to_srgb(tiny.convert(tiny.mode.removesuffix("A")), profile) is None:
        found = [*found, "have a colour profile that is broken or of other colours than theirs, and is ignored"]
    return Checked(
        *full.size,
        format="JPEG" if image.format == "MPO" else str(image.format),
        alpha=alpha,
        lightest=_range(_luminance(full))[1],
        thumbnail=base64.b64encode(small.tobytes()).decode("ascii"),
        detail=_detail(full) if gradient_bits(np.asarray(small)).sum() <= MAX_SPARSE_BITS else "",
        warnings=tuple(found),
    )


def _range(channel: Image.Image) -> tuple[int, int]:
    return cast(tuple[int, int], channel.getextrema())  # of one band


def _unidentified(blob: bytes) -> str:
    start = blob[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = "HEIC or AVIF" if blob[4:8] == b"ftyp" else ""
    for name, starts in SIGNATURES.items():
        kind = name if start.startswith(tuple(map(bytes.lower, starts))) else kind
    if kind in FORMATS:
        return f"is a damaged {kind}: its header cannot be read; restore it or remove it"
    seems = f" but seems to be {kind}" if kind else ""
    return f"is no JPEG, PNG, WebP, GIF, TIFF or BMP picture{seems}; convert it or remove it"


# Likeness


def thumbnail_pixels(thumbnail: str) -> np.ndarray:
    """uint8 [16, 17, 3] of ``Checked.thumbnail``."""
    width, height = THUMBNAIL
    return np.frombuffer(base64.b64decode(thumbnail), np.uint8).reshape(height, width, 3)


def gradient_bits(pixels: np.ndarray) -> np.ndarray:
    """Where the grey of a pixel is larger than its left neighbour's: bool [..., 256], row by row.

    Grey is rounded ITU-R 601 luma, as Pillow's mode L: an even area, such as a white background, gives zeros.

    Args:
        pixels: uint8 [..., 16, 17, 3].

    Source: N. Krawetz, "Kind of Like That" (hackerfactor.com, 2013): dHash, there of 9 x 8 pixels.
    """
    grey = (pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16  # [..., 16, 17]
    bits = grey[..., 1:] > grey[..., :-1]
    return bits.reshape(*bits.shape[:-2], -1)


def _detail(full: Image.Image) -> str:
    """How a picture differs from its background, the median: int8 [256, 256, 3] of -8 to 8, compressed, in base64.

    Scaled to its largest difference, so that a faint drawing is as clear as a black one; empty for photographs, which
    do not compress.
    """
    plain = _flat(full, "#ffffff", by_profile=False)
    plain = plain.reduce(max(1, min(plain.size) // (4 * DETAIL)))
    size = (DETAIL, DETAIL)
    small = [channel.convert("F").resize(size, Image.Resampling.BILINEAR) for channel in plain.split()]
    difference = np.stack([np.asarray(channel, np.float64) for channel in small], axis=-1)  # [256, 256, 3]
    difference -= np.median(difference, axis=(0, 1))
    largest = np.abs(difference).max()
    levels = np.round(difference / largest * DETAIL_LEVELS) if largest > FLAT else np.zeros_like(difference)
    packed = zlib.compress(levels.astype(np.int8).tobytes(), 9)
    return base64.b64encode(packed).decode("ascii") if len(packed) <= MAX_DETAIL_BYTES else ""


def detail_pixels(detail: str) -> np.ndarray:
    """int8 [256, 256, 3] of ``Checked.detail``."""
    return np.frombuffer(zlib.decompress(base64.b64decode(detail)), np.int8).reshape(DETAIL, DETAIL, 3)


# From bytes to pixels


def preprocessing(background: str, image_interpolation_mode: str) -> dict[str, Any]:
    """What, beside the bytes and the view, decides the pixels that ``load_view`` returns."""
    return {"background": background.lower(), "filter": image_interpolation_mode, "version": VERSION}


def load_view(blob: bytes, item: Item, view: View, preprocessing: dict[str, Any]) -> Image.Image:
    """One view of a picture as the model sees it: RGB of ``item.width`` x ``item.height``.

    Args:
        preprocessing: the manifest's.
    """
    return cut_view(decode(blob, preprocessing), item, view, preprocessing)


def decode(blob: bytes, preprocessing: dict[str, Any]) -> Image.Image:
    """The whole picture, upright, in sRGB: what all of its views are cut from."""
    with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        return to_rgb(image, preprocessing["background"])


def cut_view(upright: Image.Image, item: Item, view: View, preprocessing: dict[str, Any]) -> Image.Image:
    """RGB of ``item.width`` x ``item.height`` from a decoded picture."""
    seen = upright.resize((item.width, item.height), FILTERS[preprocessing["filter"]], box=view.crop)
    return ImageOps.mirror(seen) if view.flip else seen


def load_mask(
    blob: bytes, item: Item, view: View, preprocessing: dict[str, Any], kind: Literal["alpha", "file"]
) -> np.ndarray:
    """How much the loss looks at each pixel of a view: float32 [item.height, item.width], 0 to 1.

    Args:
        blob: the picture's bytes for ``alpha``: its opacity, 1 where it has no alpha channel;
            those of its mask for ``file``: luminance, black where transparent. The mask may have another size.
        preprocessing: the manifest's; its filter is for colours and could ring below 0 here.
    """
    return cut_mask(decode_mask(blob, kind), item, view)


def decode_mask(blob: bytes, kind: Literal["alpha", "file"]) -> Image.Image:
    """The whole mask, upright, mode L: what the masks of all views are cut from."""
    with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        full = _upright(image)
    if kind == "file":
        return _luminance(full)
    return full.getchannel("A") if full.mode in ("LA", "RGBA") else Image.new("L", full.size, 255)


def cut_mask(channel: Image.Image, item: Item, view: View) -> np.ndarray:
    """float32 [item.height, item.width], 0 to 1, from a decoded mask."""
    across, down = channel.width / item.source_width, channel.height / item.source_height
    left, top, right, bottom = view.crop
    box = (left * across, top * down, min(right * across, channel.width), min(bottom * down, channel.height))
    seen = channel.resize((item.width, item.height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(ImageOps.mirror(seen) if view.flip else seen, np.float32) / 255


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Turned upright by EXIF, in sRGB, laid on ``background`` (#rrggbb) where transparent, 16-bit grey scaled to 8."""
    return _flat(_upright(image), background)


def _upright(image: Image.Image) -> Image.Image:
    """Turned upright by EXIF, without a palette; mode L, I;16, RGB or CMYK, or LA or RGBA where it has transparency.

    These are the modes that a profile can belong to, so ``_flat`` applies it before anything becomes RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return image if image.mode == "I;16" else image.convert("I").convert("I;16")  # without "I", Pillow clips to 255
    is_grey = image.mode in ("1", "L", "LA", "La")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("LA" if is_grey else "RGBA")
    if image.mode == "CMYK":
        return image
    return image.convert("L" if is_grey else "RGB")


def _flat(image: Image.Image, background: str, by_profile: bool = True) -> Image.Image:
    """From the embedded profile to sRGB, then on ``background``."""
    colours = image.convert(image.mode.removesuffix("A"))
    flat = to_srgb(colours, image.info.get("icc_profile")) if by_profile else None
    flat = _eight_bits(colours).convert("RGB") if flat is None else flat
    if image.mode in ("LA", "RGBA"):
        flat.putalpha(image.getchannel("A"))
        flat = Image.alpha_composite(Image.new("RGBA", image.size, background), flat)
    return flat.convert("RGB")


def _luminance(image: Image.Image) -> Image.Image:
    """Mode L, black where transparent; profiles are for colours and play no part."""
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "#000000"), image.convert("RGBA"))
    return _eight_bits(image).convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I;16":
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))  # Pillow would clip


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """RGB by an embedded ICC profile; None where there is none, or one that is broken or of another colour space.

    Browsers ignore such a profile too; they also read grey under a profile for RGB as three equal channels.

    Args:
        image: L, I;16, RGB or CMYK.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB":
            image = _eight_bits(image).convert("RGB") if image.mode in ("L", "I;16") else image
        # Little CMS shortens a grey curve to a table that is wrong by up to 10 of 255 in the dark of a linear one.
        flags = ImageCms.Flags.NOOPTIMIZE if image.mode in ("L", "I;16") else ImageCms.Flags.NONE
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


# Pixel measures


def chroma(array: np.ndarray) -> float:
    """How colourful the drawing is: mean of (largest - smallest channel) over the foreground, 0 to 255.

    The foreground is every pixel with a channel below 240, that is, not near white; a blank picture gives 0.

    Args:
        array: uint8 [..., 3].
    """
    foreground = _foreground(array)
    return float(np.ptp(foreground, axis=-1).mean()) if len(foreground) else 0.0


def dark_share(array: np.ndarray) -> float:
    """Share of the foreground (see ``chroma``) whose largest channel is below 64: near black. 0 to 1.

    Args:
        array: uint8 [..., 3].
    """
    foreground = _foreground(array)
    return float((foreground.max(axis=-1) < DARK).mean()) if len(foreground) else 0.0


def _foreground(array: np.ndarray) -> np.ndarray:
    pixels = np.asarray(array).reshape(-1, 3)
    return pixels[pixels.min(axis=-1) < NEAR_WHITE]
