"""Loading and saving of classifiers: teachers and students.

A classifier on disk is a folder
with `config.json` (timm's hub layout) and `model.safetensors`, so what timm puts on the Hub is read
as it is. Architectures: `classifiers/small_nets.py`, `torchvision:NAME`, any other name is timm's.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dmkd_fast.classifiers import small_nets
from dmkd_fast.classifiers.spec import STEMS, ClassifierSpec, check_model_args, stated_license
from dmkd_fast.runtime.errors import is_out_of_memory
from dmkd_fast.runtime.model_files import (
    CONFIG,
    WEIGHTS,
    check_folder,
    load_weights,
    match_weights,
    read_json,
    read_licence,
    save_weights,
)
from dmkd_fast.views.spec import InputSpec

TORCHVISION = "torchvision:"
LOG = logging.getLogger("dmkd_fast")
# Pairs that torch folds: a layer and the batch norm behind it.
FOLDABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}  # fmt: skip


def build_classifier(spec: ClassifierSpec) -> nn.Module:
    """A new classifier with random weights.

    Raises:
        ValueError: There is no such architecture, or it refuses the arguments.
    """
    return build(
        spec.architecture, num_classes=spec.num_classes, in_chans=spec.in_chans, stem=spec.stem,
        **spec.model_args,
    )  # fmt: skip


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
        elif architecture.startswith(TORCHVISION):
            model = _torchvision(architecture, num_classes, in_chans, model_args)
        else:
            model = _timm(architecture, num_classes, in_chans, model_args)
    except (
        TypeError, LookupError, AssertionError, AttributeError, ArithmeticError, RuntimeError,
    ) as error:  # fmt: skip
        # Constructors raise any of these for arguments of a wrong kind or combination.
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"model_args of {architecture}: {reason}; change or remove") from None
    if stem != "own":
        _use_small_stem(model, architecture, stem, in_chans)
    return model


def save_classifier(model: nn.Module, spec: ClassifierSpec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder."""
    save_weights(model, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(spec.to_json(), indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path, device: torch.device) -> tuple[nn.Module, ClassifierSpec]:
    """Read a classifier that `save_classifier` or timm wrote; float32, in eval mode.

    Raises:
        ValueError: A file is missing, damaged or does not fit the architecture.
    """
    check_folder(folder)
    config = read_json(folder / CONFIG)
    try:
        spec = ClassifierSpec.from_json(config)
        with torch.device("meta"):
            outline = build_classifier(spec)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / CONFIG}: {reason}") from None
    # Sizes are compared before memory for them is taken.
    match_weights(outline, folder / WEIGHTS)
    model = build_classifier(spec)
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), spec


def timm_lines(spec: ClassifierSpec) -> str:
    """For a model card: how timm loads the classifier; nothing for torchvision's models."""
    if spec.architecture.startswith(TORCHVISION):
        return ""
    known = spec.stem == "own" and not spec.architecture.startswith(small_nets.PREFIXES)
    register = "" if known else "  # registers the architecture with timm\nimport timm"
    first = "timm" if known else "dmkd_fast.integrations.timm"
    return (
        f"With timm:\n```python\nimport {first}{register}\n"
        'model = timm.create_model("local-dir:.", pretrained=True)\n```\n'
    )


def classifier_licence(folder: Path) -> str:
    """The licence that a classifier's model card or config states, or "unknown"."""
    return stated_license(read_json(folder / CONFIG)) or read_licence(folder)


def hub_repository(architecture: str) -> str:
    """The Hub repository with the pretrained weights of a timm name: `OWNER/NAME`.

    Raises:
        ValueError: timm knows no such name, or no weights of it on the Hub.
    """
    import timm

    if not timm.is_model(architecture):
        _refuse_name(architecture)
    try:
        config = timm.get_pretrained_cfg(architecture)
    except (RuntimeError, ValueError):  # no such tag
        config = None
    if config is None or not config.hf_hub_id:
        known = timm.list_pretrained(f"{architecture.split('.')[0]}*")[:5]
        raise ValueError(
            f"arch: got {architecture!r} with pretrained=true, expected a timm name with weights "
            f"on the Hub{' such as ' + ', '.join(known) if known else ''}; set path instead"
        )
    return str(config.hf_hub_id)


