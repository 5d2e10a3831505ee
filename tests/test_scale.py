"""Rows times a number each, which makes gradients of a sum over examples those of a loss."""

import pytest
import torch

from backends import CPU_BACKENDS
from dpm_fast import use_backend
from dpm_fast.ops.common import (
    DTYPES,
    save_gradients,
    times_per_example,
    weighted_gradients,
)


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


class Kept(torch.autograd.Function):
    """A sum over examples whose gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx, x):
        save_gradients(ctx, [], [2 * x])
        return x.square().sum(dim=1, dtype=torch.float64)

    @staticmethod
    def backward(ctx, grad):
        return weighted_gradients(ctx, grad)[0]


def test_gradients_that_may_be_asked_for_again_stay() -> None:
    x = torch.arange(1.0, 7.0).view(2, 3).requires_grad_()
    weights = torch.tensor([0.5, -3.0], dtype=torch.float64)
    y = Kept.apply(x)
    found = [
        torch.autograd.grad(y, x, weights, retain_graph=retain)[0] for retain in (True, True, False)
    ]
    for grad in found:
        assert torch.equal(grad, 2 * x.detach() * weights.float()[:, None])


def test_what_a_hook_was_given_is_not_written_over() -> None:
    kept = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    x = torch.arange(1.0, 7.0).view(2, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = Kept.apply(x)
    y.backward(torch.tensor([0.5, -3.0], dtype=torch.float64))
    assert torch.equal(kept[0], 2 * x.detach())


def test_a_hook_may_give_back_another_layout() -> None:
    x = torch.arange(1.0, 7.0).view(2, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.t().contiguous(), torch.Tensor.t):
        y = Kept.apply(x)
    weights = torch.tensor([0.5, -3.0], dtype=torch.float64)
    y.backward(weights)
    assert torch.equal(x.grad, 2 * x.detach() * weights.float()[:, None])


def test_a_gradient_that_was_written_over_is_known_to_be_stale() -> None:
    x, factor = torch.ones(2, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    y = Kept.apply(x)
    of_saved = (y.grad_fn.saved_tensors[0] * factor).sum()
    (7 * y.sum()).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_saved.backward()
