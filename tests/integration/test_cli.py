"""The command line: whole short runs, and one line for every mistake."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_jobs import CONFIG, SHORT

import dmkd_fast
from dmkd_fast import cli
from dmkd_fast.assets import resolve

FMNIST = "embedded:fashion_mnist"


def dmkd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmkd_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a command in this process and return the JSON that it prints last."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_distill_leaves_a_complete_run_that_evaluate_reproduces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = dmkd("distill", CONFIG, f"run_dir={tmp_path}/a", *SHORT)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary) == [
        "top1",
        "top5",
        "teacher_top1",
        "agreement",
        "generated_images",
        "views",
        "reuse",
        "images_per_s",
        "views_per_s",
        "wall_s",
        "cpu_s",
        "denoiser_license",
        "teacher_license",
        "run_dir",
    ]
    assert summary["views"] == 640 and summary["generated_images"] == 192
    assert 0 <= summary["top1"] <= summary["top5"] <= 1
    run = tmp_path / "a"
    pictures, student = (
        ("samples.png", "report.html", "report.json"),
        ("model.safetensors", "config.json", "README.md"),
    )
    names = ["config.yaml", "stats.jsonl", "summary.json", *pictures]
    for name in [*names, *(f"student/{n}" for n in student)]:
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("events.out.tfevents*"))
    assert "views/s" in done.stderr and "ETA" in done.stderr

    scores = printed(capsys, "evaluate", str(run))
    assert {k: scores[k] for k in ("top1", "top5", "agreement")} == {
        k: summary[k] for k in ("top1", "top5", "agreement")
    }

    printed(capsys, "distill", f"{run}/config.yaml", f"run_dir={tmp_path}/b")
    first, second = (load_file(tmp_path / r / "student" / "model.safetensors") for r in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dry_run_prints_settings_and_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", CONFIG, "--dry-run", "sampler.num_steps=3"]) == 0
    out = capsys.readouterr().out
    assert (
        "num_steps: 3" in out and "device: cpu" in out and "ring images: " in out and "bytes" in out
    )
    assert not list(tmp_path.iterdir())


def test_help_names_only_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-h"], ["distill", "-h"], ["evaluate", "-h"], ["pretrain", "teacher", "-h"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "section.field=value" in out and "--resume" in out
    verbs = [
        line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    shown = ["demo", "init", "distill", "generate", "evaluate", "predict", "export", "import"]
    assert [v for v in verbs if v.islower()][:8] == shown


def test_help_and_config_do_not_wait_for_pytorch() -> None:
    script = textwrap.dedent(
        """
        import sys
        from dmkd_fast import cli
        try:
            code = cli.main(sys.argv[1:])
        except SystemExit as stop:
            code = stop.code
        names = ("torch", "pydantic", "yaml", "numpy")
        print("imported:", *(name for name in names if name in sys.modules))
        sys.exit(code)
        """
    )
    for arguments, allowed in (
        (["--help"], ""),
        (["distill", "--help"], ""),
        (["--version"], ""),
        ([], ""),
        (["config", "ring"], "pydantic yaml"),
    ):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].split()[1:] == allowed.split(), arguments


def test_bare_command_prints_help_and_version_is_the_packages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: dmkd [-h] [--version] VERB")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dmkd {dmkd_fast.__version__}\n"
    done = dmkd("--version")  # python -m dmkd_fast
    assert done.stdout == f"dmkd {dmkd_fast.__version__}\n" and done.returncode == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["--bare"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("dmkd: unrecognized arguments: --bare")


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", CONFIG, "seed=-1"],
        ["generate", CONFIG, "--out", "x", "--num-images", "1", "seed=-1"],
        ["evaluate", "nowhere"],
        ["pretrain", "fewstep", CONFIG],
        ["config", "nothing"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_traceback_shows_where_a_user_error_was_raised(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert cli.main([*arguments, "--traceback"]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):" and last == line


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(_: object) -> None:
        raise ValueError("a bug, not a wrong setting")

    monkeypatch.setattr(cli.verbs, "distill", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["distill", CONFIG])
    assert capsys.readouterr().err == ""


def test_warnings_of_the_package_are_printed_by_the_command_line_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("dmkd_fast")
    monkeypatch.setattr(cli.verbs, "distill", lambda _: logger.warning("a slow path"))
    for _ in range(2):
        assert logger.handlers == []
        assert cli.main(["distill", CONFIG]) == 0
        assert capsys.readouterr().err == "WARNING: a slow path\n"
    assert logger.handlers == []


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with damaged copies of the assets, which no test changes."""
    tmp_path = tmp_path_factory.mktemp("broken")
    teacher, denoiser, test = (resolve(f"{FMNIST}/{n}") for n in ("weak", "denoiser", "test"))
    (tmp_path / "empty").mkdir()
    for name in ("weak", "flipped", "truncated", "classes", "badjson"):
        shutil.copytree(teacher, tmp_path / name)
    for name in ("cut_denoiser", "odd_scheduler", "unet"):
        shutil.copytree(denoiser, tmp_path / name)
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "flipped" / "model.safetensors").write_bytes(b"\xff" * 5000)
    config = json.loads((tmp_path / "classes" / "config.json").read_text())
    config["num_classes"] = 7
    (tmp_path / "classes" / "config.json").write_text(json.dumps(config))
    (tmp_path / "badjson" / "config.json").write_text("{")
    cut = tmp_path / "cut_denoiser" / "transformer" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "odd_scheduler" / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "EDMEulerScheduler"}'
    )
    unet = tmp_path / "unet" / "transformer" / "config.json"
    unet.write_text(unet.read_text().replace("DiTTransformer2DModel", "UNet2DModel"))
    seven = {
        k: v[:7] if k.startswith("classifier.2") else v
        for k, v in load_file(teacher / "model.safetensors").items()
    }
    shutil.copytree(tmp_path / "classes", tmp_path / "seven")
    save_file(seven, tmp_path / "seven" / "model.safetensors")
    shutil.copytree(test, tmp_path / "cut_test")
    images = tmp_path / "cut_test" / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:5000])
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "broken.yaml").write_text("name: [unclosed\n")
    (tmp_path / "short.yaml").write_text("name: x\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "checkpoints" / "step-000000003").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("name: x\n")
    return tmp_path


MISTAKES = [
    (["smapler.num_steps=4"], ["'smapler'", "did you mean 'sampler'"]),
    (["batch_size=64"], ["'batch_size'", "did you mean 'train.batch_size'?"]),
    (["bacth_size=64"], ["'bacth_size'", "did you mean 'train.batch_size'?"]),
    (["ring.num_views=64"], ["'ring.num_views'", "did you mean 'train.num_views'?"]),
    (["revision=x"], ["did you mean 'denoiser.revision' or 'teacher.revision' or 'student.rev"]),
    (["ring.wings=2"], ["'ring.wings'", "known keys: capacity_images, "]),
    (["sampler.num_step=4"], ["'sampler.num_step'", "did you mean 'num_steps'"]),
    (["sampler.num_steps=many"], ["sampler.num_steps", "'many'", "integer"]),
    (["sampler.num_steps=1001"], ["num_steps", "1001", "1000"]),
    (["sampler.guidance_scale=0.5"], ["sampler.guidance_scale", "0.5", "or equal to 1"]),
    (["ring.capacity_images=64"], ["ring.capacity_images", "got 64", "raise"]),
    (["train.batch_size=9999999"], ["train.batch_size: got 9999999", "raise capacity_images"]),
    (["ring.min_fill_images=100000"], ["ring.min_fill_images", "100000", "lower"]),
    (["ring.samples_per_insert=0.001"], ["ring.samples_per_insert", "raise"]),
    (["ring.error_buffer=1"], ["ring.error_buffer: got 1", "deadlock", "raise error_buffer"]),
    (["ring.max_uses=3"], ["ring.max_uses: got 3", "samples_per_insert=24", "raise"]),
    (
        [
            "ring={order: uniform, max_uses: 30, capacity_images: 9999, min_fill_images: 1024, "
            "samples_per_insert: 2}"
        ],
        ["ring.max_uses: got 30 with order=uniform", "change one"],
    ),
    (["ring.order=random"], ["ring.order", "'random'", "'balanced'"]),
    (["ring.overlap=true"], ["ring.overlap: got true with device cpu", "ring.overlap=false"]),
    (["ring.samples_per_insert=-1"], ["ring.samples_per_insert", "or equal to 0.000001"]),
    (["loss.temperature=0"], ["loss.temperature", "or equal to 0.01"]),
    (["student={path: {tmp}/weak}", "views.size=32"], ["student.path", "28 pixels", "=28"]),
    (["student={path: {tmp}/seven}"], ["student.path", "7 classes", "teacher's 10"]),
    (["views.scale=[1, 0.5]"], ["scale", "low <= high"]),
    (["views.scale=[0.5, 2]"], ["scale", "less than or equal to 1"]),
    (["views.ratio=[1, 99999]"], ["ratio", "32768"]),
    (["views.size=9000"], ["views.size", "9000", "8192"]),
    (["denoiser.pth=x"], ["'denoiser.pth'", "did you mean 'path'"]),
    (["run_dir={tmp}/other"], ["checkpoints of another run", "another folder"]),
    (
        ["ring.overlap=true", "sampler.phases=[{start: 0.5, num_steps: 2, guidance_scale: 1}]"],
        ["ring.overlap", "sampler.phases", "remove one"],
    ),
    (["device=cuda"], ["cuda", "device=cpu"]),
    (["device=tpu"], ["device", "'tpu'"]),
    (["dtype=float16"], ["float16", "bfloat16"]),
    (["name=../up"], ["name", "'../up'"]),
    (["seed"], ["'seed'", "section.field=value"]),
    (["seed.x=1"], ["seed", "integer"]),
    (["teacher.arch=lenet5"], ["teacher", "arch with pretrained=true"]),
    (["teacher={arch: lenet5}"], ["teacher", "trained weights"]),
    (["teacher={arch: lenet5, pretrained: true}"], ["lenet5", "timm"]),
    (["teacher={arch: 'torchvision:resnet81', pretrained: true}"], ["torchvision:resnet81"]),
    (["teacher.pretrained=true"], ["teacher", "pretrained=True"]),
    (["teacher.path=hf-hub:acme/tiny"], ["teacher", "40 hexadecimal digits"]),
    (["teacher.class_map=[0, 1, 2, 10]"], ["teacher.class_map", "got 10", "0 to 9"]),
    (["teacher.class_map=[0, 1]"], ["classes", "teacher.path has 2", "denoiser.path has 10"]),
    (["teacher.class_map=[0, 1, 2, 3, 4, 5, 6, 7, 8, 8]"], ["class_map", "different numbers"]),
    (["teacher.teaches=[0, 1]"], ["no teacher for class 2"]),
    (["teacher.stop=0.5"], ["no teacher from progress 0.5"]),
    (["more_teachers=[{path: {tmp}/weak, strat: 0.5}]"], ["strat", "did you mean 'start'"]),
    (["more_teachers=[{path: {tmp}/seven}]"], ["more_teachers.0 has 7", "class_map"]),
    (["denoiser.class_map=[0, 10]"], ["denoiser.class_map", "0 to 10", "0 to 9"]),
    (["denoiser.class_map=[3, 1]"], ["classes", "expected the same"]),
    (["sampler.phases=[{start: 0.5, num_steps: 1}]"], ["phases.0.guidance_scale", "missing"]),
    (
        [
            "sampler.phases=[{start: 0.6, num_steps: 1, guidance_scale: 1}, "
            "{start: 0.5, num_steps: 1, guidance_scale: 1}]"
        ],
        ["phases", "sort"],
    ),
    (["eval.classes={tmp}/none.txt"], ["list of classes for idx", "remove it"]),
    (["teacher.path={tmp}/nowhere"], ["nowhere", "config.json"]),
    (["teacher.path={tmp}/empty"], ["config.json", "No such file"]),
    (["teacher.path={tmp}/badjson"], ["config.json", "not valid JSON"]),
    (["teacher.path={tmp}/flipped"], ["model.safetensors", "damaged"]),
    (["teacher.path={tmp}/truncated"], ["model.safetensors", "damaged"]),
    (["teacher.path={tmp}/classes"], ["classifier.2", "class count"]),
    (["teacher.path={tmp}/seven"], ["classes", "teacher.path has 7", "denoiser.path has 10"]),
    (["teacher.path=embedded:fashion_mnist/best"], ["no such asset", "fashion_mnist/lenet5"]),
    (["denoiser.path={tmp}/nowhere"], ["no such folder", "check denoiser.path"]),
    (["denoiser.path={tmp}/cut_denoiser"], ["safetensors", "damaged"]),
    (["denoiser.path={tmp}/odd_scheduler"], ["EDMEulerScheduler"]),
    (["denoiser.path={tmp}/unet"], ["num_class_embeds=None", "class-conditional"]),
    (["denoiser.path={tmp}/empty"], ["neither transformer/ nor unet/"]),
    (["denoiser.path=hf-hub:facebook/DiT-XL-2-256"], ["revision", "40 hexadecimal digits"]),
    (["denoiser.revision=main"], ["denoiser.revision", "'main'"]),
    (["denoiser.prompts=[a, b]"], ["prompts: got 2 prompts", "DiTTransformer2DModel"]),
    (["denoiser.decoder={tmp}/nowhere"], ["decoder", "no such folder"]),
    (["sampler={fidelity: low, num_steps: 9}"], ["num_steps: got 9 beside fidelity=low"]),
    (["sampler={fidelity: awful}"], ["sampler.fidelity", "'awful'"]),
    (["sampler.solver=ddim"], ["solver", "'ddim'", "euler, dpm++2m"]),
    (["sampler.solver=heun"], ["sampler.solver", "'heun'"]),
    (["sampler.attention=xformers"], ["attention: got xformers", "attention=auto"]),
    (["sampler.guidance_interval=[0.5, 0.2]"], ["guidance_interval", "start < stop"]),
    (["sampler={guidance_scale: 1, guidance_channels: 3}"], ["guidance_channels", "turns"]),
    (
        [
            "denoiser.path=embedded:fashion_mnist/fewstep",
            "sampler={num_steps: 5, guidance_scale: 1}",
        ],
        ["got 5", "distilled to 4 steps"],
    ),
    (
        [
            "denoiser.path=embedded:fashion_mnist/fewstep",
            "sampler={num_steps: 4, guidance_scale: 2}",
        ],
        ["guidance_scale", "folded in"],
    ),
    (["eval.path={tmp}/empty"], ["empty", "no idx files, class folders or .tar"]),
    (["eval.path={tmp}/nowhere"], ["nowhere", "no such folder"]),
    (["eval.path={tmp}/cut_test"], ["t10k-images", "fetch it again"]),
    (["student={arch: resnet1800}"], ["resnet1800", "timm"]),
    (["student={arch: resnte18}"], ["'resnte18'", "such as resnet18"]),
    (["student={arch: lenet_5}"], ["'lenet_5'", "such as lenet5"]),
    (["student={arch: resnet18, model_args: {wings: 2}}"], ["model_args", "wings"]),
    (["student={arch: vgg11, stem: conv3_pool}"], ["stem", "vgg11"]),
    (["student={arch: vit_tiny_patch16_224}"], ["student", "1 x 28 x 28", "another"]),
    (["ring.capacity_images=1000000000000"], ["ring.capacity_images", "GiB available", "lower"]),
    (["optim.lr=.inf"], ["optim.lr", "finite"]),
    (["run_dir={tmp}/file/run"], ["run_dir", "cannot write", "run_dir=DIR"]),
    (["run_dir={tmp}/taken"], ["run_dir", "holds a run already", "--resume"]),
    (["run_dir={tmp}/empty", "--resume"], ["--resume", "got dtype=float32", "remove it"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda v: str(v[0])[:40])
def test_a_mistake_ends_in_one_line_and_leaves_nothing(
    arguments: list[str], words: list[str], broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in broken.rglob("*")}
    arguments = [a.replace("{tmp}", str(broken)) for a in arguments]
    if not any(a.startswith("run_dir") for a in arguments):
        arguments.insert(0, f"run_dir={broken}/new")
    assert cli.main(["distill", CONFIG, *SHORT[1:2], *arguments]) == 2
    _one_line(capsys, words)
    assert {p: p.stat().st_mtime_ns for p in broken.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "{tmp}/none.yaml"], ["none.yaml", "No such file", "dmkd init"]),
        (["distill", "{tmp}/list.yaml"], ["list.yaml", "got list"]),
        (["distill", "{tmp}/broken.yaml"], ["broken.yaml", "not valid YAML"]),
        (["distill", "{tmp}/short.yaml"], ["denoiser", "missing"]),
        (["distill", CONFIG, "run_dir={tmp}/empty", "--resume"], ["--resume", "no checkpoint"]),
        (["evaluate", "{tmp}/empty"], ["config.yaml of a run", "config.json of a classifier"]),
        (["pretrain", "teacher", "{tmp}/short.yaml", "--data", "{tmp}"], ["optim", "missing"]),
        (
            ["pretrain", "teacher", "{lenet}", "--data", "{tmp}/empty"],
            ["no images in", "class folders"],
        ),
    ],
)
def test_other_verbs_end_in_one_line_too(
    arguments: list[str], words: list[str], broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lenet = str(Path(CONFIG).parent / "pretrain" / "lenet5.yaml")
    arguments = [a.replace("{tmp}", str(broken)).replace("{lenet}", lenet) for a in arguments]
    assert cli.main(arguments) == 2
    _one_line(capsys, words)


def _one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dmkd: "), captured.err
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_interrupt_saves_within_five_seconds_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "dmkd_fast",
        "distill",
        CONFIG,
        f"run_dir={run}",
        *SHORT,
        "train.num_views=64000",
    ]
    # A job started in the background of a shell ignores SIGINT unless it is told not to.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "views/s" in line:
            break
    process.send_signal(number)
    start = time.monotonic()
    rest = process.stderr.read()
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - start < 5
    assert f"dmkd distill {run}/config.yaml --resume" in rest
    saved = list((run / "checkpoints").glob("step-*"))
    assert len(saved) == 1

    tensors = saved[0] / "state.safetensors"
    intact = tensors.read_bytes()
    tensors.write_bytes(intact[:-1] + b"?")
    assert cli.main(["distill", f"{run}/config.yaml", "--resume"]) == 2
    _one_line(capsys, ["SHA-256"])
    tensors.write_bytes(intact)

    step = int(saved[0].name.removeprefix("step-"))
    # Finish quickly: only the length is changed, in the saved settings.
    text = (run / "config.yaml").read_text()
    text = text.replace("num_views: 64000", f"num_views: {32 * (step + 3)}")
    (run / "config.yaml").write_text(text)
    summary = printed(capsys, "distill", f"{run}/config.yaml", "--resume")
    assert summary["views"] == 32 * (step + 3)


