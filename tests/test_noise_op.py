"""The ops `noise`, `normal`, `uniform` and `words` on every backend, against float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dpm_fast
from backends import CPU_BACKENDS, each_backend, each_backend_in_time, needs_host_runner, running_in
from dpm_fast import dispatch, noise, ops, reference
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.noise import Stream
from dpm_fast.ops.common import DTYPES
from host_runner import build
from op_cases import LAYOUTS, MANY_SMALL, SPLIT, assert_bits_are_those_of_any_run
from tolerances import NORMAL_ATOL, rounding

IDS = torch.tensor([0, 1, 2**31, 2**32 + 7, -1, -(2**63), 2**63 - 1])
T = torch.tensor([1, 2, 0, 999, 2**16, 2**24 - 1, 5])
SEED = -(2**61) + 12345
# One element, groups and packs of examples that are not full, blocks of 32, 64 and 128 and their
# tails, two pieces.
EVENTS = [(1,), (2,), (3, 1, 1), (5,), (16,), (17,), (2, 5, 7), (1, 28, 28), (3, 5, 2, 4), (16390,)]


def counters(event: tuple[int, ...], device: str = "cpu", n: int = 0) -> tuple[int, Tensor, Tensor]:
    """Seed, ids and timesteps; few for large events, at which Triton's interpreter is slow."""
    n = n or (2 if math.prod(event) > 10_000 else len(IDS))
    at = torch.arange(-n, 0) % len(IDS)
    return SEED, IDS[at].to(device), T[at].to(device)


