"""The text encoders' output for every caption that a training can draw."""

from __future__ import annotations

from functools import cached_property

from lora_dag.artifacts import packing
from lora_dag.artifacts.store import Entry, Kind
from lora_dag.core.console import log, plural
from lora_dag.core.progress import counted
from stages.cache_latents.context import Context
from stages.cache_latents.encoding import Encoder, Shape, Tensors
from stages.cache_latents.fill_store import encode_into_store
from stages.cache_latents.keys import Setting, caption_key


class CaptionEncoder:
    """Encoder of every caption that a training can draw, and of the empty one."""

    kind: Kind = "text"
    unit = "caption"

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.encoded: set[str] = set()
        items = context.manifest.items
        captions = {"", *(caption for item in items for caption in (item.caption, *context.captions(item)))}
        self.form = packing.form_of(setting.dtype)
        self.keys = {caption: caption_key(caption, setting, self.form) for caption in sorted(captions)}
        self.jobs = {key: caption for caption, key in self.keys.items()}
        self.earlier = {key: caption_key(caption, setting, packing.FLOAT32) for caption, key in self.keys.items()}

    def fill(self, keys: list[str]) -> None:
        encode_into_store(self, self.encoder, keys)

    def save(self, key: str, tensors: Tensors) -> None:
        self.context.save(self.kind, key, self.formed(tensors))

    def formed(self, tensors: Tensors) -> Tensors:
        """Return float32 embeddings in full length in the form of this setting."""
        return tensors if self.form == packing.FLOAT32 else packing.pack(tensors, self.setting.dtype)

    def load_earlier(self, key: str) -> Entry | None:
        """Return the entry of this caption in form 1: float32 in full length. It holds the same values."""
        return self.context.store.load(self.kind, self.earlier[key])

    def reuse(self, keys: list[str]) -> list[str]:
        """Convert entries that an earlier version made in form 1, and return the keys without such an entry."""
        store = self.context.store
        found = [key for key in keys if store.path(self.kind, self.earlier[key]).exists()]
        converted = {key for key in counted("converted", found, len(found)) if self.convert(key)}
        if converted:
            entries = plural(len(converted), "entry", "entries")
            log.info("captions    %s of an earlier version converted; `lora-dag gc` deletes the earlier ones", entries)
        return [key for key in keys if key not in converted]

    def convert(self, key: str) -> bool:
        """Save the entry of form 1 in the present form; return False if it is damaged."""
        entry = self.load_earlier(key)
        if entry is not None:
            self.context.store.save(self.kind, key, self.formed(entry.tensors), entry.made_by)
        return entry is not None

    @cached_property
    def encoder(self) -> Encoder[str]:
        family, model, device = self.context.family, self.context.model, self.context.device
        text = family.load_text(model, device)

        def encode(captions: list[str]) -> Tensors:
            return family.encode_prompts(text, captions)

        def blank(caption: str) -> str:
            return ""

        size = self.setting.batch_size
        return Encoder(self.kind, self.jobs.__getitem__, encode, blank, self.shape, model, device, size)

    def shape(self, key: str) -> Shape:
        return ()  # tokenizers pad all captions to one length

    def units(self, key: str) -> int:
        return 1
