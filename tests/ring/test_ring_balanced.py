"""Balanced draws against a plain model, for sizes that do not divide each other."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from rings import new_ring


class Model:
    """Sorted lists of slots by class, read in turn."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.num_drawn = num_classes, 0
        self.labels: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.left_to_draw = 0

    def commit(self, slots: range, labels: list[int]) -> None:
        self.labels |= dict(zip(slots, labels, strict=True))
        self.uses |= dict.fromkeys(slots, 0)
        self.left_to_draw = 0

    def sort(self, drawable: list[int]) -> None:
        self.left_to_draw = len(drawable)
        self.before = dict(self.uses)
        self.lists = [
            sorted(self.before[slot] for slot in drawable if self.labels[slot] == c)
            for c in range(self.num_classes)
        ]
        self.seen: list[list[int]] = [[] for _ in range(self.num_classes)]

    def draw(self, slot: int, drawable: list[int]) -> None:
        """Check one draw and take it over."""
        if self.left_to_draw == 0:
            self.sort(drawable)
        label = self.num_drawn % self.num_classes
        while not self.lists[label]:
            label = (label + 1) % self.num_classes
        counts, seen = self.lists[label], self.seen[label]
        assert slot in drawable and self.labels[slot] == label
        if len(seen) < len(counts):  # each image once, the least used first
            assert slot not in seen and self.before[slot] == counts[len(seen)]
        else:  # then again in the same order
            assert slot == seen[len(seen) - len(counts)]
        seen.append(slot)
        self.uses[slot] += 1
        self.num_drawn += 1
        self.left_to_draw -= 1


@pytest.mark.parametrize("seed", range(12))
def test_each_draw_is_the_next_of_its_class_whatever_the_sizes(seed: int) -> None:
    pick = random.Random(seed)
    for _ in range(4):
        num_classes, block = pick.randint(1, 11), pick.randint(1, 7)
        places, guard = pick.randint(3, 6), pick.randint(0, 1)
        ring = new_ring(
            capacity_images=places * block,
            image_shape=(1, 1, 1),
            block_images=block,
            samples_per_insert=1e6,
            min_fill_images=1,
            order="balanced",
            num_classes=num_classes,
            guard_blocks=guard,
            seed=seed,
        )
        model = Model(num_classes)
        for committed in range(1, 1 + pick.randint(1, 3) * places):
            labels = [pick.randrange(num_classes) for _ in range(block)]
            reserved = ring.reserve()
            model.commit(range(reserved.start, reserved.start + block), labels)
            ring.commit(reserved, ids=torch.arange(block), labels=torch.tensor(labels))
            drawable = [
                q % places * block + i
                for q in range(max(0, committed - places + guard), committed)
                for i in range(block)
            ]
            for _ in range(pick.randint(0, 4)):
                draw = ring.sample(pick.randint(1, len(drawable)))
                for slot, use in zip(draw.indices.tolist(), draw.uses.tolist(), strict=True):
                    assert use == model.uses[slot]
                    model.draw(slot, drawable)


def test_no_image_is_skipped_where_the_classes_do_not_divide_the_ring() -> None:
    """Three classes, eight images: each sorting begins with another class."""
    ring = new_ring(
        capacity_images=8,
        image_shape=(1, 1, 1),
        block_images=4,
        samples_per_insert=1e6,
        min_fill_images=4,
        order="balanced",
        num_classes=3,
    )
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    for four in labels.split(4):
        ring.commit(ring.reserve(), ids=torch.arange(4), labels=four)
    for _ in range(100):
        ring.sample(8)
    for label in range(3):
        uses = Counter(ring.uses[labels == label].tolist())
        assert max(uses) - min(uses) <= 1, f"class {label}: {uses}"
