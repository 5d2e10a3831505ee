"""The ops of binomial diffusion in Triton: one program for each block or piece of an event."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.ops.common import Strided, extent, shared_strided, strided
from dpm_fast.triton_kernels.elementary import _exp_parts, _log_tail, log1p
from dpm_fast.triton_kernels.kl import _load, _offsets, _store, _strides
from dpm_fast.triton_kernels.philox import in_order, uniforms4

_BLOCK = 1024  # elements at a time: four for each thread of eight warps
_BLOCKS_PER_PIECE = 8
_NUM_WARPS = 8
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
def _exp(x):
    """exp(x); saturates at x = 88, a NaN stays one."""
    r, scale = _exp_parts(tl.minimum(tl.maximum(x, -87.33), 88.0), x != x)
    q = r * 0.00138210552 + 0.00836867467
    tail = r * r * (((q * r + 0.0416682623) * r + 0.166665211) * r + 0.49999994)
    value = tl.where(x < -87.33, 0.0, scale * (r + tail + 1.0))
    return tl.where(x == x, value, x)  # tl.minimum lets none pass


@triton.jit
def _exp_excess(x):
    """exp(x) - 1, and exp(x) - 1 - x without loss of digits near 0."""
    near = tl.abs(x) < 0.7
    r, scale = _exp_parts(tl.minimum(tl.maximum(x, -87.0), 88.0), near)
    q = (r * 2.4940533e-5 + 2.00759285e-4) * r + 0.00138888857
    p = ((q * r + 0.00833276566) * r + 0.0416666642) * r + 0.166666701
    tail = r * r * (p * r + 0.5)
    expm1 = scale * (r + tail) + (scale - 1.0)
    return expm1, tl.where(near, tail, expm1 - x)


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and its derivative."""
    small = _exp(-tl.abs(x))
    scale = 1.0 / (1.0 + small)
    return tl.where(x < 0, small * scale, scale), small * scale * scale


@triton.jit
def _divergence(m, e):
    """ln(1 + m (exp(e) - 1)) - m e for m in [0, 1/2], and its derivative by e."""
    limited = tl.minimum(e, _MAX_LOG_ODDS)
    expm1, excess = _exp_excess(limited)
    growth = m * expm1
    far = log1p(growth) - m * limited + (1.0 - m) * tl.maximum(e - _MAX_LOG_ODDS, 0.0)
    is_near = tl.abs(e) < 0.6
    near = m * excess + _log_tail(tl.where(is_near, growth, 0.0))  # each of second order in e
    return tl.where(is_near, near, far), (1.0 - m) * (growth / (1.0 + growth))


