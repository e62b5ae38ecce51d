"""Tiny random pipelines of the true classes, below 1 M parameters each, built offline in the diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from base.tokenizer import train

CORPUS = ["red apple", "blue boat", "green circle, ink icon", "thing 0 1 2 3 4 5 6 7"]


def clip_tokenizer() -> CLIPTokenizer:
    return train(CORPUS)


def clip(cls: Any, tokenizer: CLIPTokenizer, hidden_size: int = 32) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            projection_dim=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    """Unigram, ids as in T5: padding, end, unknown, then pieces."""
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in vocab], extra_ids=0, model_max_length=512)


def t5(tokenizer: T5Tokenizer, d_model: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=d_model,
            d_kv=16,
            d_ff=2 * d_model,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A token per byte, and those of the chat; the template is Qwen3's for a person's message."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    return Qwen2Tokenizer(
        vocab=vocab,
        extra_special_tokens=special[1:],
        model_max_length=4096,
        chat_template="{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    )


def qwen(tokenizer: Qwen2Tokenizer, hidden_size: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def vae(latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    """4 pixels per latent pixel."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
        **{"scaling_factor": 0.5} | options,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Encoders of 16 and 32 features, so that a swap shows; pixels in multiples of 8."""
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16 + 32,
            attention_head_dim=4,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """As SD 3.5: normalised queries and keys, a block with a second attention; CLIP's features are padded to T5's."""
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 32),
        text_encoder_3=t5(tokenizer_3, 64),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        text_encoder_2=t5(tokenizer_2, 32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=4 * 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def z_image() -> ZImagePipeline:
    """Trained padding tokens are not the zeros that they start as."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=(4, 6, 6),
        axes_lens=(1024, 32, 32),
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        vae=vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


BUILDERS: dict[str, Callable[[], Any]] = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "z_image": z_image}


def build(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    pipeline = BUILDERS[name]()
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) < 1_000_000
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
