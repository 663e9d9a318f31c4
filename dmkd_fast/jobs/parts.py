"""Load the networks and images that a config names, and check them against each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.data.class_names import compare_class_names
from dmkd_fast.data.sources import ShardSource
from dmkd_fast.data.test_sets import EncodedSet, ImageSet
from dmkd_fast.jobs import memory, networks
from dmkd_fast.jobs.evaluate import open_test_set
from dmkd_fast.jobs.images import (
    OpenSource,
    Origin,
    Priors,
    denoiser_class_names,
    job_class_names,
    open_denoiser,
    open_source,
)
from dmkd_fast.jobs.resolve import ResolvedJob, resolve, resolve_images
from dmkd_fast.jobs.stored_logits import open_stored
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Networks and data of a run, loaded and checked against each other."""

    origin: Origin
    """Producer of the images: a diffusion model, files, or a procedure."""
    teachers: networks.LoadedTeachers
    student: nn.Module
    student_spec: ClassifierSpec
    test_set: ImageSet | EncodedSet
    stored: ShardSource | None = None
    """Shards whose teacher logits are read; None: the teachers run."""


def load_parts(job: ResolvedJob) -> Parts:
    """Load everything that a resolved job names, without writing anything.

    Raises:
        UserError: A file is missing or damaged, or parts do not fit together.
    """
    config, device = job.config, job.device
    teachers = networks.load_teachers(
        config.teachers, temperature=config.loss.temperature, device=device
    )
    first = teachers.specs["teacher"]
    num_classes = teachers.num_classes["teacher"]
    images: Origin
    if config.source is None:
        known = job_class_names(config, teachers.class_names["teacher"])
        images = open_denoiser(config.denoiser, device, job.dtype, known)
        num_classes = images.num_classes
    # A class_map states the order of the classes, so that other names are compared, not mapped.
    names = () if config.teacher.class_map else teachers.class_names["teacher"]
    test_set = open_test_set(config.eval.path, config.eval.classes, device, num_classes, names)
    if isinstance(test_set, EncodedSet):
        test_set = replace(test_set, is_repeated=config.eval.num_points > 1)
    if config.source is None and config.eval.classes is None:
        names = denoiser_class_names(config.denoiser)
        compare_class_names("denoiser.path", names, test_set.class_names, setting="eval.classes")
    if config.source is not None and not config.source.is_on_disk:
        size = config.source.image_size or config.views.size
        images = Priors(image_shape=(first.in_chans, size, size), num_classes=num_classes)
    elif config.source is not None:
        images = open_source(
            config.source,
            num_classes=num_classes,
            channels=first.in_chans,
            class_names=test_set.class_names,
        )
    check_fit(config, images, teachers, test_set)
    stored = open_stored(config, images, teachers) if isinstance(images, OpenSource) else None
    student, student_spec = networks.load_student(
        config.student, teachers, view_size=config.views.size, device=device, seed=config.seed
    )
    return Parts(
        origin=images,
        teachers=teachers,
        student=student,
        student_spec=student_spec,
        test_set=test_set,
        stored=stored,
    )


def prepare(config: DistillConfig, ranks: Ranks = ALONE) -> tuple[ResolvedJob, Parts]:
    """Replace every "auto" of a config and load what it names, without writing anything.

    Raises:
        UserError: A setting or a file is wrong, or the machine cannot run the job.
    """
    job = resolve(config, ranks)
    memory.ring_plan(job.config, ranks=ranks)  # Refuse a bad ring before anything is loaded.
    with memory.explained(job):
        parts = load_parts(job)
    return resolve_images(job, parts.origin), parts


def check_fit(
    config: DistillConfig,
    images: Origin,
    teachers: networks.LoadedTeachers,
    test_set: ImageSet | EncodedSet,
) -> None:
    """Check that images, teachers and test set have the same classes and channels.

    Raises:
        UserError: Numbers of classes, class names or numbers of channels differ.
    """
    whose = "denoiser.path" if config.source is None else "source"
    if isinstance(images, OpenSource):
        whose = "source.path"
    for section, spec in teachers.specs.items():
        facts = (
            (
                "classes",
                images.num_classes,
                teachers.num_classes[section],
                len(test_set.class_names),
            ),
            ("channels", images.image_shape[0], spec.in_chans, test_set.num_channels),
        )
        for what, made, taught, tested in facts:
            if made != taught or tested not in (taught, None):
                raise UserError(
                    f"{what}: {whose} has {made}, {section}.path has {taught}, eval.path has "
                    f"{tested}, expected the same; change the one that is off"
                )
        if config.eval.classes is None:
            names = teachers.class_names[section]
            compare_class_names(
                f"{section}.path", names, test_set.class_names, setting="eval.classes"
            )
