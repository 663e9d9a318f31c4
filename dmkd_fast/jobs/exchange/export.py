"""Write a student for use elsewhere, and compare it with the original: `dmkd export`.

The exported file is loaded again by the loader of its own ecosystem and run on the test images, in
float32 on the CPU. Its top-1 predictions must be the same, and its logits equal within 1e-4.

Shapes: B images, c channels, S input size, C classes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmkd_fast.classifiers.loading import TORCHVISION, save_classifier, timm_lines
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data.class_names import compare_class_names, write_class_names
from dmkd_fast.data.listing import CLASS_NAMES
from dmkd_fast.jobs import networks, run_dir
from dmkd_fast.jobs.evaluate import STUDENT, open_test_set
from dmkd_fast.jobs.exchange import card, hub
from dmkd_fast.jobs.exchange.folders import check_new
from dmkd_fast.runtime import files
from dmkd_fast.runtime.device import exact_float32, set_num_threads
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.views.spec import InputSpec

Format = Literal["timm", "pt2", "onnx"]
TOLERANCE = 1e-4
CPU = torch.device("cpu")
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class _Exported:
    """A network on its way out, with what its model card states."""

    model: nn.Module
    """Network in eval mode on the CPU; it takes `input`."""
    spec: ClassifierSpec
    """Spec of the classifier; its mean and std are those of the original."""
    input: InputSpec
    """Images that `model` takes: with `--normalize`, pixels in [0, 1]."""
    inputs: card.Inputs
    """What the classifier was made from."""
    tested_on: str | None
    """Hub's name of the test set, if it has one."""


class _Normalized(nn.Module):
    """Take pixels in [0, 1], normalize them, and call a classifier."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, spec: ClassifierSpec) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (B, C) of pixels (B, c, S, S) in [0, 1]."""
        logits: Tensor = self.model((pixels - self.mean) / self.std)
        return logits


def export(
    what: str | Path,
    to: Format,
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    classes: str | Path | None = None,
    normalize: bool = False,
    push: str | None = None,
) -> dict[str, Any]:
    """Write a trained classifier in another format, after a comparison on the test images.

    Args:
        what: Run directory of a finished run, or name of a classifier; see `load_trained` in
            `jobs/networks.py`.
        to: timm: a folder for timm and the Hub. pt2: a program of torch.export. onnx: an ONNX file.
        out: Folder to create. None: export-FORMAT in the run directory.
        data: Labeled images for the comparison; see `open_set`. None: the run's own test set.
        classes: File with the class names of `data`, one a line.
        normalize: Whether the exported network takes pixels in [0, 1] and normalizes them itself.
        push: Hub repository, OWNER/NAME, to upload the folder to afterwards.

    Returns:
        path, format, run_dir (None for a classifier that is no run's), top1, num_images,
        largest_difference of the logits, and with `push` the url of the commit.

    Raises:
        UserError: The classifier cannot be loaded or has no such format, its classes are not
            those of `data`, `out` exists, the exported network predicts something else, or the
            Hub refused; the folder is kept then.
    """
    set_num_threads(0)
    folder = Path(what)
    target = folder / f"export-{to}" if out is None else Path(out)
    if out is None and not (folder / run_dir.CONFIG).is_file():
        raise UserError(f"--out: got none for {what}, which is not a run directory; add --out DIR")
    check_new(target, "--out DIR")
    if normalize and to == "timm":
        fix = "remove it, as timm reads mean and std from config.json"
        raise invalid("--normalize", "it with --to timm", "pt2 or onnx", fix)
    if push is not None:
        hub.check_repository(push)
    if to == "onnx":
        _check_onnx()
    model, spec, license = networks.load_trained(str(what), CPU)
    setting = "eval.classes" if data is None else "--classes"
    data, classes = _test_images(folder, data, classes)
    images = open_test_set(data, classes, CPU, spec.num_classes, spec.label_names)
    if classes is None:
        compare_class_names(str(what), spec.label_names, images.class_names, setting=setting)
    spec = replace(spec, label_names=spec.label_names or images.class_names)
    exported = _Exported(
        model=_Normalized(model, spec).eval() if normalize else model,
        spec=spec,
        input=_pixels(spec.input) if normalize else spec.input,
        inputs=card.read_inputs(str(what), license),
        tested_on=card.hub_dataset(str(data)),
    )
    with files.new_folder(target) as partial:
        write: Callable[[_Exported, Path], Network] = {
            "timm": _write_timm,
            "pt2": _write_pt2,
            "onnx": _write_onnx,
        }[to]
        with _one_tf32_setting():
            again = write(exported, partial)
        batches = images.batches([spec.input, exported.input])
        facts = _compare(str(what), model, again, batches, spec.input, exported.input)
        _write_card(partial, to, exported, facts)
    if push is not None:
        facts["url"] = hub.push(target, push)
    run = str(folder) if (folder / run_dir.CONFIG).is_file() else None
    return {"path": str(target), "format": to, "run_dir": run, **facts}


def _test_images(
    folder: Path, data: str | Path | None, classes: str | Path | None
) -> tuple[str | Path, str | Path | None]:
    """Return the images to compare on and the file of their class names."""
    if data is not None:
        return data, classes
    if not (folder / STUDENT).is_dir():
        raise UserError(
            f"--data: got none for {folder}, which is not the directory of a distillation; add "
            "--data DIR with labeled images to compare on"
        )
    config = load_config(DistillConfig, folder / run_dir.CONFIG)
    return config.eval.path, config.eval.classes


def _pixels(spec: InputSpec) -> InputSpec:
    """Return the same input without normalization."""
    count = spec.num_channels
    return replace(spec, mean=(0.0,) * count, std=(1.0,) * count)


