"""Build, load, save and speed up classifiers: teachers and students.

A classifier on disk is a folder with `config.json` (timm's hub layout) and `model.safetensors`.
Folders that timm puts on the Hub are read unchanged. An architecture is a name from
`classifiers/small_nets.py`, `clip_zero_shot`, `torchvision:NAME`, or a timm name.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dmkd_fast import assets
from dmkd_fast.classifiers import small_nets, zero_shot
from dmkd_fast.classifiers.spec import STEMS, ClassifierSpec, check_model_args, stated_license
from dmkd_fast.runtime.device import exact_float32, is_out_of_memory
from dmkd_fast.runtime.errors import UserError, invalid, one_line
from dmkd_fast.runtime.model_files import (
    CONFIG,
    WEIGHTS,
    check_folder,
    load_weights,
    match_weights,
    read_json,
    read_license,
    save_weights,
)
from dmkd_fast.views.spec import InputSpec

TORCHVISION = "torchvision:"
LOG = logging.getLogger("dmkd_fast")
# Layers that torch can fold with the batch norm that follows.
FOLDABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


def build_classifier(spec: ClassifierSpec) -> nn.Module:
    """Build a classifier with random weights.

    Raises:
        UserError: The architecture does not exist, or it rejects the arguments.
    """
    return build(
        spec.architecture,
        num_classes=spec.num_classes,
        in_chans=spec.in_chans,
        stem=spec.stem,
        **spec.model_args,
    )


def build(
    architecture: str, *, num_classes: int, in_chans: int, stem: str = "own", **model_args: Any
) -> nn.Module:
    """Build a network with random weights; see `build_classifier`."""
    check_model_args(model_args)
    try:
        model = small_nets.build(architecture, num_classes=num_classes, in_chans=in_chans)
        if model is not None:
            if model_args:
                raise TypeError(f"takes none, got {', '.join(model_args)}")
        elif architecture == zero_shot.NAME:
            model = zero_shot.ZeroShotClassifier(
                num_classes=num_classes, in_chans=in_chans, **model_args
            )
        elif architecture.startswith(TORCHVISION):
            model = _torchvision(architecture, num_classes, in_chans, model_args)
        else:
            model = _timm(architecture, num_classes, in_chans, model_args)
    except UserError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AssertionError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        # Constructors raise any of these for wrong types or combinations of arguments.
        if is_out_of_memory(error):
            raise
        reason = one_line(error)
        raise UserError(f"model_args of {architecture}: {reason}; change or remove") from None
    if stem != "own":
        _use_small_stem(model, architecture, stem, in_chans)
    return model


def save_classifier(model: nn.Module, spec: ClassifierSpec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder."""
    save_weights(model, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(spec.to_json(), indent=2) + "\n", encoding="utf-8")


def classifier_folder(folder: Path) -> Path:
    """Return the folder of a classifier: the same, or the part of a run that holds its result."""
    places = (folder, folder / "student", folder / "model")
    return next((place for place in places if (place / CONFIG).exists()), folder)


def load_classifier(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, ClassifierSpec]:
    """Load a classifier that `save_classifier` or timm wrote, in float32 and eval mode.

    Args:
        path: Folder of the classifier, directory of a finished run, or `embedded:NAME`.
        device: Device to load the model to.

    Raises:
        UserError: A file is missing or damaged, or does not match the architecture.

    Examples:
        >>> import torch
        >>> from dmkd_fast import load_classifier
        >>> model, spec = load_classifier("embedded:fashion_mnist/weak")
        >>> model(torch.zeros(1, spec.in_chans, spec.input_size, spec.input_size)).shape
        torch.Size([1, 10])
    """
    folder = classifier_folder(assets.resolve(str(path)))
    check_folder(folder)
    config = read_json(folder / CONFIG)
    try:
        spec = ClassifierSpec.from_json(config)
        with torch.device("meta"):
            outline = build_classifier(spec)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    # Compare sizes before memory for the weights is allocated.
    match_weights(outline, folder / WEIGHTS)
    model = build_classifier(spec)
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), spec


