"""Noise of the contract in dpm_fast/noise.py: four elements of an example from one Philox call."""

import triton
import triton.language as tl

from dpm_fast.triton_kernels.elementary import cos_sin_of_turns, log_unit


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
    radius = tl.sqrt(-2.0 * log_unit(u_a))
    cos, sin = cos_sin_of_turns(u_b)
    return radius * cos, radius * sin