@triton.jit
def _uniforms(seed, stream, example_id, t, first, BLOCK: tl.constexpr):
    groups = (first // 4) + tl.arange(0, BLOCK // 4)
    u_0, u_1, u_2, u_3 = uniforms4(seed, stream, t, example_id, groups)
    return in_order(u_0, u_1, u_2, u_3)


@triton.jit(do_not_specialize=["seed"])
def noise_block(
    x_0,  # [N, C, S]
    rows,  # [N, 2]
    example_ids, t,  # [N] int64
    x_t,  # [N, C, S], written
    x_0_strides, x_t_strides,
    seed: tl.int64, S, num_elements, num_blocks,
    STREAM: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // num_blocks).to(tl.int64)
    first = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    in_event = i < num_elements
    u = _uniforms(seed, STREAM, tl.load(example_ids + n), tl.load(t + n), first, BLOCK)
    is_one = _load(x_0, n, i, x_0_strides, S, in_event, FLAT) > 0.5
    drawn = (u <= _of_bit(rows + 2 * n, is_one)).to(tl.float32)
    drawn = tl.where((tl.load(t + n) >> 24) == 0, drawn, float("nan"))
    _store(x_t, drawn, n, i, x_t_strides, S, in_event, FLAT)


@triton.jit(do_not_specialize=["seed"])
def step_block(
    x_t, logit_out, known_mask, known_values, y, flip, drift,  # [N, C, S]
    rows,  # [N, 20]
    example_ids, t,  # [N] int64
    x_prev,  # [N, C, S], written; may be x_t itself
    x_t_strides, logit_out_strides, known_mask_strides, known_values_strides, y_strides,
    flip_strides, drift_strides, x_prev_strides,
    seed: tl.int64, S, num_elements, num_blocks,
    STREAM: tl.constexpr, KNOWN: tl.constexpr, OBSERVED: tl.constexpr, DRIFT: tl.constexpr,
    DETERMINISTIC: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // num_blocks).to(tl.int64)
    first = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    in_event = i < num_elements
    row = rows + _NUM_COLUMNS * n
    k = _load(x_t, n, i, x_t_strides, S, in_event, FLAT) > 0.5
    z = _load(logit_out, n, i, logit_out_strides, S, in_event, FLAT)
    offset = _of_bit(row + _O, k)
    offset = tl.where((tl.load(t + n) >> 24) == 0, offset, float("nan"))
    if OBSERVED:
        f = _load(flip, n, i, flip_strides, S, in_event, FLAT)
        gain = tl.log((1.0 - f) / tl.where(in_event, f, 0.5))
        is_seen = _load(y, n, i, y_strides, S, in_event, FLAT) > 0.5
        offset += tl.where(is_seen, gain, -gain)
    if DRIFT:
        offset += _load(drift, n, i, drift_strides, S, in_event, FLAT)
    c = tl.load(row + _C)
    # Proportional to the probabilities of 0 and 1.
    if c > 0:
        rate, _ = _sigmoid(_of_bit(row + _H, k) + z)
        one, zero = 1.0 + c * rate, _exp(-offset)
    else:
        one, zero = tl.full([BLOCK], 1.0, tl.float32), _exp(-(offset + z))
    if DETERMINISTIC:
        value = (zero < one).to(tl.float32)
    else:
        u = _uniforms(seed, STREAM, tl.load(example_ids + n), tl.load(t + n), first, BLOCK)
        value = (u * (zero + one) <= one).to(tl.float32)
    value = tl.where(zero + one == zero + one, value, float("nan"))
    if KNOWN:
        at = _offsets(n, i, known_mask_strides, S, FLAT)
        is_known = tl.load(known_mask + at, mask=in_event, other=0) != 0
        values = _load(known_values, n, i, known_values_strides, S, in_event, FLAT)
        value = tl.where(is_known, values, value)
    _store(x_prev, value, n, i, x_prev_strides, S, in_event, FLAT)


@triton.jit
def kl_piece(
    x_0, x_t, logit_out,  # [N, C, S]
    rows,  # [N, 20]
    sums,  # [N, pieces] float64, written
    grad,  # [N, C, S] of logit_out, written
    x_0_strides, x_t_strides, logit_out_strides, grad_strides,
    S, num_elements, num_pieces,
    GRADIENT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // num_pieces).to(tl.int64)
    piece = tl.program_id(0) % num_pieces
    row = rows + _NUM_COLUMNS * n
    c, is_first = tl.load(row + _C), tl.load(row + _IS_FIRST) > 0
    total = 0.0
    total = total.to(tl.float64)
    for block in range(NUM_BLOCKS):
        i = (piece * NUM_BLOCKS + block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_event = i < num_elements
        j = _load(x_0, n, i, x_0_strides, S, in_event, FLAT) > 0.5
        k = _load(x_t, n, i, x_t_strides, S, in_event, FLAT) > 0.5
        z = _load(logit_out, n, i, logit_out_strides, S, in_event, FLAT)
        slope = tl.full([BLOCK], 1.0, tl.float32)
        if c > 0:
            rate, bend = _sigmoid(_of_bits(row + _H, j, k) + tl.where(j, -z, z))
            excess = c * rate
            z = log1p(excess)
            slope = bend * (c / (1.0 + excess))
            slope = tl.where(j, -slope, slope)
        b = _of_bits(row + _B, j, k)
        e = _of_bits(row + _D, j, k) + b * z
        if is_first:
            nats = tl.maximum(e, 0.0) + log1p(_exp(-tl.abs(e)))
            per_e, _ = _sigmoid(e)
        else:
            nats, per_e = _divergence(_of_bits(row + _M, j, k), e)
        nats, per_e = tl.where(e == e, nats, e), tl.where(e == e, per_e, e)
        total += tl.sum(tl.where(in_event, nats, 0.0).to(tl.float64))
        if GRADIENT:
            _store(grad, per_e * b * slope, n, i, grad_strides, S, in_event, FLAT)
    tl.store(sums + tl.program_id(0), total)


def noise(x_0: Tensor, rows: Tensor, source: Source, x_t: Tensor) -> None:
    """Launch `noise_block`."""
    seed, stream, example_ids, t = source
    tensors = [strided(x_0), strided(x_t)]
    n, channels, spatial = extent(x_0.shape, tensors)
    num_blocks = -(-channels * spatial // _BLOCK)
    noise_block[(n * num_blocks,)](
        x_0, rows, example_ids, t, x_t, *(_strides(tensor) for tensor in tensors),
        seed, spatial, channels * spatial, num_blocks,
        STREAM=stream, FLAT=channels == 1, BLOCK=_BLOCK,
        num_warps=_NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def step(
    inputs: list[Tensor | None],  # x_t, logit_out, known mask and values, y, flip, drift
    rows: Tensor,
    source: Source,
    deterministic: bool,
    x_prev: Tensor,
) -> None:
    """Launch `step_block`."""
    seed, stream, example_ids, t = source
    x_t, _, known_mask, _, y, _, drift = inputs
    assert x_t is not None
    tensors: list[Strided | None] = [shared_strided(x, x_t) for x in (*inputs, x_prev)]
    n, channels, spatial = extent(x_t.shape, tensors)
    num_blocks = -(-channels * spatial // _BLOCK)
    pointers = [x_t if x is None else x for x in inputs]
    if known_mask is not None:
        pointers[2] = known_mask.view(torch.uint8)
    step_block[(n * num_blocks,)](
        *pointers, rows, example_ids, t, x_prev, *(_strides(tensor) for tensor in tensors),
        seed, spatial, channels * spatial, num_blocks,
        STREAM=stream, KNOWN=known_mask is not None, OBSERVED=y is not None,
        DRIFT=drift is not None, DETERMINISTIC=deterministic, FLAT=channels == 1, BLOCK=_BLOCK,
        num_warps=_NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def kl(inputs: list[Tensor], rows: Tensor, nats: Tensor, grad: Tensor | None) -> None:
    """Launch `kl_piece` for x_0, x_t and logit_out, and sum the pieces in their order."""
    tensors = [strided(x) for x in (*inputs, grad)]
    n, channels, spatial = extent(inputs[0].shape, tensors)
    num_elements = channels * spatial
    num_blocks = min(_BLOCKS_PER_PIECE, -(-num_elements // _BLOCK))
    num_pieces = -(-num_elements // (_BLOCK * num_blocks))
    sums = nats if num_pieces == 1 else nats.new_empty(n, num_pieces)
    kl_piece[(n * num_pieces,)](
        *inputs, rows, sums, inputs[2] if grad is None else grad,
        *(_strides(tensor) for tensor in tensors), spatial, num_elements, num_pieces,
        GRADIENT=grad is not None, FLAT=channels == 1, BLOCK=_BLOCK, NUM_BLOCKS=num_blocks,
        num_warps=_NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if num_pieces > 1:
        nats.copy_(sums.sum(dim=1))
