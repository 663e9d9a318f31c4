"""The study of selection: who is chosen, and that each arm sees what its name says."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from benchmarks.findings import levers, selection, study
from benchmarks.findings.study import Fitted, FixedSet


def test_the_best_of_every_class_are_kept_in_the_order_of_their_ids() -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    scores = torch.arange(15.0)
    kept = selection.top_of_each_class(scores, labels, 7)
    assert kept.tolist() == [6, 9, 10, 11, 12, 13, 14]  # 3 of class 0, 2 of each other
    assert selection.top_of_each_class(-scores, labels, 3).tolist() == [0, 1, 2]


def test_scores_are_large_where_the_pilot_is_far_and_the_teacher_is_unsure() -> None:
    teacher = torch.tensor([[4.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    student = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    distance = selection.distance(student, teacher)
    assert distance[:2].abs().max() < 1e-6 and distance[2] > 0.1
    unsure = selection.uncertainty(student, teacher)
    assert unsure[1] == pytest.approx(torch.tensor(2.0).log().item())
    assert unsure[0] == unsure[2] < 0.1


def test_scores_come_in_the_order_of_the_images() -> None:
    _, spec = study.new_student("lenet5_half", 1, study.load_teacher("lenet5")[1])

    class Brightness(nn.Module):
        def forward(self, views: torch.Tensor) -> torch.Tensor:
            return torch.stack([views.mean((1, 2, 3)), -views.mean((1, 2, 3))], 1)

    images = torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).expand(6, 1, 28, 28)
    every = FixedSet(images=images.contiguous(), labels=torch.zeros(6, dtype=torch.int64))
    pilot = Fitted(Brightness(), spec, Brightness(), spec, torch.float32)
    found = selection.scores(every, pilot, lambda student, _: student[:, 0])
    assert (found.diff() > 0).all()


@pytest.mark.slow
def test_arms_see_thirds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "PILOT_VIEWS", 1_024)
    monkeypatch.setattr(selection, "THIRD", 512)
    every = study.generated(1_536, [], file="fashion_mnist.yaml")
    chosen = selection.thirds(every, 1)
    assert all(len(indices) == 512 == len(indices.unique()) for indices in chosen.values())
    counts = [every.labels[indices].bincount().tolist() for indices in chosen.values()]
    assert counts[0] == counts[1] == counts[2] and max(counts[0]) - min(counts[0]) <= 1
    assert len({tuple(indices.tolist()) for indices in chosen.values()}) == 3
    options = argparse.Namespace(seeds=10, threads=1, record=False)
    assert selection.parse([]).seeds == options.seeds


@pytest.mark.parametrize("study_name", ["selection", "levers"])
def test_superseded_rows_have_no_part_in_a_mean(study_name: str) -> None:
    _, _, write = (selection.SELECTION_TABLES | levers.LEVER_TABLES)[study_name]
    shared = {"images": 9, "views": 9, "cpu_s": 1.0}
    shared["environment"] = {"device": "CPU", "date": "2026-01-01"}
    rows = [
        {"arm": arm, "seed": seed, "top1": top1, "held_out_top1": top1, **shared}
        for arm in (selection.RANDOM if study_name == "selection" else levers.BASE,)
        for seed, top1 in ((1, 0.5), (2, 0.6), (3, 0.7))
    ]
    superseded = {**rows[0], "top1": 0.1, "held_out_top1": 0.1, "superseded": "one seed"}
    assert write([*rows, superseded]) == write(rows)
