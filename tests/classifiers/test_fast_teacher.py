"""The teacher's fast copy gives the teacher's logits and leaves the teacher alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from small_jobs import small_classifier
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dmkd_fast import InputSpec
from dmkd_fast.assets import resolve
from dmkd_fast.classifiers.loading import (
    build_classifier,
    fold_batch_norms,
    for_inference,
    freeze,
    load_classifier,
    save_classifier,
    to_channels_last,
)
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.networks import TeachingConfig
from dmkd_fast.jobs import networks

CPU = torch.device("cpu")
SMALL = InputSpec(size=8, mean=(0.5,), std=(0.5,))


def shaken(model: nn.Module) -> nn.Module:
    """`model` in eval mode, with batch norms that have seen something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_fast_teacher_gives_the_teachers_logits(dtype: torch.dtype, tolerance: float) -> None:
    teacher, spec = load_classifier(resolve("embedded:fashion_mnist/strong"), CPU)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    fast = for_inference(teacher, dtype, spec.input)
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(p.requires_grad for p in fast.parameters())
    images = torch.randn(64, 1, 28, 28)
    with torch.no_grad():
        expected, got = teacher(images), fast(images.to(dtype)).float()
    assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_jobs_teacher_has_the_layout_of_the_test_images() -> None:
    """The strong teacher scores them 1.7 times as fast."""
    teachers = {"teacher": TeachingConfig(path="embedded:fashion_mnist/strong")}
    loaded = networks.load_teachers(teachers, temperature=4.0, device=CPU)
    filters = [p for p in loaded.together.parameters() if p.ndim == 4]
    assert len(filters) == 19
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


@pytest.mark.parametrize(
    "name", ["embedded:fashion_mnist/strong", "cifar_resnet20", "cifar_vgg8", "cifar_wrn16_2"]
)
def test_the_fold_has_the_bits_of_torchs_own(name: str) -> None:
    """The figures of earlier runs were made with `torch.fx.experimental.optimization.fuse`."""
    if name.startswith("embedded"):
        teacher, _ = load_classifier(resolve(name), CPU)
    else:
        spec = ClassifierSpec(
            architecture=name,
            num_classes=10,
            in_chans=3,
            input_size=32,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        teacher = shaken(build_classifier(spec))
    expected = optimization.fuse(freeze(teacher)).state_dict()
    got = fold_batch_norms(teacher).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Twice(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(self.conv(x)) + self.two(self.conv(x.flip(3)))).mean((2, 3))


class Optional(nn.Module):
    """Takes another branch for an argument that teachers are not given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_classifier()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.inner(x) if scale is None else self.inner(x) * scale


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) < 1e9 else x


class Switch(nn.Module):
    """What tracing sees is not what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if isinstance(x, Tensor) else self.inner(x) + 1


def hooked(place: int, kind: str) -> nn.Module:
    model = small_classifier()
    if kind == "pre":
        model[place].register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    else:
        model[place].register_forward_hook(lambda _module, _inputs, output: output * 2)
    return model


def reworked(change: Callable[[nn.Module], object]) -> nn.Module:
    model = small_classifier()
    change(model[0])
    return model


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        Optional,
        Branching,
        Switch,
        lambda: hooked(0, "after"),
        lambda: hooked(1, "after"),
        lambda: hooked(1, "pre"),
        lambda: hooked(0, "pre"),
        lambda: hooked(2, "after"),
        lambda: reworked(weight_norm),
        lambda: reworked(spectral_norm),
        lambda: reworked(parametrizations.weight_norm),
        lambda: reworked(parametrizations.spectral_norm),
        lambda: reworked(lambda conv: prune.random_unstructured(conv, "weight", 0.5)),
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
        ),
    ],
    ids=[
        "twice",
        "optional",
        "branching",
        "switch",
        "conv hook",
        "norm hook",
        "norm pre-hook",
        "conv pre-hook",
        "later hook",
        "weight_norm",
        "spectral_norm",
        "parametrized weight_norm",
        "parametrized spectral_norm",
        "prune",
        "no statistics",
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_teacher_that_folding_would_change_is_used_as_it_is(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(1)
    teacher = shaken(make())
    images = torch.randn(16, 1, 8, 8)
    got = for_inference(teacher, torch.float32, SMALL)(images)
    with torch.no_grad():
        torch.testing.assert_close(got, teacher(images), rtol=1e-4, atol=1e-5)
    assert not got.requires_grad and got.std() > 0


@pytest.mark.parametrize(
    ("make", "unfolded"),
    [
        (Twice, 2),
        (lambda: hooked(0, "after"), 1),
        (lambda: hooked(1, "after"), 1),
        (lambda: hooked(1, "pre"), 1),
        (lambda: hooked(2, "after"), 0),
    ],
)
def test_only_a_layer_with_one_use_and_no_hook_is_folded(
    make: Callable[[], nn.Module], unfolded: int
) -> None:
    """So the rest of such a network is folded; nothing is left to the comparison."""
    teacher, images = freeze(shaken(make())), torch.randn(4, 1, 8, 8)
    expected = teacher(images)
    folded = fold_batch_norms(teacher)
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == unfolded


def test_a_teacher_that_is_not_folded_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dmkd_fast"):
        for_inference(shaken(small_classifier()), torch.float32, SMALL)
        for_inference(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), torch.float32, SMALL)
        assert not caplog.records
        for_inference(shaken(Branching()), torch.float32, SMALL)
        for_inference(shaken(Switch()), torch.float32, SMALL)
    untraced, different = (record.getMessage() for record in caplog.records)
    assert "not folded" in untraced and "differ by" in different


def test_a_teacher_keeps_its_random_state_and_mode() -> None:
    teacher = small_classifier(dropout=0.5).train()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for_inference(teacher, torch.float32, SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in teacher.modules())
    assert all(p.requires_grad for p in teacher.parameters())


def test_weights_of_five_dimensions_keep_their_layout() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, 3))
    model.register_buffer("table", torch.randn(1, 2, 3, 4, 5))
    to_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous() and model.table.is_contiguous()


# The smallest model of each of timm's families, but those of more than 35 million parameters or
# 512 pixels and those whose forward pass takes a dictionary of patches.
FAMILIES = """
    halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
    eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
    hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto inception_v3 lcnetv2_small levit_128s lowformer_b0 test_mambaout
    test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035 mobilevit_xxs mvitv2_tiny nest_tiny
    nextvit_small test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
    res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
    sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
    legacy_xception xception41p xcit_nano_12_p8_224
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.split())
def test_every_family_of_timm_can_teach(name: str, tmp_path: Path) -> None:
    """Saved, loaded as a job loads it, folded if possible: the logits of timm's own model."""
    given = timm.get_pretrained_cfg(name)
    size = given.input_size[-1]
    spec = ClassifierSpec(
        architecture=name,
        num_classes=7,
        in_chans=3,
        input_size=size,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    for weight in model.parameters():  # some heads begin at 0
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    save_classifier(model, spec, tmp_path)
    section = TeachingConfig(path=str(tmp_path))
    loaded = networks.load_teachers({"teacher": section}, temperature=4.0, device=CPU)
    fast = loaded.together.mapped(lambda module, input: for_inference(module, torch.float32, input))
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(images)
    got = fast.predict({spec.input: images})
    assert expected.std() > 0 and (got - expected).abs().max() < 1e-4 * expected.abs().max()
