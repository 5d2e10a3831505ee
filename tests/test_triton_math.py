"""Elementary functions of the Triton kernels: error against float64, interpreted or on a GPU."""

import numpy as np
import pytest
import torch

from backends import HAS_GPU
from dpm_fast import dispatch
from test_native_math import EXPONENTS, FUNCTIONS, sigmoid

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
elementary = pytest.importorskip("dpm_fast.triton_kernels.elementary")

DEVICE = "cuda" if HAS_GPU else "cpu"
REASON = dispatch.why_absent("triton", DEVICE)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BLOCK = 2**17 if DEVICE == "cpu" else 2**10  # an interpreter is slow for each program


@triton.jit
def apply_kernel(x, out, size, FUNCTION: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = FUNCTION(tl.load(x + i, mask=i < size, other=0.5))
    if RESULT >= 0:
        values = values[RESULT]
    tl.store(out + i, values, mask=i < size)


def apply(name: str, x: np.ndarray, result: int = -1) -> np.ndarray:
    """One of the results of a function, or its only one."""
    given = torch.from_numpy(x.astype(np.float32)).to(DEVICE)
    out = torch.empty_like(given)
    apply_kernel[(triton.cdiv(len(x), BLOCK),)](
        given, out, len(x), getattr(elementary, name), result, BLOCK
    )
    return out.cpu().numpy()


def slope(x: np.ndarray) -> np.ndarray:
    return sigmoid(x) * sigmoid(-x)


def inputs_and(name: str) -> tuple:
    """The inputs on which csrc/math.h is tested, and the function in float64."""
    return FUNCTIONS[name][:2]


SHIFTS = np.linspace(-60, 60, 400_001)
# Function, which of its results (-1: the only one): inputs, the result in float64, ulp it may be
# wrong by.
CASES = {
    ("exp", -1): (*inputs_and("exp"), 1.1),
    ("exp_of_shift", -1): (SHIFTS, np.exp, 1.1),
    ("expm1", -1): (*inputs_and("expm1"), 1.6),
    ("exp_excess", 0): (*inputs_and("expm1"), 3.1),
    ("exp_excess", 1): (*inputs_and("expm1_minus_identity"), 3.1),
    ("expm1_minus_identity", -1): (*inputs_and("expm1_minus_identity"), 3.1),
    ("sigmoid", 0): (*inputs_and("sigmoid"), 4.0),
    ("sigmoid", 1): (EXPONENTS, slope, 8.0),  # the square of a quotient, which is of 2 ulp on a GPU
    ("log1p", -1): (*inputs_and("log1p"), 2.0),
}


@pytest.mark.parametrize(("name", "result"), CASES)
def test_error_in_units_of_the_last_place(name: str, result: int) -> None:
    inputs, function, max_ulp = CASES[name, result]
    x = inputs[::7].astype(np.float32)
    exact = function(x.astype(np.float64))
    tiny = np.finfo(np.float32).tiny
    ulp = np.spacing(np.maximum(np.abs(exact).astype(np.float32), tiny))
    error = np.abs(apply(name, x, result) - exact) / ulp
    assert error.max() <= max_ulp, (x[error.argmax()], error.max())


def test_logarithms_of_uniforms() -> None:
    u = np.exp(np.linspace(np.log(2.0**-33), 0, 400_001)).astype(np.float32)
    u = np.concatenate((u, 1 - np.arange(1, 1000) * 2.0**-24)).astype(np.float32)
    exact = np.log(u.astype(np.float64))
    assert (np.abs(apply("log_unit", u) - exact) <= 1.2e-7 * np.abs(exact)).all()


def test_turns() -> None:
    u = np.linspace(0, 1, 1_000_001).astype(np.float32)
    angle = 2 * np.pi * u.astype(np.float64)
    for result, function in enumerate((np.cos, np.sin)):
        assert np.abs(apply("cos_sin_of_turns", u, result) - function(angle)).max() < 1.7e-7


def test_extremes_are_finite_and_nan_stays() -> None:
    def value(name: str, *x: float, result: int = -1) -> list[float]:
        return apply(name, np.array(x), result).tolist()

    largest = pytest.approx(np.exp(88.0), rel=2e-7)
    huge = (3.4e38, np.inf, -3.4e38, -np.inf)
    assert value("exp", *huge) == [largest, largest, 0.0, 0.0]
    assert value("expm1", *huge) == [largest, largest, -1.0, -1.0]
    assert value("sigmoid", *huge, result=0) == [1.0, 1.0, 0.0, 0.0]
    assert value("expm1_minus_identity", 0.0, -1e6, 1e6) == [0.0, 1e6 - 1, largest]
    assert value("log1p", -1.0) == pytest.approx([-127 * np.log(2.0)])
    for name, result in CASES:
        assert np.isnan(value(name, np.nan, result=result)).all(), name
