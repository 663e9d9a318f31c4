"""Build small random text encoders and their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from small_models import spread

PROMPTS = ["a cat", "some dog", "the car", "no"]
# Tokens of a prompt for CLIP.
TOKENS = 16
PROCESSOR = {
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 24, "width": 24},
    "resample": 3,
}


def letters_tokenizer(folder: Path, *, max_length: int = TOKENS) -> Any:
    """Build a CLIP tokenizer of single letters; start and end are tokens 52 and 53."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length
    )


def clip(width: int, *, projected: bool, seed: int) -> Any:
    """Build a small CLIP text encoder; `projected` adds the projection to a pooled vector."""
    import transformers

    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=52,
        eos_token_id=53,
    )
    encoder = spread(getattr(transformers, name)(config), seed=seed)
    with torch.no_grad():  # so that prompts differ by more than their common bias
        for part, value in encoder.named_parameters():
            if part.endswith(("token_embedding.weight", "norm.weight", "norm1.weight")):
                value.mul_(4)
    return encoder


def t5(folder: Path, width: int, *, seed: int) -> tuple[Any, Any]:
    """Build a small T5 encoder, and a tokenizer of single letters with its files in `folder`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters]
    fast = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(vocabulary),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    return spread(encoder, seed=seed), tokenizer


def gemma(width: int, *, seed: int) -> tuple[Any, Any]:
    """Build a small Gemma, and a tokenizer of the words of `PROMPTS` that pads on the left."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<bos>", "<unk>", *dict.fromkeys(" ".join(PROMPTS).split())]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.padding_side = "left"
    config = transformers.Gemma2Config(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
    )
    return spread(transformers.Gemma2Model(config), seed=seed), tokenizer


def clip_folder(folder: Path, **vision: Any) -> Any:
    """Save a small CLIP with random weights in the layout of openai/clip-vit-base-patch32."""
    import transformers

    tokenizer = letters_tokenizer(folder, max_length=32)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    image = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    } | vision
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=20)
    model = spread(transformers.CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(4.6)  # 100, as in published models
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return model
