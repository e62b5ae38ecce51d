"""Tiny random image-text models of the true classes, in the transformers layout, built offline."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.helpers.pipelines import clip_tokenizer, qwen_tokenizer

CONTEXT = 12
"""Tokens of a caption that the models read."""


def save(kind: str, folder: Path) -> Path:
    """clip, siglip or siglip2, about 50,000 parameters, in the transformers layout.

    siglip's tokenizer keeps upper case, as that of SigLIP 2's models of one size, which are of this type.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer() if kind == "siglip" else clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    text = sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    vision = sizes | {"image_size": 16, "patch_size": 4}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        processor = CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer)
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer)
    else:
        vision = sizes | {"num_patches": 16, "patch_size": 4}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
        processor = Siglip2Processor(Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
