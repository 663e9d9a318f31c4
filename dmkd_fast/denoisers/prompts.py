"""Encode prompts, one for each class of a text-to-image model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.runtime.errors import UserError, one_line
from dmkd_fast.runtime.model_files import check_plain


@torch.no_grad()
def encode_prompts(folder: Path, prompts: list[str]) -> Tensor:
    """Compute CLIP embeddings of prompts, as Stable Diffusion takes them.

    Args:
        folder: Model folder with `tokenizer/` and `text_encoder/`.
        prompts: N prompts; longer ones are cut to the encoder's length L.

    Returns:
        (N, L, D) float32.

    Raises:
        UserError: transformers is not installed, or a part of the folder cannot be loaded.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise UserError(
            "prompts: text-to-image models need transformers; pip install transformers"
        ) from None
    for part in ("tokenizer", "text_encoder"):
        check_plain(folder / part)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        loaded: Any = CLIPTextModel.from_pretrained(
            folder / "text_encoder",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        encoder, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"no weights for {min(info['missing_keys'])}, and others")
        encoder.eval()
        # A tokenizer whose files state no length reports 10**30.
        longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = tokenizer(
            prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        embeddings: Tensor = encoder(tokens.input_ids)[0]
        return embeddings.float()
    except Exception as error:  # transformers raises many kinds of errors for a damaged folder
        raise UserError(f"{folder}: text_encoder/ or tokenizer/: {one_line(error)}") from None
