"""The op `multiscale_conv` in Triton: convolutions as matrix products, gathered as they are read.

Images are kept channels last: a row of a product is a pixel of the batch, a column a channel. The
sum over the taps of a kernel and their channels is one axis, K K C long, and is padded once, at its
end: 20 channels fill 180 of 192 places, where padding each tap would fill 180 of 288.

Where there is a coarser scale, rows go by fours: pixels that share one of the coarser image follow
each other. So each scale adds the coarser one's result as it writes its own; and who writes an
image at full size also writes its mean-pooled copy, of a quarter of the bytes, where pooling later
would read the image again. In the backward pass the gradient goes to the layer below the same way,
through its nonlinearity and pooled, and is itself never stored.

Bits of the output and of the gradient of x do not depend on the batch: blocks are a function of
the channels and of the kernel alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpm_fast.ops.common import takes_tf32
from dpm_fast.triton_kernels.elementary import exp, expm1, log1p
from dpm_fast.triton_kernels.tiles import NUM_WARPS

# Programs of a weight gradient: about four for each multiprocessor of a large GPU.
_PROGRAMS = 512
_POOL_ELEMENTS = 1024  # of a program that pools: two for each thread and corner

# Its matrix products take bfloat16 for integers (triton-lang/triton#11584).
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _pixels_of_rows(first, num_rows, H, W, BY_FOURS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from the first on: number of the pixel in the batch, y, x; y is far outside of the image
    where there is none."""
    row = tl.arange(0, BLOCK)
    image = first // (H * W)  # of the first row; the others are counted from its first pixel
    i = (first - image * H * W).to(tl.int32) + row
    if BY_FOURS:
        corner, column = i % 4, i // 4 % (W // 2)
        y, x = i // (2 * W) * 2 + corner // 2, column * 2 + corner % 2
    else:
        y, x = i // W, i % W
    pixel = image * H * W + y * W + x
    return pixel, tl.where(first + row < num_rows, y % H, 1 << 30), x


