import pytest
import torch

from dora_dist.method.subspaces import fixed_signs, leading_directions, orthonormal


def matrix(sizes: tuple[int, int], values: list[float]) -> torch.Tensor:
    """With these singular values, in float64."""
    draws = torch.Generator().manual_seed(0)
    left, right = (orthonormal(torch.randn(size, len(values), generator=draws, dtype=torch.float64)) for size in sizes)
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("width", [5, 40])
def test_orthonormal_columns_have_the_span_of_those_given(width):
    columns = torch.randn(width, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = orthonormal(columns)
    torch.testing.assert_close(found.T @ found, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T @ columns, columns)


def test_probes_that_span_all_of_a_matrix_find_its_singular_vectors_in_order():
    whole = matrix((30, 20), [5.0, 3.0, 2.0, 1.0])
    probes = orthonormal(whole @ torch.randn(20, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    found = leading_directions(whole.T @ probes, 3)
    wanted = torch.linalg.svd(whole).Vh[:3]
    torch.testing.assert_close(found, wanted * fixed_signs(wanted))


def test_iterated_products_find_the_leading_directions_of_a_matrix_with_a_gap():
    whole = matrix((30, 20), [10.0, 8.0, *([1.0] * 10)])
    probes = orthonormal(torch.randn(20, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    for _ in range(4):
        products = whole.T @ orthonormal(whole @ probes)
        probes = orthonormal(products)
    wanted = torch.linalg.svd(whole).Vh[:2]
    torch.testing.assert_close(leading_directions(products, 2), wanted * fixed_signs(wanted), atol=1e-6, rtol=0)


def test_directions_beyond_the_rank_of_a_matrix_are_orthogonal_to_the_others():
    found = leading_directions(matrix((6, 20), [3.0, 2.0]).T, 4)
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64))


def test_signs_make_the_largest_entry_positive():
    rows = torch.tensor([[1.0, -3.0], [2.0, -1.0]])
    assert (rows * fixed_signs(rows)).tolist() == [[-1, 3], [2, -1]]
