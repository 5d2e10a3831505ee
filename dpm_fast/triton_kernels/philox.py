"""Noise of the contract in dpm_fast/noise.py: four elements of an example from one Philox call.

The transcendentals are those of csrc/math.h: Triton's own logarithm has an absolute error, which
near u = 1 would be 1e-3 in the normal.
"""

import triton
import triton.language as tl


@triton.jit
def words4(seed, stream, t, example, group):
    """Words of the elements 4 g ... 4 g + 3 for each group g, uint32.

    Args:
        seed: scalar, any 64 bits.
        stream: scalar, 0..255.
        t, example: int64, scalars or blocks that broadcast against the groups.
        group: block of integers in [0, 2**32).
    """
    return tl.philox(
        seed,
        group.to(tl.uint32),
        t.to(tl.uint32) | (stream << 24),
        example.to(tl.uint32),
        (example >> 32).to(tl.uint32),
    )


@triton.jit
def uniforms4(seed, stream, t, example, group):
    """In [2**-33, 1]; see `words4`."""
    w0, w1, w2, w3 = words4(seed, stream, t, example, group)
    return _unit(w0), _unit(w1), _unit(w2), _unit(w3)


@triton.jit
def normals4(seed, stream, t, example, group):
    """Unit Gaussian numbers; see `words4`."""
    u0, u1, u2, u3 = uniforms4(seed, stream, t, example, group)
    x0, x1 = _box_muller(u0, u1)
    x2, x3 = _box_muller(u2, u3)
    return x0, x1, x2, x3


@triton.jit
def in_order(x0, x1, x2, x3):
    """The elements of blocks of groups in their order: shape (..., G) becomes (..., 4 G)."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def _unit(word):
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _box_muller(u_a, u_b):
    radius = tl.sqrt(-2.0 * _log_unit(u_a))
    cos, sin = _cos_sin_of_turns(u_b)
    return radius * cos, radius * sin


@triton.jit
def _log_unit(u):
    """ln u for u in [2**-33, 1]; 2 ulp, also near 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = (f * 0.087387979 - 0.143077224) * f + 0.149163544
    q = ((p * f - 0.165703133) * f + 0.199622393) * f - 0.250017762
    tail = f * f * ((q * f + 0.333339453) * f - 0.499999911)
    return exponent.to(tl.float32) * 8.2629582881927490e-08 + (tail + f)


@triton.jit
def _cos_sin_of_turns(u):
    """(cos, sin)(2 pi u) for u in [0, 1], absolute error below 2e-7."""
    shifted = 2.0 * u + 12582912.0  # 3 2**22: half turns in the low bits
    h = 2.0 * u - (shifted - 12582912.0)  # in [-1/2, 1/2], exact
    z = h * h
    c = (((z * -0.0239638742 + 0.234683767) * z - 1.33516157) * z + 4.05870533) * z - 4.93480206
    s = ((z * 0.0764338076 - 0.597625375) * z + 2.54995775) * z - 5.1677022
    sign = shifted.to(tl.int32, bitcast=True) << 31
    cos = (c * z + 1.0).to(tl.int32, bitcast=True) ^ sign
    sin = (h * (s * z + 3.1415925)).to(tl.int32, bitcast=True) ^ sign
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)
