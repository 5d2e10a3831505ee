"""The op `multiscale_conv`: one layer or a stack of them in one call, with its gradients."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpm_fast import dispatch, reference
from dpm_fast.ops.common import (
    LIBRARY,
    check_examples,
    differentiable_gradients,
    is_batched,
    is_differentiated_again,
    is_plain,
    needs_gradient,
    on_its_device,
    takes_tf32,
)
from dpm_fast.ops.tail import Tail, tail_by_torch

ACTIVATIONS = ("per_scale", "after_sum")
LANES = 16  # of a vector: as many images, or parts of them, are computed side by side (csrc/tile.h)
# Instead of a number of parts: the kernels are Triton's, and so is the layout of what they keep,
# for a gradient that may be asked for when another backend is.
WHOLE = 0


def multiscale_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "per_scale",
    negative_slope: float = 0.05,
) -> Tensor:
    """One layer: convolve the image and its mean-pooled copies, bring all to full size, add.

        per_scale:  (1/S) sum_s up^s(leaky_relu(conv_s(pool^s(x))))    as the 2015 code computes it
        after_sum:  softplus(sum_s up^s(conv_s(pool^s(x))))            as [DPM] describes it

    with pool the mean of 2 x 2 pixels, up the repetition of each pixel in both directions, and
    zeros beyond the border of every scale.

    Args:
        x: (N, C, H, W), both sides divisible by 2**(S - 1); float32, bfloat16, float16 or float64.
            Sums are formed in float32 (in float64 for float64).
        weights: S kernels (F, C, K, K), K odd, finest scale first; cross-correlated, not flipped.
        biases: S biases, (F,) or one per location, (F, H / 2**s, W / 2**s).
        activation: "per_scale" or "after_sum".
        negative_slope: of the leaky ReLU; "after_sum" has no use for it.

    Returns:
        (N, F, H, W) of the dtype of x, channels last in memory.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or activation that does not fit.

    Reference: `dpm_fast.reference.multiscale_conv`.
    """
    return multiscale_conv_stack(
        x, [weights], [biases], activation=activation, negative_slope=negative_slope
    )


def multiscale_conv_stack(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    *,
    activation: str = "per_scale",
    negative_slope: float = 0.05,
) -> Tensor:
    """Layers of `multiscale_conv`, each on the output of the one before.

    One call for all of them: the layout in which kernels convolve images is entered and left once.
    The gradient is differentiable too, then by the reference. CUDA C++ leaves to torch gradients,
    and images that are too large for a GPU's shared memory.

    Bits of kernels depend neither on the number of threads nor, for the output and the gradient of
    x, on how examples are put together in batches. The backend "auto" may leave a batch to torch
    (`dpm_fast.dispatch.convolution_route`).

    In float32 a CPU's kernels of 3 x 3 form four neighbors from six products, with 1.5 times the
    rounding error of their definition; what is not finite spreads to all four, infinities as NaN. A
    GPU's take TensorFloat-32 where torch's convolutions do, as by its default
    (`torch.backends.cudnn.conv.fp32_precision`), and else three products of it for one.

    In 16 bits a GPU's round to the dtype of x between layers, as torch does; a CPU's keep float32,
    but round in bfloat16 where no gradient is wanted and the processor multiplies bfloat16
    (avx512_bf16). So where `torch.utils.checkpoint` repeats a call with gradients it is rounded
    otherwise. Those products take subnormal numbers for 0, and a weight that is not finite may or
    may not make the first and last rows NaN, by the batch.

    Args:
        x, activation, negative_slope: as of `multiscale_conv`.
        weights, biases: as of `multiscale_conv`, for each layer; all have as many scales.

    Returns:
        (N, F of the last layer, H, W) of the dtype of x.

    Raises:
        TypeError, ValueError: as `multiscale_conv`.

    Reference: `dpm_fast.reference.multiscale_conv`, layer by layer.
    """
    check_stack(x, weights, biases, activation, negative_slope)
    x, weights, biases = as_under_autocast(x, weights, biases)
    return run(
        x, weights, biases, [], activation, negative_slope,
        lambda: by_torch(x, weights, biases, activation, negative_slope),
    )  # fmt: skip


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of what is computed of x."""
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(x.device.type):
        return False
    return torch.is_autocast_enabled(x.device.type)


