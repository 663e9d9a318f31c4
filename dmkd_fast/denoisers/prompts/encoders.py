"""Encode prompts, one for each class of a text-to-image model, once and before sampling begins.

No encoder outlives the call that encodes, so sampling has its memory. What an encoder made is kept
in the cache folder, in a file that is named by a digest of the encoder's files and the prompts.

Shapes: N prompts, L tokens of a prompt, D width of an encoder.
"""

from __future__ import annotations

import gc
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmkd_fast.assets import file_sha256
from dmkd_fast.denoisers.model_folders import num_stored, quietly, weight_files
from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError, invalid, one_line, warn_once
from dmkd_fast.runtime.model_files import CONFIG, check_plain, keep_in_cache, read_json

# Prompts encoded at a time.
BATCH = 32
# First part of `model_type` in the config of an encoder, by its class.
KINDS = {
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "T5EncoderModel": "t5",
    "Gemma2Model": "gemma2",
}
# Files of which a tokenizer needs one, or two together.
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder of a pipeline, and which of its outputs a family takes."""

    part: str = "text_encoder"
    """Folder of the encoder."""
    tokenizer: str = "tokenizer"
    """Folder of its tokenizer."""
    model_class: str = "CLIPTextModel"
    """Class of the encoder in transformers."""
    tokenizer_class: str = "CLIPTokenizer"
    """Class of the tokenizer in transformers."""
    outputs: tuple[Literal["last", "penultimate", "pooled", "mask"], ...] = ("last",)
    """`last` and `penultimate`: hidden states (N, L, D). `pooled`: one vector a prompt, (N, D).
    `mask`: 1 for tokens and 0 for padding, (N, L) int64."""
    max_tokens: int | None = None
    """Tokens that prompts are padded and cut to, L; None: as many as the encoder has positions."""


def encode(
    folder: Path, encoder: TextEncoder, prompts: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Compute what a text encoder makes of prompts, or read it from the cache.

    CLIP computes in float32. Other encoders, which are large, compute in bfloat16 on CUDA.

    Args:
        folder: Folder of the whole model.
        encoder: Encoder and the names of its outputs.
        prompts: N prompts; longer ones are cut to L tokens.
        device: Device to encode on.

    Returns:
        The outputs by name, on the CPU.

    Raises:
        UserError: transformers is not installed, or a part of the folder cannot be loaded.
    """
    found = _check_parts(folder, encoder)
    path = (
        files.cache_folder()
        / f"prompts-{_digest(folder, encoder, prompts, device, found[0])}.safetensors"
    )
    try:
        kept = load_file(path) if path.is_file() else {}
    except (SafetensorError, OSError):
        kept = {}  # a damaged file is written again
    if kept.keys() == set(encoder.outputs):
        return kept
    outputs = _encode(folder, encoder, prompts, device, found[1])
    gc.collect()  # models of transformers refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        keep_in_cache(path, outputs)
    except OSError as error:
        warn_once(f"{path.parent}: cannot keep prompts there ({error.strerror})")
    return outputs