def test_no_real_training_image_is_opened(tmp_path: Path) -> None:
    """A decoy training set lies where one would look; every opened file is on the allow-list."""
    decoy = tmp_path / "data" / "fashion-mnist"
    decoy.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (decoy / name).write_bytes(b"decoy")
        os.utime(decoy / name, (1, 1))
    probe = tmp_path / "probe"
    probe.write_bytes(b"probe")
    os.utime(probe, (1, 1))
    script = textwrap.dedent(
        """
        import os, site, sys, tempfile
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
        from dmkd_fast import assets, cli
        code = cli.main(sys.argv[1:])
        package = os.path.dirname(os.path.dirname(os.path.abspath(assets.__file__)))
        data = [str(assets.ROOT / "fashion_mnist" / n) for n in ("test", "weak", "denoiser")]
        home = os.path.expanduser("~")
        system = [sys.prefix, sys.base_prefix, *site.getsitepackages(), "/proc", "/sys", "/dev",
                  "/usr", "/lib", "/etc", "/opt", "/var/lib", tempfile.gettempdir(),
                  home + "/.cache", home + "/.config"]
        run = next(a for a in sys.argv if a.startswith("run_dir=")).removeprefix("run_dir=")
        config = sys.argv[2]
        paths = {os.path.abspath(os.fsdecode(p)) for p in opened if isinstance(p, (str, bytes))}
        code_files = (".py", ".pyc", "manifest.json")
        odd = {p for p in paths if p.startswith(str(assets.ROOT)) and os.path.isfile(p)
               and not p.startswith(tuple(data)) and not p.endswith(code_files)}
        own = lambda p: p.startswith((package, run)) or p in (config, os.path.dirname(run))
        odd |= {p for p in paths if not own(p) and not p.startswith(tuple(system))}
        odd |= {p for p in paths if "train-images" in p or "train-labels" in p}
        assert not odd, odd
        assert any("t10k-images" in p for p in paths)
        sys.exit(code)
        """
    )
    command = [sys.executable, "-c", script, "distill", CONFIG, f"run_dir={tmp_path}/run", *SHORT]
    command.append("eval.path=embedded:fashion_mnist/test")
    (tmp_path / "scratch").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    probe.read_bytes()
    if probe.stat().st_atime > 1:  # The file system records reads, so C code is seen as well.
        for name in decoy.iterdir():
            assert name.stat().st_atime == 1, name


@pytest.mark.parametrize(("missing", "code"), [("pydantic", 2), ("yaml", 2)])
def test_a_core_install_says_in_one_line_what_the_command_needs(missing: str, code: int) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from dmkd_fast.cli import main; "
        "sys.exit(main(['distill', 'x.yaml', '--dry-run']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "pip install 'dmkd_fast[distill]'" in done.stderr
    assert done.stderr.count("\n") == 1