def as_under_autocast(
    x: Tensor, weights: Sequence[Sequence[Tensor]], biases: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Sequence[Sequence[Tensor]], Sequence[Sequence[Tensor]]]:
    """In the dtype in which torch would convolve."""
    if not _is_autocast(x):
        return x, weights, biases
    dtype = torch.get_autocast_dtype(x.device.type)
    weights, biases = (
        [[p.to(dtype) for p in layer] for layer in kind] for kind in (weights, biases)
    )
    return x.to(dtype), weights, biases


def run(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    tail: list[Tensor],
    activation: str,
    negative_slope: float,
    otherwise: Callable[[], Tensor],
) -> Tensor:
    """A stack and its tail (see `Tail`) by kernels; or ``otherwise``, where there are none for
    these tensors or they would be slower."""
    num_scales = len(weights[0])
    tensors = (x, *(p for kind in (weights, biases) for layer in kind for p in layer), *tail)
    shapes = [layer[0].shape for layer in weights]
    per_location = any(layer[0].dim() > 1 for layer in biases)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    parts, full = _parts(x, shapes, num_scales, per_location, differentiable)
    route = dispatch.convolution_route(x, shapes, num_scales, full, differentiable)
    if route == "reference" or _transformed(tensors):
        return otherwise()
    if route == "triton":
        parts = WHOLE
    form = (num_scales, activation == "after_sum", negative_slope, parts, len(tail))
    if is_plain(tensors) and needs_gradient(*tensors):
        return _MultiscaleConv.apply(form, *tensors)
    op = _forward if is_plain(tensors) else torch.ops.dpm_fast.multiscale_conv
    return op(x, *_split(tensors, len(tail)), *form[:-1])


