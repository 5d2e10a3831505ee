"""The op `kl` in Triton: programs of a piece of each event."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.triton_kernels.elementary import expm1, expm1_minus_identity, limited, log1p
from dpm_fast.triton_kernels.tiles import (
    ELEMENTS,
    FEW_ELEMENTS,
    NUM_WARPS,
    add_pieces,
    examples_of,
    extent,
    in_a_row,
    load,
    room_for_pieces,
    store,
    strided,
    strides_of,
    tile_shape,
)

_BLOCKS_PER_PIECE = 8
_NUM_COLUMNS = tl.constexpr(15)
_MAX_SHIFT = tl.constexpr(60.0)  # of the log-variance, as dpm_fast.reference.max_shift
_LOG_2PI = tl.constexpr(1.8378770664093454836)


@triton.jit
def _log_scaled_erfc(z):
    """ln(exp(z^2) erfc(z)) for z >= 0 in float64, error 1e-11: with t = 2 / (2 + z) it is
    ln t + P(2 t - 1), P a Chebyshev fit of degree 17."""
    t = 2.0 / (2.0 + z)
    y = 2.0 * t - 1.0
    p = y * 9.827451900592404e-08 + 3.150801105067081e-06
    p = p * y - 4.140970257891011e-06
    p = p * y - 2.0724462712152834e-05
    p = p * y + 3.5416346906743926e-05
    p = p * y + 6.227611781496803e-05
    p = p * y - 0.00017625598701398598
    p = p * y - 8.852674333913804e-05
    p = p * y + 0.0006743112315422201
    p = p * y - 0.00014801109316469065
    p = p * y - 0.0023459302020781498
    p = p * y + 0.001759271642240845
    p = p * y + 0.008824949710309267
    p = p * y - 0.00987272199321559
    p = p * y - 0.04689561064337589
    p = p * y + 0.04734330805941031
    p = p * y + 0.6726432239801938
    p = p * y - 0.6717940840642004
    return tl.log(t) + p


@triton.jit
def _exact_bin_nats(x_0, difference, sigma2, half_width, lowest, highest):
    """Code length of the bin around x_0 and its derivatives, float64: the forms of csrc/bins.h."""
    open_below = x_0 < lowest + half_width
    open_above = (x_0 > highest - half_width) & (x_0 >= lowest + half_width)
    one_sided = open_below | open_above
    sigma = tl.sqrt(sigma2)
    middle, width = difference / sigma, 2.0 * half_width / sigma
    mirrored = open_above | ((middle > 0) & (x_0 >= lowest + half_width))
    sign = tl.where(mirrored, -1.0, 1.0)
    inner = 0.5 * width + sign * middle

    square, curvature = middle * middle, width * width / 12.0
    thin = 0.5 * (square + _LOG_2PI) - tl.log(width) + 0.5 * curvature * (1.0 - square)
    thin_per_difference = middle * (1.0 - curvature) / sigma
    thin_per_log_variance = 0.5 * (1.0 - square + curvature * (2.0 * square - 1.0))

    near = tl.maximum(inner, 0.0) * 0.70710678118654752440
    far = tl.maximum(width * 0.70710678118654752440 - near, 0.0)
    density_near, density_far = tl.exp(-near * near), tl.exp(-far * far)
    outside = density_near * tl.exp(_log_scaled_erfc(near))
    outside += tl.where(one_sided, 0.0, density_far * tl.exp(_log_scaled_erfc(far)))
    probability = 1.0 - 0.5 * outside
    center = -tl.log(probability)
    scale = 0.39894228040143267794 / probability
    center_inner, center_outer = scale * density_near, scale * density_far

    a = tl.maximum(-inner, 0.0) * 0.70710678118654752440
    log_scaled = _log_scaled_erfc(a)
    fall = width * (0.5 * width + 1.41421356237309504880 * a)
    log_ratio = fall + log_scaled - _log_scaled_erfc(a + width * 0.70710678118654752440)
    missing = tl.where(one_sided, 0.0, tl.log(1.0 - tl.exp(-log_ratio)))
    tail = a * a - (log_scaled - 0.69314718055994530942) - missing
    tail_inner = 0.79788456080286535588 * tl.exp(-log_scaled - missing)
    tail_outer = tail_inner * tl.exp(-fall)

    is_center = inner > 0
    at_inner = tl.where(is_center, center_inner, tail_inner)
    at_outer = tl.where(one_sided, 0.0, tl.where(is_center, center_outer, tail_outer))
    per_difference = sign * (at_outer - at_inner) / sigma
    per_log_variance = 0.5 * ((at_inner - at_outer) * inner + at_outer * width)
    narrow = (width * (1.0 + tl.abs(middle)) < 1e-3) & (x_0 >= lowest + half_width)
    narrow = narrow & (x_0 <= highest - half_width)
    return (
        tl.where(narrow, thin, tl.where(is_center, center, tail)),
        tl.where(narrow, thin_per_difference, per_difference),
        tl.where(narrow, thin_per_log_variance, per_log_variance),
    )


@triton.jit
def _tanh_cdf(z):
    """[iDDPM]'s normal CDF and its density, float64."""
    inner = 0.79788456080286535588 * (z + 0.044715 * z * z * z)
    e = tl.exp(-2.0 * tl.abs(inner))
    tanh = tl.where(inner < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    density = 0.5 * (1.0 - tanh * tanh) * 0.79788456080286535588 * (1.0 + 0.134145 * z * z)
    return 0.5 * (1.0 + tanh), density


@triton.jit
def _tanh_bin_nats(x_0, difference, sigma2, half_width, lowest, highest):
    """The same with [iDDPM]'s CDF and a probability of at least 1e-12."""
    open_below = x_0 < lowest + half_width
    open_above = (x_0 > highest - half_width) & (x_0 >= lowest + half_width)
    precision = 1.0 / tl.sqrt(sigma2)
    upper, lower = (difference + half_width) * precision, (difference - half_width) * precision
    cdf_upper, at_upper = _tanh_cdf(upper)
    cdf_lower, at_lower = _tanh_cdf(lower)
    cdf_upper, at_upper = tl.where(open_above, 1.0, cdf_upper), tl.where(open_above, 0.0, at_upper)
    cdf_lower, at_lower = tl.where(open_below, 0.0, cdf_lower), tl.where(open_below, 0.0, at_lower)
    probability = cdf_upper - cdf_lower
    floored = probability < 1e-12
    probability = tl.where(floored, 1e-12, probability)
    per_difference = (at_lower - at_upper) * precision / probability
    per_log_variance = 0.5 * (upper * at_upper - lower * at_lower) / probability
    return (
        -tl.log(probability),
        tl.where(floored, 0.0, per_difference),
        tl.where(floored, 0.0, per_log_variance),
    )


@triton.jit(do_not_specialize=["N"])
def kl_pieces(
    x_0, x_t, mu_out, sigma2_out,  # [N, C, S]
    rows,  # [N, 15]
    nats_of_pieces,  # [N, pieces] float64, written
    grad_rows_of_pieces,  # [N, pieces, 15] float64, written
    grad_x_0, grad_x_t, grad_mu_out, grad_sigma2_out,  # [N, C, S]
    x_0_strides, x_t_strides, mu_out_strides, sigma2_out_strides,
    grad_x_0_strides, grad_x_t_strides, grad_mu_out_strides, grad_sigma2_out_strides,
    S, N, num_elements, num_pieces,
    half_width: tl.float64, lowest: tl.float64, highest: tl.float64,  # float32 unless it is said
    FLAT: tl.constexpr, LEARNED: tl.constexpr, EDGE: tl.constexpr,
    WANT_X_0: tl.constexpr, WANT_X_T: tl.constexpr, WANT_MU: tl.constexpr,
    WANT_SIGMA2: tl.constexpr, WANT_ROWS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    examples, counts = examples_of(tl.program_id(0) // num_pieces, N, num_elements, ROWS)
    piece = tl.program_id(0) % num_pieces
    n = examples[:, None]
    row = rows + n * _NUM_COLUMNS
    a, c, e = tl.load(row), tl.load(row + 2), tl.load(row + 3)
    p, q = tl.load(row + 4), tl.load(row + 5)
    low, high = tl.load(row + 6), tl.load(row + 7)
    s, base, g = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
    c_0, d = tl.load(row + 11), tl.load(row + 12)
    delta_0, is_first = tl.load(row + 13), tl.load(row + 14) > 0

    total = tl.zeros([ROWS, BLOCK], tl.float64)
    per_a = tl.zeros([ROWS], tl.float64)
    per_c, per_e, per_p, per_q = per_a, per_a, per_a, per_a
    per_low, per_high, per_s, per_base, per_g = per_a, per_a, per_a, per_a, per_a
    per_c_0, per_d, per_delta_0 = per_a, per_a, per_a
    for block in range(NUM_BLOCKS):
        i = in_a_row((piece * NUM_BLOCKS + block).to(tl.int64) * BLOCK, BLOCK)
        inside = i < counts[:, None]
        x_0_i = load(x_0, n, i, x_0_strides, S, inside, FLAT)
        x_t_i = load(x_t, n, i, x_t_strides, S, inside, FLAT)
        mu_i = load(mu_out, n, i, mu_out_strides, S, inside, FLAT)

        if LEARNED:
            z = load(sigma2_out, n, i, sigma2_out_strides, S, inside, FLAT)
            v = limited(s * z, -_MAX_SHIFT, _MAX_SHIFT)
            shrinks = v < 0
            excess = expm1(tl.abs(v))
            weighted = tl.where(shrinks, 1.0 - g, g) * excess
            bend = 1.0 + weighted
            up = tl.where(shrinks, 1.0, 1.0 + excess)
            down = tl.where(shrinks, 1.0 + excess, 1.0)
            growth = tl.maximum(v, 0.0) - log1p(weighted)
            sigma2 = base * up / bend
            precision = bend / (base * up)
            slope = tl.where(v == s * z, (1.0 - g) * down / bend, 0.0)
        else:
            growth, slope = tl.zeros_like(mu_i), tl.zeros_like(mu_i)
            sigma2, precision = growth + base, growth + 1.0 / base

        raw = p * x_t_i + q * mu_i
        prediction = limited(raw, low, high)
        free = (raw >= low) & (raw <= high)
        scaled = c * mu_i + e * x_t_i
        difference = c_0 * x_0_i + d * x_t_i - a * prediction - sigma2 * scaled

        delta = delta_0 - growth
        near_kl = expm1_minus_identity(delta)
        weighted_difference = difference * precision
        square = 0.5 * difference * weighted_difference
        nats = (0.5 * tl.where(is_first, _LOG_2PI - delta, near_kl) + square).to(tl.float64)
        per_difference = weighted_difference
        per_log_variance = -square
        per_delta = 0.5 * tl.where(is_first, -1.0, near_kl + delta)
        if EDGE != 0:
            if tl.max(is_first.to(tl.int32)) > 0:
                if EDGE == 1:
                    in_bin, per_difference_64, per_log_variance_64 = _exact_bin_nats(
                        x_0_i.to(tl.float64), difference.to(tl.float64), sigma2.to(tl.float64),
                        half_width, lowest, highest,
                    )  # fmt: skip
                else:
                    in_bin, per_difference_64, per_log_variance_64 = _tanh_bin_nats(
                        x_0_i.to(tl.float64), difference.to(tl.float64), sigma2.to(tl.float64),
                        half_width, lowest, highest,
                    )  # fmt: skip
                nats = tl.where(is_first, in_bin, nats)
                per_difference = tl.where(
                    is_first, per_difference_64.to(tl.float32), per_difference
                )
                per_log_variance = tl.where(
                    is_first, per_log_variance_64.to(tl.float32), per_log_variance
                )
                per_delta = tl.where(is_first, 0.0, per_delta)
        total += tl.where(inside, nats, 0.0)

        through = tl.where(free, a, 0.0)
        per_growth = per_log_variance - per_delta - per_difference * sigma2 * scaled
        if WANT_X_0:
            store(grad_x_0, per_difference * c_0, n, i, grad_x_0_strides, S, inside, FLAT)
        if WANT_X_T:
            value = per_difference * (d - through * p - sigma2 * e)
            store(grad_x_t, value, n, i, grad_x_t_strides, S, inside, FLAT)
        if WANT_MU:
            value = -per_difference * (through * q + sigma2 * c)
            store(grad_mu_out, value, n, i, grad_mu_out_strides, S, inside, FLAT)
        if WANT_SIGMA2:
            value = per_growth * slope * s
            store(grad_sigma2_out, value, n, i, grad_sigma2_out_strides, S, inside, FLAT)
        if WANT_ROWS:
            per_difference = tl.where(inside, per_difference, 0.0)
            per_growth = tl.where(inside, per_growth, 0.0)
            per_delta = tl.where(inside, per_delta, 0.0)
            per_scaled = -per_difference * sigma2
            per_a += tl.sum((-per_difference * prediction).to(tl.float64), axis=1)
            per_c += tl.sum((per_scaled * mu_i).to(tl.float64), axis=1)
            per_e += tl.sum((per_scaled * x_t_i).to(tl.float64), axis=1)
            per_p += tl.sum((-per_difference * through * x_t_i).to(tl.float64), axis=1)
            per_q += tl.sum((-per_difference * through * mu_i).to(tl.float64), axis=1)
            per_low += tl.sum(tl.where(raw < low, -per_difference * a, 0.0).to(tl.float64), axis=1)
            per_high += tl.sum(
                tl.where(raw > high, -per_difference * a, 0.0).to(tl.float64), axis=1
            )
            per_base += tl.sum(((per_growth + per_delta) / base).to(tl.float64), axis=1)
            per_c_0 += tl.sum((per_difference * x_0_i).to(tl.float64), axis=1)
            per_d += tl.sum((per_difference * x_t_i).to(tl.float64), axis=1)
            per_delta_0 += tl.sum(per_delta.to(tl.float64), axis=1)
            if LEARNED:
                sign = tl.where(shrinks, 1.0, -1.0)
                per_s += tl.sum((per_growth * slope * z).to(tl.float64), axis=1)
                per_g += tl.sum((per_growth * sign * excess / bend).to(tl.float64), axis=1)

    of_piece = examples * num_pieces + piece
    is_variance = tl.reshape(base, [ROWS]) > 0
    sum_of_nats = tl.where(is_variance, tl.sum(total, axis=1), float("nan"))
    tl.store(nats_of_pieces + of_piece, sum_of_nats, mask=counts > 0)
    if WANT_ROWS:
        to = grad_rows_of_pieces + of_piece * _NUM_COLUMNS
        none = tl.zeros([ROWS], tl.float64)  # of b, which is not read, and of the flag
        tl.store(to, per_a, mask=counts > 0)
        tl.store(to + 1, none, mask=counts > 0)
        tl.store(to + 2, per_c, mask=counts > 0)
        tl.store(to + 3, per_e, mask=counts > 0)
        tl.store(to + 4, per_p, mask=counts > 0)
        tl.store(to + 5, per_q, mask=counts > 0)
        tl.store(to + 6, per_low, mask=counts > 0)
        tl.store(to + 7, per_high, mask=counts > 0)
        tl.store(to + 8, per_s, mask=counts > 0)
        tl.store(to + 9, per_base, mask=counts > 0)
        tl.store(to + 10, per_g, mask=counts > 0)
        tl.store(to + 11, per_c_0, mask=counts > 0)
        tl.store(to + 12, per_d, mask=counts > 0)
        tl.store(to + 13, per_delta_0, mask=counts > 0)
        tl.store(to + 14, none, mask=counts > 0)


def kl(
    inputs: Sequence[Tensor | None],  # x_0, x_t, mu_out, sigma2_out: [N, C, *spatial]
    rows: Tensor,  # [N, 15]
    edge: int,
    bins: Sequence[float],
    nats: Tensor,  # [N] float64, written
    grads: Sequence[Tensor | None],  # of the inputs and the rows, written
) -> None:
    """Launch `kl_pieces` and sum the pieces in their order."""
    x_0, _, mu_out, sigma2_out = inputs
    assert x_0 is not None
    layouts = [strided(x) for x in (*inputs, *grads[:4])]
    n, channels, spatial = extent(x_0.shape, layouts)
    num_elements = channels * spatial
    num_rows, block = tile_shape(num_elements, FEW_ELEMENTS if edge else ELEMENTS)
    num_pieces = triton.cdiv(num_elements, block * _BLOCKS_PER_PIECE)
    num_blocks = min(_BLOCKS_PER_PIECE, triton.cdiv(num_elements, block))
    nats_of_pieces = room_for_pieces(nats, num_pieces)
    grad_rows = grads[4]
    rows_of_pieces = nats if grad_rows is None else room_for_pieces(grad_rows, num_pieces)
    absent = mu_out  # a pointer that the kernel does not follow
    kl_pieces[(triton.cdiv(n, num_rows) * num_pieces,)](
        *(absent if x is None else x for x in inputs), rows, nats_of_pieces, rows_of_pieces,
        *(absent if g is None else g for g in grads[:4]),
        *map(strides_of, layouts),
        spatial, n, num_elements, num_pieces, *bins,
        FLAT=channels == 1, LEARNED=sigma2_out is not None, EDGE=edge,
        WANT_X_0=grads[0] is not None, WANT_X_T=grads[1] is not None,
        WANT_MU=grads[2] is not None, WANT_SIGMA2=grads[3] is not None,
        WANT_ROWS=grads[4] is not None,
        ROWS=num_rows, BLOCK=block, NUM_BLOCKS=num_blocks, num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    add_pieces(nats_of_pieces, nats)
    if grad_rows is not None:
        add_pieces(rows_of_pieces, grad_rows)
