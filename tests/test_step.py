"""The ops `step` and `step_`: reference, every backend against it in float64, contract."""

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
from dpm_fast.reference import ReverseRow
from host_runner import build
from op_cases import (
    LAYOUTS,
    MANY_SMALL,
    SPLIT,
    assert_bits_are_those_of_any_run,
    steps,
    storage_types,
)
from tolerances import NORMAL_ATOL, rounding

NUM_STEPS = 50
T = (1, 2, 25, NUM_STEPS)
# Fixed, exponential and sigmoid variances; a mean with and without a part that the variance scales.
KERNELS = [
    ("perturbation", None, None),
    ("decay", None, None),
    ("epsilon", "learned_range", (-1.0, 1.0)),
    ("x0", "fixed_small", None),
    ("previous", "learned", None),
]
FIXED = KERNELS[3]
PROCESS = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
SEED = 2**63 + 5
FACTORS = ["none", "known", "observed", "observed by one number", "drift", "all", "all, shared"]

Call = dict[str, Any]


def normal(k: int, n: int, event: tuple[int, ...]) -> Tensor:
    ids = torch.arange(n)
    return noise.normal(k, noise.Stream.DATA, ids, 0, event, torch.float64)


def factors(name: str, n: int, event: tuple[int, ...], dtype: torch.dtype) -> Call:
    """Options of a call, shared by all examples or one for each."""
    n = 1 if "shared" in name else n
    wide = torch.promote_types(dtype, torch.float32)
    sigma2_y = normal(11, n, event).exp()
    sigma2_y[sigma2_y > 2] = math.inf
    y = normal(12, n, event)
    y[sigma2_y.isinf()] = math.nan  # nothing was observed
    found: Call = {}
    if name == "known" or "all" in name:
        found["known"] = normal(13, n, event) > 0.3, normal(14, n, event).to(dtype)
    if name == "observed" or "all" in name:
        found["observed"] = y.to(dtype), sigma2_y.to(wide)
    if name == "observed by one number":
        found["observed"] = normal(12, n, event).to(dtype), 0.3
    if name == "drift" or "all" in name:
        found["drift"] = normal(15, n, event).to(dtype)
    return found


