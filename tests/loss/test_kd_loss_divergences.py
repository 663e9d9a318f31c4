"""The divergences: values, gradients and errors against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kd_loss_cases import FORMS, ids_for, logits
from textbook import rows as textbook
from torch import Tensor

from benchmarks.fake_cuda import pretended
from dmkd_fast import DistillKL, kd_loss, kd_loss_and_grad
from dmkd_fast.loss import ops
from dmkd_fast.loss.divergences import NAMES, PARAMETERS, terms_of


def exact(
    student: Tensor, teacher: Tensor, target: Tensor | None, form: str | dict, **named: object
) -> tuple[Tensor, Tensor]:
    """Mean loss and gradient by autograd in float64."""
    leaf = student.detach().double().requires_grad_()
    loss = textbook(leaf, teacher.double(), target, form, **named).mean()
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_gradients_are_those_of_the_definition(
    form: str | dict, standardize: bool
) -> None:
    for rows, classes, dtype in ((7, 10, torch.float64), (33, 103, torch.float32)):
        student = logits(rows, classes, seed=0, dtype=dtype)
        teacher = logits(rows, classes, seed=1, dtype=dtype)
        target = ids_for(form, rows, classes)
        expected, expected_grad = exact(
            student, teacher, target, form, temperature=2.0, standardize=standardize
        )
        named = {"temperature": 2.0, "divergence": form, "standardize_logits": standardize}
        loss, grad = kd_loss_and_grad(student, teacher, target, **named)
        leaf = student.clone().requires_grad_()
        again = kd_loss(leaf, teacher, target, **named)
        again.backward(retain_graph=True)
        assert torch.equal(loss, again.detach()) and torch.equal(grad, leaf.grad)
        (recomputed,) = torch.autograd.grad(again, leaf)
        assert torch.equal(recomputed, grad)
        assert torch.equal(DistillKL(**named)(student, teacher, target), loss)
        unit = 1e-11 if dtype == torch.float64 else 1e-5
        assert abs(loss.double() - expected) <= unit * expected
        assert (grad.double() - expected_grad).norm() <= unit * expected_grad.norm()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_eager_definition_equals_the_kernel(form: str | dict) -> None:
    student, teacher = (logits(6, 10, seed=s, dtype=torch.float64) for s in (0, 1))
    target = torch.tensor([3, 0, 9, 9, 1, 5])
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    temperatures = torch.stack((weight + 1, weight + 2), 1)
    for standardize in (False, True):
        extra = (temperatures, terms_of(form), standardize)
        problem = (student, teacher, target, weight, 1.0, 0.3, 1.0, 0.5, 0.1)
        losses = ops.forward(*problem, *extra, True)
        expected = ops._eager_forward(*problem, *extra, True)
        for a, b in zip(losses[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        upstream = torch.arange(6.0, dtype=torch.float64)
        grad = ops.backward(upstream, losses[3], *problem, *extra)
        other = ops._eager_backward(upstream, expected[3], *problem, *extra)
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)
        assert (grad[2] == 0).all()
        torch.library.opcheck(ops.forward, (*problem, *extra, True))
        torch.library.opcheck(ops.backward, (upstream, losses[3], *problem, *extra))


def test_the_definition_of_dist_which_cuda_runs_can_be_captured_in_a_graph() -> None:
    student, teacher = (logits(6, 10, seed=s) for s in (0, 1))
    problem = (student, teacher, None, None, 2.0, 1.0, 4.0, 1.0, 0.0)
    extra = (None, terms_of("dist"), False)
    expected_grad, grad = torch.empty_like(student), torch.empty_like(student)
    expected = ops._eager_forward_backward(expected_grad, None, 3.0, *problem, *extra)
    with pretended():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = ops._eager_forward_backward(grad, None, 3.0, *problem, *extra)
        grad.zero_()
        graph.replay()
    assert torch.equal(losses[0], expected[0]) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(form: str | dict) -> None:
    student = logits(5, 7, seed=0, dtype=torch.float64).requires_grad_()
    teacher = logits(5, 7, seed=1, dtype=torch.float64)
    target = torch.tensor([0, 6, -100, 2, 3])
    hard = {} if "dkd" in form else {"alpha": 0.3, "label_smoothing": 0.1}
    for reduction in ("batchmean", "none"):
        for standardize in (False, True):
            torch.autograd.gradcheck(
                lambda s, r=reduction, z=standardize: kd_loss(
                    s,
                    teacher,
                    target,
                    temperature=torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5]),
                    reduction=r,
                    row_weight=torch.arange(1.0, 6),
                    divergence=form,
                    standardize_logits=z,
                    **hard,
                ),
                (student,),
            )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_near_the_teacher_nothing_cancels(form: str | dict) -> None:
    teacher = logits(8, 1000, seed=0)
    student = teacher + 1e-3 * logits(8, 1000, seed=1)
    target = ids_for(form, 8, 1000)
    problem = (student.double(), teacher.double(), target, None, 4.0, 1.0, 2.0, 1.0, 0.0)
    extra = (None, terms_of(form), False)
    expected, *_, stats = ops.forward(*problem, *extra, False)
    one = torch.ones((), dtype=torch.float64)
    expected_grad = ops.backward(one, stats, *problem, *extra)
    loss, grad = kd_loss_and_grad(student, teacher, target, divergence=form)
    assert abs(loss.double() - expected) <= 2e-4 * expected and loss > 0
    assert (grad.double() - expected_grad).norm() <= 2e-4 * expected_grad.norm()
    same, zero = kd_loss_and_grad(teacher, teacher, target, divergence=form)
    assert same == 0 and (zero == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_infinite_logits_leave_finite_gradients(form: str | dict) -> None:
    inf = float("inf")
    teacher = torch.tensor([[0.0, -inf, 1.0, 2.0], [0.0, 1.0, 2.0, 1.0], [0.0, -inf, 1.0, 0.5]])
    student = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, -inf, 1.0, 1.5], [0.0, -inf, 1.0, 1.0]])
    target = torch.tensor([0, 0, 2]) if "dkd" in form else None
    loss, grad = kd_loss_and_grad(
        student.repeat(1, 5), teacher.repeat(1, 5), target, divergence=form, temperature=1.0
    )
    assert grad.isfinite().all() and not loss.isnan()
    rows = kd_loss(student, teacher, target, divergence=form, reduction="none")
    assert rows[2].isfinite()
    problem = (
        student,
        teacher,
        target,
        None,
        4.0,
        1.0,
        16.0,
        1.0,
        0.0,
        None,
        terms_of(form),
        False,
    )
    expected = ops._eager_forward(*problem, True)[0]
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    nan = kd_loss_and_grad(student + float("nan"), teacher, target, divergence=form)
    assert nan[0].isnan() and nan[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dkd_with_a_target_infinite_or_far_away_follows_the_definition(dtype: torch.dtype) -> None:
    student, teacher = (logits(6, 10, seed=s, dtype=dtype) for s in (0, 1))
    target = torch.arange(6)
    teacher[[0, 2], [0, 2]] = student[[1, 2], [1, 2]] = -torch.inf
    student[3, 3], teacher[4, 4], teacher[5, 5] = 90.0, 90.0, torch.inf
    numbers = (1.0, 1.0, 1.0, 1.0, 0.0, None, terms_of("dkd"), False)
    problem = (student.double(), teacher.double(), target, None, *numbers)
    expected = ops._eager_forward(*problem, True)[0]
    assert expected.isinf().tolist() == [False, True, False, False, False, False]
    named = {"temperature": 1.0, "divergence": "dkd"}
    rows = kd_loss(student, teacher, target, reduction="none", **named)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
    _, grad = kd_loss_and_grad(student, teacher, target, reduction="sum", **named)
    one = torch.ones((), dtype=torch.float64)
    expected = ops._eager_backward(one, torch.empty(0), *problem)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_do_not_depend_on_threads(form: str | dict) -> None:
    student, teacher = logits(300, 103, seed=0), logits(300, 103, seed=1)
    target, threads, results = torch.arange(300) % 103, torch.get_num_threads(), []
    named = {"alpha": 0.5} if "dkd" not in form else {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kd_loss_and_grad(student, teacher, target, divergence=form, **named))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_that_do_not_count_may_hold_anything(form: str | dict) -> None:
    student, teacher = logits(6, 10, seed=0), logits(6, 10, seed=1)
    target = torch.tensor([1, 2, 3, -100, 4, 5])
    student[3] = teacher[3] = float("nan")
    named = {"divergence": form} | ({} if "dkd" in form else {"alpha": 0.5})
    loss, grad = kd_loss_and_grad(student, teacher, target, **named)
    keep = target >= 0
    alone, alone_grad = kd_loss_and_grad(student[keep], teacher[keep], target[keep], **named)
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[keep], alone_grad, rtol=1e-5, atol=1e-7)
    assert (grad[3] == 0).all()


def test_no_rows_give_a_loss_of_zero() -> None:
    logits, ids = torch.randn(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for form in NAMES:
        loss = kd_loss(logits, logits.detach(), ids, alpha=0.5, divergence=form, reduction="sum")
        loss.backward()
        assert loss == 0 and logits.grad is not None


def test_hard_labels_mix_with_any_divergence() -> None:
    student, teacher = (logits(6, 10, seed=s, dtype=torch.float64) for s in (0, 1))
    target = torch.tensor([1, 2, 3, 0, 4, 5])
    for form in FORMS:
        leaf = student.clone().requires_grad_()
        kd = textbook(leaf, teacher, target, form, 3.0).mean()
        expected = 0.25 * kd + 0.75 * F.cross_entropy(leaf, target, label_smoothing=0.1)
        expected.backward()
        loss, grad = kd_loss_and_grad(
            student,
            teacher,
            target,
            alpha=0.25,
            temperature=3.0,
            label_smoothing=0.1,
            divergence=form,
        )
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-13)


def test_a_constant_student_has_a_finite_gradient() -> None:
    """A head that starts at zero gives equal logits, for which correlations are not defined."""
    teacher, student = logits(6, 10, seed=0), torch.zeros(6, 10)
    for named in ({"divergence": "dist"}, {"standardize_logits": True}):
        loss, grad = kd_loss_and_grad(student, teacher, **named)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("divergence", "error", "words"),
    [
        ("kl", ValueError, "divergence: got 'kl', expected one of"),
        (3, TypeError, "divergence: got int"),
        ({}, ValueError, "divergence: got 0 terms"),
        ({"jsd": {"beta": 1.0}}, ValueError, r"jsd.beta: got 1, expected 0 to 1 \(exclusive\)"),
        ({"jsd": {"gamma": 1.0}}, ValueError, r"jsd: got \['gamma'\], expected some of"),
        ({"jsd": {"beta": "x"}}, TypeError, "jsd.beta: got str"),
        ({"jsd": 10**400}, ValueError, "jsd.weight: got inf, expected 0 to inf"),
        ({"dkd": {"beta": 10**400}}, ValueError, "dkd.beta: got inf, expected 0 to 1000"),
        ({"forward_kl": 0.0}, ValueError, "forward_kl.weight: got 0"),
        ({"forward_kl": float("nan")}, ValueError, "weight: got nan"),
        (dict.fromkeys(("forward_kl", "jsd", "reverse_kl"), 1.0), ValueError, "got 3 terms"),
        ("dkd", ValueError, "target: got None, expected int64 class ids"),
    ],
)
def test_wrong_divergences_say_what_to_change(
    divergence: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        kd_loss(torch.zeros(4, 10), torch.ones(4, 10), divergence=divergence)
    if divergence != "dkd":
        with pytest.raises(error, match=words):
            DistillKL(divergence=divergence)


def test_every_parameter_has_a_usual_value_within_its_limits() -> None:
    for name, parameters in PARAMETERS.items():
        usual = {p.name: p.usual for p in parameters}
        assert terms_of({name: usual}) == terms_of(name)


def test_dist_alone_equals_dist_beside_a_divergence_that_counts_nothing() -> None:
    """Alone it keeps the changes of probability in the gradient's memory between its passes."""
    student, teacher = (logits(37, 103, seed=seed) for seed in (0, 1))
    mask = torch.arange(37) % 5 != 0
    named = {"temperature": 2.0, "mask": mask}
    loss, grad = kd_loss_and_grad(student, teacher, divergence={"dist": 0.7}, **named)
    both = {"dist": 0.7, "reverse_kl": 1e-30}
    other, expected = kd_loss_and_grad(student, teacher, divergence=both, **named)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("form", ["jsd", "alpha_beta"])