def _write_timm(exported: _Exported, folder: Path) -> Network:
    """Write a folder in timm's layout, and load it with timm."""
    import timm

    spec = exported.spec
    if spec.architecture.startswith(TORCHVISION):
        fix = "use --to pt2 or --to onnx"
        raise invalid("--to", f"timm for {spec.architecture}", "an architecture of timm", fix)
    save_classifier(exported.model, spec, folder)
    # Registers the architectures of this package with timm; no layer below may import it.
    importlib.import_module("dmkd_fast.integrations.timm")
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def _write_pt2(exported: _Exported, folder: Path) -> Network:
    """Write a program of torch.export with a dynamic batch, and load it."""
    path = folder / "model.pt2"
    torch.export.save(_program(exported), path)
    return torch.export.load(path).module()


def _write_onnx(exported: _Exported, folder: Path) -> Network:
    """Write an ONNX file with a dynamic batch, and load it with ONNX Runtime."""
    import onnxruntime

    path = folder / "model.onnx"
    torch.onnx.export(
        _program(exported),
        (),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return call


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx: takes onnx, onnxscript and onnxruntime ({error}); install them with: "
            "pip install 'dmkd_fast[onnx]'"
        ) from None


@contextmanager
def _one_tf32_setting() -> Iterator[None]:
    """Let torch.export run whatever the TF32 settings of cuDNN are; restore them afterwards.

    torch.export reads the older flag of all of cuDNN, which raises if a program has set
    convolutions apart from it. On the CPU the settings change no result.
    """
    cudnn: Any = torch.backends.cudnn
    parts = (cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    cudnn.allow_tf32 = True  # the default; sets both parts as well
    try:
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def _program(exported: _Exported) -> torch.export.ExportedProgram:
    """Trace the network for any number of images."""
    size = exported.input.size
    example = torch.zeros(4, exported.input.num_channels, size, size)
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(exported.model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises many kinds of errors for what it cannot trace.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{exported.spec.architecture}: torch.export cannot trace it for any number of images "
            f"({reason}); use --to timm"
        ) from None
    for node in program.graph.nodes:  # Traces name files of this machine.
        node.meta.pop("stack_trace", None)
    return program


@exact_float32()
@torch.inference_mode()
def _compare(
    name: str,
    model: nn.Module,
    again: Network,
    batches: Iterator[tuple[dict[InputSpec, Tensor], Tensor]],
    original: InputSpec,
    taken: InputSpec,
) -> dict[str, Any]:
    """Compare the logits of the original and the exported network on all images."""
    hits = count = changed = not_finite = 0
    largest = 0.0
    for views, labels in batches:
        logits = model(views[original])
        # A batch of one image and one of all others show that the batch is dynamic.
        split = views[taken].split([1, len(labels) - 1]) if len(labels) > 1 else [views[taken]]
        others = torch.cat([again(part) for part in split])
        difference = (logits - others).abs().max().item()
        # `max` would drop a NaN.
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        not_finite += int((~logits.isfinite()).any(1).sum())
        changed += int((logits.argmax(1) != others.argmax(1)).sum())
        hits += int((others.argmax(1) == labels).sum())
        count += len(labels)
    if not_finite:
        got = f"NaN or infinite logits for {not_finite:,} of {count:,} images"
        fix = "the weights are damaged or their training diverged, use others"
        raise invalid(name, got, "finite ones", fix)
    if changed or largest > TOLERANCE:
        raise UserError(
            f"exported network: got {changed:,} of {count:,} predictions changed and logits that "
            f"differ by up to {largest:.1e}, expected the same predictions and at most "
            f"{TOLERANCE:.0e}; nothing is kept, use another format"
        )
    return {"top1": hits / count, "num_images": count, "largest_difference": largest}


def _write_card(folder: Path, to: Format, exported: _Exported, facts: dict[str, Any]) -> None:
    """Write README.md with metadata that the Hub reads, and the class names; no local path."""
    spec, inputs = exported.spec, exported.inputs
    header = card.metadata(
        name=spec.architecture,
        library={"timm": "timm", "pt2": "pytorch", "onnx": "onnx"}[to],
        inputs=inputs,
        tested_on=exported.tested_on,
        facts=facts,
    )
    stated = "; ".join(f"{part}: {text}" for part, text in inputs.licenses.items())
    shape = f"{spec.in_chans} x {spec.input_size} x {spec.input_size}"
    loading = {
        "timm": timm_lines(spec),
        "pt2": '```python\nimport torch\nmodel = torch.export.load("model.pt2").module()\n```\n',
        "onnx": "```python\nimport onnxruntime\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        '(logits,) = session.run(None, {"images": images})\n```\n',
    }[to]
    prepared = (
        "which the network normalizes itself"
        if exported.input.mean != spec.mean or exported.input.std != spec.std
        else f"normalized with mean {list(spec.mean)} and std {list(spec.std)}"
    )
    text = (
        f"{header}# {spec.architecture}\n\n"
        f"Top-1 accuracy {facts['top1']:.4f} on {facts['num_images']:,} real test images. On these "
        "images, the file and the original network predict the same classes, and their logits "
        f"differ by at most {facts['largest_difference']:.1e}.\n\n{loading}\n"
        f"Input: float32 images (B, {shape}) for any B, pixels in [0, 1], {prepared}. The short "
        f"side is resized to {exported.input.short_side} ({spec.interpolation}, antialiased), then "
        f"the center is cut out. Output: logits (B, {spec.num_classes}), in the order of "
        f"{CLASS_NAMES}.\n\nLicenses: {stated}.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    names = spec.label_names or tuple(map(str, range(spec.num_classes)))
    write_class_names(folder / CLASS_NAMES, names)
