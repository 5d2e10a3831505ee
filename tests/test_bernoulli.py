"""The ops of binomial diffusion: their reference, every backend against it, their contract."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dpm_fast
from backends import (
    CPU_BACKENDS,
    Backend,
    each_backend,
    each_backend_in_time,
    needs_host_runner,
    running_in,
)
from dpm_fast import dispatch, noise, ops, reference
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.ops.common import DTYPES
from host_runner import build
from op_cases import (
    LAYOUTS,
    MANY_SMALL,
    SPLIT,
    assert_bits_are_those_of_any_run,
    steps,
    storage_types,
)
from tolerances import rounding

NUM_STEPS, RHO = 50, 0.2
PROCESS = BinomialDiffusion(NUM_STEPS, RHO)
T = (1, 2, 25, NUM_STEPS, 1)
NAMES = ("rate", "perturbation", "x0")
IDS = torch.tensor([0, 7, 2**40, 2**62 + 1, 3])
SEED = 2**63 + 5
# What may multiply a step: nothing, everything at once, or no noise.
FACTORS = ("none", "all", "shared", "deterministic")

Arguments = list[Tensor]  # x_0, x_t, logit_out, rows


def bits(seed: int, event: tuple[int, ...], n: int, rate: float = 0.4) -> Tensor:
    u = noise.uniform(seed, noise.Stream.DATA, torch.arange(n), 0, event, torch.float64)
    return (u <= rate).double()


def normals(seed: int, event: tuple[int, ...], n: int) -> Tensor:
    return noise.normal(seed, noise.Stream.DATA, torch.arange(n), 0, event, torch.float64)


def arguments(
    event: tuple[int, ...] = (3, 7, 5),
    name: str = "rate",
    *,
    t: tuple[int, ...] = T,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Arguments:
    """Bits, what the forward process makes of them, and what a network might say."""
    steps, n = torch.tensor(t), len(t)
    x_0 = bits(0, event, n).to(dtype)
    x_t = PROCESS.sample_x_t(x_0.double(), steps, 0, torch.arange(n)).to(dtype)
    out = (scale * normals(1, event, n)).to(out_dtype or dtype)
    return [x_0, x_t, out, PROCESS.reverse(name).rows(steps, x_0)]


def counters(n: int) -> tuple[Tensor, Tensor]:
    """Ids and timesteps of the noise of n examples."""
    at = torch.arange(n) % len(IDS)
    return IDS[at], torch.tensor(T)[at]


def factors(which: str, x: Tensor) -> dict[str, Any]:
    """Keyword arguments of a step on x."""
    event, n = tuple(x.shape[1:]), x.shape[0]
    if which == "none":
        return {}
    if which == "deterministic":
        return {"deterministic": True}
    shared = 1 if which == "shared" else n
    mask = bits(5, event, shared, 0.2) > 0.5
    flip = 0.01 + 0.49 * noise.uniform(6, noise.Stream.DATA, torch.arange(shared), 0, event)
    return {
        "known": (mask, bits(7, event, shared).to(x.dtype)),
        "observed": (bits(8, event, shared).to(x.dtype), flip.to(x.dtype)),
        "drift": normals(9, event, n).to(x.dtype),
    }


def moved(value: Any, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Tensors, also those in lists and dictionaries, elsewhere; floating-point ones as dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device, dtype) for item in value)
    return value


def value_and_gradient(
    kl: Callable[..., Tensor], given: Arguments, weights: Tensor
) -> tuple[Tensor, Tensor]:
    x_0, x_t, out, rows = given
    out = out.detach().requires_grad_()
    nats = kl(x_0, x_t, out, rows)
    return nats.detach(), torch.autograd.grad(nats @ weights.to(nats), out)[0]


def check_kl(given: Arguments, backend: Backend) -> None:
    """Value and gradient of a backend against the reference in float64, to relative digits."""
    weights = torch.linspace(0.5, 2, len(given[0]), dtype=torch.float64)
    expected, expected_gradient = value_and_gradient(
        reference.bernoulli_kl, moved(given, dtype=torch.float64), weights
    )
    with backend.use():
        nats, gradient = value_and_gradient(ops.bernoulli_kl, moved(given, backend.device), weights)
    assert nats.dtype == torch.float64
    assert gradient.dtype == given[2].dtype
    assert gradient.shape == given[2].shape
    # An exponent of magnitude z is rounded to z eps, which is the relative error of its power.
    num_operations = 64 + int(given[2].abs().max()) if given[2].numel() else 0
    tolerance = rounding(
        torch.float64 if given[0].dtype == torch.float64 else torch.float32, 1, num_operations
    )
    assert bool(((nats.cpu() - expected).abs() <= tolerance * expected).all())
    error = (gradient.cpu().double() - expected_gradient).abs()
    # The gradient and its product with a weight are rounded; Triton's interpreter truncates.
    tolerance += 2 * torch.finfo(gradient.dtype).eps
    # float16 is coarse below its smallest normal number.
    assert bool((error <= tolerance * expected_gradient.abs() + _tiny(gradient.dtype)).all())


def _tiny(dtype: torch.dtype) -> float:
    return 2.0**-24 if dtype == torch.float16 else 1e-36


def check_step(given: Arguments, backend: Backend, which: str) -> None:
    """The bits of a step and its in-place twin: the reference's in float64, except where u is
    next to the rate."""
    _, x_t, out, rows = given
    ids, t = counters(len(x_t))
    options = factors(which, x_t)
    exact = moved([x_t, out, rows], dtype=torch.float64)
    options_64 = moved(options, dtype=torch.float64)
    expected = reference.bernoulli_step(*exact, SEED, ids, t, **options_64)
    call = moved([x_t, out, rows, SEED, ids, t], backend.device)
    with backend.use():
        x_prev = ops.bernoulli_step(*call, **moved(options, backend.device))
        assert x_prev.dtype == x_t.dtype
        x = call[0].clone(memory_format=torch.contiguous_format)
        assert ops.bernoulli_step_(x, *call[1:], **moved(options, backend.device)) is x
    assert torch.equal(x, x_prev)
    differs = x_prev.cpu().double() != expected
    if not differs.any():
        return
    logit = reference.bernoulli_logit(*exact)
    if "observed" in options:
        logit = reference.bernoulli_observe(logit, *options_64["observed"]) + options_64["drift"]
    u = noise.uniform(SEED, noise.Stream.REVERSE, ids, t, x_t.shape[1:], torch.float64)
    close = (u - torch.sigmoid(logit)).abs() < rounding(torch.float32, 1, 64)
    assert bool((close | ~differs).all())
    assert differs.double().mean() < 1e-3


def check_noise(given: Arguments, backend: Backend) -> None:
    """The very bits of the reference: both compare the same floats."""
    x_0 = given[0]
    ids, t = counters(len(x_0))
    call = [x_0, PROCESS.noise_rows(t, x_0), SEED, ids, t]
    expected = reference.bernoulli_noise(*call)
    with backend.use():
        x_t = ops.bernoulli_noise(*moved(call, backend.device))
    assert x_t.dtype == x_0.dtype
    assert torch.equal(x_t.cpu(), expected)


def check(given: Arguments, backend: Backend, which: str = "all") -> None:
    check_kl(given, backend)
    check_step(given, backend, which)
    check_noise(given, backend)


# The reference.


@pytest.mark.parametrize("m", [1e-12, 1e-7, 1e-3, 0.2, 0.5])
def test_divergence_keeps_its_digits_near_equality(m: float) -> None:
    m_64 = torch.tensor(m, dtype=torch.float64)
    for e in (1e-15, 1e-9, 1e-5, 1e-3):
        found = reference.bernoulli_divergence(m_64, torch.tensor([e, -e], dtype=torch.float64))
        # The first cumulants of a bit: variance, skewness, kurtosis.
        variance = m * (1 - m)
        third, fourth = variance * (1 - 2 * m), variance * (1 - 6 * variance)
        series = [variance * e**2 / 2 + s * third * e**3 / 6 + fourth * e**4 / 24 for s in (1, -1)]
        expected = torch.tensor(series, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=max(1e-14, 10 * e**3), atol=0)


def test_divergence_far_from_equality() -> None:
    m, e = torch.tensor(0.25, dtype=torch.float64), torch.tensor([-3.0, 3.0], dtype=torch.float64)
    p = torch.sigmoid(e + torch.logit(m))
    expected = m * (m / p).log() + (1 - m) * ((1 - m) / (1 - p)).log()
    torch.testing.assert_close(reference.bernoulli_divergence(m, e), expected, rtol=1e-14, atol=0)
    far = reference.bernoulli_divergence(m, e / 3 * 1e6)
    torch.testing.assert_close(far, far.new_tensor([0.25e6, 0.75e6]), rtol=1e-5, atol=0)
    assert reference.bernoulli_divergence(m, e * math.inf).tolist() == [math.inf, math.inf]


def test_nan_gives_nan_and_no_plausible_bit() -> None:
    x_0, nan = torch.tensor([[0.0, 1.0, torch.nan]]), torch.nan
    ids = t = torch.ones(1, dtype=torch.int64)
    rates = torch.tensor([[0.2, 0.7]])
    assert reference.bernoulli_noise(x_0, rates, 0, ids, t).isnan().tolist() == [
        [False, False, True]
    ]
    rates = torch.tensor([[0.2, nan]])
    assert reference.bernoulli_noise(x_0, rates, 0, ids, t).isnan().tolist() == [
        [False, True, True]
    ]
    rows = PROCESS.reverse().rows(t, x_0)
    for deterministic in (False, True):
        x = reference.bernoulli_step(
            torch.zeros(1, 2), torch.tensor([[0.3, nan]]), rows, 0, ids, t,
            deterministic=deterministic,
        )  # fmt: skip
        assert x.isnan().tolist() == [[False, True]]


def test_a_certain_bit_of_noise_stays_and_a_rate_of_one_half_decides_alike() -> None:
    x_0 = bits(0, (1000,), 2).float()
    rows, ids, t = (
        torch.tensor([[0.0, 1.0], [0.5, 0.5]]),
        torch.tensor([4, 4]),
        torch.tensor([3, 3]),
    )
    x_t = reference.bernoulli_noise(x_0, rows, 1, ids, t)
    assert torch.equal(x_t[0], x_0[0])
    u = noise.uniform(1, noise.Stream.FORWARD, ids, t, (1000,))
    assert torch.equal(x_t[1], (u[1] <= 0.5).float())


def test_an_observed_bit_multiplies_the_odds() -> None:
    rate, flip, half = torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64)
    y = torch.tensor([1.0, 0.0])
    found = torch.sigmoid(reference.bernoulli_observe(torch.logit(rate), y, flip))
    expected = [0.3 * 0.9 / (0.3 * 0.9 + 0.7 * 0.1), 0.3 * 0.1 / (0.3 * 0.1 + 0.7 * 0.9)]
    torch.testing.assert_close(found, found.new_tensor(expected), rtol=1e-14, atol=0)
    unchanged = reference.bernoulli_observe(torch.logit(rate), y, half)
    torch.testing.assert_close(unchanged, torch.logit(rate).expand(2), rtol=1e-15, atol=0)


# Every backend.


@pytest.mark.parametrize("which", FACTORS)
@pytest.mark.parametrize("name", NAMES)
@each_backend
def test_bits_and_nats(backend, name, which) -> None:
    check(arguments(name=name), backend, which)


@pytest.mark.parametrize("scale", [0.01, 10.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
@each_backend_in_time
def test_outputs_of_every_size(backend, name, scale) -> None:
    given = arguments((400,), name, scale=scale)
    given[2] = given[2].clamp(-100, 100)
    check(given, backend)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6])
@each_backend
def test_nats_of_a_network_that_is_nearly_right(backend, distance) -> None:
    """Terms of 1e-13 nats and less, which a difference of code lengths would not resolve."""
    x_0, x_t, out, _ = arguments((200,), t=(2, 10, 25, 40, NUM_STEPS))
    reverse, t = PROCESS.reverse("perturbation"), torch.tensor((2, 10, 25, 40, NUM_STEPS))
    rows = reverse.rows(t, x_0)
    row = reference.bernoulli_row(rows, 2)
    # e = d + b out = distance
    d = torch.where(x_0 > 0.5, torch.where(x_t > 0.5, row.d_11, row.d_10),
                    torch.where(x_t > 0.5, row.d_01, row.d_00))  # fmt: skip
    b = torch.where(x_0 > 0.5, torch.where(x_t > 0.5, row.b_11, row.b_10),
                    torch.where(x_t > 0.5, row.b_01, row.b_00))  # fmt: skip
    given = [x_0, x_t, b * (distance * out - d), rows]
    assert reference.bernoulli_kl(*moved(given, dtype=torch.float64)).max() < 200 * distance**2
    check_kl(given, backend)


@pytest.mark.parametrize("rho", [1e-12, 1 - 1e-12])
@pytest.mark.parametrize("name", NAMES)
@each_backend
def test_rates_next_to_certainty(backend, name, rho) -> None:
    x_0, x_t, out, _ = arguments((60,))
    rows = BinomialDiffusion(NUM_STEPS, rho).reverse(name).rows(torch.tensor(T), x_0)
    assert rows.isfinite().all()
    check_kl([x_0, x_t, out, rows], backend)


@storage_types
@each_backend
def test_storage_types(backend, dtype, out_dtype) -> None:
    if dtype in backend.dtypes:
        check(arguments((2, 4, 6), "x0", dtype=dtype, out_dtype=out_dtype), backend)


# One element, a vector, less and more than 16 lanes, one piece and a bit of a CPU or GPU kernel.
EVENTS = [(1,), (2,), (17,), (1, 1, 1), (2, 3), (1, 28, 28), (3, 5, 2, 4), (1, 16390)]


@pytest.mark.parametrize("event", EVENTS, ids=str)
@each_backend
def test_shapes(backend, event) -> None:
    check(arguments(event, t=(1, 2)), backend)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("event", "n"), MANY_SMALL)
@each_backend_in_time
def test_many_small_events(backend, event, n, name) -> None:
    check(arguments(event, name, t=steps(n)), backend)


@each_backend
def test_rows_of_different_parameterizations_in_one_batch(backend) -> None:
    """A tile of several examples may hold rows of logits of x_0 and of x_{t-1}."""
    x_0, x_t, out, rows = arguments((6,), "x0", t=steps(40))
    rows[::3] = arguments((6,), "rate", t=steps(40))[3][::3]
    check([x_0, x_t, out, rows], backend)


@pytest.mark.parametrize("which", ["outputs", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_layouts(backend, layout, which) -> None:
    change = LAYOUTS[layout]
    x_0, x_t, out, rows = arguments((3, 7, 6))
    out = change(out)
    if which == "all":
        x_0, x_t = change(x_0), change(x_t)
    check([x_0, x_t, out, rows], backend)


@pytest.mark.parametrize("layout", ["channel half", "channels last", "every other example"])
@each_backend
def test_a_step_in_place_fills_the_layout_it_is_given(backend, layout) -> None:
    _, x_t, out, rows = moved(arguments((3, 7, 6)), backend.device)
    x = LAYOUTS[layout](x_t)
    ids, t = moved([IDS, torch.tensor(T)], backend.device)
    with backend.use():
        expected = ops.bernoulli_step(x_t, out, rows, 1, ids, t)
        assert ops.bernoulli_step_(x, out, rows, 1, ids, t) is x
    assert torch.equal(x, expected)


@each_backend
def test_no_examples(backend) -> None:
    x_0, x_t, out, rows = (x[:0].to(backend.device) for x in arguments())
    none = IDS[:0].to(backend.device)
    with backend.use():
        leaf = out.detach().requires_grad_()
        nats = ops.bernoulli_kl(x_0, x_t, leaf, rows)
        nats.sum().backward()  # whose gradient has a stride of 0
        assert ops.bernoulli_noise(x_0, rows[:, :2], 0, none, none).shape == x_0.shape
        assert ops.bernoulli_step(x_t, out, rows, 0, none, none).shape == x_t.shape
        assert ops.bernoulli_step_(x_t, out, rows, 0, none, none) is x_t
    assert nats.shape == (0,)
    assert leaf.grad is not None and leaf.grad.shape == out.shape


@pytest.mark.parametrize(("event", "n"), SPLIT)
@each_backend
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads(backend, event, n) -> None:
    x_0, x_t, out, rows = moved(arguments(event, "x0", t=steps(n)), backend.device)
    ids, t = moved(counters(n), backend.device)

    def run(part: slice) -> tuple[Tensor, ...]:
        x, z, row = x_t[part], out[part], rows[part]
        source = (9, ids[part], t[part])
        nats, gradient = torch.ops.dpm_fast._bernoulli_kl_with_grad(x_0[part], x, z, row)
        noised = ops.bernoulli_noise(x_0[part], row[:, 16:18].contiguous(), *source)
        return nats, gradient, ops.bernoulli_step(x, z, row, *source), noised

    with backend.use():
        assert_bits_are_those_of_any_run(run, n)


@each_backend
def test_not_a_number_is_seen(backend) -> None:
    x_0, x_t, out, rows = arguments((20,))
    out[1, 3] = math.nan
    with backend.use():
        nats, gradient = value_and_gradient(
            ops.bernoulli_kl,
            moved([x_0, x_t, out, rows], backend.device),
            torch.ones(5, dtype=torch.float64),
        )
    assert nats.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(gradient.isnan().cpu(), out.isnan())


@needs_host_runner
@pytest.mark.parametrize("order", build.ORDERS)
def test_no_order_of_blocks_or_threads_matters(order) -> None:
    with running_in(order) as backend:
        check(arguments((1, 28, 28)), backend)
        check(arguments((20,), t=steps(70)), backend)
        check(arguments((2, 8200), t=(1, 2)), backend)


@pytest.mark.parametrize("deterministic", [False, True])
@each_backend
def test_a_step_with_an_output_that_is_not_a_number_is_not_one(backend, deterministic) -> None:
    _, x_t, out, rows = arguments((20,))
    out[1, 3] = math.nan
    call = moved([x_t, out, rows, SEED, IDS, torch.tensor(T)], backend.device)
    with backend.use():
        x_prev = ops.bernoulli_step(*call, deterministic=deterministic)
    assert torch.equal(x_prev.isnan().cpu(), out.isnan())


@needs_host_runner
def test_on_a_gpu_values_that_nobody_has_checked_give_nan(monkeypatch) -> None:
    x_0, x_t, out, rows = arguments((9,))
    t = torch.tensor([1, -1, 25, 2**24, 1])
    library = torch.ops.dpm_fast
    noise_rows = PROCESS.noise_rows(torch.tensor(T), x_0)
    with running_in("forward") as backend, backend.use():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # values are not read
        x = library.bernoulli_noise(x_0, noise_rows, 1, IDS, t)
        none = (None,) * 5
        t[4] = 0  # of noise alone
        steps = [library.bernoulli_step(x_t, out, rows, 1, IDS, t, *none, flag) for flag in (0, 1)]
        flip = torch.full_like(x_t, 1.5)
        seen = (None, None, x_t, flip, None, False)
        certain = library.bernoulli_step(x_t, out, rows, 1, IDS, torch.tensor(T), *seen)
    for found, at_zero in ((x, False), *((step, True) for step in steps)):
        assert found.isnan().all(1).tolist() == [False, True, False, True, at_zero]
    assert certain.isnan().all()


@each_backend
def test_arguments_may_share_the_memory_that_is_written(backend) -> None:
    _, x_t, out, rows = moved(arguments((2, 3)), backend.device)
    counters = (SEED, IDS.to(backend.device), torch.tensor(T, device=backend.device))
    both = torch.cat((x_t, out), dim=1)
    x_t = both[:, :2]
    given = {"logit_out": both[:, 2:], "rows": rows, "drift": None}
    with backend.use():
        for changed in ({"logit_out": x_t}, {"logit_out": both[:, 1:3]}, {"drift": x_t}):
            logit_out, rows, drift = (given | changed).values()
            before = both.clone()
            expected = ops.bernoulli_step(x_t, logit_out, rows, *counters, drift=drift)
            ops.bernoulli_step_(x_t, logit_out, rows, *counters, drift=drift)
            assert torch.equal(x_t, expected)
            both.copy_(before)
        apart = torch.zeros(len(x_t), 2, 6, 7, 3, device=backend.device)[:, :, ::2, ::3]
        apart.copy_(moved(bits(1, (2, 3, 3, 3), len(x_t)), backend.device, torch.float32))
        out = torch.ones_like(apart)
        expected = ops.bernoulli_step(apart, out, rows, *counters)
        assert torch.equal(ops.bernoulli_step_(apart, out, rows, *counters), expected)


# The contract.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS], ids=str)
def test_gradcheck(backend, name) -> None:
    x_0, x_t, out, rows = arguments((2, 5, 1), name, dtype=torch.float64)
    with dpm_fast.use_backend("reference") if backend is None else backend.use():
        assert torch.autograd.gradcheck(
            lambda z: ops.bernoulli_kl(x_0, x_t, z, rows), out.requires_grad_()
        )


def test_opcheck() -> None:
    x_0, x_t, out, rows = arguments((2, 3, 4))
    t, library = torch.tensor(T), torch.ops.dpm_fast
    source = (-3, IDS, t)
    everything = factors("shared", x_t)
    given = (*everything["known"], *everything["observed"], everything["drift"], False)
    for requires_grad in (False, True):
        z = out.clone().requires_grad_(requires_grad)
        torch.library.opcheck(library.bernoulli_kl, (x_0, x_t, z, rows))
        torch.library.opcheck(library.bernoulli_step, (x_t, z, rows, *source, *given))
    torch.library.opcheck(library._bernoulli_kl_with_grad, (x_0, x_t, out, rows))
    torch.library.opcheck(library.bernoulli_step_, (x_t, out, rows, *source, *given))
    torch.library.opcheck(library.bernoulli_noise, (x_0, PROCESS.noise_rows(t, x_0), *source))


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_compiles_whole(name) -> None:
    x_0, x_t, out, rows = arguments((2, 3, 4))
    t = torch.tensor(T)
    noise_rows = PROCESS.noise_rows(t, x_0)
    options = factors("all", x_t)

    def all_ops(z: Tensor) -> tuple[Tensor, ...]:
        nats = ops.bernoulli_kl(x_0, x_t, z, rows)
        if name == "reference":
            return (nats,)  # compiling Philox in plain PyTorch takes long
        return (
            nats,
            ops.bernoulli_noise(x_0, noise_rows, 5, IDS, t),
            ops.bernoulli_step(x_t, z.detach(), rows, 5, IDS, t, **options),
            ops.bernoulli_step_(x_t.clone(), z.detach(), rows, 5, IDS, t),
        )

    with dpm_fast.use_backend(name):
        z = out.clone().requires_grad_()
        expected = [*all_ops(z)]
        expected += torch.autograd.grad(expected[0].sum(), z)
        torch._dynamo.reset()
        found = [*torch.compile(all_ops, fullgraph=True, backend="aot_eager")(z)]
        found += torch.autograd.grad(found[0].sum(), z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_second_derivatives() -> None:
    x_0, x_t, out, rows = arguments()

    def hessian() -> torch.Tensor:
        def cost(out: torch.Tensor) -> torch.Tensor:
            return ops.bernoulli_kl(x_0, x_t, out, rows).sum()

        return torch.autograd.functional.hessian(cost, out)

    found = hessian()
    with dpm_fast.use_backend("reference"):
        torch.testing.assert_close(found, hessian(), rtol=1e-6, atol=1e-7)
    assert found.abs().max() > 0


def test_bits_have_no_gradient() -> None:
    x_0, x_t, out, rows = arguments()
    out.requires_grad_()
    assert not ops.bernoulli_step(x_t, out, rows, 0, IDS, torch.tensor(T)).requires_grad
    noise_rows = rows[:, :2].clone().requires_grad_()
    assert not ops.bernoulli_noise(x_0, noise_rows, 0, IDS, torch.tensor(T)).requires_grad


X = torch.zeros(5, 2, 3)
HALF = torch.full((5, 2, 3), 0.5)


def _kl(**changed: Any) -> Tensor:
    call = dict(zip(("x_0", "x_t", "logit_out", "rows"), arguments((2, 3)), strict=True))
    return ops.bernoulli_kl(**call | changed)


def _noise(**changed: Any) -> Tensor:
    call = {"x_0": X, "rows": torch.full((5, 2), 0.5), "seed": 1, "example_ids": IDS}
    return ops.bernoulli_noise(**call | {"t": torch.tensor(T)} | changed)


def _step(op: Callable[..., Tensor] = ops.bernoulli_step, **changed: Any) -> Tensor:
    _, x_t, out, rows = arguments((2, 3))
    call = {"x_t": x_t, "logit_out": out, "rows": rows, "seed": 1, "example_ids": IDS}
    return op(**call | {"t": torch.tensor(T)} | changed)


def _step_(**changed: Any) -> Tensor:
    return _step(ops.bernoulli_step_, **changed)


@each_backend
def test_factors_that_all_examples_share(backend: Backend) -> None:
    one = noise.uniform(3, noise.Stream.DATA, torch.arange(1), 0, (2, 3))
    shared = {"known": (one > 0.7, one.round()), "observed": ((one > 0.4) * 1.0, 0.2)}
    shared["drift"] = one - 0.5
    flip = torch.full((1, 2, 3), 0.2)
    of_each = {
        "known": [x.expand(5, 2, 3).clone() for x in shared["known"]],
        "observed": (shared["observed"][0].expand(5, 2, 3), flip.double().expand(5, 2, 3)),
        "drift": shared["drift"].expand(5, 2, 3).clone(),
    }
    arguments_ = _step(dict, **shared), _step(dict, **of_each)
    with backend.use(), torch.no_grad():
        found, expected = (
            ops.bernoulli_step(**{k: _to(v, backend.device) for k, v in a.items()})
            for a in arguments_
        )
    assert torch.equal(found, expected)


def _to(value: Any, device: str) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_to(x, device) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value


MASK = X.bool()
BAD: list[tuple[Callable[..., Tensor], dict[str, Any], type[Exception], str]] = [
    (_kl, {"x_0": [1.0]}, TypeError, "x_0 must be a tensor, got list"),
    (_kl, {"x_0": X.long()}, TypeError, "x_0 must have dtype float32, .*, got torch.int64"),
    (_kl, {"x_0": torch.zeros(5)}, ValueError, r"x_0 must have shape \(N, \*event\), got \(5,\)"),
    (_kl, {"x_t": X[:4]}, ValueError, r"x_t must have shape \(5, 2, 3\) like x_0, got"),
    (_kl, {"x_t": X.half()}, TypeError, "x_t must have dtype torch.float32 like x_0, got"),
    (_kl, {"x_t": X.to("meta")}, ValueError, "x_t must be on cpu like x_0, got meta"),
    (_kl, {"logit_out": X.double()}, TypeError, "logit_out must have dtype .*, bfloat16 or"),
    (_kl, {"rows": torch.zeros(5, 19)}, ValueError, r"rows must have shape \(5, 20\), got"),
    (_kl, {"rows": torch.zeros(5, 20).double()}, TypeError, "rows must have dtype torch.float32"),
    (_kl, {"rows": torch.zeros(5, 20).requires_grad_()}, ValueError, "rows must not require a"),
    (_noise, {"x_0": None}, TypeError, "x_0 must be a tensor, got NoneType"),
    (_noise, {"rows": torch.zeros(5, 3)}, ValueError, r"rows must have shape \(5, 2\), got"),
    (_noise, {"seed": 1.0}, TypeError, "seed must be an integer, got float"),
    (
        _noise,
        {"seed": 2**64},
        ValueError,
        "seed must be a 64-bit integer, got 18446744073709551616",
    ),
    (_noise, {"example_ids": [1]}, TypeError, "example_ids must be a tensor, got list"),
    (_noise, {"example_ids": IDS.int()}, TypeError, "example_ids must have dtype torch.int64, got"),
    (_noise, {"example_ids": IDS[:4]}, ValueError, r"example_ids must have shape \(5,\), got \(4,"),
    (_noise, {"t": IDS.to("meta")}, ValueError, "t must be on cpu, got meta"),
    (_noise, {"t": torch.tensor(T) - 2}, ValueError, r"t must be in 0..2\*\*24 - 1, got -1"),
    (_noise, {"t": IDS}, ValueError, r"t must be in 0..2\*\*24 - 1, got 1099511627776"),
    (_step, {"logit_out": X[:, :1]}, ValueError, "logit_out must have shape .* got"),
    (_step, {"known": MASK}, TypeError, r"known must be a pair \(mask, values\), got Tensor"),
    (_step, {"known": (X, X)}, TypeError, "known mask must have dtype torch.bool, got"),
    (_step, {"known": (MASK, X.double())}, TypeError, "known values must have dtype torch.float32"),
    (_step, {"known": (MASK[:2], X)}, ValueError, r"known mask must have shape \(5, 2, 3\) or"),
    (_step, {"observed": (X, None)}, TypeError, "observed flip must be a tensor, got NoneType"),
    (_step, {"observed": (X, X)}, ValueError, r"observed flip must be in \(0, 1/2\], got 0 to 0"),
    (_step, {"observed": (X, X + math.nan)}, ValueError, r"observed flip must be in .* got nan"),
    (_step, {"known": (MASK,)}, ValueError, r"known must be a pair \(mask, values\), got 1 items"),
    (_step, {"observed": X}, TypeError, r"observed must be a pair \(y, flip\), got Tensor"),
    (_step, {"observed": (X, 0.6)}, ValueError, r"observed flip must be in .* got 0.6$"),
    (_step, {"drift": X[:2]}, ValueError, r"drift must have shape \(5, 2, 3\) or \(1, 2, 3\), got"),
    (_step, {"seed": True}, TypeError, "seed must be an integer, got bool"),
    (_step, {"t": 1.0}, TypeError, "t must be an integer or a tensor, got float"),
    (_step_, {"x_t": X.clone().requires_grad_()}, ValueError, "x_t must not require a gradient"),
    (_step_, {"x_t": X[:1].expand(5, 2, 3)}, ValueError, "x_t must have an address for each"),
]


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_one_timestep_for_all(name) -> None:
    with dpm_fast.use_backend(name):
        for call, first in ((_noise, 0), (_step, 1), (_step_, 1)):
            assert torch.equal(call(t=7), call(t=torch.full((5,), 7)))
            with pytest.raises(ValueError, match=rf"t must be in {first}..2\*\*24 - 1, got -1"):
                call(t=-1)
        for t in (0, torch.tensor(T) - 1):
            with pytest.raises(ValueError, match=r"t must be in 1..2\*\*24 - 1, got 0"):
                _step(t=t, deterministic=True)


@pytest.mark.skipif(dispatch.why_absent("native", "cpu") is not None, reason="needs kernels")
def test_a_seed_may_be_a_symbol() -> None:
    def work(seed: int) -> Tensor:
        return torch.cat((_noise(seed=seed), _step(seed=seed)))

    expected = [work(seed) for seed in (3, 4, 5)]
    torch._dynamo.reset()
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager", dynamic=True)
    assert all(torch.equal(compiled(s), x) for s, x in zip((3, 4, 5), expected, strict=True))


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(
    ("call", "bad", "error", "message"), BAD, ids=[message for *_, message in BAD]
)
def test_refuses(name, call, bad, error, message) -> None:
    with dpm_fast.use_backend(name), pytest.raises(error, match=message):
        call(**bad)


_SHAPES = st.lists(st.integers(0, 3), min_size=0, max_size=4).map(tuple)
_TENSORS = st.one_of(
    st.builds(
        torch.zeros,
        _SHAPES,
        dtype=st.sampled_from([*DTYPES, torch.int64, torch.int32, torch.bool]),
    ),
    st.sampled_from([None, 0.0, 3, "x_0", X, HALF, IDS, torch.ones(5, 20), torch.ones(5, 2)]),
    st.sampled_from([(MASK, X), (X, HALF), (MASK[:1], X[:1]), (X[:1], HALF), (X, X), (None, X)]),
)
_FUZZED = [
    (_kl, ("x_0", "x_t", "logit_out", "rows")),
    (_noise, ("x_0", "rows", "seed", "example_ids", "t")),
    (_step, ("x_t", "logit_out", "rows", "seed", "example_ids", "t", "known", "observed", "drift")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "names"), _FUZZED, ids=["kl", "noise", "step"])
@given(data=st.data())
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_malformed_calls_are_refused_or_right(call, names, data) -> None:
    changed = {
        data.draw(st.sampled_from(names)): data.draw(_TENSORS)
        for _ in range(data.draw(st.integers(1, 2)))
    }
    try:
        found = call(**changed)
    except (TypeError, ValueError):
        return
    with dpm_fast.use_backend("reference"):
        expected = call(**changed)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4, equal_nan=True)
