"""Read and write weights and configs as safetensors and JSON; nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError, invalid, one_line

WEIGHTS, CONFIG = "model.safetensors", "config.json"
COMPILED = "_orig_mod."
"""Prefix that torch.compile adds to the names inside the module that it wraps."""
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar")
RUNS_CODE = (
    "auto_map",
    "trust_remote_code",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
)
"""Keys of a config that make diffusers or transformers import third-party code."""
FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file")
CONVERT = (
    "convert it: timm.models.save_for_hf(timm.create_model(ARCH, num_classes=N, "
    "checkpoint_path=FILE), FOLDER, safe_serialization=True) writes config.json and "
    "model.safetensors"
)
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of `model` from a safetensors file, which must hold exactly these weights.

    Raises:
        UserError: The file is missing or damaged, or its names, shapes or types differ from those
            of the model.
    """
    names = match_weights(model, path)
    weights = load_file(path)
    expected = model.state_dict()
    # Not strict, since `match_weights` allows missing counters and tied weights.
    model.load_state_dict(
        {name: weights[theirs].to(expected[name].dtype) for theirs, name in names.items()},
        strict=False,
    )


def match_weights(model: nn.Module, path: Path) -> dict[str, str]:
    """Match the tensors of a safetensors file to `model`, which may be on the meta device.

    Only the header is read. Prefixes that torch.compile and DistributedDataParallel add to names
    are ignored. `num_batches_tracked` may be missing, since evaluation does not use it, and so may
    the other names of a tied weight.

    Returns:
        Name in the model for each name in the file.

    Raises:
        UserError: As in `load_weights`.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file{pickle_hint(path.parent)}")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            given = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {path}: damaged ({one_line(error)}); fetch or save them again"
        ) from None
    expected = model.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    for theirs in given:
        name = theirs.replace(COMPILED, "")
        name = name if name in expected else name.removeprefix("module.")
        if name in names.values():
            raise UserError(
                f"weights {path}: {_shown(name)}: got it twice, once as {_shown(theirs)}; save the "
                "model again"
            )
        names[theirs] = name
    found = {name: given[theirs] for theirs, name in names.items()}
    present = {id(expected[name]) for name in found.keys() & expected.keys()}
    for name in sorted(expected.keys() | found.keys()):
        tensor = expected.get(name)
        if name not in found and (name.endswith("num_batches_tracked") or id(tensor) in present):
            continue
        got = found[name][1] if name in found else "nothing"
        want = tuple(tensor.shape) if tensor is not None else "nothing"
        if got != want or tensor is None:
            fix = "the file belongs to another architecture or class count"
            raise invalid(f"weights {path}: {_shown(name)}", got, str(want), fix)
        kind, wanted = found[name][0], NAMES.get(tensor.dtype, str(tensor.dtype))
        if _kind(kind) != _kind(wanted):
            where, fix = f"weights {path}: {_shown(name)}", "save the model in float32 or float16"
            raise invalid(where, f"numbers of type {kind}", wanted, fix)
    return names


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of `model` as safetensors, under the names of the bare network.

    Wrappers (torch.compile, DataParallel, DistributedDataParallel) leave no prefix. Tied weights
    are written once.
    """
    written: set[tuple[Any, ...]] = set()
    weights: dict[str, Tensor] = {}
    for name, value in unwrapped(model).state_dict().items():
        place = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
        if place in written and value.numel():
            continue
        written.add(place)
        weight = value.detach().cpu().contiguous()
        # safetensors refuses weights that share memory, so a view of a larger storage is copied.
        is_view = weight.untyped_storage().nbytes() != weight.nbytes
        weights[name.replace(COMPILED, "")] = weight.clone() if is_view else weight
    save_file(weights, path, metadata={"format": "pt"})


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        else:
            return model


def check_folder(folder: Path) -> None:
    """Refuse a path that is not a folder with a config.json.

    Raises:
        UserError: The path is a file, or there is no config.json; the message says what to do.
    """
    if folder.is_file():
        what, fix = "a file", "give its folder"
        if _is_pickle(folder):
            what, fix = "a pickle, which can run code when read", CONVERT
        raise invalid(folder, what, "a folder with config.json and model.safetensors", fix)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: No such file{pickle_hint(folder)}")


