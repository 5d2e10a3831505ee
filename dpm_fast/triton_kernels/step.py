"""The op `step` in Triton: four elements from one Philox call."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.noise import Stream
from dpm_fast.triton_kernels.elementary import exp_of_shift, limited
from dpm_fast.triton_kernels.philox import in_order, normals4
from dpm_fast.triton_kernels.tiles import (
    NUM_WARPS,
    extent,
    load,
    offsets,
    shared_strided,
    store,
    strided,
    strides_of,
    tile_of_program,
    tile_shape,
)

if TYPE_CHECKING:
    from dpm_fast.ops.step import StepInputs

_MAX_SHIFT = tl.constexpr(60.0)  # of the log-variance, as dpm_fast.reference.max_shift


@triton.jit(do_not_specialize=["seed", "N"])
def step_tile(
    x_prev, x_t, mu_out, sigma2_out,  # [N, C, S]
    rows, ids, steps, seed: tl.int64, stream,  # [N, 15], [N], [N]
    y, sigma2_y, drift, mask, values,  # [N, C, S], or shared by a stride of 0
    x_prev_strides, x_t_strides, mu_out_strides, sigma2_out_strides,
    y_strides, sigma2_y_strides, drift_strides, mask_strides, values_strides,
    S, N, num_elements, num_blocks,
    LEARNED: tl.constexpr, OBSERVED: tl.constexpr, DRIFT: tl.constexpr, KNOWN: tl.constexpr,
    NOISE: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i, groups, inside = tile_of_program(N, num_elements, num_blocks, ROWS, BLOCK)
    row = rows + n * 15
    a, b, c, e = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    p, q, low, high = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    s, base, g = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
    t = tl.load(steps + n)
    # Values that no one has looked at: the result must not look like a sample.
    b = tl.where((base >= 0) & (t >= 1) & (t < 16777216), b, float("nan"))

    x = load(x_t, n, i, x_t_strides, S, inside, FLAT)
    z = load(mu_out, n, i, mu_out_strides, S, inside, FLAT)
    sigma2 = tl.zeros_like(x) + base
    if LEARNED:
        v = s * load(sigma2_out, n, i, sigma2_out_strides, S, inside, FLAT)
        scaled = exp_of_shift(limited(v, -_MAX_SHIFT, _MAX_SHIFT))
        sigma2 = base * scaled / ((1.0 - g) + g * scaled)
    prediction = limited(p * x + q * z, low, high)
    mu = a * prediction + b * x + sigma2 * (c * z + e * x)

    if OBSERVED:
        y_i = load(y, n, i, y_strides, S, inside, FLAT)
        variance = load(sigma2_y, n, i, sigma2_y_strides, S, inside, FLAT)
        finite = variance < float("inf")
        variance = tl.where(finite, variance, 1.0)
        weight, left = sigma2 / (sigma2 + variance), variance / (sigma2 + variance)
        mu = tl.where(finite, mu + weight * (y_i - mu), mu)
        left = tl.where(variance > 0, sigma2 * left, float("nan"))
        sigma2 = tl.where(finite, left, sigma2)
    if DRIFT:
        mu += sigma2 * load(drift, n, i, drift_strides, S, inside, FLAT)
    if NOISE:
        eps = in_order(*normals4(seed, stream, t, tl.load(ids + n), groups))
        mu += tl.sqrt(sigma2) * eps
    if KNOWN:
        at = offsets(n, i, mask_strides, S, FLAT)
        known = tl.load(mask + at, mask=inside, other=0) != 0
        mu = tl.where(known, load(values, n, i, values_strides, S, inside, FLAT), mu)
    store(x_prev, mu, n, i, x_prev_strides, S, inside, FLAT)


def step(x_prev: Tensor, inputs: "StepInputs") -> None:
    """Fills x_prev; see `dpm_fast.ops.step`."""
    x_t, mu_out = inputs.x_t, inputs.mu_out
    own = [strided(x) for x in (x_prev, x_t, mu_out, inputs.sigma2_out)]
    shared_tensors = (inputs.y, inputs.sigma2_y, inputs.drift, inputs.mask, inputs.values)
    shared = [shared_strided(x, x_t) for x in shared_tensors]
    num_examples, channels, spatial = extent(x_t.shape, own + shared)
    num_elements = channels * spatial
    rows, block = tile_shape(num_elements)
    num_blocks = triton.cdiv(num_elements, block)
    step_tile[(triton.cdiv(num_examples, rows) * num_blocks,)](
        x_prev, x_t, mu_out, _or(inputs.sigma2_out, mu_out),
        inputs.rows, inputs.example_ids, inputs.t, inputs.seed, int(Stream.REVERSE),
        *(_or(x, mu_out) for x in shared_tensors),
        *(strides_of(layout) for layout in own + shared),
        spatial, num_examples, num_elements, num_blocks,
        LEARNED=inputs.sigma2_out is not None, OBSERVED=inputs.y is not None,
        DRIFT=inputs.drift is not None, KNOWN=inputs.mask is not None,
        NOISE=not inputs.deterministic, FLAT=channels == 1, ROWS=rows, BLOCK=block,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
