"""Elementary functions of float32, operation by operation those of csrc/math.h and as accurate.

`tl.exp` and `tl.log` are the approximate instructions of a GPU: their absolute error near a
logarithm of 1 and their relative error for large exponents are above what the bound can bear.

Errors bound those that tests/test_triton_math.py measures; an ulp is the spacing of floats at the
exact result. A NaN stays one.
"""

import triton
import triton.language as tl


@triton.jit
def limited(x, low, high):
    """x in [low, high]. Exact."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


# Next to 3 * 2**22 the low bits of a float are an integer: here n + 127, for exponents.
_SHIFT = tl.constexpr(12582912.0 + 127.0)


@triton.jit
def _exp_parts(x):
    """r and scale with exp(x) = scale exp(r), |r| <= ln(2) / 2. x in [-87.33, 88]."""
    return _parts(x, x * 1.44269504 + _SHIFT)


@triton.jit
def _parts(x, shifted):
    """The same for scale = 2**n, where n + _SHIFT is given."""
    n = shifted - _SHIFT
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    scale = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return r, scale


@triton.jit
def _exp_tail(r):
    """exp(r) - 1 - r, error below 4e-9 of exp(r); |r| <= ln(2) / 2."""
    q = r * 0.00138210552 + 0.00836867467
    return r * r * (((q * r + 0.0416682623) * r + 0.166665211) * r + 0.49999994)


@triton.jit
def exp(x):
    """Any x; 1.1 ulp. Above 88 it is exp(88) = 1.65e38, below -87.33 it is 0."""
    r, scale = _exp_parts(limited(x, -87.33, 88.0))
    return tl.where(x < -87.33, 0.0, scale * (r + _exp_tail(r) + 1.0))


@triton.jit
def exp_of_shift(x):
    """exp(x) for |x| <= 60; 1.1 ulp."""
    r, scale = _exp_parts(x)
    return scale * (r + _exp_tail(r) + 1.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 for any x; 1.6 ulp. Above 88 it is exp(88), below -87 it is -1."""
    r, scale = _exp_parts(limited(x, -87.0, 88.0))
    return scale * (r + _exp_tail(r)) + (scale - 1.0)


@triton.jit
def exp_excess(x):
    """exp(x) - 1, and exp(x) - 1 - x with its digits near 0 too, where it is x^2 / 2: 3.1 ulp each
    for any x. The exponential saturates as in `expm1`."""
    near = tl.abs(x) < 0.7
    within = limited(x, -87.0, 88.0)
    r, scale = _parts(within, tl.where(near, _SHIFT, within * 1.44269504 + _SHIFT))
    q = (r * 2.4940533e-5 + 2.00759285e-4) * r + 0.00138888857
    p = ((q * r + 0.00833276566) * r + 0.0416666642) * r + 0.166666701
    tail = r * r * (p * r + 0.5)
    expm1 = scale * (r + tail) + (scale - 1.0)
    return expm1, tl.where(near, tail, expm1 - x)


@triton.jit
def expm1_minus_identity(x):
    """exp(x) - 1 - x, see `exp_excess`."""
    excess = exp_excess(x)
    return excess[1]


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) for any x, 4 ulp, and its derivative, 8 ulp. 0 below -87.33, the derivative
    also above 87.33."""
    small = exp(-tl.abs(x))
    scale = 1.0 / (1.0 + small)
    return tl.where(x < 0, small * scale, scale), small * scale * scale


@triton.jit
def log_tail(f):
    """ln(1 + f) - f for f in [sqrt(1/2) - 1, sqrt(2) - 1], error below 4e-8 of ln(1 + f)."""
    p = (f * 0.087387979 - 0.143077224) * f + 0.149163544
    q = ((p * f - 0.165703133) * f + 0.199622393) * f - 0.250017762
    return f * f * ((q * f + 0.333339453) * f - 0.499999911)


@triton.jit
def _exponent_in_place(u):
    """The exponent e of a normal u = 2**e m, m in [sqrt(1/2), sqrt(2)), times 2**23, int32."""
    return (u.to(tl.int32, bitcast=True) - 0x3F3504F3) & -8388608


@triton.jit
def log1p(x):
    """ln(1 + x) for x in (-1, 1e38]; 2 ulp, also near 0. At -1 it is -88."""
    exponent = _exponent_in_place(x + 1.0)
    scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    f = x * scale + (scale - 1.0)
    e = exponent.to(tl.float32) * 1.1920929e-7
    return e * 0.693359375 + (log_tail(f) + (f - e * 2.12194440e-4))


@triton.jit
def log_unit(u):
    """ln u for u in [2**-33, 1]; relative error 1.2e-7, also near 1."""
    exponent = _exponent_in_place(u)
    f = (u.to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32) * 1.1920929e-7
    return e * 0.693147181 + (log_tail(f) + f)


@triton.jit
def cos_sin_of_turns(u):
    """(cos, sin)(2 pi u) for u in [0, 1]; absolute error 1.7e-7."""
    shifted = 2.0 * u + 12582912.0
    h = 2.0 * u - (shifted - 12582912.0)  # half turns, in [-1/2, 1/2]
    z = h * h
    c = ((z * 0.22000809 - 1.33206248) * z + 4.05844736) * z - 4.93479538
    s = ((z * 0.0764338076 - 0.597625375) * z + 2.54995775) * z - 5.1677022
    sign = shifted.to(tl.int32, bitcast=True) << 31
    cos = (c * z + 1.0).to(tl.int32, bitcast=True) ^ sign
    sin = (h * (s * z + 3.1415925)).to(tl.int32, bitcast=True) ^ sign
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)
