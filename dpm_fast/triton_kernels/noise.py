"""The op `noise` and plain random numbers in Triton: programs of a tile each."""

import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.triton_kernels.philox import in_order, normals4, uniforms4, words4
from dpm_fast.triton_kernels.tiles import (
    NUM_WARPS,
    examples_of,
    extent,
    in_a_row,
    load,
    store,
    strided,
    strides_of,
    tile_of_program,
    tile_shape,
)


@triton.jit
def _example(ids, t, coefficients, n):
    """Id, timestep and coefficients, NaN for a timestep that is none."""
    row = coefficients + 2 * n
    step = tl.load(t + n)
    signal = tl.where((step >> 24) == 0, tl.load(row), float("nan"))
    return tl.load(ids + n), step, signal, tl.load(row + 1)


@triton.jit(do_not_specialize=["seed", "N"])
def _noise_tile_per_program(
    x_0, x_t, coefficients, ids, t, seed: tl.int64, stream, x_0_strides, x_t_strides, S, N,
    num_elements, num_blocks, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i, groups, inside = tile_of_program(N, num_elements, num_blocks, ROWS, BLOCK)
    example, step, signal, spread = _example(ids, t, coefficients, n)
    eps = in_order(*normals4(seed, stream, step, example, groups))
    x = load(x_0, n, i, x_0_strides, S, inside, FLAT)
    store(x_t, signal * x + spread * eps, n, i, x_t_strides, S, inside, FLAT)


@triton.jit(do_not_specialize=["seed", "N"])
def _noise_gradients_of_examples(
    grad_x_t, x_0, grad_x_0, grad_coefficients, coefficients, ids, t, seed: tl.int64, stream,
    grad_x_t_strides, x_0_strides, grad_x_0_strides, S, N, num_elements, FLAT: tl.constexpr,
    PER_X_0: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    examples, counts = examples_of(tl.program_id(0), N, num_elements, ROWS)
    n = examples[:, None]
    example, step, signal, _ = _example(ids, t, coefficients, n)
    signal_sum = tl.zeros([ROWS, BLOCK], tl.float64)
    spread_sum = tl.zeros([ROWS, BLOCK], tl.float64)
    for first in range(0, num_elements, BLOCK):
        i = in_a_row(first, BLOCK)
        inside = i < counts[:, None]
        gradient = load(grad_x_t, n, i, grad_x_t_strides, S, inside, FLAT)
        if PER_X_0:
            store(grad_x_0, gradient * signal, n, i, grad_x_0_strides, S, inside, FLAT)
        if SUMS:
            groups = in_a_row(first // 4, BLOCK // 4)
            eps = in_order(*normals4(seed, stream, step, example, groups))
            x = load(x_0, n, i, x_0_strides, S, inside, FLAT)
            signal_sum += (gradient * x).to(tl.float64)
            spread_sum += (gradient * eps).to(tl.float64)
    if SUMS:
        is_valid = (tl.load(t + examples) >> 24) == 0
        to = grad_coefficients + 2 * examples
        tl.store(to, tl.where(is_valid, tl.sum(signal_sum, axis=1), float("nan")), mask=counts > 0)
        tl.store(
            to + 1, tl.where(is_valid, tl.sum(spread_sum, axis=1), float("nan")), mask=counts > 0
        )


@triton.jit(do_not_specialize=["seed", "N"])
def _random_tile_per_program(
    out, ids, t, seed: tl.int64, stream, N, num_elements, num_blocks,
    RANDOM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i, groups, inside = tile_of_program(N, num_elements, num_blocks, ROWS, BLOCK)
    example, step = tl.load(ids + n), tl.load(t + n)
    is_valid = (step >> 24) == 0
    if RANDOM == 0:
        x = in_order(*words4(seed, stream, step, example, groups)).to(tl.int64)
        x = tl.where(is_valid, x, -1)
    elif RANDOM == 1:
        x = in_order(*uniforms4(seed, stream, step, example, groups))
        x = tl.where(is_valid, x, float("nan"))
    else:
        x = in_order(*normals4(seed, stream, step, example, groups))
        x = tl.where(is_valid, x, float("nan"))
    tl.store(out + n * num_elements + i, x.to(out.dtype.element_ty), mask=inside)


Source = tuple[int, int, Tensor, Tensor]  # seed, stream, ids, timesteps


def noise(x_0: Tensor, x_t: Tensor, coefficients: Tensor, source: Source) -> None:
    """Fills x_t; see `dpm_fast.ops.noise`."""
    seed, stream, ids, t = source
    tensors = strided(x_0), strided(x_t)
    num_examples, channels, spatial = extent(x_0.shape, tensors)
    num_elements = channels * spatial
    rows, block = tile_shape(num_elements)
    num_blocks = triton.cdiv(num_elements, block)
    _noise_tile_per_program[(triton.cdiv(num_examples, rows) * num_blocks,)](
        x_0, x_t, coefficients, ids, t, seed, stream, *map(strides_of, tensors), spatial,
        num_examples, num_elements, num_blocks, FLAT=channels == 1, ROWS=rows, BLOCK=block,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def noise_gradients(
    grad_x_t: Tensor,
    x_0: Tensor | None,
    coefficients: Tensor,
    source: Source,
    grad_x_0: Tensor,
    grad_coefficients: Tensor,
) -> None:
    """Fills the gradients that are not empty."""
    seed, stream, ids, t = source
    per_x_0 = grad_x_0.numel() > 0
    tensors = strided(grad_x_t), strided(x_0), strided(grad_x_0) if per_x_0 else None
    num_examples, channels, spatial = extent(grad_x_t.shape, tensors)
    rows, block = tile_shape(channels * spatial)
    _noise_gradients_of_examples[(triton.cdiv(num_examples, rows),)](
        grad_x_t, x_0, grad_x_0, grad_coefficients, coefficients, ids, t, seed, stream,
        *map(strides_of, tensors), spatial, num_examples, channels * spatial, FLAT=channels == 1,
        PER_X_0=per_x_0, SUMS=x_0 is not None, ROWS=rows, BLOCK=block, num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip


def fill(random: int, source: Source, out: Tensor) -> None:
    """Random numbers of a kind (an index of `dpm_fast.ops.noise.RANDOM`) for `out`, contiguous."""
    seed, stream, ids, t = source
    num_examples, num_elements = out.shape
    rows, block = tile_shape(num_elements)
    num_blocks = triton.cdiv(num_elements, block)
    _random_tile_per_program[(triton.cdiv(num_examples, rows) * num_blocks,)](
        out, ids, t, seed, stream, num_examples, num_elements, num_blocks, RANDOM=random,
        ROWS=rows, BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