def call(
    event: tuple[int, ...] = (3, 7, 5),
    kernel: tuple[str, str | None, tuple[float, float] | None] = KERNELS[0],
    factor: str = "none",
    *,
    t: tuple[int, ...] = T,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Call:
    """Arguments of `step`."""
    n, steps = len(t), torch.tensor(t)
    reverse = PROCESS.reverse(*kernel)
    x_t = normal(0, n, event).to(dtype)
    out = [0.5 * normal(k, n, event) for k in range(1, 1 + reverse.num_outputs)]
    out = [x.to(out_dtype or dtype) for x in out]
    arguments: Call = {
        "x_t": x_t,
        "mu_out": out[0],
        "sigma2_out": out[1] if len(out) > 1 else None,
        "rows": reverse.rows(steps, x_t),
        "seed": SEED,
        "example_ids": torch.arange(n) * 2**33 + 7,
        "t": steps,
    }
    return arguments | factors(factor, n, event, dtype)


def mapped(arguments: Call, change: Callable[[Tensor], Tensor]) -> Call:
    def one(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(one, x))
        return change(x) if isinstance(x, Tensor) else x

    return {name: one(x) for name, x in arguments.items()}


def as_float64(arguments: Call) -> Call:
    return mapped(arguments, lambda x: x.double() if x.is_floating_point() else x)


def magnitude(wide: Call) -> Tensor:
    """Sum of the magnitudes of what is added up to the mean, per element, float64."""
    row = reference.reverse_row(wide["rows"], wide["x_t"].dim())
    x_t, mu_out = wide["x_t"].abs(), wide["mu_out"].abs()
    sigma2, _ = reference.reverse_variance(wide["sigma2_out"], row)
    total = row.a.abs() * (row.p.abs() * x_t + row.q.abs() * mu_out) + row.b.abs() * x_t
    total = total + sigma2 * (row.c.abs() * mu_out + row.e.abs() * x_t + 1) + sigma2.sqrt()
    if wide.get("observed"):
        total = total + wide["observed"][0].nan_to_num().abs()
    if wide.get("drift") is not None:
        total = total + sigma2 * wide["drift"].abs()
    return total


def check(arguments: Call, backend: Backend) -> Tensor:
    """step and step_ of a backend against the reference in float64; returns x_{t-1}."""
    wide = as_float64(arguments)
    expected = reference.step(**wide)
    there = mapped(arguments, lambda x: x.to(backend.device))
    with backend.use():
        x_prev = ops.step(**there)
        assert torch.equal(there["x_t"].cpu(), arguments["x_t"])
        in_place = there["x_t"].clone()
        returned = ops.step_(**there | {"x_t": in_place})
    assert returned is in_place
    assert torch.equal(returned, x_prev)
    x_t = arguments["x_t"]
    assert (x_prev.dtype, x_prev.shape) == (x_t.dtype, x_t.shape)
    x_prev = x_prev.cpu()
    computed = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    scale = magnitude(wide)
    # A normal may differ by NORMAL_ATOL; Triton's interpreter truncates bfloat16.
    storage_roundings = 2 if backend.interpreted else 1
    allowed = (rounding(computed, 1, 64) + NORMAL_ATOL) * scale
    if computed == torch.float32:
        allowed = allowed + storage_roundings * torch.finfo(x_t.dtype).eps * expected.abs()
    assert bool(((x_prev.double() - expected).abs() <= allowed).all())
    if arguments.get("known"):
        mask, values = (x.expand_as(x_t) for x in arguments["known"])
        assert torch.equal(x_prev[mask], values[mask])
    return x_prev


# The reference.


def test_a_step_without_factors_is_a_sample_of_the_reverse_kernel() -> None:
    arguments = call(dtype=torch.float64)
    x_t, mu_out, sigma2_out, rows, seed, ids, t = arguments.values()
    mu_p, sigma2_p = reference.reverse_moments(x_t, mu_out, sigma2_out, rows)
    eps = noise.normal(seed, noise.Stream.REVERSE, ids, t, x_t.shape[1:], torch.float64)
    assert torch.equal(reference.step(**arguments), mu_p + sigma2_p.sqrt() * eps)
    assert torch.equal(reference.step(**arguments, deterministic=True), mu_p)


def test_an_observation_is_a_product_of_gaussians() -> None:
    def unnormalized(x: Tensor) -> Tensor:
        return -((x - 0.3) ** 2) / (2 * 0.5) - (x - 2.0) ** 2 / (2 * 0.25)

    mu, sigma2 = reference.observe(*torch.tensor([0.3, 0.5, 2.0, 0.25], dtype=torch.float64))
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    gap = torch.distributions.Normal(mu, sigma2.sqrt()).log_prob(x) - unnormalized(x)
    torch.testing.assert_close(gap, gap[0].expand_as(gap), rtol=1e-12, atol=1e-12)


def test_a_sharp_observation_keeps_its_variance() -> None:
    one = torch.ones(1)
    _, sigma2 = reference.observe(one, one, one, 1e-9 * one)
    torch.testing.assert_close(sigma2, 1e-9 * one, rtol=1e-6, atol=0)


def test_factors_act_in_order() -> None:
    arguments = call((4,), FIXED, dtype=torch.float64, t=(9,))
    x = arguments["x_t"]
    mu, sigma2 = reference.reverse_moments(x, arguments["mu_out"], None, arguments["rows"])
    y, drift = x + 1, x - 2
    left = 1 / (1 / sigma2 + 1 / 0.25)
    mean = left * (mu / sigma2 + y / 0.25) + left * drift
    mask = torch.tensor([[True, False, True, False]])
    found = reference.step(
        **arguments, observed=(y, 0.25), drift=drift, known=(mask, y), deterministic=True
    )
    torch.testing.assert_close(found, torch.where(mask, y, mean), rtol=1e-12, atol=1e-12)


# Every backend.


@pytest.mark.parametrize("kernel", KERNELS, ids=[f"{k[0]}-{k[1]}" for k in KERNELS])
@each_backend
def test_parameterizations(backend, kernel) -> None:
    check(call(kernel=kernel), backend)
    check(call(kernel=kernel) | {"deterministic": True}, backend)


@pytest.mark.parametrize("factor", FACTORS)
@each_backend
def test_factors(backend, factor) -> None:
    check(call((2, 4, 6), factor=factor), backend)
    check(call((5,), FIXED, factor), backend)


@pytest.mark.parametrize("factor", ["none", "all"])
@storage_types
@each_backend
def test_storage_types(backend, dtype, out_dtype, factor) -> None:
    if dtype in backend.dtypes:
        check(call((2, 4, 6), factor=factor, dtype=dtype, out_dtype=out_dtype), backend)


# One element, a vector, less and more than 16 lanes, more than the numbers made at once and than a
# piece of a CPU or a block of a GPU.
EVENTS = [(1,), (2,), (17,), (1, 1, 1), (2, 3), (1, 28, 28), (3, 5, 2, 4), (1, 1030), (1, 16390)]


@pytest.mark.parametrize("event", EVENTS, ids=str)
@each_backend
def test_shapes(backend, event) -> None:
    check(call(event, t=(1, 7)), backend)


@pytest.mark.parametrize("factor", ["none", "all"])
@pytest.mark.parametrize(("event", "n"), MANY_SMALL)
@each_backend
def test_many_small_events(backend, event, n, factor) -> None:
    check(call(event, factor=factor, t=steps(n)), backend)


@pytest.mark.parametrize("which", ["outputs", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend_in_time
def test_noise_and_result_do_not_depend_on_the_layout(backend, layout, which) -> None:
    change = LAYOUTS[layout]
    plain = call((3, 8, 70), factor="all, shared")
    changed = mapped(plain, lambda x: change(x) if x.dim() == 4 else x)
    if which == "outputs":
        changed = plain | {name: changed[name] for name in ("mu_out", "sigma2_out")}
    assert torch.equal(check(changed, backend), check(plain, backend))


@each_backend
def test_no_examples(backend) -> None:
    none = mapped(call(), lambda x: x[:0].to(backend.device))
    with backend.use():
        assert ops.step(**none).shape == (0, 3, 7, 5)
        assert ops.step_(**none) is none["x_t"]


@each_backend
def test_ddim_is_a_row_whose_variance_is_zero(backend) -> None:
    arguments = call(kernel=FIXED)
    arguments["rows"][:, ReverseRow._fields.index("base")] = 0
    x_prev = check(arguments, backend)
    assert torch.equal(x_prev, check(arguments | {"deterministic": True}, backend))


@each_backend
def test_outputs_beyond_the_limit_give_finite_samples(backend) -> None:
    # In float32: the limit of float64 is another one.
    arguments = call((3,), KERNELS[2])
    for value in (-1e30, -1e3, 1e3, 1e30):
        arguments["sigma2_out"] = torch.full((len(T), 3), value)
        with backend.use():
            x_prev = ops.step(**mapped(arguments, lambda x: x.to(backend.device))).cpu()
        assert bool(x_prev.isfinite().all())
        torch.testing.assert_close(x_prev, reference.step(**arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("event", "n"), SPLIT)
@each_backend
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads(backend, event, n) -> None:
    arguments = mapped(call(event, t=steps(n)), lambda x: x.to(backend.device))
    with backend.use():
        assert_bits_are_those_of_any_run(
            lambda part: [ops.step(**mapped(arguments, lambda x: x[part]))], n
        )


@each_backend
def test_arguments_may_share_the_memory_that_is_written(backend) -> None:
    arguments = mapped(call((2, 3)), lambda x: x.to(backend.device))
    both = torch.cat((arguments["x_t"], arguments["mu_out"]), dim=1)
    x_t, mu_out = both.chunk(2, dim=1)
    shared = arguments | {"x_t": x_t, "mu_out": mu_out, "drift": x_t.flip(0), "known": None}
    with backend.use():
        for name, x in (("mu_out", x_t), ("sigma2_out", both[:, 1:3]), ("drift", x_t)):
            before = both.clone()
            expected = ops.step(**shared | {name: x})
            assert torch.equal(ops.step_(**shared | {name: x}), expected)
            both.copy_(before)


@needs_host_runner
@pytest.mark.parametrize("order", build.ORDERS)
def test_no_order_of_blocks_or_threads_matters(order) -> None:
    with running_in(order) as backend:
        check(call((1, 28, 28)), backend)
        check(call((20,), factor="all", t=steps(70)), backend)
        check(call((2, 4100), factor="all", t=(1, 9)), backend)


@needs_host_runner
@pytest.mark.parametrize("wrong", ["base", "t", "sigma2_y"])
def test_on_a_gpu_values_that_nobody_has_checked_give_nan(wrong, monkeypatch) -> None:
    arguments = call((8,), t=(1, 2, 3))
    if wrong == "base":
        arguments["rows"][1, ReverseRow._fields.index("base")] = -1e-3
    elif wrong == "t":
        arguments["t"][1] = 0
    else:
        sigma2_y = torch.ones(3, 8)
        sigma2_y[1] = -1
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # values are not read
        arguments["observed"] = arguments["x_t"], sigma2_y
    for deterministic in (False, True):
        if wrong == "sigma2_y" and deterministic:
            continue
        with running_in("forward") as backend, backend.use():
            x_prev = ops.step(**arguments, deterministic=deterministic)
        assert x_prev.isnan().all(dim=1).tolist() == [False, True, False]


@each_backend
def test_outputs_that_are_not_numbers_give_nan(backend) -> None:
    for name in ("mu_out", "sigma2_out"):
        arguments = call((8,), KERNELS[2])
        arguments[name][1, 3] = math.nan
        with backend.use():
            x_prev = ops.step(**mapped(arguments, lambda x: x.to(backend.device))).cpu()
        assert torch.equal(x_prev.isnan(), arguments[name].isnan())


@each_backend
def test_a_vague_observation_keeps_the_variance(backend) -> None:
    plain = call((8,))
    vague = plain | {"observed": (plain["x_t"], torch.full((len(T), 8), 3e38))}
    with backend.use():
        found, expected = (
            ops.step(**mapped(c, lambda x: x.to(backend.device))) for c in (vague, plain)
        )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# The contract.


@pytest.mark.parametrize("factor", ["none", "all, shared"])
@pytest.mark.parametrize("kernel", [KERNELS[0], FIXED], ids=["learned", "fixed"])
def test_opcheck(kernel, factor) -> None:
    c = call((2, 3, 4), kernel, factor)
    mask, values = c.get("known", (None, None))
    y, sigma2_y = c.get("observed", (None, None))
    arguments = (
        *(c[name] for name in ("x_t", "mu_out", "sigma2_out", "rows")), 3, c["example_ids"], c["t"],
        y, sigma2_y, c.get("drift"), mask, values, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dpm_fast.step, arguments)
    torch.library.opcheck(torch.ops.dpm_fast.step_, arguments)


# Philox in plain PyTorch takes long to compile.
@pytest.mark.parametrize(
    ("name", "factor"), [("reference", "all"), ("auto", "none"), ("auto", "all")]
)
def test_compiles_whole(name, factor) -> None:
    arguments = call((2, 3, 4), factor=factor) | {"seed": 5}
    with dpm_fast.use_backend(name):
        expected = ops.step(**arguments)
        torch._dynamo.reset()
        compiled = torch.compile(ops.step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**arguments), expected, rtol=1e-6, atol=1e-6)
        compiled = torch.compile(ops.step_, fullgraph=True, backend="aot_eager")
        x = arguments["x_t"].clone()
        assert compiled(**arguments | {"x_t": x}) is x
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize("op", [ops.step, ops.step_])
def test_a_gradient_is_refused_and_the_reference_has_one(name, op) -> None:
    arguments = call((2, 3), dtype=torch.float64)
    arguments["mu_out"].requires_grad_()
    with dpm_fast.use_backend(name):
        with pytest.raises(RuntimeError, match=r"step has no gradient: .* torch\.no_grad\(\)"):
            op(**arguments)
        with torch.no_grad():
            op(**arguments)

    def of_output(mu_out: Tensor) -> Tensor:
        return reference.step(**arguments | {"mu_out": mu_out})

    assert torch.autograd.gradcheck(of_output, (arguments["mu_out"],))


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
def test_seeds(seed) -> None:
    for backend in CPU_BACKENDS[:1]:
        check(call((5,)) | {"seed": seed}, backend)


def test_one_timestep_for_all_and_ids_of_any_stride() -> None:
    arguments = call((5,), t=(3, 3))
    expected = ops.step(**arguments)
    ids = arguments["example_ids"].repeat_interleave(2)[::2]
    assert torch.equal(ops.step(**arguments | {"t": 3, "example_ids": ids}), expected)


def _with(**changed: Any) -> Call:
    return call((2, 3)) | changed


X = torch.zeros(4, 2, 3)
MASK = X.bool()
BAD_BASE = torch.ones(4, 15)
BAD_BASE[2, ReverseRow._fields.index("base")] = -0.5
BAD = [
    (_with(x_t=[1.0]), TypeError, "x_t must be a tensor, got list"),
    (_with(x_t=X.long()), TypeError, "x_t must have dtype float32, .*, got torch.int64"),
    (_with(x_t=torch.zeros(4)), ValueError, r"x_t must have shape \(N, \*event\), got \(4,\)"),
    (_with(mu_out=X[:3]), ValueError, r"mu_out must have shape \(4, 2, 3\) like x_t, got \(3, 2"),
    (_with(mu_out=X.double()), TypeError, "mu_out must have dtype torch.float32 like x_t, bfloat"),
    (_with(sigma2_out=X.half()), TypeError, "sigma2_out must have dtype .* like mu_out"),
    (_with(rows=torch.zeros(4, 14)), ValueError, r"rows must have shape \(4, 15\), got \(4, 14\)"),
    (_with(rows=BAD_BASE), ValueError, "rows must have a base that is not negative, got -0.5"),
    (
        _with(rows=torch.full((4, 15), math.nan)),
        ValueError,
        "rows must have a base that is not negative, got nan",
    ),
    (_with(seed=1.0), TypeError, "seed must be an integer, got float"),
    (_with(seed=2**64), ValueError, "seed must be a 64-bit integer, got 18446744073709551616"),
    (_with(example_ids=3), TypeError, "example_ids must be a tensor, got int"),
    (_with(example_ids=torch.arange(3)), ValueError, r"example_ids must have shape \(4,\), got "),
    (_with(example_ids=torch.ones(4)), TypeError, "example_ids must have dtype torch.int64, got "),
    (_with(t=0), ValueError, r"t must be in 1..2\*\*24 - 1, got 0"),
    (_with(t=2**24), ValueError, r"t must be in 1..2\*\*24 - 1, got 16777216"),
    (_with(t=torch.tensor([1, 2, -1, 4])), ValueError, r"t must be in 1..2\*\*24 - 1, got -1"),
    (_with(t=torch.ones(4).int()), TypeError, "t must have dtype torch.int64, got torch.int32"),
    (_with(t=2.5), TypeError, "t must be an integer or a tensor, got float"),
    (_with(known=MASK), TypeError, r"known must be a pair \(mask, values\), got Tensor"),
    (_with(known=(MASK,)), ValueError, r"known must be a pair \(mask, values\), got 1 items"),
    (_with(known=(X, X)), TypeError, "known mask must have dtype torch.bool, got torch.float32"),
    (_with(known=(MASK, X.half())), TypeError, "known values must have dtype torch.float32, got"),
    (_with(known=(MASK[:2], X)), ValueError, r"known mask must have shape \(4, 2, 3\) or \(1, 2, "),
    (_with(observed=(X, 0.0)), ValueError, "observed sigma2_y must be positive, got 0"),
    (_with(observed=(X, math.nan)), ValueError, "observed sigma2_y must be positive, got nan"),
    (_with(observed=(X, X)), ValueError, "observed sigma2_y must be positive, got 0"),
    (_with(observed=(X, "1")), TypeError, "observed sigma2_y must be a tensor, got str"),
    (_with(observed=(X[0], 1.0)), ValueError, r"observed y must have shape .*, got \(2, 3\)"),
    (_with(observed=(X, MASK)), TypeError, "observed sigma2_y must have dtype torch.float32, got"),
    (_with(drift=X.to("meta")), ValueError, "drift must be on cpu, got meta"),
]


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_refuses(name, bad, error, message) -> None:
    with dpm_fast.use_backend(name), pytest.raises(error, match=message):
        ops.step(**bad)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_what_is_written_must_have_an_address_for_each_element(name) -> None:
    with (
        dpm_fast.use_backend(name),
        pytest.raises(ValueError, match=r"x_t must have an address for each element, got strides"),
    ):
        ops.step_(**_with(x_t=torch.zeros(1, 2, 3).expand(4, 2, 3)))


def test_what_is_written_must_not_require_a_gradient() -> None:
    x_t = torch.zeros(4, 2, 3, requires_grad=True)
    with torch.no_grad(), pytest.raises(ValueError, match="x_t must not require a gradient"):
        ops.step_(**_with(x_t=x_t))


_NAMES = ["x_t", "mu_out", "sigma2_out", "rows", "seed", "example_ids", "t", "drift"]
_SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)
_TENSORS = st.one_of(
    st.builds(torch.zeros, _SHAPES, dtype=st.sampled_from([*DTYPES, torch.int64, torch.bool])),
    st.sampled_from([None, 0, 0.5, "x", X, X[:1], torch.ones(4, 15), torch.arange(4)]),
)
_PAIRS = st.one_of(st.none(), st.tuples(_TENSORS, _TENSORS), _TENSORS)


@pytest.mark.slow
@given(
    op=st.sampled_from([ops.step, ops.step_]),
    name=st.sampled_from(_NAMES),
    value=_TENSORS,
    other=st.sampled_from(_NAMES),
    other_value=_TENSORS,
    pair=st.sampled_from(["known", "observed"]),
    pair_value=_PAIRS,
)
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_malformed_calls_are_refused_or_right(
    op, name, value, other, other_value, pair, pair_value
) -> None:
    arguments = _with(**{name: value}) | {other: other_value} | {pair: pair_value}
    x_t = arguments["x_t"]
    before = x_t.clone() if isinstance(x_t, Tensor) else x_t
    try:
        x_prev = op(**arguments)
    except (TypeError, ValueError):
        return
    with dpm_fast.use_backend("reference"):
        expected = ops.step(**arguments | {"x_t": before})
    torch.testing.assert_close(x_prev, expected, rtol=1e-2, atol=1e-4, equal_nan=True)
    if op is ops.step_:
        x_t.copy_(before)
