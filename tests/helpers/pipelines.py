"""Parts of tiny random pipelines, of the true classes: tokenizers, text encoders, a VAE."""

from __future__ import annotations

import json
from typing import Any

from diffusers import (
    AutoencoderKL,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
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
    vocab = [(piece, round(score, 6)) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    pieces = sorted(vocab[len(special) :], key=lambda piece: (-piece[1], piece[0]))  # ties come in any order
    return T5Tokenizer(vocab=vocab[: len(special)] + pieces, extra_ids=0, model_max_length=512)


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
