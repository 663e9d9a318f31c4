"""Write the model card of an exported classifier, with the metadata that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dmkd_fast import assets
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import run_dir
from dmkd_fast.jobs.evaluate import STUDENT
from dmkd_fast.runtime.model_files import read_json

# Identifiers that the Hub accepts as `license`; any other license is stated as `license_name`.
LICENSES = """afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause
    bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m ecl-2.0
    epl-2.0 eupl-1.2 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl openrail
    openrail++ osl-3.0 unlicense wtfpl zlib"""
# Data sets on the Hub, by the embedded assets that were made from them.
_DATASETS = {"embedded:fashion_mnist": "zalando-datasets/fashion_mnist"}
_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a classifier was made from."""

    licenses: dict[str, str]
    """License of each of the inputs, by what it is."""
    base_models: tuple[str, ...] = ()
    """Hub repositories of denoiser and teachers."""
    datasets: tuple[str, ...] = ()
    """Data sets that the inputs were made from, as their cards state them."""


def read_inputs(what: str, license: str) -> Inputs:
    """Collect what a run directory or a classifier was made from.

    Args:
        what: Run directory of a distillation, or name of a classifier.
        license: License of the classifier's weights.
    """
    folder = Path(what)
    licenses, sources = {"weights": license}, [assets.split_commit(what)]
    if (folder / STUDENT).is_dir() and (folder / run_dir.CONFIG).is_file():
        config = load_config(DistillConfig, folder / run_dir.CONFIG)
        parts = [config.denoiser, *config.teachers.values()]
        sources = [(part.path, part.revision) for part in parts if part and part.path]
        summary = folder / run_dir.SUMMARY
        found = read_json(summary) if summary.is_file() else {}
        licenses = {k: str(found.get(f"{k}_license", "unknown")) for k in ("denoiser", "teacher")}
    hub = [path.removeprefix(assets.HUB) for path, _ in sources if path.startswith(assets.HUB)]
    # The license of a published timm model says where it came from.
    hub += re.findall(rf"{assets.HUB}(\S+) at ", license)
    datasets = [name for path, revision in sources for name in _datasets(path, revision)]
    return Inputs(
        licenses=licenses,
        base_models=tuple(dict.fromkeys(hub)),
        datasets=tuple(dict.fromkeys(datasets)),
    )


def hub_dataset(path: str) -> str | None:
    """Return the Hub's name of the data set that an embedded asset was made from."""
    return next((name for key, name in _DATASETS.items() if path.startswith(key)), None)


def _datasets(path: str, revision: str | None) -> Iterator[str]:
    """Yield the data sets that the card of an input states."""
    if (known := hub_dataset(path)) is not None:
        yield known
        return
    from huggingface_hub import try_to_load_from_cache

    card: Any = Path(path) / "README.md"
    if path.startswith(assets.HUB):  # as it was fetched for the run; nothing is downloaded
        name = path.removeprefix(assets.HUB)
        card = try_to_load_from_cache(name, "README.md", revision=revision)
    try:
        text = Path(card).read_text(encoding="utf-8", errors="replace")
        header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        values = yaml.safe_load(header[1]) if header else {}
    except (OSError, TypeError, yaml.YAMLError):
        return  # No card, or one that the Hub cannot read either.
    stated = values.get("datasets") if isinstance(values, dict) else None
    for each in stated if isinstance(stated, list) else [stated]:
        if isinstance(each, str) and re.fullmatch(_ID, each, re.ASCII):
            yield each


def license_fields(licenses: dict[str, str]) -> dict[str, Any]:
    """Return the card's license: that of all inputs if it is one, else `other` and their names."""
    stated = {text.partition(" (")[0].strip().lower() for text in licenses.values()}
    if len(stated) == 1 and (only := next(iter(stated))) in LICENSES.split():
        return {"license": only}
    if stated == {"unknown"}:
        return {"license": "unknown"}
    names = [f"{part}-{text}" for part, text in licenses.items()] if len(stated) > 1 else stated
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", "-".join(names).lower()),
    }


def metadata(
    *, name: str, library: str, inputs: Inputs, tested_on: str | None, facts: dict[str, Any]
) -> str:
    """Return the YAML header of a model card.

    Args:
        name: Name of the model.
        library: Hub's name of the library that loads the files.
        inputs: What the classifier was made from.
        tested_on: Hub's name of the test set; None if it is not on the Hub.
        facts: `top1` on the test images.
    """
    from huggingface_hub import EvalResult, ModelCardData

    result = EvalResult(
        task_type="image-classification",
        dataset_type=tested_on or "imagefolder",
        dataset_name=tested_on or "real test images",
        dataset_split="test",
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(facts["top1"], 6),
    )
    card = ModelCardData(
        **license_fields(inputs.licenses),
        base_model=list(inputs.base_models) or None,
        datasets=list(inputs.datasets) or None,
        library_name=library,
        metrics=["accuracy"],
        model_name=name,
        eval_results=[result],
        pipeline_tag="image-classification",
        tags=["image-classification", "knowledge-distillation", "synthetic-data"],
    )
    return f"---\n{card.to_yaml()}\n---\n"
