"""The text encoders' output for every caption that a training can draw."""

from __future__ import annotations

from functools import cached_property

from lora_dag.artifacts.store import Kind
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
        self.keys = {caption: caption_key(caption, setting) for caption in sorted(captions)}
        self.jobs = {key: caption for caption, key in self.keys.items()}

    def fill(self, keys: list[str]) -> None:
        encode_into_store(self, self.encoder, keys)

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