def check_stack(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    activation: str,
    negative_slope: float,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'per_scale' or 'after_sum', got {activation!r}")
    if not isinstance(negative_slope, Real) or isinstance(negative_slope, bool):
        raise TypeError(f"negative_slope must be a number, got {type(negative_slope).__name__}")
    check_examples(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    for kind, name in ((weights, "weights"), (biases, "biases")):
        for given in (kind, *(kind if isinstance(kind, list | tuple) else ())):
            if not isinstance(given, list | tuple):
                raise TypeError(
                    f"{name} must be a list of tensors, one per scale, for each layer, "
                    f"got {type(given).__name__}"
                )
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights and biases must be of the same layers, one at least, "
            f"got {len(weights)} and {len(biases)}"
        )
    if not -math.inf < negative_slope < math.inf:
        raise ValueError(f"negative_slope must be finite, got {negative_slope}")
    num_scales, channels, sides = len(weights[0]), x.shape[1], x.shape[2:]
    if min(sides) < 1:
        raise ValueError(f"sides of x must be positive, got {sides[0]} x {sides[1]}")
    divisor = 2 ** (num_scales - 1) if num_scales else 1
    if sides[0] % divisor or sides[1] % divisor:
        raise ValueError(
            f"sides of x must be divisible by {divisor} for {num_scales} scales, "
            f"got {sides[0]} x {sides[1]}"
        )
    for layer, (kernels, offsets) in enumerate(zip(weights, biases, strict=True)):
        if len(kernels) != num_scales or len(offsets) != num_scales or not num_scales:
            raise ValueError(
                f"layer {layer} must have one weight and one bias for each of "
                f"{num_scales or 'one or more'} scales, got {len(kernels)} and {len(offsets)}"
            )
        for kind, given in (("weights", kernels), ("biases", offsets)):
            if not isinstance(given[0], Tensor):
                raise TypeError(
                    f"{kind}[0] of layer {layer} must be a tensor, got {type(given[0]).__name__}"
                )
        shape = kernels[0].shape
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or shape[2] % 2 == 0:
            raise ValueError(
                f"weights of layer {layer} must have shape (F, {channels}, K, K), K odd, "
                f"got {tuple(shape)}"
            )
        for scale, (weight, bias) in enumerate(zip(kernels, offsets, strict=True)):
            location = (sides[0] >> scale, sides[1] >> scale) if offsets[0].dim() > 1 else ()
            check_parameter(weight, x, f"weights[{scale}] of layer {layer}", shape)
            check_parameter(bias, x, f"biases[{scale}] of layer {layer}", (shape[0], *location))
        channels = shape[0]
        if shape.numel() == 0:
            raise ValueError(f"weights of layer {layer} must not be empty, got {tuple(shape)}")


def check_parameter(
    parameter: Tensor,
    x: Tensor,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    """A tensor of this shape beside x, of its dtype where no other one is given."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
    if parameter.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {parameter.device}")
    if _is_autocast(x):
        return
    if parameter.dtype != (dtype or x.dtype):
        required = f"{dtype}" if dtype else f"{x.dtype} like x"
        raise TypeError(f"{name} must have dtype {required}, got {parameter.dtype}")


def by_torch(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    activation: str,
    negative_slope: float,
) -> Tensor:
    """A stack in PyTorch, images channels last, which takes about two thirds of the time."""
    order = torch.channels_last
    if not _transformed((x,)):  # torch.func does not know the order
        # `contiguous` would leave an image of one channel as it is.
        x = x.clone(memory_format=order) if x.shape[1] == 1 else x.contiguous(memory_format=order)
    for kernels, offsets in zip(weights, biases, strict=True):
        x = reference.multiscale_conv(
            x, list(kernels), list(offsets), activation=activation, negative_slope=negative_slope
        )
    return x


def _parts(
    x: Tensor,
    shapes: Sequence[Sequence[int]],
    num_scales: int,
    per_location: bool,
    differentiable: bool,
) -> tuple[int, float]:
    """Into how many parts the rows of an image are cut, and the part of the lanes of all threads
    that work at a time then.

    Few images fill the lanes if each is cut. Sums over pixels depend on that, so for a gradient the
    choice is made as for four threads, whatever their number; the pixels themselves do not.
    """
    n, threads, parts = x.shape[0], dispatch.convolution_threads(x), 1
    if not per_location and not torch.compiler.is_compiling():  # symbolic sizes cannot be compared
        smallest = max(1, max(shape[2] for shape in shapes) // 2) * 2 ** (num_scales - 1)
        unit = 2 ** (num_scales - 1)
        parts = _best_parts(n, x.shape[2], unit, smallest, 4 if differentiable else threads)
    rounds = -(-_groups(n, parts) // threads)
    return parts, (n * parts / (LANES * threads * rounds) if n else 1.0)


@lru_cache(maxsize=1024)
def _best_parts(n: int, height: int, unit: int, smallest: int, threads: int) -> int:
    """Parts of at least ``smallest`` rows, a multiple of ``unit``, that take the least time."""

    def cost(parts: int) -> tuple[float, float]:
        """In rows of a group of images, with half a row more for its halo: time, then work."""
        groups, rows = _groups(n, parts), height / parts + 0.5
        return -(-groups // threads) * rows, groups * rows

    choices = [
        p for p in range(1, LANES + 1) if height % (p * unit) == 0 and height >= smallest * p
    ]
    return min(choices or [1], key=cost)


def _groups(n: int, parts: int) -> int:
    images = LANES // parts
    return (n + images - 1) // images


def _transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether torch.func or forward-mode differentiation is at work: kernels have no rule."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _split(
    tensors: Sequence[Tensor], tail_length: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights and biases of all layers, and the tail, from x, weights, biases, tail."""
    end = len(tensors) - tail_length
    middle = (1 + end) // 2
    return list(tensors[1:middle]), list(tensors[middle:end]), list(tensors[end:])


# Weights and biases of all layers, of all scales of each; the tail as `Tail.tensors` gives it.
_INPUTS = "Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] tail"
_FORM = "int num_scales, bool after_sum, float negative_slope, int parts"
LIBRARY.define(f"multiscale_conv({_INPUTS}, {_FORM}) -> Tensor")
# What the gradient needs of each layer, in the layout of the kernels; see `_kept`.
LIBRARY.define(f"_multiscale_conv_keeping({_INPUTS}, {_FORM}) -> (Tensor, Tensor[], Tensor[])")
# Gradients of x, weights, biases, tail; those not wanted come back empty.
LIBRARY.define(
    f"_multiscale_conv_gradient(Tensor grad_out, {_INPUTS}, Tensor[] outs, Tensor[] signs, "
    f"{_FORM}, bool[] wanted) -> Tensor[]"
)

Form = tuple[int, bool, float, int, int]  # that of the schemas, and the length of the tail


def _out(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], tail: list[Tensor], *form: Any
) -> Tensor:
    """Channels last for the layer that follows; the outputs of a network are no longer that."""
    channels = tail[0].shape[1] if tail else weights[-1].shape[0]
    order = torch.contiguous_format if tail else torch.channels_last
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


def _kept(
    x: Tensor, weights: list[Tensor], keep_last: bool, num_scales: int, after_sum: bool, parts: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the layers, [groups, H + 2 halo, W + 2 halo, F, 16] with H the rows of a part;
    and, under "per_scale", bits of the signs of all sums, [groups, elements]. For images that are
    whole, what Triton's kernels need."""
    if parts == WHOLE:
        from dpm_fast.triton_kernels import multiscale_conv as triton_kernels

        return triton_kernels.kept(x, weights, num_scales, after_sum)
    n, _, height, width = x.shape
    groups, height = _groups(n, parts), height // parts
    layers = weights[::num_scales]
    halo = max(w.shape[-1] for w in layers) // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    outs = [
        x.new_empty(groups, height + 2 * halo, width + 2 * halo, w.shape[0], LANES, dtype=wide)
        for w in (layers if keep_last else layers[:-1])
    ]
    pixels = sum((height >> s) * (width >> s) for s in range(num_scales))
    signs = [
        x.new_empty(groups, pixels * w.shape[0], dtype=torch.int16)
        for w in ([] if after_sum else layers)
    ]
    return outs, signs


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], tail: list[Tensor], *form: Any
) -> Tensor:
    out = _out(x, weights, biases, tail)
    _launch(x, weights, biases, tail, form, [], [], out)
    return out


