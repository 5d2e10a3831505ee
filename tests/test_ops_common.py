"""What all ops do with tensors that are more than memory with a shape."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dpm_fast
from backends import CPU_BACKENDS, Backend, each_backend
from dpm_fast import dispatch, noise, ops, use_backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.dispatch import BackendError
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.reference import Bins
from test_kl import arguments, to

RANDOM = (ops.normal, ops.uniform)
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


def test_numpy_integers_are_integers() -> None:
    x_0, x_t, mu_out, sigma2_out, rows = arguments((2, 3))
    bits, bit_rows = (x_t > 0).float(), BinomialDiffusion(9).reverse("rate").rows(T, x_t)
    coefficients = torch.rand(5, 2)

    def calls(kind: type) -> list[torch.Tensor]:
        seed, t, stream = kind(7), kind(3), kind(1)
        return [
            ops.noise(x_0, coefficients, seed, IDS, t, stream=stream),
            ops.step(x_t, mu_out, sigma2_out, rows, seed, IDS, t),
            ops.bernoulli_noise(bits, coefficients, seed, IDS, t),
            ops.bernoulli_step(bits, mu_out, bit_rows, seed, IDS, t),
            *(
                random(seed, stream, IDS, t, (kind(2), kind(3)))
                for random in (ops.normal, ops.uniform)
            ),
            ops.words(seed, stream, IDS, t, kind(5)),
            noise.words(seed, stream, IDS, t, kind(5)),
        ]

    for name in ("reference", "auto"):
        with use_backend(name), torch.no_grad():
            expected = calls(int)
            for kind in (np.int64, np.int32, np.uint8):
                found = calls(kind)
                assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"seed": True}, TypeError, "seed must be an integer, got bool"),
        ({"seed": np.float64(1)}, TypeError, "seed must be an integer, got float64"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an integer, got Tensor"),
        ({"stream": False}, TypeError, "stream must be an integer, got bool"),
        ({"stream": np.int64(256)}, ValueError, "stream must be in 0..255, got 256"),
        ({"t": True}, TypeError, "t must be an integer or a tensor, got bool"),
        ({"t": np.int64(-1)}, ValueError, r"t must be in 0..2\*\*24 - 1, got -1"),
        ({"event_shape": 3}, TypeError, "event_shape must be a sequence of sizes, got int"),
        ({"event_shape": (2.0,)}, TypeError, "each size of event_shape must be an integer, got fl"),
        (
            {"event_shape": (-1,)},
            ValueError,
            r"event_shape must have no negative .*, got \(-1,\)",
        ),
        ({"event_shape": (2**35,)}, ValueError, "event_shape must have at most 2.*, got"),
        ({"num_elements": 2.5}, TypeError, "num_elements must be an integer, got float"),
        ({"num_elements": -1}, ValueError, r"num_elements must be in 0..2\*\*34, got -1"),
        ({"dtype": torch.int64}, TypeError, "dtype must be .*, got torch.int64"),
    ],
)
@pytest.mark.parametrize("module", [ops, noise])
def test_random_numbers_refuse(
    module: Any, changed: dict[str, Any], error: type[Exception], message: str, name: str
) -> None:
    call = {"seed": 1, "stream": 1, "example_ids": IDS, "t": 1}
    of_words = "num_elements" in changed
    call |= {"num_elements": 4} if of_words else {"event_shape": (2, 2)}
    with use_backend(name), pytest.raises(error, match=message):
        (module.words if of_words else module.normal)(**call | changed)


def _without_values() -> list[Callable[[], torch.Tensor]]:
    """Calls on tensors without memory."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    x, rows, bit_rows, rates = meta(3, 2, 4), meta(3, 15), meta(3, 20), meta(3, 2)
    ids, t = meta(3, dtype=torch.int64), meta(3, dtype=torch.int64)
    factors = {"known": (x > 0, x), "observed": (x, 0.5), "drift": x[:1]}
    bins = Bins(0.1, -1.0, 1.0)
    return [
        lambda: ops.kl(x, x, x, x, rows),
        lambda: ops.kl(x, x, x, None, rows, edge="discretized", bins=bins),
        lambda: ops.step(x, x, x, rows, 3, ids, t, **factors),
        lambda: ops.step_(meta(3, 2, 4), x, None, rows, 3, ids, 5),
        lambda: ops.noise(x, rates, 3, ids, t),
        lambda: ops.normal(3, 1, ids, t, (2, 4)),
        lambda: ops.words(3, 1, ids, 5, 7),
        lambda: ops.bernoulli_noise(x, rates, 3, ids, t),
        lambda: ops.bernoulli_step(x, x, bit_rows, 3, ids, t, **factors),
        lambda: ops.bernoulli_kl(x, x, x, bit_rows),
    ]