def timm_lines(spec: ClassifierSpec) -> str:
    """Return the model card's lines on loading with timm; empty for torchvision's models."""
    if spec.architecture.startswith(TORCHVISION):
        return ""
    own = (*small_nets.PREFIXES, zero_shot.NAME)
    known = spec.stem == "own" and not spec.architecture.startswith(own)
    register = "" if known else "  # registers the architecture with timm\nimport timm"
    first = "timm" if known else "dmkd_fast.integrations.timm"
    return (
        f"With timm:\n```python\nimport {first}{register}\n"
        'model = timm.create_model("local-dir:.", pretrained=True)\n```\n'
    )


def classifier_license(folder: Path) -> str:
    """Return the license stated in a classifier's config or model card, or "unknown"."""
    return stated_license(read_json(folder / CONFIG)) or read_license(folder)


def hub_repository(architecture: str) -> str:
    """Return the Hub repository (`OWNER/NAME`) with the pretrained weights of a timm name.

    Raises:
        UserError: timm does not know the name, or has no weights for it on the Hub.
    """
    import timm

    if not timm.is_model(architecture):
        _refuse_name(architecture)
    try:
        config = timm.get_pretrained_cfg(architecture)
    except (RuntimeError, ValueError):  # no such tag
        config = None
    if config is None or not config.hf_hub_id:
        known = timm.list_pretrained(f"{architecture.partition('.')[0]}*")[:5]
        such = f" such as {', '.join(known)}" if known else ""
        got = f"{architecture!r} with pretrained=true"
        raise invalid("arch", got, f"a timm name with weights on the Hub{such}", "set path instead")
    return str(config.hf_hub_id)


def load_torchvision(
    architecture: str, device: torch.device
) -> tuple[nn.Module, ClassifierSpec, str]:
    """Load torchvision's default weights of `torchvision:NAME`; downloaded once, hash-checked.

    Returns:
        The model in eval mode, its spec, and the name of the weights.

    Raises:
        UserError: The model does not exist, or its weights cannot be downloaded or read.
    """
    from torchvision.models import get_model_weights

    name = architecture.removeprefix(TORCHVISION)
    _check_torchvision_name(name)
    weights = get_model_weights(name).DEFAULT
    recipe = weights.transforms()
    spec = ClassifierSpec(
        architecture=architecture,
        num_classes=len(weights.meta["categories"]),
        in_chans=3,
        input_size=recipe.crop_size[0],
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
        crop_pct=min(1.0, recipe.crop_size[0] / recipe.resize_size[0]),
        interpolation=recipe.interpolation.value,
        # These two were trained with another normalization; this argument makes them convert.
        model_args={"transform_input": True} if name in ("googlenet", "inception_v3") else {},
    )
    model = build_classifier(spec)
    try:
        # The file is a pickle; with weights_only nothing but tensors is read from it.
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # No network, or any error from a damaged file.
        reason = one_line(error, most=120)
        raise UserError(
            f"{architecture}: cannot have {weights.url} ({reason}); check the network and torch's "
            "cache, or set path to weights in safetensors"
        ) from None
    kept = model.state_dict().keys()
    state = {k: v for k, v in state.items() if k in kept or not k.lower().startswith("aux")}
    model.load_state_dict(state)
    return model.to(device).eval(), spec, str(weights)


def for_inference(model: nn.Module, dtype: torch.dtype, input: InputSpec) -> nn.Module:
    """Return a frozen copy that computes the same logits faster; the model stays unchanged.

    Weights are cast once, because autocast would cast frozen weights on every call. Batch norms are
    folded into the layers before them if the model can be traced. The folded and the unfolded copy
    are compared in float32 on a batch of random images; if they differ, the unfolded one is used.

    Args:
        model: Classifier, (B, c, S, S) -> (B, C) logits.
        dtype: Compute dtype of the copy.
        input: Input that the model expects.
    """
    views = _random_views(model, input)
    try:
        copied = copy.deepcopy(model)
    except RuntimeError:
        # Weights computed by a hook (weight_norm, prune) can be copied only without a graph.
        with torch.no_grad():
            model(views)
        copied = copy.deepcopy(model)
    copied = freeze(copied).float()
    if any(type(module) in FOLDABLE.values() for module in copied.modules()):
        copied = _folded_if_equal(copied, views.float())
    return to_channels_last(copied.to(dtype))


def to_channels_last(model: nn.Module) -> nn.Module:
    """Convert the four-dimensional weights and buffers of `model` to channels_last.

    `Module.to(memory_format=...)` would also convert five-dimensional weights, and fail.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Put a model into eval mode, and turn off the gradients of its parameters."""
    return model.eval().requires_grad_(False)


