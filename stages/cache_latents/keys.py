"""Keys of the store: sha256 over all inputs that determine an entry's tensors, except for some of their last bits.

A key does not depend on an image's file name or folder. It also leaves out versions, processor model and thread count,
which can change last bits: they differ between machines that share a store, and a library update would encode all
again. Entries record them, and a run warns of a mix; see environments.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_dag.artifacts import packing
from lora_dag.artifacts.manifest import Item, Manifest, View
from lora_dag.core.files import sha256_json

FORMAT = 1  # of latents and text entries; raise it when the meaning of their tensors changes
MASK_FORMAT = 2  # of masks; in format 2 no mask is zero everywhere
OPAQUE = {"background": "#ffffff"}


@dataclass(frozen=True)
class Setting:
    """Part of a key that all entries of a kind share."""

    components: dict[str, str]
    """Component of the base model that encodes -> sha256 of its files."""
    family: str
    dtype: str
    device: str
    """cpu, cuda or mps."""
    batch_size: int
    tiling: bool = False

    def key_fields(self) -> dict[str, Any]:
        """Return the values that go into a key, without the components."""
        common = {
            "family": self.family,
            "dtype": self.dtype,
            "device": self.device,
            "batch_size": self.batch_size,
            "format": FORMAT,
        }
        return common | ({"tiling": True} if self.tiling else {})


def image_key(item: Item, view: View, manifest: Manifest, setting: Setting) -> str:
    """Return the key of the latents of one view."""
    return sha256_json(view_inputs(item, view, manifest) | {"vae": setting.components} | setting.key_fields())


def caption_key(caption: str, setting: Setting, form: int) -> str:
    """Return the key of the embeddings of one caption in a form, which versions that do not know the form never read.

    The key of form 1 does not name it, as in the first version.
    """
    fields = {"caption": caption, "text": setting.components} | setting.key_fields()
    return sha256_json(fields | ({} if form == packing.FLOAT32 else {"text_form": form}))


def mask_key(item: Item, view: View, manifest: Manifest, factor: int) -> str:
    """Return the key of the mask of one view, in latent pixels of ``factor`` pixels. No model is part of it."""
    size = [item.width // factor, item.height // factor]
    return sha256_json(
        view_inputs(item, view, manifest) | mask_inputs(item, manifest) | {"latent_size": size, "format": MASK_FORMAT}
    )


def content_digest(item: Item, view: View, manifest: Manifest) -> str:
    """Return the digest of a view and its mask, independent of the model that encodes them."""
    return sha256_json(view_inputs(item, view, manifest) | mask_inputs(item, manifest))


def view_inputs(item: Item, view: View, manifest: Manifest) -> dict[str, Any]:
    """Return all inputs that determine the pixels of one view."""
    return {
        "picture": item.sha256,
        "crop": view.crop,
        "flip": view.flip,
        "size": [item.width, item.height],
        "preprocessing": preprocessing_of(item, manifest),
    }


def preprocessing_of(item: Item, manifest: Manifest) -> dict[str, Any]:
    """Return the manifest's preprocessing; for an opaque image with a constant background, since it is never visible.

    A constant rather than no color keeps the keys of older versions, where the background was part of every key.
    """
    return manifest.preprocessing if item.transparent else manifest.preprocessing | OPAQUE


def mask_inputs(item: Item, manifest: Manifest) -> dict[str, Any]:
    """Return all inputs that determine the mask, besides those of the view; empty without a mask."""
    if item.mask is None:
        return {}
    kind = "alpha" if item.mask == "alpha" else "file"
    return {"mask": [kind, item.mask_sha256], "unmasked_weight": manifest.unmasked_weight}
