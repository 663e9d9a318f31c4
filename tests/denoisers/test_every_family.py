"""What holds for the images of every family of denoisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, load
from small_jobs import sampler_from
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmkd_fast import Denoiser, DiffusionSampler
from dmkd_fast.runtime.errors import NotFiniteError, UserError
from dmkd_fast.sampling.sampler import check_broken

pytestmark = pytest.mark.slow  # run by .ci/run

IDS = torch.arange(9) + 5
LABELS = torch.tensor([2, 0, 3, 1, 1, 0, 3, 2, 2])


def sampler_of(name: str, loaded: Denoiser, **changes: Any) -> DiffusionSampler:
    family = FAMILIES[name]
    settings = {"count": family.count, "scale": family.scale, "micro_batch_images": 4}
    return sampler_from(**(vars(loaded) | settings | changes))


def images(sampler: DiffusionSampler, ids: Tensor, labels: Tensor) -> Tensor:
    out = torch.empty(len(ids), *sampler.denoiser.image_shape, dtype=torch.uint8)
    return sampler.sample(ids, labels, out=out)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_depends_on_its_id_and_class_alone(name: str) -> None:
    loaded = load(name)
    sampler = sampler_of(name, loaded)
    whole = images(sampler, IDS, LABELS)  # three micro-batches, of which the last is filled up
    assert len(whole.flatten(1).unique(dim=0)) == len(whole) and whole.float().std() > 10
    for order in ([8], [4, 1, 7, 0, 3, 8, 5]):
        assert torch.equal(images(sampler, IDS[order], LABELS[order]), whole[order])
    for size in (5, 16):
        other = images(sampler_of(name, loaded, micro_batch_images=size), IDS, LABELS)
        difference = (other.int() - whole.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 5e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_map_chooses_among_the_classes(name: str) -> None:
    loaded = load(name)
    whole = images(sampler_of(name, loaded), IDS[:4], torch.tensor([3, 1, 1, 3]))
    some = sampler_of(name, loaded.restricted((3, 1)))
    assert some.denoiser.num_classes == 2
    assert torch.equal(images(some, IDS[:4], torch.tensor([0, 1, 1, 0])), whole)
    with pytest.raises(UserError, match="labels: got 2, expected 0 to 1"):
        images(some, IDS[:4], torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_is_used_or_refused(name: str) -> None:
    loaded, family = load(name), FAMILIES[name]
    plain = sampler_of(name, loaded, scale=1.0)
    assert plain.forwards_per_image == family.count
    if family.scale == 1:
        with pytest.raises(UserError, match=r"guidance\.scale: got 2\.0 for a model without"):
            sampler_of(name, loaded, scale=2.0)
        return
    guided = sampler_of(name, loaded)
    assert guided.forwards_per_image == family.count * (1 if loaded.takes_guidance else 2)
    without, with_it = (images(sampler, IDS, LABELS).float() for sampler in (plain, guided))
    assert (without - with_it).abs().mean() > 0.5


def class_table(module: torch.nn.Module) -> Tensor:
    """The table of a denoiser that has one row a class."""
    tables = dict(module.named_buffers()) | dict(module.named_parameters())
    names = ("prompts", "labels.weight", "unet.class_embedding.weight")
    (table,) = (tables[name] for name in names if name in tables)
    return table


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_are_not_finite_are_counted(name: str) -> None:
    loaded = load(name)
    with torch.no_grad():
        class_table(loaded.module)[2] = float("nan")
    sampler = sampler_of(name, loaded)
    images(sampler, IDS, LABELS)
    assert int(sampler.num_broken) == 3 + 3  # three of them fill up the last micro-batch
    with pytest.raises(NotFiniteError, match="6 of 12 images"):
        check_broken(int(sampler.num_broken), sampler.num_made)


class Places(TorchDispatchMode):
    """Notes the devices of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(made)
        self.seen |= {x.device.type for x in leaves if isinstance(x, Tensor)}
        return made


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.has_prompts and not family.own]
)
def test_a_forward_pass_is_one_graph_and_makes_no_tensor_on_the_host(name: str) -> None:
    """On CUDA, the sampler compiles a step as one graph and captures it."""
    loaded = load(name)
    inputs = [torch.randn(4, *loaded.latent_shape), torch.full((4,), 500.0), torch.arange(4)]
    inputs += [torch.full((4,), 3.5)] * loaded.takes_guidance
    graph = torch.compile(loaded.module, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), loaded.module(*inputs), rtol=1e-4, atol=1e-4)
        with Places() as places:
            loaded.module.to("meta")(*(value.to("meta") for value in inputs))
    assert places.seen == {"meta"}