@triton.jit
def _taps(k, H, W, TURNED: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Where in the image the places k of a sum are read: dy, dx, and how far that is in memory.
    TURNED: where a pixel is read that the taps of a kernel would bring here."""
    tap = k // C
    dy, dx = tap // K - K // 2, tap % K - K // 2
    if TURNED:
        dy, dx = -dy, -dx
    dy = tl.where(k < K * K * C, dy, H)  # outside, for each pixel
    return dy, dx, (dy * W + dx) * C + k % C


@triton.jit
def _convolve(
    image,  # [pixels, C]
    kernel,  # [K K C, F]
    pixel, y, x, f, H, W,
    TURNED: tl.constexpr, C: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_F] float32: sums over all taps and channels."""
    total = tl.zeros([BLOCK, BLOCK_F], tl.float32)
    center = image + pixel * C
    for first in range(0, K * K * C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        dy, dx, from_center = _taps(k, H, W, TURNED, C, K)
        to_y, to_x = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
        inside = (to_y >= 0) & (to_y < H) & (to_x >= 0) & (to_x < W)
        values = tl.load(center[:, None] + from_center[None, :], mask=inside, other=0.0)
        factors = tl.load(
            kernel + k[:, None] * F + f[None, :],
            mask=(k < K * K * C)[:, None] & (f < F)[None, :], other=0.0,
        )  # fmt: skip
        total = _dot(values, factors, total, PRECISION)
    return total


@triton.jit
def _sum_of_fours(x, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr):
    """[BLOCK / 4, BLOCK_F], summed in the order in which `pool` does."""
    corners = tl.reshape(x, [BLOCK // 4, 2, 2, BLOCK_F])
    left, right = tl.split(tl.permute(corners, (0, 3, 1, 2)))
    upper_left, lower_left = tl.split(left)
    upper_right, lower_right = tl.split(right)
    return upper_left + upper_right + lower_left + lower_right


@triton.jit
def _through_nonlinearity(grad, signs, out, pixel, f, inside, slope, F: tl.constexpr):
    """Of a sum, from the gradient of its leaky ReLU; or, given ``out``, of its softplus."""
    if signs is not None:
        eight = tl.load(
            signs + pixel[:, None] * ((F + 7) // 8) + (f // 8)[None, :], mask=inside, other=0
        )
        is_positive = (eight.to(tl.int32) >> (f % 8)[None, :]) & 1
        grad = tl.where(is_positive != 0, grad, grad * slope)
    if out is not None:
        softplus = tl.load(out + pixel[:, None] * F + f[None, :], mask=inside, other=0.0)
        grad *= -expm1(-softplus.to(tl.float32))
    return grad


@triton.jit(do_not_specialize=["num_rows", "H", "W"])
def convolve_scale(
    image,  # [N, H, W, C]
    kernel,  # [K K C, F]
    bias,  # [F], or [H W, F] if PER_LOCATION
    coarser,  # [N, H / 2, W / 2, F] float32: the result of the coarser scales, or None
    out,  # [N, H, W, F], written
    pooled,  # [N, H / 2, W / 2, F], written, or None
    signs,  # [N, H, W, (F + 7) / 8], written: a bit for each sum, or None
    num_rows, H, W, slope, weight,
    PER_LOCATION: tl.constexpr, LEAKY: tl.constexpr, SOFTPLUS: tl.constexpr,
    BY_FOURS: tl.constexpr, C: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One scale of a layer, and the coarser ones added to it."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pixel, y, x = _pixels_of_rows(first, num_rows, H, W, BY_FOURS, BLOCK)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (y < H)[:, None] & (f < F)[None, :]
    value = _convolve(
        image, kernel, pixel, y, x, f, H, W, False, C, F, K, PRECISION, BLOCK, BLOCK_F, BLOCK_K
    )
    location = y * W + x if PER_LOCATION else tl.zeros_like(y)
    value += tl.load(bias + location[:, None] * F + f[None, :], mask=inside, other=0.0)
    if signs is not None:
        bits = tl.reshape((value > 0).to(tl.int32), [BLOCK, BLOCK_F // 8, 8])
        eights = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
        eight = tl.program_id(1) * (BLOCK_F // 8) + tl.arange(0, BLOCK_F // 8)
        num_eights = (F + 7) // 8
        tl.store(
            signs + pixel[:, None] * num_eights + eight[None, :], eights.to(tl.uint8),
            mask=(y < H)[:, None] & (eight < num_eights)[None, :],
        )  # fmt: skip
    if LEAKY:
        value = tl.where(value > 0, value, value * slope)
    if coarser is not None:
        coarse = first // 4 + tl.arange(0, BLOCK) // 4
        value += tl.load(coarser + coarse[:, None] * F + f[None, :], mask=inside, other=0.0)
    if SOFTPLUS:
        value = tl.where(value > 0, value, 0.0) + log1p(exp(-tl.abs(value)))
    value = (value * weight).to(out.dtype.element_ty)
    tl.store(out + pixel[:, None] * F + f[None, :], value, mask=inside)
    if pooled is not None:
        # Of the values as they are stored: a stack has the bits of its layers.
        mean = 0.25 * _sum_of_fours(value.to(tl.float32), BLOCK, BLOCK_F)
        coarse = first // 4 + tl.arange(0, BLOCK // 4)
        tl.store(
            pooled + coarse[:, None] * F + f[None, :], mean.to(pooled.dtype.element_ty),
            mask=(4 * coarse < num_rows)[:, None] & (f < F)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "H", "W"])
def input_gradient_of_scale(
    grad_sums,  # [N, H, W, C]: of this scale's sums
    kernel,  # [K K C, F], of which C are the layer's outputs, and F its inputs
    coarser,  # [N, H / 2, W / 2, F] float32: of the pooled image, or None
    grad,  # [N, H, W, F], written: of this scale's image; or, given one of the next two, of the
    # sums of the layer below, at full size
    signs,  # [N, H, W, (F + 7) / 8], or None
    below,  # [N, H, W, F]: softplus of the sums of the layer below, or None
    pooled,  # [N, H / 2, W / 2, F], written: what the coarser scale of that layer gets, or None
    num_rows, H, W, slope, weight,
    BY_FOURS: tl.constexpr, C: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pixel, y, x = _pixels_of_rows(first, num_rows, H, W, BY_FOURS, BLOCK)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (y < H)[:, None] & (f < F)[None, :]
    value = _convolve(
        grad_sums, kernel, pixel, y, x, f, H, W, True, C, F, K, PRECISION, BLOCK, BLOCK_F, BLOCK_K
    )
    if coarser is not None:
        coarse = first // 4 + tl.arange(0, BLOCK) // 4
        value += 0.25 * tl.load(coarser + coarse[:, None] * F + f[None, :], mask=inside, other=0.0)
    value *= weight
    through = _through_nonlinearity(value, signs, below, pixel, f, inside, slope, F)
    tl.store(grad + pixel[:, None] * F + f[None, :], through.to(grad.dtype.element_ty), mask=inside)
    if pooled is not None:
        # A leaky ReLU is each scale's own; the softplus is that of their sum.
        total = _sum_of_fours(value if below is None else through, BLOCK, BLOCK_F)
        coarse = first // 4 + tl.arange(0, BLOCK // 4)
        tl.store(
            pooled + coarse[:, None] * F + f[None, :], total.to(pooled.dtype.element_ty),
            mask=(4 * coarse < num_rows)[:, None] & (f < F)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "W"])
def pool(
    image,  # [N, H, W, F]: values, or gradients of the outputs of a scale's nonlinearity
    signs,  # [N, H, W, (F + 7) / 8], or None
    out,  # [N, H, W, F]: softplus of the sums, or None
    grad_sums,  # [N, H, W, F], written: through the nonlinearity; or None
    pooled,  # [N, H / 2, W / 2, F], written: sums of four; or None
    num_rows, W, slope, weight,  # rows are pixels of what is pooled, if anything is
    F: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (row < num_rows)[:, None] & (f < F)[None, :]
    total = tl.zeros([BLOCK, BLOCK_F], tl.float32)
    for corner in tl.static_range(1 if pooled is None else 4):
        if pooled is None:
            pixel = row
        else:
            upper_left = row // (W // 2) * (2 * W) + row % (W // 2) * 2
            pixel = upper_left + corner // 2 * W + corner % 2
        at = pixel[:, None] * F + f[None, :]
        value = weight * tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
        if grad_sums is not None:
            through = _through_nonlinearity(value, signs, out, pixel, f, inside, slope, F)
            tl.store(grad_sums + at, through.to(grad_sums.dtype.element_ty), mask=inside)
            value = value if out is None else through
        total += value
    if pooled is not None:
        at = row[:, None] * F + f[None, :]
        tl.store(pooled + at, total.to(pooled.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "H", "W", "num_blocks"])
def weight_gradient_of_split(
    image,  # [N, H, W, C]
    grad_sums,  # [N, H, W, F]
    sums,  # [splits, K K C + 1, F] float32, written; the last row is of the bias
    num_rows, H, W, num_blocks,  # of rows, of a split
    C: tl.constexpr, F: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over a run of pixels. The bias is the weight of one more channel, which is 1."""
    split = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    dy, dx, from_center = _taps(k, H, W, False, C, K)
    total = tl.zeros([BLOCK_K, BLOCK_F], tl.float32)
    for block in range(num_blocks):
        first = (split * num_blocks + block) * BLOCK
        pixel, y, x = _pixels_of_rows(first, num_rows, H, W, False, BLOCK)
        to_y, to_x = y[None, :] + dy[:, None], x[None, :] + dx[:, None]
        inside = (to_y >= 0) & (to_y < H) & (to_x >= 0) & (to_x < W)
        center = image + pixel * C
        values = tl.load(center[None, :] + from_center[:, None], mask=inside, other=0.0)
        values = tl.where((k == K * K * C)[:, None], 1.0, values).to(image.dtype.element_ty)
        grads = tl.load(
            grad_sums + pixel[:, None] * F + f[None, :],
            mask=(y < H)[:, None] & (f < F)[None, :], other=0.0,
        )  # fmt: skip
        total = _dot(values, grads, total, PRECISION)
    at = split * (K * K * C + 1) + k
    tl.store(
        sums + at[:, None] * F + f[None, :], total,
        mask=(k <= K * K * C)[:, None] & (f < F)[None, :],
    )  # fmt: skip


Form = tuple[int, bool, float]  # num_scales, after_sum, negative_slope


def kept(
    x: Tensor, weights: Sequence[Tensor], num_scales: int, after_sum: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """What the gradient needs: the pooled images of x; every layer's output but the last, and what
    is pooled of it; and, unless a softplus shows its own derivative, bits of the signs of all sums,
    [N, H, W, (F + 7) / 8]."""
    layers, scales = weights[::num_scales], range(num_scales)
    outs = [_image(x, x.shape[1], s) for s in scales[1:]]
    outs += [_image(x, w.shape[0], s) for w in layers[:-1] for s in scales]
    signs = [
        _image(x, (w.shape[0] + 7) // 8, s, torch.uint8)
        for w in ([] if after_sum else layers)
        for s in scales
    ]
    return outs, signs


def forward(
    x: Tensor,  # (N, C, H, W)
    weights: Sequence[Tensor],  # of all layers, of all scales of each
    biases: Sequence[Tensor],
    form: Form,
    outs: Sequence[Tensor],  # what `kept` makes, written; or nothing
    signs: Sequence[Tensor],
    out: Tensor,  # (N, F, H, W), channels last, written
) -> None:
    """Fills out, and what is to be kept."""
    num_scales, after_sum, slope = form
    scales, images = range(num_scales), list(outs[: num_scales - 1])
    images = [_channels_last(x), *(images or [_image(x, x.shape[1], s) for s in scales[1:]])]
    _pool_in_turn(images)
    for first in range(0, len(weights), num_scales):
        width, channels, side, _ = weights[first].shape
        if first + num_scales == len(weights):
            above = [out.permute(0, 2, 3, 1)]
        else:
            begin = first + num_scales - 1  # x itself is not among the outs
            above = list(outs[begin : begin + num_scales])
            above = above or [_image(x, width, s) for s in scales]
        coarser = None
        for s in reversed(scales):
            bias, per_location = biases[first + s], biases[first + s].dim() > 1
            sums = above[0] if s == 0 else _image(x, width, s, torch.float32)
            extent, blocks = _extent(images[s]), product_blocks(images[s], width, side)
            convolve_scale[_grid(extent[0], width, blocks)](
                images[s], weights[first + s].permute(2, 3, 1, 0).contiguous(),
                bias.permute(1, 2, 0).contiguous() if per_location else bias.contiguous(),
                coarser, sums, above[1] if s == 0 and len(above) > 1 else None,
                signs[first + s] if signs else None,
                *extent, slope, 1.0 if after_sum or s > 0 else 1.0 / num_scales,
                PER_LOCATION=per_location, LEAKY=not after_sum, SOFTPLUS=after_sum and s == 0,
                BY_FOURS=s + 1 < num_scales, C=channels, F=width, K=side, **blocks,
                num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
            coarser = sums
        _pool_in_turn(above[1:])
        images = above


def backward(
    grad_out: Tensor,  # (N, F, H, W)
    x: Tensor,
    weights: Sequence[Tensor],
    form: Form,
    outs: Sequence[Tensor],  # as `forward` wrote them; then, if after_sum, what it wrote to out
    signs: Sequence[Tensor],
    gradients: Sequence[Tensor],  # of x, weights, biases, written; empty if not wanted
) -> None:
    """Fills the gradients that are not empty."""
    num_scales, after_sum, slope = form
    scales, num_weights = range(num_scales), len(weights)
    mean = 1.0 if after_sum else 1.0 / num_scales
    of_x, of_weights, of_biases = (
        gradients[0], gradients[1 : 1 + num_weights], gradients[1 + num_weights :]
    )  # fmt: skip
    grad_x = of_x.permute(0, 2, 3, 1) if of_x.numel() else of_x
    inner, last = outs[: num_weights - 1], outs[num_weights - 1 :]
    images = [_channels_last(x), *inner, *map(_channels_last, last)]

    def nonlinearity(i: int) -> tuple[Tensor | None, Tensor | None]:
        """What shows its derivative at the sums i: their signs, or its values."""
        return signs[i] if signs else None, images[i + num_scales] if after_sum else None

    # Gradients of the sums of a layer's scales, the finest first; and that of what is next of them.
    of_sums: list[Tensor] = []
    grad: Tensor | None = _channels_last(grad_out)
    for first in reversed(range(0, num_weights, num_scales)):
        width, channels, side, _ = weights[first].shape
        for s in scales[len(of_sums) :]:
            assert grad is not None
            pooled = _image(x, width, s + 1) if s + 1 < num_scales else None
            if after_sum and s > 0:  # the gradient of a sum is that of each of its terms
                of_sums.append(grad)
                if pooled is not None:
                    _pool(grad, pooled)
            else:
                of_sums.append(torch.empty_like(grad))
                weight = mean if s == 0 else 1.0
                _pool(grad, pooled, weight, of_sums[s], *nonlinearity(first + s), slope)
            grad = pooled
        for s in scales:
            wanted = of_weights[first + s], of_biases[first + s]
            _weight_gradient(images[first + s], of_sums[s], side, *wanted)
        if not any(g.numel() for g in (of_x, *of_weights[:first], *of_biases[:first])):
            return
        coarser, pooled = None, None
        for s in reversed(scales):
            below = first > 0 and s == 0
            to = _image(x, channels, s, torch.float32 if s > 0 else None)
            if first == 0 and s == 0 and grad_x.is_contiguous():
                to = grad_x
            if below and num_scales > 1:
                pooled = _image(x, channels, 1)
            extent, blocks = _extent(of_sums[s]), product_blocks(of_sums[s], channels, side)
            input_gradient_of_scale[_grid(extent[0], channels, blocks)](
                of_sums[s], weights[first + s].permute(2, 3, 0, 1).contiguous(), coarser, to,
                *(nonlinearity(first - num_scales) if below else (None, None)), pooled,
                *extent, slope, mean if below else 1.0,
                BY_FOURS=s + 1 < num_scales, C=width, F=channels, K=side, **blocks,
                num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
            coarser = to
        of_sums, grad = [to], pooled
    if to is not grad_x:
        grad_x.copy_(to)


def _image(x: Tensor, channels: int, scale: int, dtype: torch.dtype | None = None) -> Tensor:
    """[N, H >> scale, W >> scale, channels]"""
    n, _, height, width = x.shape
    return x.new_empty(n, height >> scale, width >> scale, channels, dtype=dtype or x.dtype)


def _channels_last(x: Tensor) -> Tensor:
    """[N, H, W, C] of (N, C, H, W): x itself, if its memory is in that order."""
    return x.permute(0, 2, 3, 1).contiguous()


def _extent(image: Tensor) -> tuple[int, int, int]:
    """Pixels of the batch, H, W."""
    n, height, width, _ = image.shape
    return n * height * width, height, width


def _grid(num_rows: int, width: int, blocks: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(num_rows, blocks["BLOCK"]), triton.cdiv(width, blocks["BLOCK_F"])


def product_blocks(image: Tensor, width: int, side: int) -> dict[str, Any]:
    """Of a product from an image to ``width`` channels.

    Of the lengths of a step along the sum, the one that pads it least, then the longest.
    """
    length, longest = image.shape[3] * side**2, 128 // image.element_size()
    columns = _columns(width)
    step = min((longest, longest // 2, 16), key=lambda step: (-length % step, -step))
    rows = 128 if columns <= 64 else 64
    return {"BLOCK": rows, "BLOCK_F": columns, "BLOCK_K": step, "PRECISION": _precision()}


def gradient_blocks(image: Tensor, width: int, side: int) -> dict[str, Any]:
    """Of a weight gradient: steps along pixels, rows of taps and their channels."""
    rows = min(64, max(16, triton.next_power_of_2(image.shape[3] * side**2 + 1)))
    blocks = {"BLOCK": 128 // image.element_size(), "BLOCK_F": _columns(width), "BLOCK_K": rows}
    return blocks | {"PRECISION": _precision()}


def pool_blocks(width: int) -> dict[str, Any]:
    columns = min(128, triton.next_power_of_2(width))
    return {"BLOCK": _POOL_ELEMENTS // columns, "BLOCK_F": columns}


def _columns(width: int) -> int:
    """Of a product: a matrix instruction has 16 or more."""
    return min(128, max(16, triton.next_power_of_2(width)))


def _precision() -> str:
    """Of float32: products of tensor cores in TensorFloat-32, if torch's are; else three of them
    each, which keep 21 bits or more of a product."""
    return "tf32" if takes_tf32() else "tf32x3"


def _pool_in_turn(images: Sequence[Tensor]) -> None:
    """Each from the one before."""
    for image, pooled in pairwise(images):
        _pool(image, pooled, 0.25)


def _pool(
    image: Tensor,
    pooled: Tensor | None,
    weight: float = 1.0,
    grad_sums: Tensor | None = None,
    signs: Tensor | None = None,
    out: Tensor | None = None,
    slope: float = 0.0,
) -> None:
    """Launch `pool`."""
    width = image.shape[3]
    num_rows, *_ = _extent(image if pooled is None else pooled)
    blocks = pool_blocks(width)
    pool[_grid(num_rows, width, blocks)](
        image, signs, out, grad_sums, pooled, num_rows, image.shape[2], slope, weight,
        F=width, **blocks, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _weight_gradient(
    image: Tensor,  # [N, H, W, C]
    grad_sums: Tensor,  # [N, H, W, F]
    side: int,
    of_weight: Tensor,  # (F, C, K, K), written unless it is empty
    of_bias: Tensor,  # (F,) or (F, H, W), written unless it is empty
) -> None:
    """Launch `weight_gradient_of_split` and add the splits; torch does that, and sums biases per
    location over the batch, in an order that depends on the shape alone."""
    if of_bias.dim() > 1:
        of_bias.copy_(grad_sums.sum(0, dtype=torch.float32).permute(2, 0, 1))
        of_bias = of_bias.new_empty(0)
    if not of_weight.numel() and not of_bias.numel():
        return
    channels, width = image.shape[3], grad_sums.shape[3]
    length = channels * side**2 + 1
    num_rows, *sides = _extent(image)
    blocks = gradient_blocks(image, width, side)
    tiles = triton.cdiv(length, blocks["BLOCK_K"]), triton.cdiv(width, blocks["BLOCK_F"])
    num_blocks = triton.cdiv(num_rows, blocks["BLOCK"])
    per_split = triton.cdiv(num_blocks, max(1, _PROGRAMS // (tiles[0] * tiles[1])))
    num_splits = triton.cdiv(num_blocks, per_split)
    sums = image.new_empty(num_splits, length, width, dtype=torch.float32)
    weight_gradient_of_split[(*tiles, num_splits)](
        image, grad_sums, sums, num_rows, *sides, per_split, C=channels, F=width, K=side,
        **blocks, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    total = sums.sum(0)
    if of_weight.numel():
        of_weight.copy_(total[:-1].view(side, side, channels, width).permute(3, 2, 0, 1))
    if of_bias.numel():
        of_bias.copy_(total[-1])
