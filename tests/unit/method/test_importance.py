import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_dist.method.importance import (
    component_magnitudes,
    component_scores,
    score_layers,
    smooth,
    squared_magnitudes,
    weight_criterion,
)

KINDS = ("random", "nearly collinear", "zero gates", "one zero gate")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def dense_scores(lora_a: Tensor, gate: Tensor, lora_b: Tensor, eps: float = 1e-8) -> Tensor:
    """Equation 7 as written: every component as a matrix of the layer's size, in float64."""
    components = torch.einsum("or,r,ri->roi", lora_b.double(), gate.double(), lora_a.double())
    return components.flatten(1).norm(dim=1) / (components.sum(0).norm() + eps)


def draw(kind: str, rank: int, size_in: int, size_out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lora_a, lora_b = (torch.randn(shape, generator=generator) for shape in ((rank, size_in), (size_out, rank)))
    gate = torch.randn(rank, generator=generator)
    if kind == "nearly collinear":
        lora_a = lora_a[:1] + 1e-4 * lora_a
        lora_b = lora_b[:, :1] + 1e-4 * lora_b
        gate = gate.abs() + 0.1
    elif kind == "zero gates":
        gate.zero_()
    elif kind == "one zero gate":
        gate[0] = 0
    return lora_a, gate, lora_b


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 10_000),
)
def test_scores_equal_the_dense_definition(kind, dtype, rank, size_in, size_out, seed):
    layer = [tensor.to(dtype) for tensor in draw(kind, rank, size_in, size_out, seed)]
    scores = component_scores(*layer)
    torch.testing.assert_close(scores, dense_scores(*layer), rtol=1e-5, atol=1e-12, check_dtype=False)
    assert scores.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
def test_scores_of_opposing_components_equal_the_dense_definition(difference, dtype):
    lora_a, gate, lora_b = draw("random", 4, 512, 256, seed=3)
    lora_a[1] = lora_a[0] * (1 + difference)
    lora_b[:, 1] = -lora_b[:, 0]
    gate[:] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    layer = [tensor.to(dtype) for tensor in (lora_a, gate, lora_b)]
    scores = component_scores(*layer)
    torch.testing.assert_close(scores, dense_scores(*layer), rtol=1e-5, atol=0, check_dtype=False)
    # They cancel down to the difference, so that each is far larger than their sum.
    assert scores[0] == pytest.approx(1 / difference, rel=1e-2)


def test_components_that_cancel_out_give_finite_scores():
    """a_3 = a_1 + a_2 up to rounding, against both: the square of the sum may come out below 0."""
    negative = 0
    for seed in range(40):
        lora_a, _, lora_b = draw("random", 2, 300, 200, seed)
        lora_a = torch.cat([lora_a.double(), lora_a.double().sum(0, keepdim=True)])
        lora_b = lora_b[:, :1].expand(-1, 3).double()
        gate = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
        square = gate @ ((lora_a @ lora_a.T) * (lora_b.T @ lora_b)) @ gate
        negative += bool(square < 0)
        scores = component_scores(lora_a, gate, lora_b)
        assert torch.isfinite(scores).all()
        assert (scores > 1e3).all()
    assert negative, "no case provokes a negative square"


@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1.0, 1e30, 3e38])
def test_no_finite_float32_layer_gives_a_score_that_is_not_finite(magnitude):
    lora_a, gate, lora_b = (torch.full(shape, magnitude) for shape in ((4, 64), (4,), (64, 4)))
    assert torch.isfinite(component_scores(lora_a, gate, lora_b)).all()


def test_all_gates_zero_score_exactly_zero():
    scores = component_scores(*draw("zero gates", 6, 20, 30, seed=0))
    assert torch.equal(scores, torch.zeros(6))


def test_scores_do_not_depend_on_scale_or_sign_and_carry_no_gradient():
    lora_a, gate, lora_b = draw("random", 5, 16, 8, seed=1)
    scores = component_scores(lora_a.requires_grad_(), gate, lora_b)
    torch.testing.assert_close(component_scores(lora_a, -4 * gate, lora_b), scores, rtol=1e-6, atol=0)
    assert not scores.requires_grad


def test_a_non_finite_weight_shows_in_the_scores():
    lora_a, gate, lora_b = draw("random", 5, 16, 8, seed=1)
    lora_a[2, 3] = float("nan")
    assert not torch.isfinite(component_scores(lora_a, gate, lora_b)).all()


