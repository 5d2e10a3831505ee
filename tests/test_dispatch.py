"""How a call of an op reaches a backend: what is chosen, what is refused, what may be skipped."""

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import dpm_fast
from dpm_fast import dispatch, noise, ops, reference
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion

T, IDS = torch.tensor([1, 2, 5]), torch.tensor([0, 7, 2**40])
GAUSSIAN = GaussianDiffusion.from_schedule("erase", 50).reverse("decay")
BINOMIAL = BinomialDiffusion(50).reverse("rate")
COEFFICIENTS = torch.tensor([[0.9, 0.4], [0.5, 0.8], [0.1, 0.9]])


def normal(seed: int, event: tuple[int, ...] = (2, 3)) -> Tensor:
    return noise.normal(seed, noise.Stream.DATA, torch.arange(3), 0, event)


def kl(x: Tensor) -> Tensor:
    return ops.kl(x, normal(1), normal(2), normal(3), GAUSSIAN.rows(T, x))


def step(x: Tensor) -> Tensor:
    return ops.step(x, normal(2), normal(3), GAUSSIAN.rows(T, x), 5, IDS, T)


def step_(x: Tensor) -> Tensor:
    return ops.step_(x, normal(2), normal(3), GAUSSIAN.rows(T, x), 5, IDS, T)


def noised(x: Tensor) -> Tensor:
    return ops.noise(x, COEFFICIENTS, 5, IDS, T)


def bernoulli_noise(x: Tensor) -> Tensor:
    return ops.bernoulli_noise(x, COEFFICIENTS, 5, IDS, T)


def bernoulli_step(x: Tensor) -> Tensor:
    return ops.bernoulli_step(x, normal(2), BINOMIAL.rows(T, x), 5, IDS, T)


def bernoulli_step_(x: Tensor) -> Tensor:
    return ops.bernoulli_step_(x, normal(2), BINOMIAL.rows(T, x), 5, IDS, T)


def bernoulli_kl(x: Tensor) -> Tensor:
    return ops.bernoulli_kl(normal(1), normal(2), x, BINOMIAL.rows(T, x))


IN_PLACE = [step_, bernoulli_step_]
OPS = [kl, step, noised, bernoulli_noise, bernoulli_step, bernoulli_kl, *IN_PLACE]