def pickle_hint(folder: Path) -> str:
    """Return advice about a missing model file, based on the other files in the folder."""
    pickles = sorted(p.name for p in folder.glob("*") if _is_pickle(p))
    if not pickles and (folder / "config.yaml").is_file():
        return "; a run has its model in a subfolder, and a classifier once it is finished"
    if not pickles:
        return "; check the model's folder"
    return f", but there is {pickles[0]}, a pickle, which can run code when read; {CONVERT}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: The file cannot be read, or does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the model's folder") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; fetch or save the model again") from None
    if not isinstance(values, dict):
        raise invalid(path, f"a JSON {type(values).__name__}", "an object")
    return values


def check_plain(folder: Path) -> None:
    """Refuse a component of a diffusers model that names code, or files outside its folder.

    Raises:
        UserError: The component does so, or it is an adapter of another model.
    """
    configs = [p for p in (folder / CONFIG, folder / "tokenizer_config.json") if p.is_file()]
    for path in configs:
        values = read_json(path)
        # The config of a model with two towers has one section for each.
        sections = [values, *(v for v in values.values() if isinstance(v, dict))]
        for key in RUNS_CODE:
            if any(section.get(key) is not None for section in sections):
                what = f"{key}, which can run code that is not the library's own"
                raise invalid(path, what, "a config without", "use a plain model")
        _check_inside(path, [values.get(key) for key in FILE_KEYS])
    for path in sorted(folder.glob("*.index.json")):
        names = read_json(path).get("weight_map")
        _check_inside(path, [*names.values()] if isinstance(names, dict) else [names])
    if (folder / "adapter_config.json").exists():
        what = "adapter_config.json, which loads another model"
        raise invalid(folder, what, "a whole one", "merge the adapter and save the result")


def _check_inside(path: Path, names: list[Any]) -> None:
    for name in names:
        if name is None:
            continue
        # One path component that is not only dots.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]*[^/\\.][^/\\]*", name):
            what = f"the file name {str(name)[:80]!r}"
            raise invalid(path, what, "one without folders", "fetch or save the model again")


def file_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file piece by piece, without copying the tensors.

    The `save` function of safetensors copies everything twice and lets no other Python thread run
    meanwhile, which would stop the training loop.

    Args:
        tensors: Contiguous tensors on the CPU, by name.

    Raises:
        TypeError: A tensor has a dtype that is not in `NAMES`.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    # The widest dtypes first, so that every tensor is aligned in the file.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {}
    place = 0
    for name in names:
        value, start = tensors[name], place
        if value.dtype not in NAMES:
            raise TypeError(
                f"{name}: got {value.dtype}, expected one of {', '.join(map(str, NAMES))}; keep it "
                "in another dtype"
            )
        place += value.numel() * value.dtype.itemsize
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, place],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def keep_in_cache(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that several processes may write, one of them at a time.

    Raises:
        OSError: It cannot be written.
    """
    files.make_folder(path.parent)
    with files.locked(path.parent / "lock", wait_s=60) as is_ours:
        if is_ours:
            files.replace(path, file_parts(tensors))


def read_license(folder: Path) -> str:
    """Return the license in the header of a folder's model card, or "unknown"."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = header and re.search(r"^licen[sc]e:[ \t]*[\"']?([\w.+-]+)", header[1], re.MULTILINE)
    return found[1] if found else "unknown"


def _is_pickle(path: Path) -> bool:
    return path.suffix.lower() in PICKLES and path.is_file()


def _kind(dtype: str) -> str:
    """Return the group of a dtype; dtypes of one group are converted into each other on loading."""
    if dtype in ("F64", "F32", "F16", "BF16"):
        return "float"
    return "integer" if dtype[:1] in ("I", "U") else dtype


def _shown(name: str) -> str:
    """Return a name from a file, with line breaks and terminal control characters escaped."""
    return ascii(name)[1:-1][:120]