@pytest.mark.parametrize(
    ("shape_a", "shape_gate", "shape_b"),
    [
        ((4, 8), (5,), (6, 4)),
        ((4, 8), (4,), (6, 5)),
        ((8,), (4,), (6, 4)),
        ((4, 8), (4, 1), (6, 4)),
        ((4, 8), (4,), (4,)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(shape_a, shape_gate, shape_b):
    with pytest.raises(ValueError, match="lora_a") as refusal:
        component_scores(torch.zeros(shape_a), torch.zeros(shape_gate), torch.zeros(shape_b))
    for shape in (shape_a, shape_gate, shape_b):
        assert str(shape) in str(refusal.value)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int64"):
        component_scores(torch.ones(2, 3), torch.ones(2, dtype=torch.int64), torch.ones(3, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_layers_score_as_each_alone(dtype):
    sizes = [(20, 30), (30, 20), (7, 64), (20, 30)]
    layers = [tuple(t.to(dtype) for t in draw("random", 5, *size, seed=n)) for n, size in enumerate(sizes)]
    alone = torch.stack([component_scores(*layer) for layer in layers])
    torch.testing.assert_close(score_layers(layers), alone, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)


def test_layers_that_cannot_be_scored_together_are_refused():
    layers = [draw("random", rank, 8, 8, seed=0) for rank in (4, 5)]
    with pytest.raises(ValueError, match=r"\[4, 5\]"):
        score_layers(layers)
    with pytest.raises(ValueError, match="no layers"):
        score_layers([])


def test_smoothing_is_the_average_of_equation_8():
    scores = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])]
    smoothed = torch.zeros(2)
    for current in scores:
        smoothed = smooth(smoothed, current, beta=0.9)
    torch.testing.assert_close(smoothed, 0.9 * 0.1 * scores[0] + 0.1 * scores[1])
    assert torch.equal(smooth(smoothed, scores[0], beta=0.0), scores[0])


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_smoothing_outside_its_range_is_refused(beta):
    with pytest.raises(ValueError, match=f"smoothing is {beta}"):
        smooth(torch.zeros(2), torch.zeros(2), beta)


def test_smoothing_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        smooth(torch.zeros(2), torch.zeros(3), 0.9)


def random_layers(count: int = 3, rank: int = 4) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(8 + 3 * number, 20 - 2 * number) for number in range(count)]
    return [
        (
            torch.randn(rank, n_in, generator=generator),
            torch.randn(rank, generator=generator),
            torch.randn(n_out, rank, generator=generator),
        )
        for n_in, n_out in shapes
    ]


def test_magnitudes_are_the_norms_of_the_components():
    layers = random_layers()
    for (lora_a, gate, lora_b), scores in zip(layers, component_magnitudes(layers), strict=True):
        dense = torch.einsum("or,r,ri->roi", lora_b.double(), gate.double(), lora_a.double())
        torch.testing.assert_close(scores, torch.linalg.matrix_norm(dense), rtol=1e-12, atol=0)
    torch.testing.assert_close(squared_magnitudes(layers), component_magnitudes(layers) ** 2)


def test_the_papers_score_does_not_see_the_size_of_a_layers_update_and_the_magnitude_does():
    lora_a, gate, lora_b = random_layers(1)[0]
    layers = [(lora_a, gate, lora_b), (lora_a, 1e-3 * gate, lora_b)]
    share, magnitude = score_layers(layers).double(), component_magnitudes(layers)
    torch.testing.assert_close(share[0], share[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(1e-3 * magnitude[0], magnitude[1], rtol=1e-6, atol=0)


def test_random_scores_stay_the_same_and_depend_on_the_seed_only():
    layers = random_layers()
    others = [(2 * lora_a, gate + 1, lora_b) for lora_a, gate, lora_b in layers]
    score = weight_criterion("random", 3)
    assert torch.equal(score(layers), score(others))
    assert torch.equal(score(layers), weight_criterion("random", 3)(layers))
    assert not torch.equal(score(layers), weight_criterion("random", 4)(layers))
    assert score(layers).shape == (3, 4)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="importance is 'fisher', but must be one of frobenius, magnitude"):
        weight_criterion("fisher", 0)