def normals_of_words(words: Tensor) -> Tensor:
    """Box-Muller in float64 on words (N, 4 k), the uniforms in float32 as the contract says."""
    u = words.numpy().astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    u = u.astype(np.float64).reshape(len(words), -1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * math.pi * u[..., 1]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return torch.from_numpy(pairs.reshape(words.shape))


def arguments(
    event: tuple[int, ...] = (3, 7, 5),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    n: int = 0,
) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    seed, ids, t = counters(event, device, n)
    n = len(ids)
    x_0 = noise.normal(1, Stream.DATA, torch.arange(n), 0, event, torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    signal = torch.linspace(1, 0.01, n, dtype=torch.float64)
    coefficients = torch.stack((signal, (1 - signal * signal).sqrt()), dim=1)
    return x_0.to(device, dtype), coefficients.to(device, wide), seed, ids, t


def as_float64(x_0: Tensor, coefficients: Tensor, *counters: Any) -> list[Any]:
    moved = [c.cpu() if isinstance(c, Tensor) else c for c in counters]
    return [x_0.detach().cpu().double(), coefficients.detach().cpu().double(), *moved]


def check(backend: Any, x_0: Tensor, *rest: Any) -> None:
    """x_t and both gradients of a backend against the reference in float64."""
    eps_of_storage = torch.finfo(x_0.dtype).eps
    weights = torch.linspace(-1, 2, x_0.numel(), dtype=torch.float64).view(x_0.shape).to(x_0.dtype)
    wide_x_0, wide_coefficients, *counters = as_float64(x_0, *rest)
    wide_x_0.requires_grad_()
    wide_coefficients.requires_grad_()
    expected = reference.noise(wide_x_0, wide_coefficients, *counters)
    wide_weights = weights.double()
    wanted = torch.autograd.grad(expected, (wide_x_0, wide_coefficients), wide_weights)

    x_0 = x_0.detach().requires_grad_()
    coefficients = rest[0].detach().requires_grad_()
    with backend.use():
        x_t = ops.noise(x_0, coefficients, *rest[1:])
        found = torch.autograd.grad(x_t, (x_0, coefficients), weights.to(x_0.device))
        with torch.no_grad():
            assert torch.equal(ops.noise(x_0, coefficients, *rest[1:]), x_t)
    assert (x_t.dtype, x_t.shape) == (x_0.dtype, x_0.shape)
    error = (x_t.detach().cpu().double() - expected).abs()
    assert bool((error <= NORMAL_ATOL + eps_of_storage * expected.abs()).all()), error.max()

    assert [g.dtype for g in found] == [x_0.dtype, coefficients.dtype]
    error = (found[0].cpu().double() - wanted[0]).abs()
    assert bool((error <= eps_of_storage * wanted[0].abs() + 1e-30).all()), error.max()
    eps = noise.normal(*counters[:1], Stream.FORWARD, *counters[1:], x_0.shape[1:], torch.float64)
    magnitudes = [(wide_weights * x).abs().flatten(1).sum(1) for x in (wide_x_0, eps)]
    tolerance = rounding(coefficients.dtype, x_0[0].numel()) * torch.stack(magnitudes, dim=1)
    tolerance[:, 1] += NORMAL_ATOL * wide_weights.abs().flatten(1).sum(1)
    error = (found[1].cpu().double() - wanted[1]).abs()
    assert bool((error <= tolerance).all()), error / tolerance


# Random numbers.


@pytest.mark.parametrize("event", EVENTS, ids=str)
@each_backend
def test_words_and_uniforms_are_equal_and_normals_within_the_contract(backend, event) -> None:
    seed, ids, t = counters(event, backend.device)
    count = math.prod(event)
    with backend.use():
        words = ops.words(seed, Stream.REVERSE, ids, t, count).cpu()
        uniforms = ops.uniform(seed, Stream.REVERSE, ids, t, event).cpu()
        normals = ops.normal(seed, Stream.REVERSE, ids, t, event).cpu()
    at = (seed, Stream.REVERSE, *counters(event)[1:])
    whole = noise.words(*at, -(-count // 4) * 4)
    assert torch.equal(words, whole[:, :count])
    assert torch.equal(uniforms, noise.uniform(*at, event))
    expected = normals_of_words(whole)[:, :count]
    assert normals.shape == (len(ids), *event) and normals.dtype == torch.float32
    assert (normals.flatten(1) - expected).abs().max() < NORMAL_ATOL


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("stream", [0, 1, 255])
@each_backend
def test_every_bit_of_seed_and_stream_counts(backend, seed, stream) -> None:
    ids, t = IDS.to(backend.device), T.to(backend.device)
    with backend.use():
        assert torch.equal(
            ops.words(seed, stream, ids, t, 9).cpu(), noise.words(seed, stream, IDS, T, 9)
        )


@pytest.mark.parametrize("draw", [ops.normal, ops.uniform])
@pytest.mark.parametrize("event", [(3,), (131,)])
@each_backend
def test_other_dtypes_hold_the_float32_values(backend, draw, event) -> None:
    at = (SEED, Stream.INITIAL, IDS.to(backend.device), 3, event)
    with backend.use():
        x = draw(*at)
        for dtype in DTYPES:
            y = draw(*at, dtype)
            assert y.dtype == dtype
            if backend.interpreted and dtype == torch.bfloat16:  # the interpreter truncates
                assert ((y.float() - x).abs() <= torch.finfo(dtype).eps * x.abs()).all()
            else:
                assert torch.equal(y, x.to(dtype))


@each_backend
def test_strided_ids_and_a_common_timestep(backend) -> None:
    ids = IDS.repeat_interleave(2).to(backend.device)[::2]
    with backend.use():
        common = ops.normal(SEED, 0, ids, 7, (9,)).cpu()
        expanded = ops.normal(SEED, 0, ids, torch.tensor([7]).to(ids).expand(len(ids)), (9,)).cpu()
    assert torch.equal(common, expanded)
    assert (common - noise.normal(SEED, 0, IDS, 7, (9,))).abs().max() < NORMAL_ATOL


@each_backend
def test_nothing_to_draw(backend) -> None:
    ids = IDS.to(backend.device)
    with backend.use():
        assert ops.normal(0, 0, ids[:0], 1, (3, 2)).shape == (0, 3, 2)
        assert ops.uniform(0, 0, ids, 1, (0, 4)).shape == (len(IDS), 0, 4)
        x_0, coefficients, *counters = arguments(device=backend.device)
        x_t = ops.noise(x_0[:0], coefficients[:0], 0, ids[:0], counters[2][:0])
        assert x_t.shape == (0, *x_0.shape[1:])
        none = x_0[:, :0].requires_grad_()
        (gradient,) = torch.autograd.grad(ops.noise(none, coefficients, *counters).sum(), none)
        assert gradient.shape == none.shape


# x_t.


@pytest.mark.parametrize("event", EVENTS, ids=str)
@each_backend
def test_x_t_and_gradients(backend, event) -> None:
    check(backend, *arguments(event, device=backend.device))


@pytest.mark.parametrize(("event", "n"), MANY_SMALL)
@each_backend
def test_many_small_events(backend, event, n) -> None:
    x_0, coefficients, seed, ids, t = arguments(event, device=backend.device, n=n)
    check(backend, x_0, coefficients, seed, ids, t)
    with backend.use():
        words = ops.words(seed, 0, ids, t, math.prod(event)).cpu()
    assert torch.equal(words, noise.words(seed, 0, ids.cpu(), t.cpu(), math.prod(event)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("event", [(3,), (2, 4, 6)], ids=str)
@each_backend
def test_storage_types(backend, dtype, event) -> None:
    if dtype in backend.dtypes:
        check(backend, *arguments(event, dtype, backend.device))


WITH_EXPANDED = LAYOUTS | {"expanded": lambda x: x[:, :1, :1, :1].expand_as(x)}


@pytest.mark.parametrize("layout", WITH_EXPANDED)
@pytest.mark.parametrize("event", [(3, 8, 6), (3, 2, 2)], ids=str)
@each_backend_in_time
def test_memory_layout_changes_nothing(backend, layout, event) -> None:
    x_0, *rest = arguments(event, device=backend.device)
    strided = WITH_EXPANDED[layout](x_0)
    check(backend, strided, *rest)
    with backend.use():
        assert torch.equal(ops.noise(strided, *rest), ops.noise(strided.contiguous(), *rest))


@pytest.mark.parametrize(("event", "n"), [*SPLIT, ((16390,), 2)])
@each_backend_in_time
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads(backend, event, n) -> None:
    x_0, coefficients, seed, ids, t = arguments(event, device=backend.device, n=n)
    gradient = x_0.flip(0)

    def run(part: slice) -> tuple[Tensor, ...]:
        inputs = x_0[part], coefficients[part], seed, ids[part], t[part]
        gradients = torch.ops.dpm_fast._noise_gradients(gradient[part], *inputs, 0, True)
        numbers = ops.normal(seed, 0, ids[part], t[part], event, torch.float16)
        return ops.noise(*inputs), *gradients, numbers

    with backend.use():
        assert_bits_are_those_of_any_run(run, n)


@needs_host_runner
@pytest.mark.parametrize("order", build.ORDERS)
def test_no_order_of_blocks_or_threads_matters(order) -> None:
    with running_in(order) as backend:
        check(backend, *arguments((1, 28, 28)))
        check(backend, *arguments((20,), n=70))
        check(backend, *arguments((16390,)))


def test_the_process_has_the_noise_of_its_forward_stream() -> None:
    process = GaussianDiffusion.from_schedule("erase", 50)
    x_0, _, seed, ids, _ = arguments((2, 3))
    t = torch.tensor([0, 1, 2, 25, 49, 50, 3])
    eps = noise.normal(seed, Stream.FORWARD, ids, t, (2, 3), torch.float64)
    tables = process.tables()
    signal, spread = (c[t].sqrt().view(-1, 1, 1) for c in (tables.alpha_bar, tables.beta_bar))
    expected = reference.noised(x_0.double(), eps, signal, spread)
    x_t = process.sample_x_t(x_0, t, seed, ids)
    torch.testing.assert_close(x_t.double(), expected, rtol=1e-6, atol=NORMAL_ATOL)
    assert torch.equal(x_t[0], x_0[0])  # t = 0


@needs_host_runner
@pytest.mark.parametrize("bad", [-1, 2**24])
def test_on_a_gpu_a_timestep_that_nobody_has_checked_gives_nan(bad) -> None:
    x_0, coefficients, seed, ids, t = arguments((9,))
    t = t.clone()
    t[2] = bad
    is_bad = (torch.arange(len(t)) == 2).tolist()
    with running_in("forward") as backend, backend.use():
        numbers = torch.ops.dpm_fast.random
        words = numbers(0, seed, 3, ids, t, 9, torch.int64)
        assert (words == -1).all(1).tolist() == is_bad
        drawn = [numbers(kind, seed, 3, ids, t, 9, torch.float32) for kind in (1, 2)]
        drawn.append(torch.ops.dpm_fast.noise(x_0, coefficients, seed, ids, t, 0))
        given = (x_0, x_0, coefficients, seed, ids, t, 0, True)
        drawn += torch.ops.dpm_fast._noise_gradients(*given)
    for x in drawn:
        assert x.isnan().all(1).tolist() == is_bad
        assert x.isnan().any(1).tolist() == is_bad


# The contract.


@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS], ids=str)
@pytest.mark.parametrize("event", [(2, 2, 1), (18,)], ids=str)
def test_gradcheck(backend, event) -> None:
    x_0, coefficients, *counters = arguments(event, torch.float64)
    inputs = [x_0.requires_grad_(), coefficients.requires_grad_()]
    with dpm_fast.use_backend("reference") if backend is None else backend.use():
        assert torch.autograd.gradcheck(lambda *x: ops.noise(*x, *counters), inputs)


@pytest.mark.parametrize("layout", [None, "channels last", "transposed"])
def test_opcheck(layout) -> None:
    x_0, coefficients, *counters = arguments((2, 3, 4))
    x_0 = LAYOUTS[layout](x_0) if layout else x_0
    for requires_grad in (False, True):
        inputs = [x.clone().requires_grad_(requires_grad) for x in (x_0, coefficients)]
        torch.library.opcheck(torch.ops.dpm_fast.noise, (*inputs, *counters, 0))
    for x, per_x_0 in ((x_0, True), (x_0, False), (None, True)):
        torch.library.opcheck(
            torch.ops.dpm_fast._noise_gradients, (x_0, x, coefficients, *counters, 0, per_x_0)
        )
    for random, dtype in ((0, torch.int64), (1, torch.float16), (2, torch.float32)):
        args = (random, SEED, 3, IDS, T, 5, dtype)
        torch.library.opcheck(torch.ops.dpm_fast.random, args)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_compiles_whole(name) -> None:
    x_0, coefficients, _, ids, t = arguments((2, 3, 4))

    def work(x_0: Tensor, coefficients: Tensor, seed: int) -> Tensor:
        x_t = ops.noise(x_0, coefficients, seed, ids, t)
        return x_t + ops.normal(seed, Stream.REVERSE, ids, 3, x_0.shape[1:])

    with dpm_fast.use_backend(name):
        torch._dynamo.reset()
        compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
        for seed in (3, 4, 5):  # the second one makes it a symbol
            results = []
            for function in (work, compiled):
                leaves = [x.clone().requires_grad_() for x in (x_0, coefficients)]
                out = function(*leaves, seed)
                results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_second_derivatives() -> None:
    x_0, coefficients, *counters = arguments()

    def second() -> tuple[torch.Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in (x_0, coefficients)]
        cost = (ops.noise(*inputs, *counters) ** 3).sum() + sum((x**2).sum() for x in inputs)
        first = torch.autograd.grad(cost, inputs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    found = second()
    with dpm_fast.use_backend("reference"):
        torch.testing.assert_close(found, second(), rtol=1e-5, atol=1e-4)


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass() -> None:
    x_0, coefficients, *counters = arguments()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.noise(x_0.requires_grad_(), coefficients, *counters)
    if dispatch.backend("noise", x_0) == "native":
        assert sum(x.numel() for x in kept) == coefficients.numel() + 2 * len(IDS)


def _with(**changed: Any) -> dict[str, Any]:
    names = ("x_0", "coefficients", "seed", "example_ids", "t")
    return dict(zip(names, arguments((2, 3)), strict=True)) | changed


N = len(IDS)
BAD = [
    (_with(x_0=[1.0]), TypeError, "x_0 must be a tensor, got list"),
    (_with(x_0=torch.zeros(N, 2).long()), TypeError, "x_0 must have dtype float32, .*int64"),
    (_with(x_0=torch.zeros(N)), ValueError, r"x_0 must have shape \(N, \*event\), got \(7,\)"),
    (_with(coefficients=None), TypeError, "coefficients must be a tensor, got NoneType"),
    (_with(coefficients=torch.ones(N, 3)), ValueError, r"must have shape \(7, 2\), got \(7, 3\)"),
    (_with(coefficients=torch.ones(N, 2).double()), TypeError, "must have dtype torch.float32"),
    (_with(coefficients=torch.ones(N, 2).to("meta")), ValueError, "must be on cpu, got meta"),
    (_with(seed=1.5), TypeError, "seed must be an integer, got float"),
    (_with(seed=2**64), ValueError, "seed must be a 64-bit integer, got 18446744073709551616"),
    (_with(stream="a"), TypeError, "stream must be an integer, got str"),
    (_with(stream=256), ValueError, r"stream must be in 0..255, got 256"),
    (_with(example_ids=3), TypeError, "example_ids must be a tensor, got int"),
    (_with(example_ids=IDS.int()), TypeError, "example_ids must have dtype torch.int64, got .*32"),
    (_with(example_ids=IDS[:5], t=3), ValueError, r"example_ids must have shape \(7,\), got \(5,"),
    (_with(example_ids=IDS.to("meta"), t=3), ValueError, "example_ids must be on cpu, got meta"),
    (_with(t=None), TypeError, "t must be an integer or a tensor, got NoneType"),
    (_with(t=-1), ValueError, r"t must be in 0..2\*\*24 - 1, got -1"),
    (_with(t=T[:3]), ValueError, r"t must have shape \(7,\), got \(3,\)"),
    (_with(t=T.float()), TypeError, r"t must have dtype torch.int64, got torch.float32"),
    (_with(t=T.to("meta")), ValueError, "t must be on cpu, got meta"),
    (_with(t=T - 1), ValueError, r"t must be in 0..2\*\*24 - 1, got -1"),
    (_with(t=T + 1), ValueError, r"t must be in 0..2\*\*24 - 1, got 16777216"),
]


@pytest.mark.parametrize("name", ["reference", "auto", "triton"])
@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_refuses(name, bad, error, message) -> None:
    if name == "triton" and dispatch.why_absent("triton", "cpu"):
        pytest.skip("no Triton for a CPU")
    with dpm_fast.use_backend(name), pytest.raises(error, match=message):
        ops.noise(**bad)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_random_numbers_refuse(name) -> None:
    with dpm_fast.use_backend(name):
        with pytest.raises(TypeError, match=r"dtype must be float32, .*, got torch.int64"):
            ops.normal(0, 0, IDS, 1, (2,), torch.int64)
        with pytest.raises(ValueError, match=r"event_shape must have no negative size, got \(-1,"):
            ops.normal(0, 0, IDS, 1, (-1, 2))
        with pytest.raises(ValueError, match=r"num_elements must be in 0..2\*\*34, got 1717"):
            ops.words(0, 0, IDS, 1, 2**34 + 1)
        with pytest.raises(ValueError, match=r"t must be in 0..2\*\*24 - 1, got -1"):
            ops.uniform(0, 0, IDS, T - 1, (2,))


_SHAPES = st.lists(st.integers(0, 3), min_size=0, max_size=4).map(tuple)
_INTEGERS = st.sampled_from([0, 1, -1, 2**24, 2**63, 2**64, -(2**64), True])
_VALUES = st.one_of(
    st.builds(torch.zeros, _SHAPES, dtype=st.sampled_from([*DTYPES, torch.int64, torch.bool])),
    st.sampled_from([None, 0.0, "x", IDS, T, T - 1, torch.zeros(N, 1), torch.ones(N, 2)]),
    _INTEGERS,
)
_NAMES = st.sampled_from(["x_0", "coefficients", "seed", "example_ids", "t", "stream"])


@pytest.mark.slow
@given(name=_NAMES, other=_NAMES, value=_VALUES, other_value=_VALUES)
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_malformed_calls_are_refused_or_right(name, other, value, other_value) -> None:
    call = _with(**{name: value}) | {other: other_value}
    try:
        x_t = ops.noise(**call)
    except (TypeError, ValueError):
        return
    with dpm_fast.use_backend("reference"):
        torch.testing.assert_close(x_t, ops.noise(**call), rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS[:1], ids=str)
def test_more_elements_than_32_bits_count(backend) -> None:
    """2**31 + 64 elements of an event, in bfloat16: the last ones are where they belong."""
    num_elements = 2**31 + 64
    with backend.use():
        x = ops.uniform(SEED, 0, IDS[:1], 1, (num_elements,), torch.bfloat16)[0]
    group = torch.arange(num_elements // 4 - 16, num_elements // 4)
    counter = (group, 1, IDS[0], 0)
    words = torch.stack(
        noise.philox4x32(counter, (SEED & 0xFFFFFFFF, SEED >> 32 & 0xFFFFFFFF)), dim=1
    )
    expected = (words.flatten().float() * 2.0**-32 + 2.0**-33).bfloat16()
    assert torch.equal(x[-64:], expected)