def _forward_keeping(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], tail: list[Tensor], *form: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    out, outs, signs = _forward_keeping_fake(x, weights, biases, tail, *form)
    _launch(x, weights, biases, tail, form, outs, signs, out)
    return out, outs, signs


def _forward_keeping_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], tail: list[Tensor], *form: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    num_scales, after_sum, _, parts = form
    keep_last = after_sum or bool(tail)
    kept = _kept(x, weights, keep_last, num_scales, after_sum, parts)
    return _out(x, weights, biases, tail), *kept


def _gradient(
    grad_out: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    tail: list[Tensor],
    outs: list[Tensor],
    signs: list[Tensor],
    *args: Any,
) -> list[Tensor]:
    gradients = _gradient_fake(grad_out, x, weights, biases, tail, outs, signs, *args)
    _launch(x, weights, biases, tail, args[:-1], outs, signs, None, grad_out, gradients)
    return gradients


def _gradient_fake(
    grad_out: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    tail: list[Tensor],
    outs: list[Tensor],
    signs: list[Tensor],
    *args: Any,
) -> list[Tensor]:
    wanted = args[-1]
    images = (x, Tail.of(tail).beside) if tail else (x,)  # whose gradients have their order
    contiguous = torch.contiguous_format
    return [
        x.new_empty(0)
        if not wanted
        else torch.empty_like(tensor)
        if any(tensor is image for image in images)
        else torch.empty_like(tensor, memory_format=contiguous)
        for tensor, wanted in zip((x, *weights, *biases, *tail), wanted, strict=True)
    ]


