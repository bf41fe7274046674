"""Leading directions of a matrix that is never built, by subspace iteration (Halko, Martinsson and Tropp, 2011).

The matrix is known by its products with a few orthonormal columns, the probes. Products of it and its transpose in
turn (or of a symmetric matrix again and again) turn the probes towards the directions of the largest singular values.
"""

import torch
from torch import Tensor

EXTRA_PROBES = 4
"""Beside one for each direction that is wanted: those at the edge are found in fewer products."""


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns of the same span, float64, of the same shape ``(width, probes)``; no more than ``width``."""
    found: Tensor = torch.linalg.qr(columns.double()).Q
    return found


def leading_directions(products: Tensor, count: int) -> Tensor:
    """The directions that the matrix stretches most, of those that the probes have found.

    Args:
        products: of the matrix with orthonormal probes, shape ``(width, probes)``.
        count: how many are wanted, at most as many as probes.

    Returns:
        Orthonormal rows, shape ``(count, width)``, float64, the largest first, with :func:`fixed_signs`. Where the
        matrix has a lower rank, the last ones are any that are orthogonal.
    """
    left: Tensor = torch.linalg.svd(products.double(), full_matrices=False).U
    directions = left[:, :count].T
    return directions * fixed_signs(directions)


def fixed_signs(directions: Tensor) -> Tensor:
    """1 or -1 for each of the rows, shape ``(count, width)``: what makes its largest entry positive. ``(count, 1)``."""
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)
