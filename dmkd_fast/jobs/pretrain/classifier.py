"""Train a teacher on real images: `dmkd pretrain teacher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dmkd_fast.classifiers.loading import build_classifier, save_classifier, to_channels_last
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import TeacherConfig
from dmkd_fast.jobs import memory, networks
from dmkd_fast.jobs.pretrain import loop
from dmkd_fast.jobs.pretrain.real_data import list_real
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.training import scoring
from dmkd_fast.views.crops import Views, ViewSpec


@loop.less_memory
def pretrain_teacher(
    config: TeacherConfig, data: Path, *, resume: bool = False, show: bool = True
) -> dict[str, Any]:
    """Train a classifier with cross-entropy and save it as `model` in the run directory.

    Args:
        config: Settings of the job.
        data: Folder of labeled images; see `list_real` in `real_data.py`.
        resume: Whether to continue from the newest checkpoint.
        show: Whether to show progress.

    Returns:
        held_out_top1, with a test set test_top1, and the figures that `loop.train` returns.
    """
    if (ended := loop.finished(config, resume=resume)) is not None:
        return ended
    job = loop.prepare(config, resume=resume, show=show)
    config, device = job.config, job.device
    if config.model.arch is None:
        raise invalid("model", "path", "arch", "name the architecture to train")
    listed = list_real(data, device, config.data)
    channels = listed.shape[0]
    spec = ClassifierSpec(
        architecture=config.model.arch,
        num_classes=len(listed.class_names),
        in_chans=channels,
        input_size=config.views.size,
        mean=(config.mean,) * channels,
        std=(config.std,) * channels,
        model_args=config.model.model_args,
        stem=config.model.stem,
        label_names=listed.class_names,
    )
    model = to_channels_last(build_classifier(spec).to(device))
    one_view = memory.batch_plan(
        model, 1, 1, channels, [spec.input_size], dtype=job.dtype, compiled=False
    )
    memory.check_fits(one_view, available_bytes(device))
    networks.check_takes("model", model, spec.input, spec.num_classes, device)
    real = listed.decode()
    del listed  # It holds the names of all files.
    batch = memory.batch_plan(
        model,
        config.train.batch_size,
        config.train.accumulate,
        spec.in_chans,
        [spec.input_size],
        dtype=job.dtype,
        compiled=job.compiles,
    )
    memory.check_fits(batch, available_bytes(device))
    forward = job.compiled(model)
    views = Views(
        ViewSpec(size=config.views.size, mean=spec.mean, std=spec.std, device=device),
        **config.views.model_dump(exclude={"size"}),
        seed=config.seed,
    )

    def loss_of(indices: Tensor, uses: Tensor) -> Tensor:
        batch = views(real.train.images, indices, indices, uses)
        with job.autocast():
            logits = forward(batch)
        return nn.functional.cross_entropy(
            logits.float(), real.train.labels[indices], label_smoothing=config.label_smoothing
        )

    with loop.opened(config, resume=resume) as folder:
        real.write_record(folder)
        average, facts = loop.train(job, model, loss_of, len(real.train.labels), folder)
        final = average.module
        with loop.results(folder) as target:
            for name, images in (("held_out_top1", real.held_out), ("test_top1", real.test)):
                if images is None:
                    continue
                batches = scoring.tracked(images.batches([spec.input]), len(images), job.display)
                scores = scoring.measure(
                    final, batches, input=spec.input, num_classes=spec.num_classes
                )
                scoring.check_trained(scores)
                facts[name] = scores.result()["top1"]
            save_classifier(final, spec, target)
            title = f"{config.name}: {spec.architecture}"
            verb = "pretrain teacher CONFIG --data DIR"
            loop.write_card(target, title, verb, config, facts, source=real.source)
    return job.finish(facts)