@on_its_device
def _launch(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    tail: list[Tensor],
    form: Sequence[Any],
    outs: list[Tensor],
    signs: list[Tensor],
    out: Tensor | None,
    grad_out: Tensor | None = None,
    gradients: list[Tensor] | None = None,
) -> None:
    """Write out, outs and signs; or, from them, the gradients."""
    num_scales, after_sum, negative_slope, parts = form
    if gradients is None:  # which the backend makes that has kept what it needs
        dispatch.kernels("multiscale_conv", x)
    if x.numel() == 0:
        for gradient in gradients or ():
            gradient.zero_()
        return
    if parts == WHOLE:
        from dpm_fast.triton_kernels import multiscale_conv as triton_kernels

        options = num_scales, after_sum, negative_slope
        if out is not None:
            triton_kernels.forward(x, weights, biases, options, outs, signs, out)
        elif grad_out is not None and gradients is not None:
            triton_kernels.backward(grad_out, x, weights, options, outs, signs, gradients)
        return
    module, threads = dispatch.native(x)
    of_layers = [[w.contiguous() for w in weights], [b.contiguous() for b in biases]]
    grad_tail: list[Tensor] = []
    if gradients is None:
        of_layers += [[], []]
    else:
        *grads, grad_tail = _split(gradients, len(tail))
        of_layers += grads
    layers = tuple(
        (
            *(tuple(kind[first : first + num_scales]) or None for kind in of_layers),
            outs[layer] if layer < len(outs) else None,
            signs[layer] if layer < len(signs) else None,
        )
        for layer, first in enumerate(range(0, len(weights), num_scales))
    )
    if not hasattr(module, "multiscale_conv_gradient"):
        if outs or signs or out is None:
            raise dispatch.BackendError("multiscale_conv has no CUDA C++ kernels for gradients")
        _launch_resident(x, weights, biases, form, layers, out)
        return
    given_tail = _tail_for_launch(tail, grad_tail) if tail else None
    form = num_scales, parts, layers, given_tail, after_sum, negative_slope, threads
    if gradients is None:
        module.multiscale_conv(x, out, *form)
    else:
        grad_x = gradients[0] if gradients[0].numel() else None
        module.multiscale_conv_gradient(x, grad_out, grad_x, *form)


def _tail_for_launch(tensors: list[Tensor], gradients: list[Tensor]) -> tuple[Any, ...]:
    """As csrc/bind_conv.h takes it."""
    tail = Tail.of(tensors)
    wanted: list[Any] = [g if g.numel() else None for g in gradients] or [None] * len(tensors)
    grads = Tail.of(wanted)
    layers = zip(
        (w.contiguous() for w in tail.pixel_weights), (b.contiguous() for b in tail.pixel_biases),
        grads.pixel_weights, grads.pixel_biases, strict=True,
    )  # fmt: skip
    return (
        tail.beside, tuple(layers), tail.readout_weight.contiguous(),
        tail.readout_bias.contiguous(), grads.beside, grads.readout_weight, grads.readout_bias,
    )  # fmt: skip


