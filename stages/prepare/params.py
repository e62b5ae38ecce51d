"""Section ``dataset``: which images and captions are used, and how images are cropped and scaled."""

from __future__ import annotations

import json
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lora_dag.core.params import LocalPath, Params
from lora_dag.core.setting_problem import setting_problem
from stages.prepare.captions import character_problem
from stages.prepare.file_names import nfc


def require_plain_text(value: str | None) -> str | None:
    """Refuse the characters that captions of sources are refused for."""
    if problem := character_problem(value or ""):
        raise setting_problem(problem.code, problem.about(json.dumps(value)[:80]))
    return value


class Subset(Params):
    """One of several sources below ``dataset.source``. Keys that are left out use the values of section ``dataset``."""

    path: str = Field(min_length=1)
    """Folder, relative to dataset.source. "." is dataset.source itself."""
    repeats: int = Field(default=1, ge=1, le=10_000)
    """Number of times that each image is used per epoch."""
    caption_column: str | None = Field(default=None, min_length=1)
    """Key of the caption in this folder's metadata. null: dataset.caption_column."""
    instance_prompt: str | None = Field(default=None, min_length=1)
    """Caption of every image in this folder. null: dataset.instance_prompt."""
    caption_prefix: str | None = None
    """Text before every caption of this folder. null: dataset.caption_prefix."""
    regularization: bool = False
    """Prior-preservation images. They are used for training only, never for evaluation."""
    loss_weight: float = Field(default=1.0, gt=0, le=1000)
    """Factor of the loss of these images."""

    _is_plain_text = field_validator("instance_prompt", "caption_prefix")(require_plain_text)


