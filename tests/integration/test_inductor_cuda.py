"""Inductor's CUDA code without a GPU: what a GPU would launch is on record.

Graphs are made by torch.compile for an H100 that is absent; see tests/helpers/inductor_cuda.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import inductor_cuda
from inductor_cases import CASES, IMAGES, PAPER, Case, sample
from paper_models import DIT

HELPERS = Path(__file__).parents[1] / "helpers"
GOLDEN = json.loads(inductor_cuda.GOLDEN.read_text(encoding="utf-8"))
GRAPHS = [(name, graph) for name in CASES for graph in GOLDEN[name]["graphs"]]
# Of each graph; a block of the denoiser has a test of its own.
MOST_LAUNCHES = {
    "decoder of SD-VAE": [180],
    "teacher, ResNet-18": [18],
    "student, ResNet-18, forward and backward": [116, 106],
}


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.__version__.startswith(f"{inductor_cuda.VERSION}.") or torch.version.cuda is None,
    reason=f"recorded with a CUDA build of torch {inductor_cuda.VERSION}",
)
def test_generated_cuda_code_is_as_recorded() -> None:
    # In a process of its own, since compilers remember what they asked about the device.
    command = [sys.executable, str(HELPERS / "inductor_cuda.py"), "--print"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(made) == set(CASES)
    for name, facts in made.items():
        assert facts == GOLDEN[name], name


def test_golden_file_has_all_cases_without_spills_and_graph_breaks() -> None:
    assert set(GOLDEN) == {"triton", "torch", *CASES}
    assert GOLDEN["torch"] == inductor_cuda.VERSION
    assert [name for name in CASES if GOLDEN[name]["breaks"]] == []
    assert [name for name, graph in GRAPHS if graph["spills"]] == []
    assert [name for name, graph in GRAPHS if not graph["calls"]] == []


def test_each_kind_of_step_is_one_graph_two_with_an_interval_and_three_with_a_guide() -> None:
    steps = {name: len(GOLDEN[name]["graphs"]) for name, case in CASES.items() if is_step(case)}
    assert len(steps) == 11
    for name, count in steps.items():
        assert count == (2 if "interval" in name else 3 if "with a guide" in name else 1), name


def is_step(case: Case) -> bool:
    return isinstance(case.run, partial) and case.run.func is sample


def test_a_transformer_block_is_five_products_and_two_launches() -> None:
    block = inductor_cuda.difference(GOLDEN[PAPER.format(2)], GOLDEN[PAPER.format(3)])
    products = block["products"]
    assert sum(products.values()) == 5, products  # query, key and value are one
    assert sum(count for name, count in products.items() if "attention" in name) == 1
    assert block["launches"] <= 2, block
    # Each of the two reads two activations or more; with all vectors, 8 activations are moved.
    width = DIT["num_attention_heads"] * DIT["attention_head_dim"]
    activation = 2 * IMAGES * (DIT["sample_size"] // DIT["patch_size"]) ** 2 * width * 2
    assert block["bytes between"] <= 8.1 * activation, block


def test_networks_launch_few_kernels_between_products() -> None:
    made = {name: [graph["launches"] for graph in GOLDEN[name]["graphs"]] for name in MOST_LAUNCHES}
    for name, most in MOST_LAUNCHES.items():
        assert len(made[name]) == len(most), name
        assert all(map(int.__le__, made[name], most)), (name, made[name])


def test_guide_shows_the_counts_of_the_golden_file() -> None:
    page = inductor_cuda.PAGE.read_text(encoding="utf-8")
    assert inductor_cuda.table(GOLDEN) in page, "run python tests/helpers/inductor_cuda.py"
