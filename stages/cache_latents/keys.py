"""What names an entry of the store: sha256 over what decides its tensors, but for some of their last bits.

The name and the folder of a picture's file decide nothing. Versions, processor model and thread count can move the
last bits, and are left out all the same: they differ between the machines that share a store, and a library update
would encode everything again. An entry records them, and a run warns of a mixture; see environments.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_dag.artifacts.manifest import Item, Manifest, View
from lora_dag.core.files import sha256_json

FORMAT = 1  # of latents and text entries; raise it when the meaning of their tensors changes
MASK_FORMAT = 2  # of masks; none of format 2 is zero all over
OPAQUE = {"background": "#ffffff"}


@dataclass(frozen=True)
class Setting:
    """What names a kind of entries beside the picture or the caption."""

    components: dict[str, str]
    """Digest of each component of the base that encodes."""
    family: str
    dtype: str
    device: str
    """cpu, cuda or mps."""
    batch_size: int
    tiling: bool = False

    def ingredients(self) -> dict[str, Any]:
        common = {
            "family": self.family,
            "dtype": self.dtype,
            "device": self.device,
            "batch_size": self.batch_size,
            "format": FORMAT,
        }
        return common | ({"tiling": True} if self.tiling else {})


def picture_key(item: Item, view: View, manifest: Manifest, setting: Setting) -> str:
    """Of the latents of one view."""
    return sha256_json(shown(item, view, manifest) | {"vae": setting.components} | setting.ingredients())


def caption_key(caption: str, setting: Setting) -> str:
    """Of the conditioning of one caption."""
    return sha256_json({"caption": caption, "text": setting.components} | setting.ingredients())


def mask_key(item: Item, view: View, manifest: Manifest, factor: int) -> str:
    """Of the weights of one view's latent pixels, ``factor`` pixels wide each; no model is part of it."""
    size = [item.width // factor, item.height // factor]
    return sha256_json(
        shown(item, view, manifest) | masked(item, manifest) | {"latent_size": size, "format": MASK_FORMAT}
    )


def content(item: Item, view: View, manifest: Manifest) -> str:
    """Names a view, and its mask, by what they show, whatever encodes it."""
    return sha256_json(shown(item, view, manifest) | masked(item, manifest))


def shown(item: Item, view: View, manifest: Manifest) -> dict[str, Any]:
    """What decides the pixels of one view, whatever encodes them."""
    return {
        "picture": item.sha256,
        "crop": view.crop,
        "flip": view.flip,
        "size": [item.width, item.height],
        "preprocessing": preprocessing_of(item, manifest),
    }


def preprocessing_of(item: Item, manifest: Manifest) -> dict[str, Any]:
    """The manifest's, with the usual background for an opaque picture: no background changes what it shows.

    A constant in place of the colour, rather than no colour, keeps the keys of opaque pictures that were encoded when
    the background was part of every key.
    """
    return manifest.preprocessing if item.transparent else manifest.preprocessing | OPAQUE


def masked(item: Item, manifest: Manifest) -> dict[str, Any]:
    """What decides the mask beside the view; empty without one."""
    if item.mask is None:
        return {}
    kind = "alpha" if item.mask == "alpha" else "file"
    return {"mask": [kind, item.mask_sha256], "unmasked_weight": manifest.unmasked_weight}
