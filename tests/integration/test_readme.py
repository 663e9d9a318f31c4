"""README.md is short, its links and examples work, and its figures are those of recorded rows."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import render

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def example(word: str) -> str:
    """Return the one Python example that contains `word`."""
    (found,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in b)
    return found


def factors(name: str, column: str) -> list[float]:
    """Return a column of factors of a rendered table, by its header."""
    header, *rows = cells(name, with_header=True)
    return [float(row[header.index(column)].rstrip("x")) for row in rows]


def cells(name: str, *, with_header: bool = False) -> list[list[str]]:
    """Return the rows of a rendered table, found in README or in the docs."""
    pages = [README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md"))]
    found = (m[0] for page in pages for m in render.MARKED.finditer(page) if m[2] == name)
    lines = [line for line in next(found).splitlines() if line.startswith("|")]
    found_cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return found_cells[:1] * with_header + found_cells[2:]


def uncounted_s() -> str:
    """Return the seconds of the few-step denoiser's training, from the end-to-end table."""
    page = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
    (table,) = (m[0] for m in render.MARKED.finditer(page) if m[2] == "end-to-end")
    (seconds,) = {*re.findall(r"few-step denoiser itself took ([\d,]+) s on one thread", table)}
    return str(seconds)


def slugs(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_it_is_short_and_says_the_gpu_status_first() -> None:
    lines = README.splitlines()
    assert len(lines) <= 160
    assert any("No line of the CUDA code has run on a GPU" in line for line in lines[:10])


def test_relative_links_lead_to_files_and_headings() -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            page = ROOT / (path or "README.md")
            assert page.exists(), link
            assert not heading or heading in slugs(page.read_text(encoding="utf-8")), link


def test_figures_of_the_text_are_those_of_the_tables() -> None:
    text = re.sub(r"\s+", " ", render.MARKED.sub("", README))
    mean = cells("embedded")[-1]
    assert f"top-1 of {mean[1]} (mean and standard deviation)" in text
    card = (ROOT / "dmkd_fast/assets/fashion_mnist/strong/README.md").read_text(encoding="utf-8")
    (strong,) = re.findall(r"^\| test_top1 \| (.*) \|$", card, re.MULTILINE)
    assert f"together reach {mean[2]}, the stronger one alone {strong}." in text
    sampler = factors("sampler", "not compiled: gain")
    assert f"the sampler makes {min(sampler)} to {max(sampler)} times" in text
    loss = factors("kd-loss", "`kd_loss` vs eager")
    assert f"with its gradient is {min(loss)} to {max(loss)} times as fast" in text
    compiled = factors("kd-loss", "`kd_loss` vs compile")
    assert f"and {min(compiled)} to {max(compiled)} times as fast as torch.compile" in text
    header, *rows = cells("end-to-end", with_header=True)
    # The first table, over all CPUs; those of each CPU have other columns.
    first = [row for row in rows if len(row) == len(header)]
    ours = {row[0]: dict(zip(header, row, strict=True)) for row in first}
    software, default = ours["ours, equal settings"], ours["ours, default"]
    older, same = "vs the faster bf16", "vs bf16 with our recipe"
    alone, bf16, recipe = (
        re.sub("x", " times", row[name], count=1)
        for row, name in ((software, older), (default, older), (default, same))
    )
    # The software alone comes first: the other factors need a network that is not counted.
    assert (
        "At equal settings, the whole job reaches the target accuracy (final top-1 of the fp32 "
        f"baseline less 0.005) {alone} as soon as diffusers and PyTorch in bfloat16. This is the "
        f"software alone. The default job reaches it {bf16} as soon as that baseline with its "
        f"older recipe, and {recipe} as soon as that baseline with our recipe. Both include a "
        f"few-step denoiser, whose {uncounted_s()} s of training no row counts."
    ) in text
    is_old = "the loss kernel was changed" in README
    assert is_old == ("measured before the kernel's last change" in text)


def test_commands_and_output_are_those_of_the_first_run() -> None:
    page = (ROOT / "docs" / "quickstart" / "first-run.md").read_text(encoding="utf-8")
    (run,) = re.findall(r"```console\n\$ \.venv/bin/(dmkd distill .*?)```", README, re.DOTALL)
    assert run in page
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert f"\n{target}: " in makefile


def test_loss_example_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    images, target = torch.randn(8, 6), torch.randint(0, 4, (8,))
    space = {"torch": torch, "student": student, "teacher": teacher} | {
        "images": images,
        "target": target,
    }
    exec(example("DistillKL"), space)
    grad = student.weight.grad
    s, t = student(images), teacher(images).detach()
    kl = nn.functional.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
    loss = 0.9 * 16 * kl + 0.1 * nn.functional.cross_entropy(s, target)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, student.weight)[0])


def test_example_of_the_parts_trains_a_student(tmp_path: Path) -> None:
    class Network(nn.Module):
        def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            return latents - labels.view(-1, 1, 1, 1) / 10

    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)) for _ in range(2))
    before = student[1].weight.detach().clone()
    code = example("Distiller(").replace("num_views=1_000_000", "num_views=1_280")
    space = {"network": Network(), "scheduler_config": FLOW} | {
        "teacher": teacher,
        "student": student,
    }
    with contextlib.chdir(tmp_path):
        exec(code, space)
    assert not torch.equal(student[1].weight, before)
    assert space["summary"]["views"] == 1_280  # type: ignore[index]
    assert (tmp_path / "runs" / "mine" / "stats.jsonl").exists()