def _random_views(model: nn.Module, input: InputSpec) -> Tensor:
    """Return four noise images, normalized for `model`; the same on every call."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    shape = 4, input.num_channels, input.size, input.size
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (input.mean, input.std))
    return ((pixels - mean) / std).to(weight.device, weight.dtype)


@torch.no_grad()
def _folded_if_equal(model: nn.Module, views: Tensor) -> nn.Module:
    """Return `model` with folded batch norms, or `model` itself if folding changes its logits."""
    try:
        folded = fold_batch_norms(copy.deepcopy(model))
        # The error of TF32 alone is larger than the limit below.
        with exact_float32():
            expected = model(views)
            error = (folded(views) - expected).abs().max() / expected.abs().max()
        reason = "" if error <= 1e-4 else f"logits differ by {error.item():.1e} of the largest"
    except Exception as stop:  # Tracing, and calling the traced module, fail in many ways.
        reason = one_line(stop, most=120)
    if not reason:
        return folded
    LOG.warning("teacher: its batch norms are not folded, so it is slower (%s)", reason)
    return model


def fold_batch_norms(model: nn.Module) -> fx.GraphModule:
    """Trace `model` and fold each batch norm into the layer before it; changes `model`.

    A layer is not folded if it is called twice, if its output has another use, or if the layer or
    the norm has hooks. A norm without running statistics is not folded either.
    """
    traced = fx.symbolic_trace(model)
    modules: dict[Any, Any] = dict(traced.named_modules())
    calls = Counter(id(modules[n.target]) for n in traced.graph.nodes if n.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, layer = modules[node.target], modules[before.target]
        if FOLDABLE.get(type(layer)) is not type(norm) or calls[id(layer)] > 1:
            continue
        if norm.running_mean is None or _has_hooks(layer) or _has_hooks(norm):
            continue
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        traced.set_submodule(str(before.target), fuse(layer, norm))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    return fx.GraphModule(traced, traced.graph)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _timm(
    architecture: str, num_classes: int, in_chans: int, model_args: dict[str, Any]
) -> nn.Module:
    import timm

    if not timm.is_model(architecture):
        _refuse_name(architecture)
    return timm.create_model(
        architecture, pretrained=False, num_classes=num_classes, in_chans=in_chans, **model_args
    )


def _torchvision(
    architecture: str, num_classes: int, in_chans: int, model_args: dict[str, Any]
) -> nn.Module:
    from torchvision.models import get_model

    name = architecture.removeprefix(TORCHVISION)
    _check_torchvision_name(name)
    if in_chans != 3:
        got, fix = f"images with {in_chans} channel(s)", "use a timm model"
        raise invalid(architecture, got, "3, as torchvision's models take color only", fix)
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads return more than logits
        model_args = {"aux_logits": False, "init_weights": True} | model_args
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **model_args)
    return model


def _check_torchvision_name(name: str) -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        such = f"such as {', '.join(close)}" if close else "(see torchvision.models.list_models())"
        expected = f"a classification model of torchvision {such}"
        raise invalid("arch", f"{TORCHVISION}{name}", expected)


def _refuse_name(architecture: str) -> None:
    import timm

    known = [*small_nets.EXAMPLES, *timm.list_models()]
    close = difflib.get_close_matches(architecture, known) or timm.list_models(f"*{architecture}*")
    such = f" such as {', '.join(close[:5])}" if close else ""
    expected = f"lenet5, lenet5_half, cifar_..., torchvision:NAME or a timm model{such}"
    raise invalid("arch", repr(architecture), expected, "" if close else "see timm.list_models()")


def _use_small_stem(model: Any, architecture: str, stem: str, in_chans: int) -> None:
    """Replace a ResNet's 7x7 stride-2 first convolution by a 3x3 one.

    `conv3`: stride 1, no max-pooling. `conv3_pool`: stride 1, keeps the max-pooling.
    `conv3_stride2`: stride 2, no max-pooling.
    """
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or stem not in STEMS:
        expected = f"own, or {', '.join(STEMS)} for a ResNet with a single first convolution"
        raise invalid("stem", f"{stem!r} for {architecture!r}", expected, "set stem=own")
    stride = 2 if stem == "conv3_stride2" else 1
    model.conv1 = nn.Conv2d(in_chans, first.out_channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem != "conv3_pool":
        model.maxpool = nn.Identity()
