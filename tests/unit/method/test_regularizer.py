import pytest
import torch
from torch import Tensor

from dora_dist.method.regularizer import equilibrium_penalty

SHAPES = [(3, 16, 8), (5, 7, 21), (1, 2, 2)]  # rank, in, out; ranks differ, so that a mean of means would be wrong


def draw_pairs(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(rank, size_in, generator=generator).to(dtype).requires_grad_(),
            torch.randn(size_out, rank, generator=generator).to(dtype).requires_grad_(),
        )
        for rank, size_in, size_out in SHAPES
    ]


def naive_penalty(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Equation 10 component by component, with the variance written out."""

    def variance(vector: Tensor) -> Tensor:
        return ((vector - vector.mean()) ** 2).sum() / (len(vector) - 1)

    terms = [(variance(a[i].double()) + variance(b[:, i].double())) / 2 for a, b in pairs for i in range(len(a))]
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_the_penalty_equals_the_formula(dtype, tolerance):
    pairs = draw_pairs(dtype)
    penalty = equilibrium_penalty(pairs)
    assert penalty.ndim == 0
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(penalty.double(), naive_penalty(pairs), rtol=tolerance, atol=0)


def test_the_gradient_equals_that_of_the_formula():
    pairs = draw_pairs()
    tensors = [tensor for pair in pairs for tensor in pair]
    ours = torch.autograd.grad(equilibrium_penalty(pairs), tensors)
    naive = torch.autograd.grad(naive_penalty(pairs), tensors)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_inputs_dtype_and_the_losss_factor(dtype):
    pairs = draw_pairs(dtype)
    exact = [tuple(tensor.detach().double().requires_grad_() for tensor in pair) for pair in pairs]
    (0.1 * equilibrium_penalty(pairs)).backward()
    (0.1 * naive_penalty(exact)).backward()
    for pair, wanted in zip(pairs, exact, strict=True):
        for tensor, other in zip(pair, wanted, strict=True):
            assert tensor.grad.dtype == dtype
            torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=torch.finfo(dtype).eps * 2, atol=1e-9)


def test_vectors_far_from_zero_keep_the_precision_of_their_variance():
    """The mean is taken off before anything is squared."""
    pairs = [tuple((tensor.detach() + 100).float() for tensor in pair) for pair in draw_pairs()]
    torch.testing.assert_close(equilibrium_penalty(pairs).double(), naive_penalty(pairs), rtol=1e-6, atol=0)


def test_a_second_backward_gives_the_same():
    pairs = draw_pairs()
    tensors = [tensor for pair in pairs for tensor in pair]
    penalty = equilibrium_penalty(pairs)
    first, second = (torch.autograd.grad(penalty, tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_components_with_equal_entries_cost_nothing():
    assert equilibrium_penalty([(torch.full((2, 5), 3.0), torch.full((4, 2), -1.0))]) == 0


def test_a_generator_of_pairs_is_accepted():
    pairs = draw_pairs()
    assert torch.equal(equilibrium_penalty(pair for pair in pairs), equilibrium_penalty(pairs))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no layers"),
        ([(torch.ones(2, 1), torch.ones(3, 2))], r"two entries.*\(2, 1\)"),
        ([(torch.ones(2, 3), torch.ones(1, 2))], r"two entries.*\(1, 2\)"),
    ],
)
def test_what_has_no_variance_is_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        equilibrium_penalty(pairs)
