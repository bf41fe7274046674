"""Leading directions of a matrix that is never built, by subspace iteration (Halko, Martinsson and Tropp, 2011).

The matrix is accessed only through its products with a few orthonormal columns, the probes. Multiplying alternately by
it and its transpose (or repeatedly by a symmetric matrix) turns the probes towards the largest singular vectors.
"""

import torch
from torch import Tensor

EXTRA_PROBES = 4
"""Probes beyond one for each wanted direction: with them, the last directions converge in fewer products."""


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same span, float64, shape ``(width, probes)``; at most ``width`` columns."""
    found: Tensor = torch.linalg.qr(columns.double()).Q
    return found


def leading_directions(products: Tensor, count: int) -> Tensor:
    """The directions that the matrix stretches most, among those that the probes have found.

    Args:
        products: products of the matrix with orthonormal probes, shape ``(width, probes)``.
        count: number of wanted directions, at most the number of probes.

    Returns:
        Orthonormal rows, shape ``(count, width)``, float64, the largest first, with :func:`fixed_signs`. If the matrix
        has a rank below ``count``, the last rows are arbitrary orthogonal directions.
    """
    left: Tensor = torch.linalg.svd(products.double(), full_matrices=False).U
    directions = left[:, :count].T
    return directions * fixed_signs(directions)


def fixed_signs(directions: Tensor) -> Tensor:
    """For each row, the sign (1 or -1) that makes its largest entry positive. ``(count, width)`` -> ``(count, 1)``."""
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)
