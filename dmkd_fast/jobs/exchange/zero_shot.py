"""Turn CLIP and one prompt per class into a classifier: `dmkd import teacher --zero-shot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dmkd_fast import assets
from dmkd_fast.classifiers import zero_shot
from dmkd_fast.classifiers.loading import build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.data.class_names import read_class_names
from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.denoisers.model_folders import quietly
from dmkd_fast.jobs.exchange.folders import check_new, save_teacher
from dmkd_fast.runtime.device import exact_float32
from dmkd_fast.runtime.errors import UserError, invalid, one_line
from dmkd_fast.runtime.model_files import CONFIG, check_plain, read_json, read_license

PROMPT = "a photo of a {name}"
# CLIP's own preprocessing, for folders that state none.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TEXTS_AT_ONCE = 64


def import_zero_shot(
    source: str | Path,
    classes: str | Path,
    *,
    prompts: Sequence[str] = (PROMPT,),
    out: str | Path | None = None,
    data: str | Path | None = None,
) -> dict[str, Any]:
    """Save CLIP's image tower with a linear head made from the prompts of the classes.

    The logits are transformers' `logits_per_image` for these prompts. With several prompts for a
    class, their normalized embeddings are averaged.

    Args:
        source: Folder of transformers' CLIPModel with a tokenizer, or `hf-hub:OWNER/NAME@COMMIT`.
        classes: File with the class names, one a line.
        prompts: Texts in which `{name}` stands for a class name; underscores in names become
            spaces.
        out: Folder to create. None: teachers/FOLDER-zero-shot.
        data: Labeled images on which the accuracy is measured; see `open_set`.

    Returns:
        As `import_teacher`.

    Raises:
        UserError: The folder is no CLIP model or is damaged, or a prompt has no `{name}`.
    """
    path, revision = assets.split_commit(str(source))
    target = Path(out or Path("teachers") / f"{Path(path).name}-zero-shot")
    check_new(target, "--out DIR")
    names = read_class_names(Path(classes), must_exist=True)
    for prompt in prompts:
        if "{name}" not in prompt:
            raise invalid("--prompt", repr(prompt[:60]), "a text with {name}", "add {name} to it")
    folder = assets.resolve(path, revision)
    config = _checked_config(folder)
    spec = _spec(folder, config, names)
    clip, tokenizer = _load(folder)
    with exact_float32(), torch.no_grad():
        head = _head(clip, tokenizer, names, prompts)
        model = _converted(clip, spec, head)
        _compare(folder, clip, model, spec, head)
    return save_teacher(
        model,
        spec,
        target,
        source=source,
        weights="image tower and prompts",
        license=read_license(folder),
        data=data,
        classes=classes,
    )


def _checked_config(folder: Path) -> dict[str, Any]:
    """Return the config of a CLIP model, after checks of all sizes that cost memory."""
    if not (folder / CONFIG).is_file():
        got = "a folder of open_clip" if (folder / "open_clip_config.json").is_file() else "none"
        fix = "use the model in transformers' layout"
        raise invalid(folder, got, "the config.json of transformers' CLIPModel", fix)
    check_plain(folder)
    path, config = folder / CONFIG, read_json(folder / CONFIG)
    kind = config.get("model_type")
    if kind != "clip":
        fix = "use a CLIP model"
        raise invalid(path, f"model_type {kind!r:.60}", "'clip' of transformers", fix)
    for section in ("text_config", "vision_config"):
        values = config.setdefault(section, {})
        if not isinstance(values, dict):
            raise invalid(f"{path}: {section}", f"{values!r:.60}", "an object")
        where = f"{path}: {section}"
        for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
            whole(where, values, key, 8, high=65_536)
        whole(where, values, "num_hidden_layers", 12, high=256)
    return config


def _load(folder: Path) -> tuple[Any, Any]:
    """Load CLIP and its tokenizer from local files; no code of the folder runs."""
    try:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError(
            "--zero-shot: needs transformers; install it with: pip install 'dmkd_fast[text]'"
        ) from None
    try:
        with quietly(logging):
            loaded: Any = CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        model, info = loaded
        if missing := info["missing_keys"]:
            raise ValueError(f"no weights for {min(missing)}")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds of errors for a damaged folder
        raise UserError(f"{folder}: {one_line(error)}; fetch or save it again") from None
    return model.float().eval(), tokenizer


def _spec(folder: Path, config: dict[str, Any], names: tuple[str, ...]) -> ClassifierSpec:
    where, vision = f"{folder / CONFIG}: vision_config", config["vision_config"]
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in zero_shot.ACTIVATIONS:
        fix = "use another model"
        raise invalid(f"{where}: hidden_act", f"{activation!r:.60}", "quick_gelu or gelu", fix)
    if number(where, vision, "layer_norm_eps", 1e-5) != zero_shot.NORM_EPS:
        got, fix = vision["layer_norm_eps"], "use another model"
        raise invalid(f"{where}: layer_norm_eps", got, f"{zero_shot.NORM_EPS:g}", fix)
    width = whole(where, vision, "hidden_size", 768)
    size = whole(where, vision, "image_size", 224, high=8192)
    spec = ClassifierSpec(
        architecture=zero_shot.NAME,
        num_classes=len(names),
        in_chans=whole(where, vision, "num_channels", 3),
        input_size=size,
        **_preprocessing(folder, size),
        model_args={
            "img_size": size,
            "patch_size": whole(where, vision, "patch_size", 32),
            "embed_dim": width,
            "depth": whole(where, vision, "num_hidden_layers", 12),
            "num_heads": whole(where, vision, "num_attention_heads", 12),
            "mlp_ratio": whole(where, vision, "intermediate_size", 3072) / width,
            "act_layer": activation,
            "projection_dim": whole(folder / CONFIG, config, "projection_dim", 512, high=8192),
        },
        label_names=names,
    )
    return ClassifierSpec.from_json(spec.to_json())  # checks every value


def _preprocessing(folder: Path, size: int) -> dict[str, Any]:
    """Read normalization, resize and crop from the folder's image processor."""
    values: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not values and (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
    sides = values.get("size", size)
    if isinstance(sides, dict):  # height and width in place of the short side: no aspect ratio
        sides = sides.get("shortest_edge")
    short = size if sides is None else whole(folder, {"size": sides}, "size", high=8192)
    interpolation = {2: "bilinear", 3: "bicubic"}.get(values.get("resample", 3))
    if interpolation is None:
        got = f"{values['resample']!r:.60}"
        raise invalid(f"{folder}: resample", got, "2 (bilinear) or 3 (bicubic)")
    normalization = {"mean": values.get("image_mean", _MEAN), "std": values.get("image_std", _STD)}
    for name, numbers in normalization.items():
        if not isinstance(numbers, list | tuple):
            raise invalid(f"{folder}: image_{name}", f"{numbers!r:.60}", "one number per channel")
        normalization[name] = tuple(numbers)
    return {
        **normalization,
        "crop_pct": min(1.0, size / short),
        "interpolation": interpolation,
        "crop_mode": "squash" if sides is None else "center",
    }


def _head(clip: Any, tokenizer: Any, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return the scaled embeddings of the classes, (C, D)."""
    total: Any = 0
    for prompt in prompts:
        texts = [prompt.replace("{name}", name.replace("_", " ")) for name in names]
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        parts = [_embed(clip, tokenizer, texts[i : i + _TEXTS_AT_ONCE]) for i in starts]
        total = total + normalize(torch.cat(parts), dim=1)
    head: Tensor = normalize(total, dim=1) * clip.logit_scale.exp()
    return head


def _embed(clip: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    longest = clip.config.text_config.max_position_embeddings
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    pooled = clip.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)[1]
    embeddings: Tensor = clip.text_projection(pooled)
    return embeddings


def _converted(clip: Any, spec: ClassifierSpec, head: Tensor) -> torch.nn.Module:
    model = build_classifier(spec).eval()
    tower = zero_shot.tower_weights(clip.vision_model.state_dict())
    weights = {f"tower.{name}": value for name, value in tower.items()}
    weights |= {"projection.weight": clip.visual_projection.weight, "head.weight": head}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"vision_config: {one_line(error)}; use another model") from None
    return model


def _compare(
    folder: Path, clip: Any, model: torch.nn.Module, spec: ClassifierSpec, head: Tensor
) -> None:
    """Compare the logits on noise images with those of transformers' own image tower."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, spec.in_chans, *[spec.input_size] * 2, generator=generator)
    features = normalize(clip.visual_projection(clip.vision_model(pixels)[1]), dim=1)
    expected = features @ head.T
    error = (model(pixels) - expected).abs().max().item()
    if not error <= 1e-4 * max(1.0, expected.abs().max().item()):
        got = f"logits that differ by {error:.1e} from transformers'"
        raise invalid(folder, got, "equal ones", "use another model")