def num_tokens(folder: Path, text: str) -> int:
    """Count the tokens of a text, by the tokenizer in a folder.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        import transformers

        with quietly(transformers.utils.logging):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return len(tokenizer.encode(text))
    except Exception as error:  # transformers raises many kinds of errors for a damaged folder
        raise UserError(f"{folder}: {one_line(error)}") from None


def _check_parts(folder: Path, encoder: TextEncoder) -> tuple[list[Path], str | None]:
    """Check the files of an encoder and of its tokenizer, and return those of the weights.

    transformers takes the defaults of its class where a file is missing: an encoder of another
    size, or a tokenizer without words.

    Returns:
        The weight files and their variant, as `weight_files` does.

    Raises:
        UserError: A file is missing or damaged, or belongs to another kind of encoder.
    """
    part, tokenizer = folder / encoder.part, folder / encoder.tokenizer
    for each in (part, tokenizer):
        check_plain(each)
    kind, wanted = read_json(part / CONFIG).get("model_type"), KINDS[encoder.model_class]
    if isinstance(kind, str) and kind.partition("_")[0] != wanted:
        fix = "use the encoder that belongs to the model"
        raise invalid(f"{part / CONFIG}: model_type", f"{kind!r:.60}", repr(wanted), fix)
    found = weight_files(part, "model")
    num_stored(found[0])
    present = {path.name for path in tokenizer.glob("*")}
    if not any(present.issuperset(files) for files in VOCABULARIES):
        expected = f"{', '.join(' with '.join(files) for files in VOCABULARIES[:-1])}"
        expected += f" or {VOCABULARIES[-1][0]}"
        raise invalid(f"{tokenizer}", "no vocabulary", expected, "fetch the model again")
    return found


@torch.no_grad()
def _encode(
    folder: Path,
    encoder: TextEncoder,
    prompts: list[str],
    device: torch.device,
    variant: str | None,
) -> dict[str, Tensor]:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "prompts: text-to-image models need transformers; pip install transformers"
        ) from None
    try:
        with quietly(transformers.utils.logging):
            tokenizer = getattr(transformers, encoder.tokenizer_class).from_pretrained(
                folder / encoder.tokenizer, local_files_only=True
            )
            loaded: Any = getattr(transformers, encoder.model_class).from_pretrained(
                folder / encoder.part,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, which is checked here
                variant=variant,
            )
        model, info = loaded
        for what in ("missing", "mismatched"):
            if keys := info[f"{what}_keys"]:
                name = min(str(key if isinstance(key, str) else key[0]) for key in keys)
                raise ValueError(f"{what} weights such as {name}; fetch the model again")
        if len(tokenizer) > model.config.vocab_size:
            sizes = f"{len(tokenizer):,} tokens for an encoder of {model.config.vocab_size:,}"
            raise ValueError(f"got {sizes}; use the tokenizer that belongs to it")
        is_exact = device.type == "cpu" or encoder.model_class.startswith("CLIP")
        model.to(device, torch.float32 if is_exact else torch.bfloat16).eval()
        # A tokenizer whose files state no length reports 10**30.
        longest = encoder.max_tokens or min(
            tokenizer.model_max_length, model.config.max_position_embeddings
        )
        rows: list[dict[str, Tensor]] = []
        for start in range(0, len(prompts), BATCH):
            tokens = tokenizer(
                prompts[start : start + BATCH],
                padding="max_length",
                max_length=longest,
                truncation=True,
                padding_side="right",
                return_tensors="pt",
            ).to(device)
            inputs = {"input_ids": tokens.input_ids}
            if "mask" in encoder.outputs:
                inputs["attention_mask"] = tokens.attention_mask
            made = model(**inputs, output_hidden_states="penultimate" in encoder.outputs)
            rows.append({name: _taken(name, made, inputs).cpu() for name in encoder.outputs})
        return {name: torch.cat([row[name] for row in rows]) for name in encoder.outputs}
    except Exception as error:  # transformers raises many kinds of errors for a damaged folder
        which = f"{encoder.part}/ or {encoder.tokenizer}/"
        raise UserError(f"{folder}: {which}: {one_line(error)}") from None


def _taken(name: str, made: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return one output of an encoder by its name in `TextEncoder.outputs`."""
    value: Tensor
    if name == "mask":
        value = inputs["attention_mask"]
    elif name == "pooled":
        value = made["text_embeds"] if "text_embeds" in made else made["pooler_output"]
    else:
        value = made["last_hidden_state"] if name == "last" else made["hidden_states"][-2]
    return value.contiguous()


def _digest(
    folder: Path,
    encoder: TextEncoder,
    prompts: list[str],
    device: torch.device,
    weights: list[Path],
) -> str:
    """Return a digest of encoder, prompts, device type and files, not of library versions."""
    read = list(weights)
    for part in (encoder.part, encoder.tokenizer):
        read += sorted(p for p in (folder / part).glob("*") if p.suffix != ".safetensors")
    hashes = [[path.name, file_sha256(path)] for path in read]
    key = [asdict(encoder), prompts, device.type, hashes]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
