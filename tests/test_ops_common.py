"""What all ops do with tensors that are more than memory with a shape."""

import pytest
import torch

import dpm_fast
from backends import Backend, each_backend
from dpm_fast import dispatch, ops
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from test_kl import arguments, to

IDS, T = torch.arange(5), torch.tensor([1, 2, 3, 4, 5])


def negated_view(x: torch.Tensor) -> torch.Tensor:
    """x as a view whose memory holds -x."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@each_backend
def test_a_negated_view_is_its_value(backend: Backend) -> None:
    x_0, x_t, mu_out, sigma2_out, rows = to(arguments((2, 3)), backend.device)
    ids, t = IDS.to(backend.device), T.to(backend.device)
    coefficients = torch.rand(5, 2, device=backend.device)
    with backend.use(), torch.no_grad():
        for plain, views in (
            (
                ops.kl(x_0, x_t, mu_out, sigma2_out, rows),
                ops.kl(x_0, negated_view(x_t), mu_out, sigma2_out, rows),
            ),
            (
                ops.step(x_t, mu_out, sigma2_out, rows, 0, ids, t),
                ops.step(negated_view(x_t), mu_out, sigma2_out, rows, 0, ids, t),
            ),
            (
                ops.noise(x_0, coefficients, 0, ids, t),
                ops.noise(negated_view(x_0), coefficients, 0, ids, t),
            ),
        ):
            torch.testing.assert_close(plain, views, rtol=1e-6, atol=1e-6)


@each_backend
def test_a_change_in_place_is_seen_by_autograd(backend: Backend) -> None:
    _, x_t, mu_out, sigma2_out, rows = to(arguments((2, 3)), backend.device)
    ids, t = IDS.to(backend.device), T.to(backend.device)
    reverse = BinomialDiffusion(10).reverse("x0")
    bits = (x_t > 0).float()
    with backend.use():
        for x in (x_t, bits):
            weight = torch.ones(5, 1, 1, device=backend.device, requires_grad=True)
            total = (weight * x).sum()
            with torch.no_grad():
                if x is bits:
                    ops.bernoulli_step_(x, mu_out, reverse.rows(t, x), 0, ids, t)
                else:
                    ops.step_(x, mu_out, sigma2_out, rows, 0, ids, t)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()


def test_functional_transforms_differentiate_the_reference_and_are_refused_by_kernels() -> None:
    x_0, x_t, mu_out, sigma2_out, rows = arguments((2, 3))
    bits, bernoulli_rows = (x_0 > 0).float(), BinomialDiffusion(10).reverse("x0").rows(T, x_0)
    coefficients = torch.rand(5, 2)
    functions = [
        lambda z: ops.kl(x_0, x_t, z, sigma2_out, rows).sum(),
        lambda z: ops.bernoulli_kl(bits, bits, z, bernoulli_rows).sum(),
        lambda z: ops.noise(z, coefficients, 0, IDS, T).square().sum(),
    ]
    for function in functions:
        z = mu_out.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(z), z)
        with dpm_fast.use_backend("reference"):
            found = torch.func.grad(function)(mu_out)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if dispatch.backend("", mu_out) == "reference":
            continue
        with pytest.raises(NotImplementedError, match=r"torch\.func cannot .*backend\(\"reference"):
            torch.func.grad(function)(mu_out)


def test_coefficients_are_those_of_the_forward_process() -> None:
    process = GaussianDiffusion.from_schedule("cosine", 10)
    signal, spread = process.coefficients(T, torch.float64).unbind(1)
    torch.testing.assert_close(signal**2 + spread**2, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(signal**2, process.tables().alpha_bar[T])
