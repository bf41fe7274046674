"""Whether two ways to compute a model give the same numbers."""

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert relative_error(found[name], gradient) <= tolerance, name
    # A dropped factor may hide in a tolerance of single entries, but not in the mean of the gradients' lengths.
    lengths = [float((found[name] * g).sum() / g.square().sum()) - 1 for name, g in expected.items()]
    assert abs(sum(lengths) / len(lengths)) <= tolerance / 10, lengths