def _launch_resident(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    form: Sequence[Any],
    layers: tuple[Any, ...],
    out: Tensor,
) -> None:
    """Images stay in the shared memory of a GPU; those that are too large are left to torch."""
    module, stream = dispatch.native(x)
    num_scales, after_sum, negative_slope, _ = form
    shapes = [tuple(w.shape[:3]) for w in weights[::num_scales]]
    most, packed, lack = module.most_shared_bytes(), 0, ""
    if len(layers) > module.MAX_LAYERS or num_scales > module.MAX_SCALES:
        lack = f"{len(layers)} layers of {num_scales} scales, of which a kernel takes "
        lack += f"{module.MAX_LAYERS} and {module.MAX_SCALES}"
    else:
        wide = x.dtype == torch.float32
        needed, packed = module.multiscale_conv_bytes(*x.shape[2:], num_scales, shapes, wide)
        if needed > most:
            lack = f"{needed} bytes of shared memory, of which a block has {most}"
    if lack:
        dispatch.log_limit("multiscale_conv", lack)
        out.copy_(_by_reference((*form, 0), x, *weights, *biases))
        return
    operands = torch.empty(packed, dtype=torch.uint8, device=x.device)
    module.multiscale_conv(
        x, out, num_scales, layers, after_sum, negative_slope, operands, takes_tf32(), stream
    )


class _MultiscaleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, *tensors):  # type: ignore[no-untyped-def]
        args = tensors[0], *_split(tensors, form[-1]), *form[:-1]
        if is_plain(tensors):
            out, outs, signs = _forward_keeping(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, outs, signs = torch.ops.dpm_fast._multiscale_conv_keeping(*args)
        if form[1] and form[3] == WHOLE:  # a softplus shows its derivative
            outs = [*outs, out]
        ctx.save_for_backward(*tensors, *outs, *signs)
        ctx.form, ctx.num_tensors, ctx.num_outs = form, len(tensors), len(outs)
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        wanted = list(ctx.needs_input_grad[1:])
        saved = ctx.saved_tensors  # once: a checkpoint computes them anew each time
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        if is_differentiated_again() or is_batched(grad_out):
            by_reference = partial(_by_reference, ctx.form)
            return None, *differentiable_gradients(by_reference, tensors, wanted, grad_out)
        args = (
            grad_out, tensors[0], *_split(tensors, ctx.form[-1]), list(kept[: ctx.num_outs]),
            list(kept[ctx.num_outs :]), *ctx.form[:-1], wanted,
        )  # fmt: skip
        if is_plain((grad_out, *saved)):
            found = _gradient(*args)
        else:
            found = torch.ops.dpm_fast._multiscale_conv_gradient(*args)
        return None, *(g if w else None for g, w in zip(found, wanted, strict=True))


def _by_reference(form: Form, *tensors: Tensor) -> Tensor:
    num_scales, after_sum, negative_slope, _, tail_length = form
    weights, biases, tail = _split(tensors, tail_length)
    layers = [slice(i, i + num_scales) for i in range(0, len(weights), num_scales)]
    x = by_torch(
        tensors[0], [weights[layer] for layer in layers], [biases[layer] for layer in layers],
        ACTIVATIONS[after_sum], negative_slope,
    )  # fmt: skip
    return tail_by_torch(x, Tail.of(tail), negative_slope) if tail else x


def _autograd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], tail: list[Tensor], *form: Any
) -> Tensor:
    if needs_gradient(x, *weights, *biases, *tail):
        return _MultiscaleConv.apply((*form, len(tail)), x, *weights, *biases, *tail)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dpm_fast.multiscale_conv(x, weights, biases, tail, *form)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("multiscale_conv", _forward, _device)
    LIBRARY.impl("_multiscale_conv_keeping", _forward_keeping, _device)
    LIBRARY.impl("_multiscale_conv_gradient", _gradient, _device)
LIBRARY.impl("multiscale_conv", _autograd, "Autograd")
torch.library.register_fake("dpm_fast::multiscale_conv", _out, lib=LIBRARY)
torch.library.register_fake(
    "dpm_fast::_multiscale_conv_keeping", _forward_keeping_fake, lib=LIBRARY
)
torch.library.register_fake("dpm_fast::_multiscale_conv_gradient", _gradient_fake, lib=LIBRARY)