def test_one_class_that_is_apart_changes_no_other_block_of_classes(form: str) -> None:
    """Blocks of 128 classes take the path for small differences where they can."""
    teacher = logits(3, 500, seed=0)
    student = teacher + 0.01 * logits(3, 500, seed=1)
    student[:, 300] -= 40.0
    loss, grad = kd_loss_and_grad(student, teacher, divergence=form, temperature=2.0)
    expected, expected_grad = exact(student, teacher, None, form, temperature=2.0)
    assert abs(loss.double() - expected) <= 1e-5 * expected
    assert (grad.double() - expected_grad).abs().max() <= 1e-6 * expected_grad.abs().max()


@pytest.mark.parametrize("classes", [1, 3, 15, 16, 17, 33, 100, 129, 1000])
def test_dist_has_the_same_bits_without_its_gradient(classes: int) -> None:
    for seed in range(0, 40, 2):
        student, teacher = (logits(5, classes, seed=seed + k) for k in (0, 1))
        student[::2] *= 0.01  # rows that are much flatter than the teacher's take another path
        alone = kd_loss(student, teacher, divergence="dist", reduction="sum")
        both = kd_loss_and_grad(student, teacher, divergence="dist", reduction="sum")
        assert torch.equal(alone, both[0])


@pytest.mark.parametrize("rows", [6, 128, 600])
def test_the_columns_of_a_constant_student_have_no_gradient(rows: int) -> None:
    columns = {"dist": {"beta": 0.0, "gamma": 1.0}}
    teacher, student = logits(rows, 10, seed=0), torch.zeros(rows, 10)
    assert not kd_loss_and_grad(student, teacher, divergence=columns)[1].any()