@pytest.mark.parametrize("call", _without_values())
def test_tensors_without_memory(call: Callable[[], torch.Tensor]) -> None:
    assert call().device.type == "meta"
    for name in ("native", "triton"):
        with use_backend(name), pytest.raises(BackendError, match=f"{name!r} cannot run on meta"):
            call()


@each_backend
def test_a_step_takes_a_whole_output(backend: Backend) -> None:
    _, x_t, mu_out, sigma2_out, rows = to(arguments((2, 3)), backend.device)
    ids, t = IDS.to(backend.device), T.to(backend.device)
    out = torch.cat((mu_out, sigma2_out), dim=1)
    with backend.use(), torch.no_grad():
        expected = ops.step(x_t, mu_out, sigma2_out, rows, 0, ids, t)
        assert torch.equal(ops.step(x_t, out, None, rows, 0, ids, t, joined=True), expected)
        assert torch.equal(ops.step_(x_t, out, None, rows, 0, ids, t, joined=True), expected)
        with pytest.raises(ValueError, match="sigma2_out must be None where mu_out holds it"):
            ops.step(x_t, out, sigma2_out, rows, 0, ids, t, joined=True)
        with pytest.raises(ValueError, match=r"mu_out must have shape \(5, 4, 3\) like x_t"):
            ops.step(x_t, mu_out, None, rows, 0, ids, t, joined=True)


@each_backend
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_learned_variance_that_no_output_gives(backend: Backend, name: str) -> None:
    if backend.instruction_set is None:
        pytest.skip("values are looked at where that is free")
    x_0, x_t, mu_out, _, rows = arguments((2, 3))
    message = r"sigma2_out must be given where rows have a learned variance, got None with s = "
    with backend.use(), use_backend(name), torch.no_grad():
        with pytest.raises(ValueError, match=message):
            ops.kl(x_0, x_t, mu_out, None, rows)
        with pytest.raises(ValueError, match=message):
            ops.step(x_t, mu_out, None, rows, 0, IDS, T)


@each_backend
def test_gradients_of_several_weights_at_once(backend: Backend) -> None:
    x_0, x_t, mu_out, sigma2_out, rows = to(arguments((2, 3)), backend.device)
    bits, bit_rows = (x_0 > 0).float(), BinomialDiffusion(10).reverse("x0").rows(T, x_0.cpu())
    weights = torch.rand(3, 5, dtype=torch.float64, device=backend.device)
    for op, *inputs in (
        (ops.kl, x_0, x_t, mu_out.requires_grad_(), sigma2_out, rows),
        (ops.bernoulli_kl, bits, bits, mu_out, bit_rows.to(backend.device)),
    ):
        with backend.use():
            nats = op(*inputs)
            found = torch.autograd.grad(nats, mu_out, weights, True, is_grads_batched=True)[0]
            each = [torch.autograd.grad(nats, mu_out, w, retain_graph=True)[0] for w in weights]
        torch.testing.assert_close(found, torch.stack(each))


def test_a_sparse_tensor_is_refused() -> None:
    _, x_t, mu_out, sigma2_out, rows = arguments((6,))
    sparse, coefficients = x_t.to_sparse(), torch.rand(5, 2)
    for name, call in {
        "x_0": lambda: ops.kl(sparse, x_t, mu_out, sigma2_out, rows),
        "x_t": lambda: ops.step(sparse, mu_out, sigma2_out, rows, 0, IDS, T),
        "x_0 ": lambda: ops.noise(sparse, coefficients, 0, IDS, T),
    }.items():
        with pytest.raises(
            TypeError, match=f"{name.strip()} must be strided, got torch.sparse_coo"
        ):
            call()


@pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native ops of a CPU")
def test_bindings_refuse_what_would_corrupt_memory() -> None:
    native, threads = dispatch.native(torch.empty(0))
    x_0, x_t, mu_out, sigma2_out, rows = arguments((6,))
    nats, coefficients = torch.zeros(5, dtype=torch.float64), torch.rand(5, 2)

    def kl(grad: torch.Tensor) -> None:
        edge = 0, 0.0, 0.0, 0.0
        grads = [None, None, grad, None, None]
        native.kl(x_0, x_t, mu_out, sigma2_out, False, rows, *edge, nats, *grads, None, threads)

    def noise(x_t: torch.Tensor, ids: torch.Tensor = IDS) -> None:
        native.noise(x_0, coefficients, 0, 1, ids, T, x_t, threads)

    for wrong in (torch.empty(5, 5), torch.empty(4, 6)):
        with pytest.raises(ValueError, match="sizes must agree"):
            kl(wrong)
        with pytest.raises(ValueError, match="sizes must agree"):
            noise(wrong)
    for call in (kl, noise):
        with pytest.raises(TypeError, match="dtypes must agree"):
            call(torch.empty(5, 6, dtype=torch.bfloat16))
    for ids in (IDS[:4], IDS.int(), torch.arange(10)[::2]):
        with pytest.raises(ValueError, match="an array must be contiguous"):
            noise(torch.empty(5, 6), ids)
