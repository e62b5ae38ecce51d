"""Train a CLIP tokenizer on the icons' names.

In: ``base/build/icons``.  Out: ``base/build/tokenizer``.  Run: ``python -m base.tokenizer`` (seconds)
"""

from __future__ import annotations

import json

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from base.icons import caption
from base.render import BUILD, ICON_SETS

VOCABULARY = 2776
MAX_TOKENS = 20  # also the padded length in training: later positions would be untrained


def main() -> None:
    slugs = sorted({path.stem for style in ICON_SETS for path in (BUILD / "icons" / style.style).glob("*.png")})
    tokenizer = train([caption(slug, "flat") for slug in slugs])
    tokenizer.save_pretrained(BUILD / "tokenizer")
    longest = max(len(tokenizer(caption(slug, "flat")).input_ids) for slug in slugs)
    print(f"{len(tokenizer)} tokens, longest caption {longest} of {MAX_TOKENS} tokens")


def train(texts: list[str]) -> CLIPTokenizer:
    """Train a byte-level BPE with CLIP's own normalizer and pre-tokenizer. The ids are in CLIP's order: bytes, merges,
    bos, eos.
    """
    blank = CLIPTokenizer()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        min_frequency=1,
        # Fixes their ids, which would otherwise follow a hash table's order; every character has one, seen or not.
        special_tokens=letters + [f"{letter}</w>" for letter in letters],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = blank.backend_tokenizer
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    for token in (blank.bos_token, blank.eos_token):
        vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]], model_max_length=MAX_TOKENS)


if __name__ == "__main__":
    main()