@pytest.mark.parametrize("scale", [0.01, 0.1])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("rows", [6, 128, 600])
def test_dist_keeps_the_digits_of_a_nearly_constant_student(
    rows: int, beta: float, scale: float
) -> None:
    named = {"dist": {"beta": beta, "gamma": 1.0 - beta}}  # columns or rows alone
    teacher, classes = logits(rows, 10, seed=0), torch.arange(rows) % 10
    teacher = teacher.scatter_add(1, classes[:, None], torch.full((rows, 1), 8.0))
    student = scale * logits(rows, 10, seed=1)
    found = kd_loss_and_grad(student, teacher, divergence=named)[1].double()
    exact = kd_loss_and_grad(student.double(), teacher.double(), divergence=named)[1]
    assert (found - exact).abs().max() < 2e-7 / scale * exact.abs().max()


def test_one_row_apart_from_many_equal_ones_leaves_the_columns_of_dist_exact() -> None:
    columns = {"dist": {"beta": 0.0, "gamma": 1.0}}
    student = torch.tensor([[30.0, 0.0]]).repeat(4096, 1)
    teacher = student.clone()
    student[0, 0], teacher[0, 0] = 2.2, -0.85  # p = 0.3 and q = 0.9 of the first class
    loss, grad = kd_loss_and_grad(student, teacher, divergence=columns, temperature=1.0)
    assert loss < 1e-6 and grad.abs().max() < 1e-5