def load_torchvision(
    architecture: str, device: torch.device
) -> tuple[nn.Module, ClassifierSpec, str]:
    """torchvision's own default weights of `torchvision:NAME`; downloaded once, hash-checked.

    Returns:
        The model in eval mode, its spec, and the name of the weights.

    Raises:
        ValueError: There is no such model, no weights of it, or no network.
    """
    from torchvision.models import get_model_weights

    name = architecture.removeprefix(TORCHVISION)
    _check_torchvision_name(name)
    weights = get_model_weights(name).DEFAULT
    recipe = weights.transforms()
    spec = ClassifierSpec(
        architecture=architecture, num_classes=len(weights.meta["categories"]), in_chans=3,
        input_size=recipe.crop_size[0], mean=tuple(recipe.mean), std=tuple(recipe.std),
        crop_pct=min(1.0, recipe.crop_size[0] / recipe.resize_size[0]),
        interpolation=recipe.interpolation.value,
        # These two were trained on inputs scaled another way, and convert them.
        model_args={"transform_input": True} if name in ("googlenet", "inception_v3") else {},
    )  # fmt: skip
    model = build_classifier(spec)
    try:
        # A .pth file: weights_only refuses everything in it but tensors.
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, or whatever the reader says of a damaged file
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(
            f"{architecture}: cannot have {weights.url} ({reason}); check the network and torch's "
            "cache, or set path to weights in safetensors"
        ) from None
    kept = model.state_dict().keys()
    state = {k: v for k, v in state.items() if k in kept or not k.lower().startswith("aux")}
    model.load_state_dict(state)
    return model.to(device).eval(), spec, str(weights)


def for_inference(model: nn.Module, dtype: torch.dtype, input: InputSpec) -> nn.Module:
    """A frozen copy that gives the same logits faster; the model itself is left alone.

    Weights are cast once (autocast would cast frozen ones on every call) and batch norms are folded
    into the convolutions before them where the model can be traced: 27 ms -> 12 ms for the embedded
    strong teacher, 64 views, one CPU thread, bfloat16. Folded and unfolded copy are compared in
    float32 on a batch of random images; where they differ, the unfolded one is used.

    Args:
        model: (B, c, S, S) -> (B, C) logits.
        dtype: What the copy computes in.
        input: How the model wants its images.
    """
    views = _random_views(model, input)
    try:
        copied = copy.deepcopy(model)
    except RuntimeError:
        # A weight that a hook computes (weight_norm, prune) can be copied only without its graph.
        with torch.no_grad():
            model(views)
        copied = copy.deepcopy(model)
    copied = freeze(copied).float()
    if any(type(module) in FOLDABLE.values() for module in copied.modules()):
        copied = _folded_if_equal(copied, views.float())
    return to_channels_last(copied.to(dtype))


def to_channels_last(model: nn.Module) -> nn.Module:
    """`model` with its weights of four dimensions in channels_last; others stay as they are.

    `Module.to(memory_format=...)` also takes those of five dimensions, and fails.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, and no parameter asks for a gradient."""
    return model.eval().requires_grad_(False)


def _random_views(model: nn.Module, input: InputSpec) -> Tensor:
    """Four images of noise, normalized for `model`; the same on every call."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    shape = 4, input.num_channels, input.size, input.size
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (input.mean, input.std))
    return ((pixels - mean) / std).to(weight.device, weight.dtype)


@torch.no_grad()
def _folded_if_equal(model: nn.Module, views: Tensor) -> nn.Module:
    """`model` with its batch norms folded, or `model` where that would change its logits."""
    try:
        folded = fold_batch_norms(copy.deepcopy(model))
        # TF32 alone would make them differ by more.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            expected = model(views)
            error = (folded(views) - expected).abs().max() / expected.abs().max()
        reason = "" if error <= 1e-4 else f"logits differ by {error.item():.1e} of the largest"
    except Exception as stop:  # Tracing, and the call of what it gave, fail in many ways.
        reason = " ".join(str(stop).split())[:120] or type(stop).__name__
    if not reason:
        return folded
    LOG.warning("teacher: its batch norms are not folded, so it is slower (%s)", reason)
    return model


def fold_batch_norms(model: nn.Module) -> fx.GraphModule:
    """Trace `model` and fold each batch norm into the layer before it; `model` is changed.

    A layer that is called twice, whose output has another use, or that has hooks is left alone.
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
        raise ValueError(
            f"{architecture}: got images with {in_chans} channel(s), expected 3, as "
            "torchvision's models take color only; use a timm model"
        )
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads return more than logits
        model_args = {"aux_logits": False, "init_weights": True} | model_args
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **model_args)
    return model


def _check_torchvision_name(name: str) -> None:
    import difflib

    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"arch: got {TORCHVISION}{name}, expected a classification model of torchvision "
            + (f"such as {', '.join(close)}" if close else "(see torchvision.models.list_models())")
        )


def _refuse_name(architecture: str) -> None:
    import timm

    close = timm.list_models(f"*{architecture}*")[:5]
    raise ValueError(
        f"arch: got {architecture!r}, expected lenet5, lenet5_half, cifar_..., torchvision:NAME or "
        "a timm model" + (f" such as {', '.join(close)}" if close else "; see timm.list_models()")
    )


def _use_small_stem(model: Any, architecture: str, stem: str, in_chans: int) -> None:
    """Replace a ResNet's 7x7 stride-2 first convolution by a 3x3 one."""
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or stem not in STEMS:
        raise ValueError(
            f"stem: got {stem!r} for {architecture!r}, expected own, or "
            f"{', '.join(STEMS)} for a ResNet with a single first convolution; set stem=own"
        )
    stride = 2 if stem == "conv3_stride2" else 1
    model.conv1 = nn.Conv2d(in_chans, first.out_channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem != "conv3_pool":
        model.maxpool = nn.Identity()
