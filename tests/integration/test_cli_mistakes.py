"""Mistakes end in one line with exit code 2, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import one_line
from safetensors.torch import load_file, save_file
from small_jobs import CONFIG, SHORT

from dmkd_fast import cli
from dmkd_fast.assets import resolve

FMNIST = "embedded:fashion_mnist"


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
    (["eval.classes={tmp}/none.txt"], ["none.txt", "no such file"]),
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
    one_line(capsys, words)
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
        (["report", "--out", "{tmp}/page.html"], ["--out: got", "without a RUN_DIR"]),
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
    one_line(capsys, words)