def test_dist_into_strided_memory_and_in_other_dtypes() -> None:
    student, teacher = (logits(21, 103, seed=seed) for seed in (0, 1))
    each = torch.linspace(0.5, 4.0, 21)
    named = {"temperature": each, "divergence": "dist"}
    loss, grad = kd_loss_and_grad(student, teacher, **named)
    wide = torch.full((21, 110), 7.0)
    again, _ = kd_loss_and_grad(student, teacher, out=wide[:, :103], **named)
    assert torch.equal(again, loss) and torch.equal(wide[:, :103], grad)
    assert (wide[:, 103:] == 7).all()
    exact, exact_grad = kd_loss_and_grad(
        student.double(), teacher.double(), **named | {"temperature": each.double()}
    )
    assert abs(loss - exact) <= 1e-5 * exact
    assert (grad - exact_grad).norm() <= 1e-5 * exact_grad.norm()
    for pair, unit in (
        ((student.bfloat16(), teacher.bfloat16()), 4e-3),
        ((student, teacher.double()), 1e-6),
    ):
        loss, grad = kd_loss_and_grad(*pair, divergence="dist")
        exact, exact_grad = kd_loss_and_grad(*(x.double() for x in pair), divergence="dist")
        assert abs(loss - exact) <= 1e-5 * exact
        assert (grad - exact_grad).norm() <= unit * exact_grad.norm()


def test_dist_keeps_a_probability_far_below_the_teachers() -> None:
    student, teacher = torch.tensor([[0.0, 25.0, 0.0]]), torch.tensor([[25.0, 0.0, 0.0]])
    named = {"temperature": 1.0, "divergence": {"dist": {"gamma": 0.0}}}
    _, grad = kd_loss_and_grad(student, teacher, **named)
    _, exact_grad = kd_loss_and_grad(student.double(), teacher.double(), **named)
    torch.testing.assert_close(grad[0, 0].double(), exact_grad[0, 0], rtol=1e-4, atol=0)


EXTREMES = [
    *({"alpha_beta": {"alpha": a, "beta": b}} for a in (0.01, 10.0) for b in (0.01, 10.0)),
    *({"jsd": {"beta": beta}} for beta in (1e-6, 0.999999)),
]


@pytest.mark.parametrize("form", EXTREMES, ids=str)
@pytest.mark.parametrize("largest", [0.45, 0.55])
def test_small_differences_at_the_ends_of_the_parameters(form: dict, largest: float) -> None:
    """Just inside of the range of the series for small differences, and just outside."""
    ((name, numbers),) = form.items()
    both = sum(numbers.values()) if name == "alpha_beta" else 1.0
    for classes in (127, 128, 129, 300):
        teacher = logits(4, classes, seed=0)
        shift = logits(4, classes, seed=1)
        shift = shift / shift.abs().max() * (largest / both / 2)
        loss, grad = kd_loss_and_grad(teacher + shift, teacher, divergence=form, temperature=1.0)
        student, exact_teacher = (teacher + shift).double(), teacher.double()
        expected, exact_grad = kd_loss_and_grad(
            student, exact_teacher, divergence=form, temperature=1.0
        )
        assert abs(loss - expected) <= 1e-4 * expected
        assert (grad - exact_grad).abs().max() <= 1e-5 * exact_grad.abs().max()
