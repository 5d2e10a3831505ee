"""The op `noise` and plain random numbers in Triton: programs of up to 1024 elements."""

import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.ops.common import Strided, extent, strided
from dpm_fast.triton_kernels.philox import in_order, normals4, uniforms4, words4

_BLOCK = 1024  # elements at a time: four for each thread of eight warps


@triton.jit
def _offsets(n, i, strides, S, FLAT: tl.constexpr):
    """Where the elements i of example n lie; FLAT: channels are part of the spatial run."""
    at = n * strides[0]
    if FLAT:
        return at + i * strides[2]
    return at + (i // S) * strides[1] + (i % S) * strides[2]


@triton.jit
def _example(ids, t, coefficients, n):
    """Id, timestep and coefficients, NaN for a timestep that is none."""
    row = coefficients + 2 * n
    step = tl.load(t + n)
    signal = tl.where((step >> 24) == 0, tl.load(row), float("nan"))
    return tl.load(ids + n), step, signal, tl.load(row + 1)


@triton.jit(do_not_specialize=["seed"])
def _noise_block_per_program(
    x_0, x_t, coefficients, ids, t, seed: tl.int64, stream, x_0_strides, x_t_strides, S,
    num_elements, num_blocks, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // num_blocks).to(tl.int64)
    group = (tl.program_id(0) % num_blocks).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    i = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_event = i < num_elements
    example, step, signal, spread = _example(ids, t, coefficients, n)
    eps = in_order(*normals4(seed, stream, step, example, group))
    x = tl.load(x_0 + _offsets(n, i, x_0_strides, S, FLAT), mask=in_event, other=0.0)
    out = signal * x.to(tl.float32) + spread * eps
    at = _offsets(n, i, x_t_strides, S, FLAT)
    tl.store(x_t + at, out.to(x_t.dtype.element_ty), mask=in_event)


@triton.jit(do_not_specialize=["seed"])
def _noise_gradients_per_example(
    grad_x_t, x_0, grad_x_0, grad_coefficients, coefficients, ids, t, seed: tl.int64, stream,
    grad_strides, x_0_strides, grad_x_0_strides, S, num_elements,
    FLAT: tl.constexpr, PER_X_0: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    example, step, signal, _ = _example(ids, t, coefficients, n)
    signal_sum, spread_sum = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_elements, BLOCK):
        group = tl.arange(0, BLOCK // 4).to(tl.int64) + first // 4
        i = tl.arange(0, BLOCK).to(tl.int64) + first
        in_event = i < num_elements
        at = _offsets(n, i, grad_strides, S, FLAT)
        gradient = tl.load(grad_x_t + at, mask=in_event, other=0.0).to(tl.float32)
        if PER_X_0:
            at = _offsets(n, i, grad_x_0_strides, S, FLAT)
            out = (gradient * signal).to(grad_x_0.dtype.element_ty)
            tl.store(grad_x_0 + at, out, mask=in_event)
        if SUMS:
            eps = in_order(*normals4(seed, stream, step, example, group))
            at = _offsets(n, i, x_0_strides, S, FLAT)
            x = tl.load(x_0 + at, mask=in_event, other=0.0).to(tl.float32)
            signal_sum += (gradient * x).to(tl.float64)
            spread_sum += (gradient * eps).to(tl.float64)
    if SUMS:
        is_valid = (step >> 24) == 0
        to = grad_coefficients + 2 * n
        tl.store(to, tl.where(is_valid, tl.sum(signal_sum), float("nan")))
        tl.store(to + 1, tl.where(is_valid, tl.sum(spread_sum), float("nan")))


@triton.jit(do_not_specialize=["seed"])
def _random_block_per_program(
    out,
    ids,
    t,
    seed: tl.int64,
    stream,
    num_elements,
    num_blocks,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // num_blocks).to(tl.int64)
    group = (tl.program_id(0) % num_blocks).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    i = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    example, step = tl.load(ids + n), tl.load(t + n)
    if RANDOM == 0:
        x = in_order(*words4(seed, stream, step, example, group)).to(tl.int64)
        x = tl.where((step >> 24) == 0, x, -1)
    elif RANDOM == 1:
        x = in_order(*uniforms4(seed, stream, step, example, group))
        x = tl.where((step >> 24) == 0, x, float("nan"))
    else:
        x = in_order(*normals4(seed, stream, step, example, group))
        x = tl.where((step >> 24) == 0, x, float("nan"))
    tl.store(out + n * num_elements + i, x.to(out.dtype.element_ty), mask=i < num_elements)


Source = tuple[int, int, Tensor, Tensor]  # seed, stream, ids, timesteps


def _block(num_elements: int) -> tuple[int, int]:
    """Elements of a program, and its warps: four elements for each thread."""
    block = min(_BLOCK, max(16, triton.next_power_of_2(num_elements)))
    return block, max(1, block // 128)


def _strides(tensor: Strided | None) -> tuple[int, int, int]:
    return (0, 0, 1) if tensor is None else tensor[1:]


def noise(x_0: Tensor, x_t: Tensor, coefficients: Tensor, source: Source) -> None:
    """Fills x_t; see `dpm_fast.ops.noise`."""
    seed, stream, ids, t = source
    tensors = strided(x_0), strided(x_t)
    num_examples, channels, spatial = extent(x_0.shape, tensors)
    num_elements = channels * spatial
    block, num_warps = _block(num_elements)
    num_blocks = triton.cdiv(num_elements, block)
    _noise_block_per_program[(num_examples * num_blocks,)](
        x_0, x_t, coefficients, ids, t, seed, stream, *map(_strides, tensors), spatial,
        num_elements, num_blocks, FLAT=channels == 1, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=True,
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
    block, num_warps = _block(channels * spatial)
    _noise_gradients_per_example[(num_examples,)](
        grad_x_t, x_0, grad_x_0, grad_coefficients, coefficients, ids, t, seed, stream,
        *map(_strides, tensors), spatial, channels * spatial, FLAT=channels == 1,
        PER_X_0=per_x_0, SUMS=x_0 is not None, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip


def fill(random: int, source: Source, out: Tensor) -> None:
    """Random numbers of a kind (an index of `dpm_fast.ops.noise.RANDOM`) for `out`, contiguous."""
    seed, stream, ids, t = source
    num_examples, num_elements = out.shape
    block, num_warps = _block(num_elements)
    num_blocks = triton.cdiv(num_elements, block)
    _random_block_per_program[(num_examples * num_blocks,)](
        out, ids, t, seed, stream, num_elements, num_blocks, RANDOM=random, BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