class DatasetParams(Params):
    """Section ``dataset``."""

    source: LocalPath
    """Folder of images. `lora-dag import` makes one from Parquet files, WebDataset (.tar) files or a Hub dataset."""
    subsets: list[Subset] | None = Field(min_length=1)
    """Several folders below ``source``. null: ``source`` is one folder of images."""
    caption_column: str = Field(min_length=1)
    """Key of the caption in metadata rows and .json files."""
    instance_prompt: str | None = Field(min_length=1)
    """Caption of every image, for a folder without captions. null: the folder has captions."""
    caption_prefix: str
    """Text before every caption, such as a trigger word: "sks, ". Two words are separated by a blank."""
    tag_separator: str = Field(min_length=1)
    """Separator of the tags in a caption: a comma, ";", "，" or a blank (booru tags)."""
    shuffle_tags: bool
    """Whether each variant of a caption has its tags in another order."""
    keep_tags: int = Field(ge=0)
    """Number of leading tags that are never moved or dropped."""
    tag_dropout: float = Field(ge=0, lt=1)
    """Share of the tags after ``keep_tags`` that each variant omits."""
    num_caption_variants: int = Field(ge=1, le=1000)
    """Seeded variants of each caption. All are encoded; each training step uses one at random."""
    resolution: int = Field(ge=8, le=4096)
    """Pixels: side of the square image that the model sees. With ``aspect_buckets``: square root of the area."""
    aspect_buckets: bool
    """Whether images keep a size near their own aspect ratio instead of a square."""
    bucket_step: int = Field(ge=8, le=512)
    """Bucket sides are multiples of this number of pixels."""
    max_aspect_ratio: float = Field(ge=1)
    """Longer side / shorter side of the widest bucket. With ``aspect_buckets``, wider images are rejected."""
    max_upscale: float = Field(ge=1)
    """Largest enlargement factor. Images that are too small for it are rejected."""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear"]
    """Filter of the resize."""
    crop: Literal["center", "random"]
    """Position of the crop: the center, or ``cache.num_variants`` seeded positions per image."""
    flip: bool
    """Whether every second variant of an image is mirrored. Needs ``cache.num_variants`` of 2 or more."""
    background: str = Field(pattern="^#[0-9a-fA-F]{6}$", examples=["#ffffff"])
    """Color #rrggbb behind transparent pixels."""
    mask: str | None = Field(min_length=1)
    """Area that the loss covers: null for everything, ``alpha`` for opaque pixels, a folder of masks below a
    source, or ``*-masklabel`` for the file fox-masklabel.png beside fox.jpg."""
    unmasked_weight: float = Field(ge=0, lt=1)
    """Weight of the loss where the mask is black."""
    first_frame: bool
    """Whether the first frame of animations and multi-page files is used. Otherwise they are rejected."""
    heldout_fraction: float | None = Field(gt=0, lt=1)
    """Share of the images that is never used for training. A hash of its content decides for each image, so the
    share is approximate and new images never move existing ones."""
    heldout_split: str | None = Field(min_length=1)
    """Name of the split to hold out instead: a folder or a value of the ``split`` column, such as test."""
    near_duplicate_bits: int | None = Field(ge=0, le=64)
    """Largest number of different bits between the 256-bit difference hashes of near-duplicates, which stay in one
    split. null: no check."""
    on_bad: Literal["error", "skip"]
    """Whether a bad image or row stops the stage, or is left out and listed."""
    max_bad_fraction: float = Field(ge=0, lt=1)
    """Largest share of images that ``on_bad: skip`` may leave out."""
    seed: int = Field(ge=0)
    """Seed of split, crops and caption variants."""

    _is_plain_text = field_validator("instance_prompt", "caption_prefix", "tag_separator")(require_plain_text)

    @field_validator("heldout_split")
    @classmethod
    def _one_unicode_form(cls, value: str | None) -> str | None:
        """Compose accents: split names come from folders, and other systems write their accents in another form."""
        return None if value is None else nfc(value)

    @field_validator("mask")
    @classmethod
    def _one_ending(cls, value: str | None) -> str | None:
        if value is not None and "*" in value and not re.fullmatch(r"\*[^*/]+", value):
            text = f"got '{value}', but a folder or an ending such as *-masklabel is expected."
            raise setting_problem("mask-invalid", text)
        return value

    @model_validator(mode="after")
    def _check(self) -> DatasetParams:
        if self.caption_column == "file_name":
            text = "got 'file_name', which is the column of file names. Name the column of the captions."
            raise setting_problem("caption-column-invalid", text, "caption_column")
        if self.heldout_fraction is None and self.heldout_split is None:
            text = "got null, and heldout_split is null too. Set one of them."
            raise setting_problem("heldout-ambiguous", text, "heldout_fraction")
        if self.heldout_fraction is not None and self.heldout_split is not None:
            split = f"heldout_split is '{self.heldout_split}'"
            text = f"got {self.heldout_fraction}, but {split}. Set one of them to null."
            raise setting_problem("heldout-ambiguous", text, "heldout_fraction")
        self._check_variants()
        if self.unmasked_weight and self.mask is None:
            text = f"{self.unmasked_weight} has no effect without dataset.mask. Set dataset.mask, or this to 0."
            raise setting_problem("setting-ignored", text, "unmasked_weight")
        paths = [subset.path for subset in self.subsets or []]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            text = f"the path '{twice}' is listed twice. List it once and set its repeats."
            raise setting_problem("value-twice", text, "subsets")
        if self.aspect_buckets and self.resolution % self.bucket_step:
            near = max(1, round(self.resolution / self.bucket_step)) * self.bucket_step
            text = f"got {self.resolution}, which is not a multiple of bucket_step {self.bucket_step}. Write {near}."
            raise setting_problem("resolution-not-multiple", text, "resolution")
        return self

    def _check_variants(self) -> None:
        varied = self.shuffle_tags or self.tag_dropout > 0
        if self.num_caption_variants > 1 and not varied:
            text = (
                f"{self.num_caption_variants} has no effect without shuffle_tags or tag_dropout, as all variants are "
                "equal. Set one of them, or this to 1."
            )
            raise setting_problem("setting-ignored", text, "num_caption_variants")
        if varied and self.num_caption_variants == 1:
            key = "shuffle_tags true" if self.shuffle_tags else f"tag_dropout {self.tag_dropout}"
            text = (
                f"1 with {key} would fix one random order or choice of tags for all steps. Set it to 8, or"
                " shuffle_tags to false and tag_dropout to 0."
            )
            raise setting_problem("caption-variants-frozen", text, "num_caption_variants")
        if self.keep_tags and not varied:
            text = f"{self.keep_tags} has no effect without shuffle_tags or tag_dropout. Set one of them, or this to 0."
            raise setting_problem("setting-ignored", text, "keep_tags")

    def as_subsets(self) -> list[Subset]:
        """Return the sources, with this section's values for the keys that a subset leaves out."""
        defaults = {
            "caption_column": self.caption_column,
            "instance_prompt": self.instance_prompt,
            "caption_prefix": self.caption_prefix,
        }
        return [
            subset.model_copy(update={name: value for name, value in defaults.items() if getattr(subset, name) is None})
            for subset in self.subsets or [Subset(path=".")]
        ]
