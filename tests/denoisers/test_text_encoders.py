"""Text encoders of denoisers: gone while images are made, cached, and not trusted."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, copy_of, folder_of, load
from text_encoders import PROMPTS

from dmkd_fast import load_denoiser
from dmkd_fast.denoisers.prompts.encoders import KINDS
from dmkd_fast.runtime.errors import UserError

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")
TEXT = [name for name, family in FAMILIES.items() if family.has_prompts and family.own is None]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", TEXT)
def test_no_encoder_is_alive_while_images_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = folder_of(name)
    load(name)  # the first import of a pipeline replaces the module `transformers`
    import transformers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    alive: list[weakref.ref[Any]] = []
    for kind in KINDS:
        own = getattr(transformers, kind)

        def noted(*arguments: Any, own: Any = own, **settings: Any) -> Any:
            made = type(own).__getattribute__(own, "from_pretrained")(*arguments, **settings)
            alive.extend(weakref.ref(p) for p in made[0].parameters())
            return made

        stand_in = type(kind, (), {"from_pretrained": staticmethod(noted)})
        monkeypatch.setattr(transformers, kind, stand_in)
    gc.disable()
    try:
        loaded = load(name)
    finally:
        gc.enable()
    assert len(alive) > 20 and all(parameter() is None for parameter in alive)
    made = len(alive)
    again = load(name)
    assert len(alive) == made  # read from the cache
    for a, b in zip(loaded.module.buffers(), again.module.buffers(), strict=True):
        assert torch.equal(a, b)
    load_denoiser(folder, CPU, **(FAMILIES[name].settings | {"prompts": ["a house"]}))
    # Other prompts are encoded; Sana keeps the empty one apart, which is there already.
    assert made < len(alive) <= 2 * made


@pytest.mark.parametrize("name", TEXT)
def test_parts_that_name_code_are_refused(tmp_path: Path, name: str) -> None:
    folder = copy_of(name, tmp_path)
    for part in sorted(p for p in folder.iterdir() if p.name.startswith(("text_", "token"))):
        config = part / ("tokenizer_config.json" if "tokenizer" in part.name else "config.json")
        before = config.read_text()
        code = {"AutoModel": "evil.Model"}
        for key, value, word in (
            ("auto_map", code, "auto_map"),
            ("vocab_file", "/etc/a", "/etc/a"),
        ):
            edit(config, **{key: value})
            with pytest.raises(UserError, match=word):
                load(name, folder)
            config.write_text(before)


def test_weights_may_be_loaded_in_the_dtype_of_the_job() -> None:
    whole = load("SDXL")
    half = load_denoiser(folder_of("SDXL"), CPU, prompts=PROMPTS, dtype=torch.bfloat16)
    for a, b in zip(whole.module.parameters(), half.module.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)


def test_a_damaged_file_of_the_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = load("SDXL")
    kept = sorted((tmp_path / "cache").rglob("prompts-*.safetensors"))
    assert len(kept) == 2
    whole = [path.read_bytes() for path in kept]
    for path, data in zip(kept, whole, strict=True):
        path.write_bytes(data[:-9])
    second = load("SDXL")
    assert torch.equal(first.module.prompts, second.module.prompts)  # type: ignore[arg-type]
    assert [path.read_bytes() for path in kept] == whole
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept[0]))  # a file, so that nothing can be kept
    load("SDXL")
