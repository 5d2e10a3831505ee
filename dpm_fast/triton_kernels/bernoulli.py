"""The ops of binomial diffusion in Triton: programs of a tile, or of a piece of each event."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.triton_kernels.elementary import exp, exp_excess, log1p, log_tail, sigmoid
from dpm_fast.triton_kernels.philox import in_order, uniforms4
from dpm_fast.triton_kernels.tiles import (
    NUM_WARPS,
    Strided,
    add_pieces,
    examples_of,
    extent,
    in_a_row,
    load,
    offsets,
    room_for_pieces,
    shared_strided,
    store,
    strided,
    strides_of,
    tile_of_program,
    tile_shape,
)

_BLOCKS_PER_PIECE = 8
# Where the columns of a row begin, see dpm_fast.reference.BernoulliRow.
_NUM_COLUMNS = tl.constexpr(20)
_C, _IS_FIRST, _O, _D = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_B, _H, _M = tl.constexpr(8), tl.constexpr(12), tl.constexpr(16)
_MAX_LOG_ODDS = tl.constexpr(80.0)  # as dpm_fast.reference.max_log_odds

Source = tuple[int, int, Tensor, Tensor]  # seed, stream, example ids [N], t [N]


@triton.jit
def _of_bit(values, k):
    return tl.where(k, tl.load(values + 1), tl.load(values))


@triton.jit
def _of_bits(values, j, k):
    return tl.where(j, _of_bit(values + 2, k), _of_bit(values, k))


@triton.jit
def _divergence(m, e):
    """ln(1 + m (exp(e) - 1)) - m e for m in [0, 1/2], and its derivative by e."""
    limited = tl.minimum(e, _MAX_LOG_ODDS)
    expm1, excess = exp_excess(limited)
    growth = m * expm1
    far = log1p(growth) - m * limited + (1.0 - m) * tl.maximum(e - _MAX_LOG_ODDS, 0.0)
    is_near = tl.abs(e) < 0.6
    near = m * excess + log_tail(tl.where(is_near, growth, 0.0))  # each of second order in e
    return tl.where(is_near, near, far), (1.0 - m) * (growth / (1.0 + growth))


@triton.jit(do_not_specialize=["seed", "N"])
def noise_tile(
    x_0,  # [N, C, S]
    rows,  # [N, 2]
    example_ids, t,  # [N] int64
    x_t,  # [N, C, S], written
    x_0_strides, x_t_strides,
    seed: tl.int64, S, N, num_elements, num_blocks,
    STREAM: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i, groups, inside = tile_of_program(N, num_elements, num_blocks, ROWS, BLOCK)
    step = tl.load(t + n)
    u = in_order(*uniforms4(seed, STREAM, step, tl.load(example_ids + n), groups))
    is_one = load(x_0, n, i, x_0_strides, S, inside, FLAT) > 0.5
    drawn = (u <= _of_bit(rows + 2 * n, is_one)).to(tl.float32)
    drawn = tl.where((step >> 24) == 0, drawn, float("nan"))
    store(x_t, drawn, n, i, x_t_strides, S, inside, FLAT)


@triton.jit(do_not_specialize=["seed", "N"])
def step_tile(
    x_t, logit_out, known_mask, known_values, y, flip, drift,  # [N, C, S]
    rows,  # [N, 20]
    example_ids, t,  # [N] int64
    x_prev,  # [N, C, S], written; may be x_t itself
    x_t_strides, logit_out_strides, known_mask_strides, known_values_strides, y_strides,
    flip_strides, drift_strides, x_prev_strides,
    seed: tl.int64, S, N, num_elements, num_blocks,
    STREAM: tl.constexpr, KNOWN: tl.constexpr, OBSERVED: tl.constexpr, DRIFT: tl.constexpr,
    DETERMINISTIC: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i, groups, inside = tile_of_program(N, num_elements, num_blocks, ROWS, BLOCK)
    row, step = rows + _NUM_COLUMNS * n, tl.load(t + n)
    k = load(x_t, n, i, x_t_strides, S, inside, FLAT) > 0.5
    z = load(logit_out, n, i, logit_out_strides, S, inside, FLAT)
    offset = _of_bit(row + _O, k)
    offset = tl.where((step > 0) & ((step >> 24) == 0), offset, float("nan"))
    if OBSERVED:
        f = load(flip, n, i, flip_strides, S, inside, FLAT)
        gain = tl.log((1.0 - f) / tl.where(inside, f, 0.5))
        is_seen = load(y, n, i, y_strides, S, inside, FLAT) > 0.5
        offset += tl.where(is_seen, gain, -gain)
    if DRIFT:
        offset += load(drift, n, i, drift_strides, S, inside, FLAT)
    c = tl.load(row + _C)
    # Proportional to the probabilities of 0 and 1.
    zero, one = exp(-tl.where(c > 0, offset, offset + z)), tl.full([ROWS, BLOCK], 1.0, tl.float32)
    if tl.max(c) > 0:
        rate, _ = sigmoid(_of_bit(row + _H, k) + z)
        one = tl.where(c > 0, 1.0 + c * rate, one)
    if DETERMINISTIC:
        value = (zero < one).to(tl.float32)
    else:
        u = in_order(*uniforms4(seed, STREAM, step, tl.load(example_ids + n), groups))
        value = (u * (zero + one) <= one).to(tl.float32)
    value = tl.where(zero + one == zero + one, value, float("nan"))
    if KNOWN:
        at = offsets(n, i, known_mask_strides, S, FLAT)
        is_known = tl.load(known_mask + at, mask=inside, other=0) != 0
        value = tl.where(
            is_known, load(known_values, n, i, known_values_strides, S, inside, FLAT), value
        )
    store(x_prev, value, n, i, x_prev_strides, S, inside, FLAT)


@triton.jit(do_not_specialize=["N"])
def kl_pieces(
    x_0, x_t, logit_out,  # [N, C, S]
    rows,  # [N, 20]
    sums,  # [N, pieces] float64, written
    grad,  # [N, C, S] of logit_out, written
    x_0_strides, x_t_strides, logit_out_strides, grad_strides,
    S, N, num_elements, num_pieces, GRADIENT: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    examples, counts = examples_of(tl.program_id(0) // num_pieces, N, num_elements, ROWS)
    piece = tl.program_id(0) % num_pieces
    n = examples[:, None]
    row = rows + _NUM_COLUMNS * n
    c, is_first = tl.load(row + _C), tl.load(row + _IS_FIRST) > 0
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for block in range(NUM_BLOCKS):
        i = in_a_row((piece * NUM_BLOCKS + block).to(tl.int64) * BLOCK, BLOCK)
        inside = i < counts[:, None]
        j = load(x_0, n, i, x_0_strides, S, inside, FLAT) > 0.5
        k = load(x_t, n, i, x_t_strides, S, inside, FLAT) > 0.5
        z = load(logit_out, n, i, logit_out_strides, S, inside, FLAT)
        slope = tl.full([ROWS, BLOCK], 1.0, tl.float32)
        if tl.max(c) > 0:
            rate, bend = sigmoid(_of_bits(row + _H, j, k) + tl.where(j, -z, z))
            excess = c * rate
            bend *= c / (1.0 + excess)
            z = tl.where(c > 0, log1p(excess), z)
            slope = tl.where(c > 0, tl.where(j, -bend, bend), slope)
        b = _of_bits(row + _B, j, k)
        e = _of_bits(row + _D, j, k) + b * z
        nats, per_e = _divergence(_of_bits(row + _M, j, k), e)
        if tl.max(is_first.to(tl.int32)) > 0:
            code_length = tl.maximum(e, 0.0) + log1p(exp(-tl.abs(e)))
            rate, _ = sigmoid(e)
            nats, per_e = tl.where(is_first, code_length, nats), tl.where(is_first, rate, per_e)
        nats, per_e = tl.where(e == e, nats, e), tl.where(e == e, per_e, e)
        total += tl.where(inside, nats, 0.0).to(tl.float64)
        if GRADIENT:
            store(grad, per_e * b * slope, n, i, grad_strides, S, inside, FLAT)
    tl.store(sums + examples * num_pieces + piece, tl.sum(total, axis=1), mask=counts > 0)


def noise(x_0: Tensor, rows: Tensor, source: Source, x_t: Tensor) -> None:
    """Launch `noise_tile`."""
    seed, stream, example_ids, t = source
    tensors = [strided(x_0), strided(x_t)]
    n, channels, spatial = extent(x_0.shape, tensors)
    num_rows, block = tile_shape(channels * spatial)
    num_blocks = triton.cdiv(channels * spatial, block)
    noise_tile[(triton.cdiv(n, num_rows) * num_blocks,)](
        x_0, rows, example_ids, t, x_t, *map(strides_of, tensors),
        seed, spatial, n, channels * spatial, num_blocks,
        STREAM=stream, FLAT=channels == 1, ROWS=num_rows, BLOCK=block,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def step(
    inputs: list[Tensor | None],  # x_t, logit_out, known mask and values, y, flip, drift
    rows: Tensor,
    source: Source,
    deterministic: bool,
    x_prev: Tensor,
) -> None:
    """Launch `step_tile`."""
    seed, stream, example_ids, t = source
    x_t, _, known_mask, _, y, _, drift = inputs
    assert x_t is not None
    tensors: list[Strided | None] = [shared_strided(x, x_t) for x in (*inputs, x_prev)]
    n, channels, spatial = extent(x_t.shape, tensors)
    num_rows, block = tile_shape(channels * spatial)
    num_blocks = triton.cdiv(channels * spatial, block)
    pointers = [x_t if x is None else x for x in inputs]
    if known_mask is not None:
        pointers[2] = known_mask.view(torch.uint8)
    step_tile[(triton.cdiv(n, num_rows) * num_blocks,)](
        *pointers, rows, example_ids, t, x_prev, *map(strides_of, tensors),
        seed, spatial, n, channels * spatial, num_blocks,
        STREAM=stream, KNOWN=known_mask is not None, OBSERVED=y is not None,
        DRIFT=drift is not None, DETERMINISTIC=deterministic, FLAT=channels == 1,
        ROWS=num_rows, BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def kl(inputs: list[Tensor], rows: Tensor, nats: Tensor, grad: Tensor | None) -> None:
    """Launch `kl_pieces` for x_0, x_t and logit_out, and sum the pieces in their order."""
    tensors = [strided(x) for x in (*inputs, grad)]
    n, channels, spatial = extent(inputs[0].shape, tensors)
    num_elements = channels * spatial
    num_rows, block = tile_shape(num_elements)
    num_blocks = min(_BLOCKS_PER_PIECE, triton.cdiv(num_elements, block))
    num_pieces = triton.cdiv(num_elements, block * num_blocks)
    sums = room_for_pieces(nats, num_pieces)
    kl_pieces[(triton.cdiv(n, num_rows) * num_pieces,)](
        *inputs, rows, sums, inputs[2] if grad is None else grad,
        *map(strides_of, tensors), spatial, n, num_elements, num_pieces,
        GRADIENT=grad is not None, FLAT=channels == 1, ROWS=num_rows, BLOCK=block,
        NUM_BLOCKS=num_blocks, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    add_pieces(sums, nats)
