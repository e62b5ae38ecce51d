"""Section ``dataset``: which pictures and captions, and how a picture is brought to what the model sees."""

from __future__ import annotations

import json
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lora_dag.core.params import LocalPath, Params
from stages.prepare.captions import odd_characters
from stages.prepare.names import nfc


def plain_text(value: str | None) -> str | None:
    """Refuse what a caption of any source is refused for."""
    odd = odd_characters(value or "")
    if odd:
        raise ValueError(f"{json.dumps(value)[:80]} {odd}")
    return value


class Subset(Params):
    """One of several sources below ``dataset.source``; what is left out falls back to section ``dataset``."""

    path: str = Field(min_length=1)
    """Folder, relative to dataset.source; "." is dataset.source itself."""
    repeats: int = Field(default=1, ge=1, le=10_000)
    """How often each picture comes up per epoch."""
    caption_column: str | None = Field(default=None, min_length=1)
    instance_prompt: str | None = Field(default=None, min_length=1)
    caption_prefix: str | None = None
    regularization: bool = False
    """Prior-preservation pictures: trained on, never held out, and no part of any evidence."""
    loss_weight: float = Field(default=1.0, gt=0, le=1000)
    """Factor of these pictures' loss."""

    _plain = field_validator("instance_prompt", "caption_prefix")(plain_text)


class DatasetParams(Params):
    """Section ``dataset``."""

    source: LocalPath
    """Folder of pictures; `lora-dag import` makes one of Parquet or WebDataset (.tar) files or a Hub dataset."""
    subsets: list[Subset] | None = Field(min_length=1)
    """Several sources below ``source``; null for ``source`` as one."""
    caption_column: str = Field(min_length=1)
    """Key of the caption in metadata rows and .json files."""
    instance_prompt: str | None = Field(min_length=1)
    """The caption of every picture, for a folder that has no captions; null where it has."""
    caption_prefix: str
    """Put before every caption, such as a trigger word: "sks, ". A blank is put between two words."""
    tag_separator: str = Field(min_length=1)
    """What separates the tags of a caption: a comma, or such as ";", "，" or a blank (booru)."""
    shuffle_tags: bool
    """Order the tags of a caption anew in each variant."""
    keep_tags: int = Field(ge=0)
    """Leading tags that are neither moved nor dropped."""
    tag_dropout: float = Field(ge=0, lt=1)
    """Share of the other tags that a variant leaves out."""
    num_caption_variants: int = Field(ge=1, le=1000)
    """Seeded variants of each caption, all encoded; training draws one per step."""
    resolution: int = Field(ge=8, le=4096)
    """Pixels: side of the square that the model sees; with buckets, the square root of their area."""
    aspect_buckets: bool
    """Sizes near a picture's own aspect ratio instead of a square."""
    bucket_step: int = Field(ge=8, le=512)
    """Bucket sides are multiples of this many pixels."""
    max_aspect_ratio: float = Field(ge=1)
    """Longer side over shorter side: the widest bucket; with aspect_buckets, wider pictures are refused."""
    max_upscale: float = Field(ge=1)
    """A picture that would be enlarged more than this is refused."""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear"]
    """Filter of the resize."""
    crop: Literal["center", "random"]
    """Where a picture is cut to shape: in the middle, or at seeded places (cache.num_variants of them)."""
    flip: bool
    """Every other variant of a picture is mirrored; needs cache.num_variants of at least 2."""
    background: str = Field(pattern="^#[0-9a-fA-F]{6}$")
    """Colour #rrggbb that transparent pixels are laid on."""
    mask: str | None = Field(min_length=1)
    """What the loss looks at: null for everything, ``alpha`` for opaque pixels, a folder of masks below a source, or
    ``*-masklabel`` for fox-masklabel.png beside fox.jpg."""
    unmasked_weight: float = Field(ge=0, lt=1)
    """Weight of the loss where the mask is black."""
    first_frame: bool
    """Take the first frame of animations and multi-page files instead of refusing them."""
    heldout_fraction: float | None = Field(gt=0, lt=1)
    """Share of the pictures that is never trained on, chosen by content."""
    heldout_split: str | None = Field(min_length=1)
    """Named split to hold out instead: a folder or a value of the ``split`` column, such as test."""
    near_duplicate_bits: int | None = Field(ge=0, le=64)
    """Pictures whose 256-bit difference hashes differ in at most this many bits stay on one side; null for no check."""
    on_bad: Literal["error", "skip"]
    """What a bad picture or row does: stop the stage, or be left out and listed."""
    max_bad_fraction: float = Field(ge=0, lt=1)
    """With on_bad skip: the share of pictures that may be left out."""
    seed: int = Field(ge=0)
    """Decides split, crops and caption variants."""

    _plain = field_validator("instance_prompt", "caption_prefix", "tag_separator")(plain_text)

    @field_validator("heldout_split")
    @classmethod
    def _one_unicode_form(cls, value: str | None) -> str | None:
        """Names of splits come from folders, whose accents another system writes in another form."""
        return None if value is None else nfc(value)

    @field_validator("mask")
    @classmethod
    def _one_ending(cls, value: str | None) -> str | None:
        if value is not None and "*" in value and not re.fullmatch(r"\*[^*/]+", value):
            raise ValueError(f"'{value}' is neither a folder nor an ending; expected such as *-masklabel")
        return value

    @model_validator(mode="after")
    def _check(self) -> DatasetParams:
        if self.caption_column == "file_name":
            raise ValueError("caption_column 'file_name' is the column of file names; name the one with the captions")
        if (self.heldout_fraction is None) == (self.heldout_split is None):
            raise ValueError("set one of heldout_fraction and heldout_split, and null for the other")
        varied = self.shuffle_tags or self.tag_dropout > 0
        if self.num_caption_variants > 1 and not varied:
            raise ValueError(
                f"num_caption_variants {self.num_caption_variants} needs shuffle_tags or tag_dropout; "
                "without them every variant is the caption itself"
            )
        if varied and self.num_caption_variants == 1:
            key = "shuffle_tags true" if self.shuffle_tags else f"tag_dropout {self.tag_dropout}"
            raise ValueError(
                f"{key} with num_caption_variants 1 would freeze one drawn order or choice of tags for the whole"
                " training; set num_caption_variants to 8, say, or shuffle_tags to false and tag_dropout to 0"
            )
        if self.keep_tags and not varied:
            raise ValueError(
                f"keep_tags {self.keep_tags} needs shuffle_tags or tag_dropout; without them no tag is moved or dropped"
            )
        if self.unmasked_weight and self.mask is None:
            raise ValueError(f"unmasked_weight {self.unmasked_weight} needs a mask")
        paths = [subset.path for subset in self.subsets or []]
        if len(set(paths)) < len(paths):
            raise ValueError("subsets names a path twice; use repeats")
        if self.aspect_buckets and self.resolution % self.bucket_step:
            raise ValueError(f"resolution {self.resolution} is no multiple of bucket_step {self.bucket_step}")
        return self

    def as_subsets(self) -> list[Subset]:
        """The sources, with this section's values where a subset names none."""
        defaults = {
            "caption_column": self.caption_column,
            "instance_prompt": self.instance_prompt,
            "caption_prefix": self.caption_prefix,
        }
        return [
            subset.model_copy(update={name: value for name, value in defaults.items() if getattr(subset, name) is None})
            for subset in self.subsets or [Subset(path=".")]
        ]