def negated_view(x: Tensor) -> Tensor:
    """x in memory that holds -x, as `.conj().imag` leaves it."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("op", OPS)
def test_a_view_that_stands_for_its_negative(op: Callable[[Tensor], Tensor]) -> None:
    x = normal(4)
    view = negated_view(x)
    expected = op(x.clone())
    found = op(view)
    assert torch.equal(found, expected)
    assert torch.equal(view, expected if op in IN_PLACE else x)


@pytest.mark.parametrize("op", [kl, bernoulli_kl])
def test_a_gradient_that_stands_for_its_negative(op: Callable[[Tensor], Tensor]) -> None:
    x = normal(4).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (expected,) = torch.autograd.grad(op(x), x, weights)
    (found,) = torch.autograd.grad(op(x), x, negated_view(weights))
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
@pytest.mark.parametrize("op", [kl, noised, bernoulli_kl, step])
def test_a_tangent_is_refused(op: Callable[[Tensor], Tensor]) -> None:
    x = normal(4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"forward-mode .* dpm_fast\.reference"):
            op(dual)
        assert torch.equal(op(x), op(x.clone()))


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize("op", IN_PLACE)
def test_a_gradient_from_what_was_overwritten_is_refused(
    op: Callable[[Tensor], Tensor], name: str
) -> None:
    weights, x = torch.ones(3, 2, 3, requires_grad=True), normal(4)
    with dpm_fast.use_backend(name):
        product = (weights * x).sum()
        op(x)
        assert x._version == 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        with torch.inference_mode():
            op(normal(4))


def test_kernels_are_not_run_where_the_reference_was_asked_for() -> None:
    x = normal(4)
    with dpm_fast.use_backend("reference"):
        assert dispatch.backend("noise", x) == "reference"
        with pytest.raises(dispatch.BackendError, match=r"noise .* runs in the reference: call it"):
            torch.ops.dpm_fast.noise(x, COEFFICIENTS, 5, IDS, T, 0)


def test_float64_where_kernels_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_absent", lambda backend, device_type: None)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setitem(dispatch._PREFERENCE, "meta", {"": ("triton",), "kl": ("native",)})
    wide, x = (torch.empty(0, dtype=t, device="meta") for t in (torch.float64, torch.float32))
    with dpm_fast.use_backend("auto"):
        assert [dispatch.backend(op, x) for op in ("kl", "step")] == ["native", "triton"]
        assert dispatch.backend("kl", wide) == "reference"
        with pytest.raises(dispatch.BackendError, match="runs in the reference"):
            dispatch.kernels("kl", wide)
    for name in ("native", "triton"):
        with dpm_fast.use_backend(name):
            assert dispatch.backend("kl", x) == name
            with pytest.raises(dispatch.BackendError, match="cannot run kl on meta in float64"):
                dispatch.backend("kl", wide)
    with dpm_fast.use_backend("reference"):
        assert dispatch.backend("kl", wide) == "reference"


def test_an_op_without_kernels_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "why_absent", lambda *_: "not built: no C++ compiler was found")
    monkeypatch.setattr(dispatch, "_chosen", {})
    with dpm_fast.use_backend("auto"):
        assert {dispatch.backend("kl", normal(1)) for _ in range(3)} == {"reference"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"  # seen without any setting
    assert record.getMessage() == (
        "ops on cpu use the backend reference (native: not built: no C++ compiler was found)"
    )


def test_threads_may_choose_at_once() -> None:
    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            dpm_fast.use_backend("reference")
            dpm_fast.use_backend("auto")

    before = dispatch._requested
    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        found = {dispatch.backend("kl", IDS) for _ in range(20_000)}
    finally:
        stop.set()
        thread.join()
        dpm_fast.use_backend(before)
    assert found <= set(dispatch.BACKENDS)


@pytest.mark.parametrize("base", [-0.5, 0.0, math.nan])
@pytest.mark.parametrize("edge", ["decoder", "discretized"])
def test_a_base_that_nobody_has_checked_gives_nan(base: float, edge: str) -> None:
    x, rows = normal(4), GAUSSIAN.rows(T, normal(4))
    rows[:2, reference.ReverseRow._fields.index("base")] = base
    bins = None if edge == "decoder" else reference.Bins(0.1, -1.0, 1.0)
    nats = reference.kl(x, normal(1), normal(2), normal(3), rows, edge=edge, bins=bins)
    assert nats.isnan().tolist() == [True, True, False]


def test_an_op_compiles_before_any_has_run() -> None:
    """The choice of a backend imports, which a compiler cannot trace, and may fall into a trace."""
    program = """
import torch
from dpm_fast import ops, use_backend
x, rows = torch.randn(3, 4), torch.ones(3, 15)
rows[:, 6] = -torch.inf
rows[:, [8, 10]] = 0
def f(x):
    return ops.kl(x, x, 2 * x, None, rows) + ops.normal(0, 0, torch.arange(3), 1, (4,)).sum(1)
compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
first = compiled(x)
with use_backend("reference"):
    second = compiled(x)
with use_backend("auto"):
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
torch.testing.assert_close(first, f(x))
torch.testing.assert_close(second, f(x), rtol=1e-5, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_that_cannot_run_on_the_gpu_are_absent(monkeypatch) -> None:
    """Nobody compiled native ones for this GPU, or nothing compiles the launcher of Triton."""

    def no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    unusable = "no kernel image is available for execution on the device"
    native = SimpleNamespace(why_unusable=lambda: unusable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_load", lambda name: (native, None))
    why_absent = dispatch.why_absent.__wrapped__
    assert why_absent("native", "cuda") == f"built, but cannot run on this GPU: {unusable}"
    native.why_unusable = lambda: ""
    assert why_absent("native", "cuda") is None
    active = SimpleNamespace(get_current_target=no_compiler)
    runtime = pytest.importorskip("triton.runtime")
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=active))
    assert why_absent("triton", "cuda") == "triton cannot start: Failed to find C compiler."
    active.get_current_target = lambda: None
    assert why_absent("triton", "cuda") is None
