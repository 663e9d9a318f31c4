"""`source.kind: priors`: a job with neither a denoiser nor data, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_jobs import CONFIG, SHORT, fit_until

from dmkd_fast import Distiller, GeneratedLoader, cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.inspect import doctor, plan
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.sampling.hooks import Hooks
from dmkd_fast.sampling.priors import PriorImages

REST = [a for a in SHORT if not a.startswith("sampler")]
JOB = [*REST, "denoiser=null", "sampler=null", "source.kind=priors", "source.block_images=64"]


def job(folder: Path) -> Distiller:
    config = load_config(DistillConfig, CONFIG, [*JOB, f"run_dir={folder}"])
    return build(*prepare(config), show=False)


def test_a_job_without_denoiser_and_data_ends_with_a_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(CONFIG).read_text()
    kept = [a for a in text.splitlines() if not a.startswith(("denoiser:", "sampler:"))]
    config = tmp_path / "config.yaml"
    config.write_text("\n".join(kept))
    run = tmp_path / "run"
    overrides = [*REST, "source.kind=priors", "source.block_images=64"]
    assert cli.main(["distill", str(config), f"run_dir={run}", *overrides]) == 0
    assert "1 x 28 x 28 procedural images" in capsys.readouterr().err
    saved = (run / "config.yaml").read_text()
    assert "denoiser:" not in saved and "image_size: 28" in saved and "kind: priors" in saved
    assert "no generator was trained" in (run / "student" / "README.md").read_text()
    assert "Images, which have no class, that were" in (run / "report.html").read_text()
    assert load_file(run / "student" / "model.safetensors")
    assert cli.main(["evaluate", str(run)]) == 0


def test_a_job_of_priors_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole = job(tmp_path / "whole")
    whole.fit()
    fit_until(job(tmp_path / "again"), 9)
    blocks = sorted((tmp_path / "again").rglob("block-*.safetensors"))
    blocks[0].write_bytes(b"lost")  # made again
    again = job(tmp_path / "again")
    assert again.restore().step == 9
    again.fit()
    assert again.ring.num_inserted == whole.ring.num_inserted
    assert torch.equal(again.ring.images, whole.ring.images)
    weights = [d.student.average.module.state_dict() for d in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_priors_have_the_size_of_the_views_unless_the_config_says_another(tmp_path: Path) -> None:
    for size, overrides in ((28, []), (32, ["source.image_size=32"])):
        settings = [*JOB, f"run_dir={tmp_path}", *overrides]
        resolved, parts = prepare(load_config(DistillConfig, CONFIG, settings))
        assert parts.origin.image_shape == (1, size, size)
        assert resolved.config.source is not None and resolved.config.source.image_size == size
    distiller = build(resolved, parts, show=False)
    assert isinstance(distiller.images, PriorImages)
    found = list(doctor.examine_job(resolved, parts, distiller))
    assert [f.what for f in found if not f.is_ok and f.name != "attention"] == []
    found_plan = plan.plan(resolved.config, images_per_s=1000, views_per_s=1000)
    assert found_plan["run"]["forwards_per_image"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["source.path=images"], ["source: path: got a directory with kind=priors"]),
        (["source.kind=auto"], ["path: missing", "kind=priors"]),
        (["source.follow=true"], ["follow: got true with kind=priors", "shards"]),
        (["ring.order=balanced"], ["ring.order: got balanced", "priors have no"]),
        (["loss.alpha=0.5"], ["loss.alpha: got 0.5", "priors have no classes"]),
        (["loss.divergence=dkd"], ["loss.divergence: got dkd", "priors"]),
        (["teacher.teaches=[0, 1]"], ["teacher.teaches: got classes", "priors have no classes"]),
        (["teacher.stored=true"], ["teacher.stored: got true without shards"]),
        (["ring.overlap=true"], ["ring.overlap: got true with a source"]),
        (["ring.capacity_images=64"], ["ring.capacity_images", "source.block_images"]),
    ],
)
def test_what_priors_cannot_do_is_refused_in_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["distill", CONFIG, f"run_dir={tmp_path}/run", *JOB, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_hooks_need_a_denoiser(tmp_path: Path) -> None:
    resolved, parts = prepare(load_config(DistillConfig, CONFIG, [*JOB, f"run_dir={tmp_path}"]))
    hooks = Hooks(guide=lambda *_: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="none for images that no denoiser makes"):
        build(resolved, parts, hooks=hooks, show=False)


def test_a_loader_of_priors_gives_logits_in_place_of_classes(tmp_path: Path) -> None:
    settings = load_config(DistillConfig, CONFIG, [*JOB, f"run_dir={tmp_path}"])
    with pytest.raises(ValueError, match="teacher_logits: got false with source"):
        GeneratedLoader(settings)
    views, _, logits = next(iter(GeneratedLoader(settings, teacher_logits=True)))
    assert views.shape == (32, 1, 28, 28) and logits.shape == (32, 10)
