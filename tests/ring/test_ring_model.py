"""The ring against a plain-Python model: any history of moves, every order, resume at any point."""

from __future__ import annotations

import copy
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from rings import new_ring
from torch import Tensor

from dmkd_fast import RingBuffer

CLASSES = 3


class Model:
    """What the ring promises, with dictionaries and lists."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.block, self.guard = settings["block_images"], settings["guard_blocks"]
        self.places = settings["capacity_images"] // self.block
        self.order, self.max_uses = settings["order"], settings["max_uses"]
        self.reuse = Fraction(str(settings["samples_per_insert"]))
        self.fill = settings["min_fill_images"]
        self.blocks: list[list[int]] = []  # ids, by block ever written
        self.uses: dict[int, int] = {}
        self.retired: Counter[int] = Counter()
        self.sampled, self.is_open, self.is_torn = 0, False, False
        self.left: list[int] = []  # ids still to come in this pass
        self.passes: dict[int, int] = {}  # by block

    @property
    def inserted(self) -> int:
        return len(self.blocks) * self.block

    def held(self) -> list[int]:
        return [i for b in self.blocks[-self.places :] for i in b]

    def drawable(self) -> range:
        return range(max(0, len(self.blocks) - self.places + self.guard), len(self.blocks))

    def commit(self, ids: list[int]) -> None:
        newest = len(self.blocks)
        if newest >= self.places:
            self.retired.update(
                min(self.uses.pop(i), 64) for i in self.blocks[newest - self.places]
            )
        self.blocks.append(ids)
        self.uses |= dict.fromkeys(ids, 0)
        self.is_open = self.is_torn = False
        self.passes[newest] = 0
        leaves = newest - self.places + self.guard
        if leaves >= 0 and self.left and leaves in self.members:
            swap = dict(zip(self.blocks[leaves], ids, strict=True))
            self.left = [swap.get(i, i) for i in self.left]
            self.members = self.members - {leaves} | {newest}
            self.passes[newest] = 1

    def abort(self) -> None:
        self.is_torn |= self.is_open and self.guard == 0 and len(self.blocks) >= self.places
        self.is_open = False

    def uses_left(self) -> float:
        if self.max_uses is None:
            return float("inf")
        later = sum(self.max_uses - self.passes[b] for b in self.drawable())
        return len(self.left) + later * self.block

    def may_sample(self, count: int) -> bool:
        allowed = self.reuse * self.inserted
        return self.inserted >= self.fill and self.sampled + count <= allowed

    def can_draw(self, count: int) -> bool:
        if not self.blocks or count > self.uses_left():
            return False
        return self.guard > 0 or not (self.is_open or self.is_torn)

    def draw(self, ids: list[int], uses: list[int]) -> None:
        """Check a draw of the ring and take it over."""
        allowed = {i for b in self.drawable() for i in self.blocks[b]}
        for image, use in zip(ids, uses, strict=True):
            assert image in allowed and use == self.uses[image]
            self.uses[image] += 1
            self.sampled += 1
            if self.order in ("shuffled", "equal"):
                if not self.left:
                    self.begin_pass()
                self.left.remove(image)  # raises if it came twice in a pass
            assert self.max_uses is None or self.uses[image] <= self.max_uses

    def begin_pass(self) -> None:
        limit = self.max_uses or float("inf")
        chosen = [b for b in self.drawable() if self.passes[b] < limit]
        if self.order == "equal":
            chosen = sorted(chosen, key=lambda b: self.passes[b])[: -(-len(chosen) // 2)]
        for b in chosen:
            self.passes[b] += 1
        self.members = set(chosen)
        self.left = [i for b in chosen for i in self.blocks[b]]


class Pair:
    """Ring and model side by side."""

    def __init__(self, pick: random.Random, order: str) -> None:
        block, guard = pick.randint(1, 4), pick.randint(0, 2)
        places = pick.randint(max(2, guard + 1), 6)
        in_passes = order in ("shuffled", "equal")
        self.settings: dict[str, Any] = {
            "capacity_images": places * block,
            "block_images": block,
            "guard_blocks": guard,
            "samples_per_insert": pick.choice([0.5, 2, 2.5]),
            "min_fill_images": pick.randint(1, places - max(1, guard)) * block,
            "order": order,
            "max_uses": pick.choice([None, 3, 5]) if in_passes else None,
        }
        self.pick, self.model, self.ring = pick, Model(self.settings), self.new_ring()
        self.block: Any = None
        self.next_id, self.classes_drawn = 0, Counter[int]()

    def new_ring(self) -> RingBuffer:
        return new_ring(image_shape=(1, 1, 2), num_classes=CLASSES, seed=5, **self.settings)

    def move(self) -> None:
        pick = self.pick
        getattr(
            self,
            pick.choices(
                ["reserve", "write", "abort", "draw", "resume", "look"], [20, 25, 4, 40, 6, 5]
            )[0],
        )()
        self.limiter()

    def reserve(self) -> None:
        if self.block is not None:
            with pytest.raises(RuntimeError, match="open already"):
                self.ring.reserve()
            return
        self.block, self.model.is_open = self.ring.reserve(), True
        self.block.images.fill_(255)  # half written

    def write(self) -> None:
        if self.block is None:
            self.reserve()
        ids = list(range(self.next_id, self.next_id + self.ring.block_images))
        self.next_id += len(ids)
        tensor = torch.tensor(ids)
        with self.ring.producing():
            self.block.images.copy_((tensor % 251).view(-1, 1, 1, 1).expand_as(self.block.images))
        self.ring.commit(self.block, ids=tensor, labels=tensor % CLASSES)
        self.model.commit(ids)
        self.block = None

    def abort(self) -> None:
        self.ring.abort()
        self.model.abort()
        self.block = None

    def draw(self) -> None:
        count = self.pick.randint(1, 7)
        if not self.model.can_draw(count):
            with pytest.raises(RuntimeError, match="commit a block first"):
                self.ring.sample(count)
            return
        first = self.model.sampled
        draw = self.ring.sample(count)
        self.ring.release()
        ids = draw.ids.tolist()
        assert self.ring.images[draw.indices, 0, 0, 0].tolist() == [i % 251 for i in ids]
        assert self.ring.labels[draw.indices].tolist() == [i % CLASSES for i in ids]
        self.model.draw(ids, draw.uses.tolist())
        if self.model.order == "balanced":
            there = {i % CLASSES for b in self.model.drawable() for i in self.model.blocks[b]}
            for number, image in enumerate(ids, first):
                turn = number % CLASSES
                while turn not in there:
                    turn = (turn + 1) % CLASSES
                assert image % CLASSES == turn

    def resume(self) -> None:
        """Another ring takes over from a saved state; both would go on alike."""
        state = copy.deepcopy(self.ring.state_dict(images=self.pick.random() < 0.5))
        other = self.new_ring()
        other.images.copy_(self.ring.images)
        other.load_state_dict(state)
        if self.block is not None:  # dropped with the state
            self.abort()
        count = self.pick.randint(1, 7)
        if self.model.can_draw(count):
            a, b = self.ring.sample(count), other.sample(count)
            for name in ("indices", "ids", "uses"):
                assert torch.equal(getattr(a, name), getattr(b, name))
            self.model.draw(b.ids.tolist(), b.uses.tolist())
        self.ring = other

    def look(self) -> None:
        """Slots, counts and statistics are the model's."""
        model, ring = self.model, self.ring
        held = model.held()
        found = {int(i): int(u) for i, u in zip(ring.ids, ring.uses, strict=True) if i >= 0}
        assert found == {i: model.uses[i] for i in held}
        statistics = ring.statistics()
        assert _histogram(statistics.uses) == Counter(min(model.uses[i], 64) for i in held)
        assert _histogram(statistics.retired_uses) == model.retired
        ages = {int(i): int(a) for i, a in zip(ring.ids, statistics.ages, strict=True) if i >= 0}
        assert ages == {i: (model.inserted - 1 - i) // ring.block_images for i in held}
        assert statistics.sampled == model.sampled
        assert statistics.fill == len(held) / ring.capacity
        means = {name: float(value) for name, value in statistics.means().items()}
        if held:
            uses = [model.uses[i] for i in held]
            assert means["ring_uses"] == pytest.approx(sum(uses) / len(held), rel=1e-6)
            gone = max(1, model.inserted - len(held))
            retired = (model.sampled - sum(uses)) / gone
            assert means["retired_uses"] == pytest.approx(retired, rel=1e-6)
            assert means["ring_unused"] == pytest.approx(uses.count(0) / len(held), rel=1e-6)

    def limiter(self) -> None:
        ring, model = self.ring, self.model
        assert (ring.num_inserted, ring.num_sampled) == (model.inserted, model.sampled)
        for count in (1, 5):
            is_used_up = count > model.uses_left()
            assert ring.must_insert(count) == (not model.may_sample(count) or is_used_up)
            ahead = model.reuse * (model.inserted + model.block - model.fill) - model.sampled
            room = model.inserted < model.fill or ahead <= model.reuse * model.fill
            assert ring.may_insert(count) == (not model.is_open and (room or is_used_up))


def _histogram(counts: Tensor) -> Counter[int]:
    return Counter({use: n for use, n in enumerate(counts.tolist()) if n})


def run(order: str, moves: int) -> None:
    done, seed = 0, 0
    while done < moves:
        pair = Pair(random.Random(f"{order} {seed}"), order)
        for _ in range(250):
            pair.move()
        done, seed = done + 250, seed + 1


@pytest.mark.parametrize("order", ["shuffled", "equal", "uniform", "balanced"])
def test_any_history_matches_the_model(order: str) -> None:
    run(order, 2500)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "equal", "uniform", "balanced"])
def test_a_million_moves_match_the_model(order: str) -> None:
    run(order, 250_000)
