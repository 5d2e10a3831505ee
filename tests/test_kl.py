"""The op `kl`: its reference, every backend against the reference in float64, its contract."""

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
from dpm_fast import noise, ops, reference
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.ops.common import DTYPES
from dpm_fast.reference import Bins, ReverseRow
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

NUM_STEPS = 50
T = (1, 2, 25, NUM_STEPS, 1)
GREY = Bins(1 / 255, -1.0, 1.0)
EDGES: list[tuple[str, Bins | None]] = [
    ("decoder", None),
    ("discretized", GREY),
    ("discretized_tanh", GREY),
]
# Fixed, exponential and sigmoid variances; a mean with and without a part that the variance scales.
KERNELS = [
    ("perturbation", None, None),
    ("decay", None, None),
    ("epsilon", "learned_range", (-1.0, 1.0)),
    ("x0", "fixed_small", None),
    ("previous", "learned", None),
]
PROCESS = GaussianDiffusion.from_schedule("erase", NUM_STEPS)

Arguments = list[Tensor | None]  # x_0, x_t, mu_out, sigma2_out, rows


def arguments(
    event: tuple[int, ...] = (3, 7, 5),
    kernel: tuple[str, str | None, tuple[float, float] | None] = KERNELS[0],
    *,
    t: tuple[int, ...] = T,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Arguments:
    """Grey levels, what the forward process makes of them, and what a network might say."""
    ids, steps = torch.arange(len(t)), torch.tensor(t)
    u = noise.uniform(0, noise.Stream.DATA, ids, 0, event, torch.float64)
    x_0 = ((255 * u).round() * (2 / 255) - 1).to(dtype)
    x_t = PROCESS.sample_x_t(x_0.double(), steps, 0, ids).to(dtype)
    reverse = PROCESS.reverse(*kernel)
    out = [
        0.5
        * noise.normal(k, noise.Stream.DATA, ids, 0, event, torch.float64).to(out_dtype or dtype)
        for k in range(1, 1 + reverse.num_outputs)
    ]
    return [x_0, x_t, out[0], out[1] if len(out) > 1 else None, reverse.rows(steps, x_0)]


def as_float64(arguments: Arguments) -> Arguments:
    return [None if x is None else x.detach().cpu().double() for x in arguments]


def to(arguments: Arguments, device: str) -> Arguments:
    return [None if x is None else x.to(device) for x in arguments]


def value_and_gradients(
    kl: Callable[..., Tensor], arguments: Arguments, weights: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """nats, and gradients of their weighted sum."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    nats = kl(*leaves, **options)
    wanted = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(nats @ weights.to(nats), wanted))
    return nats.detach(), [None if x is None else next(found) for x in leaves]


def check(arguments: Arguments, backend: Backend, **options: Any) -> None:
    """Value and all gradients of a backend against the reference in float64."""
    n = len(arguments[0])
    weights = torch.linspace(0.5, 2, n, dtype=torch.float64)
    expected, expected_gradients = value_and_gradients(
        reference.kl, as_float64(arguments), weights, **options
    )
    with backend.use():
        nats, gradients = value_and_gradients(
            ops.kl, to(arguments, backend.device), weights, **options
        )
    assert nats.dtype == torch.float64
    num_dims = math.prod(arguments[0].shape[1:])
    tolerance = rounding(torch.float32, num_dims, 64)
    storage_roundings = 2 if backend.interpreted else 1  # Triton's interpreter truncates bfloat16
    if arguments[0].dtype == torch.float64:
        tolerance = rounding(torch.float64, num_dims, 64)
    if "tanh" in options.get("edge", ""):
        tolerance *= 64  # its gradient is a quotient of differences of numbers near 1
    error = (nats.cpu() - expected).abs()
    allowed = tolerance * magnitude(as_float64(arguments), tolerance, "bins" in options)
    assert bool((error <= allowed).all()), error / allowed
    for x, gradient, wanted in zip(arguments, gradients, expected_gradients, strict=True):
        if x is None:
            continue
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        gradient, wanted = gradient.cpu().double().flatten(1), wanted.flatten(1)
        if wanted.numel() == 0:
            continue
        # Elements are compared on the scale of their example, columns of a row on their own.
        scale = wanted.abs().amax(dim=0 if x is arguments[4] else 1, keepdim=True)
        allowed = (tolerance + storage_roundings * torch.finfo(x.dtype).eps) * scale
        if x is arguments[4]:  # that of g is a difference of nearly equal sums in the reference
            own = rounding(torch.float64, num_dims, 64) * wanted.abs().amax()
            allowed = allowed + own * (torch.arange(15) == ReverseRow._fields.index("g"))
        assert bool(((gradient - wanted).abs() <= allowed + 1e-30).all())


def magnitude(wide: Arguments, tolerance: float, in_bins: bool) -> Tensor:
    """What a relative error ``tolerance`` of each quantity is multiplied with in nats, (N,)."""
    x_0, x_t, mu_out, sigma2_out, rows = wide
    row = reference.reverse_row(rows, x_t.dim())
    _, log_u = reference.reverse_variance(sigma2_out, row)
    log_ratio, log_terms = row.delta_0 + log_u, row.delta_0.abs() + log_u.abs()
    mu_p, sigma2_p = reference.reverse_moments(x_t, mu_out, sigma2_out, rows)
    delta_mu = (row.c_0 * x_0 + (row.d + row.b) * x_t - mu_p).abs()  # d is that of mu_q - b x_t
    terms = (row.c_0 * x_0).abs() + (row.d * x_t).abs()
    terms = terms + row.a.abs() * ((row.p * x_t).abs() + (row.q * mu_out).abs())
    terms = terms + sigma2_p * ((row.c * mu_out).abs() + (row.e * x_t).abs())
    square = delta_mu.square() + 2 * delta_mu * terms + tolerance * terms.square()
    later = reference.expm1_minus_identity(log_ratio) + torch.expm1(log_ratio).abs() * log_terms
    first = math.log(2 * math.pi) + log_terms
    nats = 0.5 * (torch.where(row.is_first > 0, first, later) + square / sigma2_p)
    if in_bins:  # a probability near 1 has digits of 1
        nats = torch.where(row.is_first > 0, nats + 1, nats)
    return nats.expand_as(x_0).flatten(1).sum(dim=1)


# The reference.


def test_equal_gaussians_have_no_divergence_and_a_unit_shift_costs_half_a_nat() -> None:
    row = ReverseRow(
        a=1, b=0, c=0, e=0, p=0, q=1, low=-math.inf, high=math.inf, s=1, base=1, g=0,
        c_0=1, d=0, delta_0=0, is_first=0,
    )  # fmt: skip
    rows = torch.tensor([row], dtype=torch.float64)
    x = torch.tensor([[0.25, -1.0]], dtype=torch.float64)
    zero = torch.zeros_like(x)
    assert reference.kl(x, zero, x, zero, rows).item() == 0
    assert reference.kl(x, zero, x + 1, zero, rows).item() == pytest.approx(1.0, rel=1e-15)
    # N(x, 1) against N(x, e^2): (e^-2 - 1 + 2) / 2 per element
    expected = math.exp(-2) + 1
    assert reference.kl(x, zero, x, zero + 2, rows).item() == pytest.approx(expected, rel=1e-14)


def test_at_the_first_step_it_is_the_code_length_of_a_gaussian() -> None:
    x_0, x_t, mu_out, sigma2_out, rows = arguments(t=(1,), dtype=torch.float64)
    mu_p, sigma2_p = reference.reverse_moments(x_t, mu_out, sigma2_out, rows)
    expected = -torch.distributions.Normal(mu_p, sigma2_p.sqrt()).log_prob(x_0).sum()
    nats = reference.kl(x_0, x_t, mu_out, sigma2_out, rows)
    torch.testing.assert_close(nats[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("g", [0.0, 1e-6, 0.5, 1 - 1e-5, 1.0])
def test_one_formula_is_the_exponential_and_the_sigmoid(g: float) -> None:
    shift = torch.linspace(-40, 40, 801, dtype=torch.float64)[None]
    base = torch.tensor([[g or 0.3]], dtype=torch.float64)
    one = torch.ones_like(base)
    row = ReverseRow(*[one] * 9, base, g * one, *[one] * 4)
    u, log_u = reference.reverse_variance(shift, row)
    if g == 0:
        expected = shift
    elif g == 1:
        expected = torch.zeros_like(shift)
    else:
        logit = math.log(g / (1 - g))
        expected = torch.nn.functional.logsigmoid(shift + logit) - math.log(g)
    torch.testing.assert_close(-log_u, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(1 / u, expected.exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_outputs_beyond_the_limit_give_finite_values_and_gradients(g, dtype) -> None:
    for shift in (-1e30, -60.0, 60.0, 1e30):
        values = torch.tensor([[0.3, -2.0]], dtype=dtype)
        row = [1, 0, 0, 0, 0, 1, -math.inf, math.inf, 1, 1e-3, g, 1, 0.1, 0.2, 0]
        inputs = [values, -values, values + 1, torch.full_like(values, shift)]
        inputs = [x.requires_grad_() for x in (*inputs, torch.tensor([row], dtype=dtype))]
        nats = reference.kl(*inputs)
        gradients = torch.autograd.grad(nats.sum(), inputs)
        assert bool(nats.isfinite().all())
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# Every backend.


@pytest.mark.parametrize(("edge", "bins"), EDGES, ids=[edge for edge, _ in EDGES])
@pytest.mark.parametrize("kernel", KERNELS, ids=[f"{k[0]}-{k[1]}" for k in KERNELS])
@each_backend
def test_value_and_gradients(backend, kernel, edge, bins) -> None:
    check(arguments(kernel=kernel), backend, edge=edge, bins=bins)


@storage_types
@each_backend
def test_storage_types(backend, dtype, out_dtype) -> None:
    if dtype in backend.dtypes:
        check(arguments((2, 4, 6), dtype=dtype, out_dtype=out_dtype), backend)


@each_backend
def test_a_whole_output_has_one_gradient(backend) -> None:
    """Both outputs in one tensor: the same values and gradients as two halves, bit for bit."""
    for event in ((3, 8, 6), (4,)):
        x_0, x_t, mu_out, sigma2_out, rows = to(arguments(event), backend.device)
        out = torch.cat((mu_out, sigma2_out), dim=1).requires_grad_()
        with backend.use():
            nats = ops.kl(x_0, x_t, out, None, rows, joined=True)
            (gradient,) = torch.autograd.grad(nats.sum(), out)
            halves = [x.requires_grad_() for x in (mu_out, sigma2_out)]
            expected = ops.kl(x_0, x_t, *halves, rows)
            gradients = torch.autograd.grad(expected.sum(), halves)
        assert torch.equal(nats, expected)
        assert torch.equal(gradient, torch.cat(gradients, dim=1))


@each_backend
def test_small_and_large_shifts_take_different_ways_to_the_same_bits(backend) -> None:
    """16 lanes of small shifts skip steps that a lane with a large one among them makes."""
    x_0, x_t, mu_out, sigma2_out, rows = arguments((16,), t=(20,))
    sigma2_out = sigma2_out.clamp(-0.5, 0.5)
    mixed = sigma2_out.clone()
    mixed[0, 3] = 1e4
    weights = torch.ones(1, dtype=torch.float64)
    with backend.use():
        found = [
            value_and_gradients(ops.kl, to([x_0, x_t, mu_out, z, rows], backend.device), weights)[1]
            for z in (sigma2_out, mixed)
        ]
    same = torch.arange(16) != 3
    for small, large in zip(found[0][:4], found[1][:4], strict=True):
        assert torch.equal(small.cpu()[:, same], large.cpu()[:, same])


@each_backend
def test_gradients_of_float16_outputs_survive_the_scale_of_a_loss(backend) -> None:
    inputs = to(arguments((2, 4, 6), out_dtype=torch.float16), backend.device)
    for scale in (2.0**-14, 1.0, 2.0**14):
        weights = torch.full((len(T),), scale, dtype=torch.float64)
        wide = [x.double() for x in inputs]
        _, expected = value_and_gradients(reference.kl, wide, weights)
        with backend.use():
            _, found = value_and_gradients(ops.kl, inputs, weights)
        wanted = expected[2].to(torch.float16)
        torch.testing.assert_close(found[2], wanted, rtol=2e-3, atol=6e-8)


# One element, a vector, less and more than 16 lanes, one piece and a bit of a CPU or GPU kernel.
EVENTS = [(1,), (2,), (17,), (1, 1, 1), (2, 3), (1, 28, 28), (3, 5, 2, 4), (1, 16390)]


@pytest.mark.parametrize("event", EVENTS, ids=str)
@each_backend
def test_shapes(backend, event) -> None:
    check(arguments(event, t=(1, 7)), backend)


@pytest.mark.parametrize(("edge", "bins"), EDGES, ids=[edge for edge, _ in EDGES])
@pytest.mark.parametrize(("event", "n"), MANY_SMALL)
@each_backend
def test_many_small_events(backend, event, n, edge, bins) -> None:
    check(arguments(event, t=steps(n)), backend, edge=edge, bins=bins)


@pytest.mark.parametrize("which", ["outputs", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_layouts(backend, layout, which) -> None:
    change = LAYOUTS[layout]
    x_0, x_t, mu_out, sigma2_out, rows = arguments((3, 8, 6))
    mu_out, sigma2_out = change(mu_out), change(sigma2_out)
    if which == "all":
        x_0, x_t = change(x_0), change(x_t)
    check([x_0, x_t, mu_out, sigma2_out, rows], backend)


@each_backend
def test_no_examples(backend) -> None:
    none = [None if x is None else x[:0] for x in arguments()]
    leaves = [x.detach().requires_grad_() for x in to(none, backend.device)]
    with backend.use():
        nats = ops.kl(*leaves)
        nats.sum().backward()  # whose gradient has a stride of 0
    assert nats.shape == (0,)
    assert [x.grad.shape for x in leaves] == [x.shape for x in none]


@pytest.mark.parametrize(("event", "n"), SPLIT)
@each_backend_in_time
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads(backend, event, n) -> None:
    inputs = to(arguments(event, t=steps(n)), backend.device)
    op = torch.ops.dpm_fast._kl_with_grads
    for edge, bins in enumerate((Bins(0.0, 0.0, 0.0), GREY)):
        with backend.use():
            assert_bits_are_those_of_any_run(
                lambda part, edge=edge, bins=bins: op(
                    *(x[part] for x in inputs), edge, *bins, 0b11111
                ),
                n,
            )


@needs_host_runner
@pytest.mark.parametrize("order", build.ORDERS)
def test_no_order_of_blocks_or_threads_matters(order) -> None:
    with running_in(order) as backend:
        check(arguments((1, 28, 28)), backend)
        check(arguments((20,), t=steps(70)), backend)
        check(arguments((2, 8200), t=(1, 9)), backend, edge="discretized", bins=GREY)


# The contract.


S = ReverseRow._fields.index("s")

# [iDDPM]'s probability is a difference of numbers near 1, of which finite differences keep nothing
# where it is small: its gradient is tested where it is not.
GRADCHECKS = [
    pytest.param(kernel, edge, bins, id=f"{kernel[0]}-{kernel[1]}-{edge}")
    for kernel in KERNELS
    for edge, bins in EDGES
    if (edge, kernel[1]) != ("discretized_tanh", "fixed_small")
]


@pytest.mark.parametrize(("kernel", "edge", "bins"), GRADCHECKS)
@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS], ids=str)
def test_gradcheck(backend, kernel, edge, bins) -> None:
    inputs = [
        None if x is None else x.clone().requires_grad_()
        for x in arguments((2, 2, 1), kernel, t=(1, 25), dtype=torch.float64)
    ]
    *tensors, rows = inputs
    columns, is_first = rows.detach()[:, :-1].requires_grad_(), rows.detach()[:, -1:]  # a flag

    def terms(*x: Tensor) -> Tensor:
        columns = x[-1]
        if x[3] is None:  # s must stay 0
            columns = torch.where(torch.arange(columns.shape[1]) == S, 0.0, columns)
        return ops.kl(*x[:-1], torch.cat((columns, is_first), dim=1), edge=edge, bins=bins)

    rtol = 1e-3 if edge == "discretized_tanh" else 1e-5
    with dpm_fast.use_backend("reference") if backend is None else backend.use():
        assert torch.autograd.gradcheck(terms, [*tensors, columns], eps=1e-7, atol=1e-5, rtol=rtol)


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[3]], ids=["learned", "fixed"])
def test_opcheck(kernel) -> None:
    for requires_grad in (False, True):
        inputs = [
            None if x is None else x.clone().requires_grad_(requires_grad)
            for x in arguments((2, 3, 4), kernel)
        ]
        torch.library.opcheck(torch.ops.dpm_fast.kl, (*inputs, 0, 0.0, 0.0, 0.0))
    plain = [None if x is None else x.detach() for x in inputs]
    wanted = 0b11111 if kernel == KERNELS[0] else 0b10111
    torch.library.opcheck(torch.ops.dpm_fast._kl_with_grads, (*plain, 0, 0.0, 0.0, 0.0, wanted))


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_compiles_whole(name) -> None:
    inputs = arguments((2, 3, 4))
    weights = torch.ones(len(T), dtype=torch.float64)
    with dpm_fast.use_backend(name):
        expected = value_and_gradients(ops.kl, inputs, weights)
        torch._dynamo.reset()
        compiled = torch.compile(ops.kl, fullgraph=True, backend="aot_eager")
        found = value_and_gradients(compiled, inputs, weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_second_derivatives() -> None:
    x_0, x_t, mu_out, sigma2_out, rows = arguments()

    def second() -> tuple[torch.Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in (mu_out, sigma2_out, rows)]
        nats = ops.kl(x_0, x_t, *inputs)
        cost = nats.sum() + (inputs[0] ** 3).sum()  # an output used elsewhere too
        first = torch.autograd.grad(cost, inputs, create_graph=True)
        return torch.autograd.grad(sum((g[..., :2] ** 2).sum() for g in first), inputs)

    found = second()
    with dpm_fast.use_backend("reference"):
        torch.testing.assert_close(found, second(), rtol=1e-5, atol=1e-5)
    assert all(bool((g != 0).any()) for g in found)


def _with(**changed: Any) -> dict[str, Any]:
    names = ("x_0", "x_t", "mu_out", "sigma2_out", "rows")
    return dict(zip(names, arguments((2, 3)), strict=True)) | changed


def _binned(bins: Any) -> dict[str, Any]:
    return _with(edge="discretized", bins=bins)


X = torch.zeros(5, 2, 3)
BAD = [
    (_with(x_0=[1.0]), TypeError, "x_0 must be a tensor, got list"),
    (_with(x_0=X.long()), TypeError, "x_0 must have dtype float32, .*, got torch.int64"),
    (_with(x_0=torch.zeros(5)), ValueError, r"x_0 must have shape \(N, \*event\), got \(5,\)"),
    (_with(x_t=None), TypeError, "x_t must be a tensor, got NoneType"),
    (_with(x_t=X[:4]), ValueError, r"x_t must have shape \(5, 2, 3\) like x_0, got \(4, 2, 3\)"),
    (_with(x_t=X.half()), TypeError, "x_t must have dtype torch.float32 like x_0, got .*float16"),
    (_with(x_t=X.to("meta")), ValueError, "x_t must be on cpu like x_0, got meta"),
    (
        _with(mu_out=X.double()),
        TypeError,
        "mu_out must have dtype torch.float32 like x_0, bfloat16",
    ),
    (_with(sigma2_out=X.half()), TypeError, "sigma2_out must have dtype .* like mu_out"),
    (_with(joined=True), ValueError, r"mu_out must have shape \(5, 4, 3\) like x_0"),
    (_with(joined=True, mu_out=X.repeat(1, 2, 1)), ValueError, "sigma2_out must be None where"),
    (_with(mu_out=X.repeat(1, 2, 1)), ValueError, r"mu_out must have shape .* got \(5, 4, 3\)"),
    (_with(sigma2_out=X[:, :1]), ValueError, r"sigma2_out must have shape .* got \(5, 1, 3\)"),
    (_with(rows=torch.zeros(5, 14)), ValueError, r"rows must have shape \(5, 15\), got \(5, 14\)"),
    (_with(rows=torch.ones(5, 15).double()), TypeError, "rows must have dtype torch.float32"),
    (_with(rows=torch.zeros(5, 15)), ValueError, "rows must have a positive base, got 0"),
    (_with(rows=torch.full((5, 15), math.nan)), ValueError, "rows must have a positive base, got"),
    (_with(edge="paper"), ValueError, "edge must be one of decoder, .*, got 'paper'"),
    (_with(edge="discretized"), ValueError, "bins must be given for a discretized edge alone"),
    (_with(bins=GREY), ValueError, "bins must be given for a discretized edge alone, got Bins"),
    (_binned((0.1, -1.0, 1.0)), TypeError, "bins must be a dpm_fast.reference.Bins, got tuple"),
    (_binned(0.1), TypeError, "bins must be a dpm_fast.reference.Bins, got float"),
    (_binned(Bins("1", -1.0, 1.0)), TypeError, "bins.half_width must be a number, got str"),
    (_binned(Bins(0.1, -1.0, None)), TypeError, "bins.highest must be a number, got NoneType"),
    (_binned(Bins(0.0, -1.0, 1.0)), ValueError, "bins.half_width must be positive .*, got 0"),
    (_binned(Bins(-0.1, -1.0, 1.0)), ValueError, "bins.half_width must be positive .*, got -0.1"),
    (_binned(Bins(math.inf, -1.0, 1.0)), ValueError, "bins.half_width must be .*, got inf"),
    (_binned(Bins(math.nan, -1.0, 1.0)), ValueError, "bins.half_width must be .*, got nan"),
    (_binned(Bins(0.1, 1.0, 1.0)), ValueError, "bins.lowest must be below .*, got 1 and 1"),
    (_binned(Bins(0.1, 2.0, 1.0)), ValueError, "bins.lowest must be below .*, got 2 and 1"),
    (_binned(Bins(0.1, -math.inf, 1.0)), ValueError, "bins.lowest must be .*, got -inf and 1"),
    (_binned(Bins(0.1, -1.0, math.nan)), ValueError, "bins.lowest must be .*, got -1 and nan"),
]


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_refuses(name, bad, error, message) -> None:
    with dpm_fast.use_backend(name), pytest.raises(error, match=message):
        ops.kl(**bad)


_SHAPES = st.lists(st.integers(0, 3), min_size=0, max_size=4).map(tuple)
_TENSORS = st.one_of(
    st.builds(torch.zeros, _SHAPES, dtype=st.sampled_from([*DTYPES, torch.int64, torch.bool])),
    st.sampled_from([None, 0.0, "x_0", torch.zeros(5, 2, 3), torch.ones(5, 15)]),
)


@pytest.mark.slow
@given(
    name=st.sampled_from(["x_0", "x_t", "mu_out", "sigma2_out", "rows"]),
    other=st.sampled_from(["x_0", "x_t", "mu_out", "sigma2_out", "rows"]),
    value=_TENSORS,
    other_value=_TENSORS,
    options=st.sampled_from([{}, *({"edge": e, "bins": b} for e, b in EDGES), {"edge": 1}]),
)
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_malformed_calls_are_refused_or_right(name, other, value, other_value, options) -> None:
    call = _with(**{name: value}) | {other: other_value} | options
    try:
        nats = ops.kl(**call)
    except (TypeError, ValueError):
        return
    with dpm_fast.use_backend("reference"):
        expected = ops.kl(**call)
    torch.testing.assert_close(nats, expected, rtol=1e-2, atol=1e-4, equal_nan=True)


@each_backend
def test_a_long_trajectory_keeps_a_millionth_of_a_bit(backend) -> None:
    """The sum over 4000 steps in float32 against float64 on the same noise, bits/dim."""
    num_steps, event, n = 4000, (1, 8, 8), 40
    process = GaussianDiffusion.from_schedule("linear", num_steps)
    # Many steps of one image in one call; a slow backend takes every 100th.
    stride = 1 if backend.device == "cuda" or backend.instruction_set else 100
    t_of_each = torch.arange(num_steps, 0, -stride)
    ids = torch.zeros(n, dtype=torch.int64)
    x_0 = noise.normal(0, noise.Stream.DATA, ids, 0, event) * 0.5
    for kernel in (("perturbation", None, None), ("epsilon", "learned_range", None)):
        reverse = process.reverse(*kernel)
        expected = found = 0.0
        for t in t_of_each.split(n):
            x_t = process.sample_x_t(x_0, t, 1, ids)
            eps = noise.normal(1, noise.Stream.FORWARD, ids, t, event)
            out = [0.9 * eps if kernel[0] == "epsilon" else -0.01 * x_t, 0.1 * eps]
            inputs = [x_0, x_t, *out]
            wide = [x.double() for x in inputs]
            expected += reference.kl(*wide, reverse.rows(t, wide[0])).sum()
            inputs.append(reverse.rows(t, x_0))
            with backend.use():
                found += ops.kl(*to(inputs, backend.device)).sum().cpu()
        assert abs(found - expected) / (64 * math.log(2)) < 1e-6


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
@each_backend
def test_nats_near_equality_keep_their_digits(backend, distance) -> None:
    """Means and variances that nearly agree: 1/2 [exp(delta) - 1 - delta + Delta^2 / sigma2]."""
    row = ReverseRow(
        a=0, b=0, c=0, e=0, p=0, q=1, low=-math.inf, high=math.inf, s=1, base=1, g=0,
        c_0=0, d=0, delta_0=0, is_first=0,
    )  # fmt: skip
    rows = torch.tensor([row])
    zero = torch.zeros(1, 32)
    shift = distance * torch.linspace(-1, 1, 32)[None]
    expected = 0.5 * reference.expm1_minus_identity(-shift.double()).sum()
    with backend.use():
        nats = ops.kl(*to([zero, zero, zero, shift, rows], backend.device)).cpu()
    assert nats.item() == pytest.approx(expected.item(), rel=rounding(torch.float32, 1, 64))
