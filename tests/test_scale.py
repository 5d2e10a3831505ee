"""Rows times a number each, which makes gradients of a sum over examples those of a loss."""

import pytest
import torch

from backends import CPU_BACKENDS
from dpm_fast import use_backend
from dpm_fast.ops.common import DTYPES, times_per_example


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 17), (3, 2, 5, 4), (2, 16390)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
def test_it_is_the_product_rounded_once(backend, dtype, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    scale = torch.rand(shape[:1], generator=generator, dtype=torch.float64) + 0.5
    with use_backend("reference"):
        expected = times_per_example(scale, x)
    with backend.use():
        found = times_per_example(scale, x)
        shared = times_per_example(scale[:1].expand(shape[0]), x)  # as the gradient of a mean is
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(shared, times_per_example(scale[:1].repeat(shape[0]), x))


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
def test_layouts(backend) -> None:
    x = torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = x * scale.float().view(3, 1, 1, 1)
    with backend.use():
        found = times_per_example(scale, x)
        assert torch.equal(found, expected)
        assert found.stride() == x.stride()
        assert torch.equal(times_per_example(scale, x[:, 1:3]), expected[:, 1:3])
