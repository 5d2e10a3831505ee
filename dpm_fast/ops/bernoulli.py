"""The ops of binomial diffusion: noising bits, a reverse step, and a term of the bound."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpm_fast import dispatch, reference
from dpm_fast.noise import Stream, check_timesteps
from dpm_fast.ops.common import (
    LIBRARY,
    Gradient,
    Op,
    apart,
    check_examples,
    check_like,
    check_noise,
    check_pair,
    check_rows,
    check_shared,
    check_shared_number,
    check_writable,
    collapsible,
    differentiable_gradients,
    is_differentiated_again,
    on_its_device,
    room_for_pieces,
    save_gradients,
    weighted_gradients,
    write_in_place,
)
from dpm_fast.reference import BernoulliRow

NUM_COLUMNS = len(BernoulliRow._fields)


def bernoulli_noise(
    x_0: Tensor, rows: Tensor, seed: int, example_ids: Tensor, t: int | Tensor
) -> Tensor:
    """x_t of the forward process of binary data ([DPM] table 1).

    x_t = 1 where u <= q(x_t = 1 | x_0), with u of the noise contract's forward stream.

    Args:
        x_0: (N, C, *spatial) or (N, D), 0 or 1 (above 1/2 counts as 1); float32, bfloat16, float16
            or float64.
        rows: (N, 2), the rates of ones for x_0 = 0 and x_0 = 1; float32, or float64 for such x_0.
        seed: any integer in [-2**63, 2**64), taken modulo 2**64.
        example_ids: (N,) int64, global indices of the examples.
        t: timestep in 0..2**24 - 1, one for all or (N,) int64.

    Returns:
        x_t like x_0. Not differentiable.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or seed that does not fit, or on a CPU a t out of range.
            On other devices such a t gives NaN.

    Reference: `dpm_fast.reference.bernoulli_noise`.
    """
    check_examples(x_0, "x_0")
    check_rows(rows, x_0, 2)
    source = check_noise(seed, Stream.FORWARD, example_ids, t, x_0)
    if dispatch.backend("bernoulli_noise", x_0) == "reference":
        return reference.bernoulli_noise(x_0, rows, source[0], *source[2:])
    return _NOISE_OP(x_0, rows, source[0], *source[2:])


def bernoulli_step(
    x_t: Tensor,
    logit_out: Tensor,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    observed: tuple[Tensor, Tensor | float] | None = None,
    drift: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """One reverse step of binary data, x_{t-1} of p(x_{t-1} | x_t) and factors that multiply it.

    x_{t-1} = 1 where u <= sigmoid(logit + (2 y - 1) ln((1 - flip) / flip) + drift), with u of the
    noise contract's reverse stream; the logit follows from the network's output and a row of
    coefficients, see `dpm_fast.reference.BernoulliRow`. Known elements are put in place last.

    Args:
        x_t: (N, C, *spatial) or (N, D), 0 or 1 (above 1/2 counts as 1); float32, bfloat16, float16
            or float64.
        logit_out: the network's output, the same shape and dtype; bfloat16 or float16 also with
            float32 x_t.
        rows: (N, 20) coefficients of each example's timestep; float32, or float64 for such x_t.
        seed: any integer in [-2**63, 2**64), taken modulo 2**64.
        example_ids: (N,) int64, global indices of the examples.
        t: timestep in 1..2**24 - 1, one for all or (N,) int64.
        known: (mask, values), bool and the dtype of x_t: elements of x_{t-1} that are known.
        observed: (y, flip): bits that were seen, of the dtype of x_t, and in (0, 1/2] the
            probability that each was flipped, a number or a floating-point tensor.
        drift: the dtype of x_t, added to the logit.
        deterministic: take the likelier value (0 at a tie) instead of drawing.
        The shape of mask, values, y, flip and drift is that of x_t, or (1, *event).

    Returns:
        x_{t-1} like x_t. Not differentiable.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or seed that does not fit, or on a CPU a t or a probability
            of a flip out of range. On other devices such a t, and a logit or a probability of a
            flip that is NaN, give NaN.

    Reference: `dpm_fast.reference.bernoulli_step`.
    """
    inputs = _checked(
        x_t, logit_out, rows, seed, example_ids, t, known, observed, drift, deterministic
    )
    if dispatch.backend("bernoulli_step", x_t) == "reference":
        return _reference(x_t, inputs)
    return _STEP_OP(x_t, *inputs)


def bernoulli_step_(
    x_t: Tensor,
    logit_out: Tensor,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    observed: tuple[Tensor, Tensor | float] | None = None,
    drift: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`bernoulli_step` in place: x_t becomes x_{t-1}, and is returned.

    Other arguments may share memory with x_t; they are copied then.

    Raises:
        TypeError, ValueError: as for `bernoulli_step`, and where elements of x_t share memory
            among themselves, or where x_t requires a gradient.
    """
    inputs = _checked(
        x_t, logit_out, rows, seed, example_ids, t, known, observed, drift, deterministic
    )
    check_writable(x_t, "x_t")
    if dispatch.backend("bernoulli_step", x_t) == "reference":
        return x_t.copy_(_reference(x_t, inputs))
    return write_in_place(_STEP_OP, _STEP_IN_PLACE_OP, x_t, *inputs)


def bernoulli_kl(x_0: Tensor, x_t: Tensor, logit_out: Tensor, rows: Tensor) -> Tensor:
    """One term of the bound of binary data per example.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t >= 2, and -ln p(x_0 | x_1) at t = 1. Per
    element, where q gives the probability m <= 1/2 to one of its values and p raises the log-odds
    of that value by e,

        t >= 2:  ln(1 + m (exp(e) - 1)) - m e
        t = 1:   ln(1 + exp(e)), e the logit of the value that x_0 is not

    which keeps its digits where p is nearly q, and for rates within 1e-12 of 0 and 1. m and e
    follow from the bits, the network's output and a row of coefficients, see
    `dpm_fast.reference.BernoulliRow`.

    Differentiable with respect to logit_out. Value and gradient are made in one pass; second
    derivatives are those of the reference, at its speed.

    Args:
        x_0, x_t: (N, C, *spatial) or (N, D), 0 or 1 (above 1/2 counts as 1); float32, bfloat16,
            float16 or float64.
        logit_out: the network's output, the same shape and dtype; bfloat16 or float16 also with
            float32 x.
        rows: (N, 20) coefficients of each example's timestep; float32, or float64 for such x.

    Returns:
        (N,) float64, nats per example: summed in float64 over groups of four elements, each of
        which is added up in float32 (in float64 for float64 x).

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit, or rows that require a gradient.
        NotImplementedError: where torch.func or forward mode wants the derivative of a kernel.

    Reference: `dpm_fast.reference.bernoulli_kl`.
    """
    check_examples(x_0, "x_0")
    check_like(x_t, x_0, "x_t", "x_0")
    check_like(logit_out, x_0, "logit_out", "x_0", narrow=True)
    check_rows(rows, x_0, NUM_COLUMNS)
    if rows.requires_grad:
        raise ValueError("rows must not require a gradient, got rows that do")
    if dispatch.backend("bernoulli_kl", x_0) == "reference":
        return reference.bernoulli_kl(x_0, x_t, logit_out, rows)
    return _KL_OP(x_0, x_t, logit_out, rows)


class _Step(NamedTuple):
    """Arguments of the registered op after x_t."""

    logit_out: Tensor
    rows: Tensor
    seed: int  # signed
    example_ids: Tensor
    t: Tensor
    mask: Tensor | None
    values: Tensor | None
    y: Tensor | None
    flip: Tensor | None
    drift: Tensor | None
    deterministic: bool


def _checked(
    x_t: Tensor,
    logit_out: Tensor,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    known: tuple[Tensor, Tensor] | None,
    observed: tuple[Tensor, Tensor | float] | None,
    drift: Tensor | None,
    deterministic: bool,
) -> _Step:
    check_examples(x_t, "x_t")
    check_like(logit_out, x_t, "logit_out", "x_t", narrow=True)
    check_rows(rows, x_t, NUM_COLUMNS)
    seed, _, example_ids, t = check_noise(seed, Stream.REVERSE, example_ids, t, x_t, first=1)
    y = flip = mask = values = None
    if observed is not None:
        y, flip = check_pair(observed, "observed", "(y, flip)")
        check_shared(y, x_t, "observed y", x_t.dtype)
        if isinstance(flip, int | float) and not 0 < flip <= 0.5:
            raise ValueError(f"observed flip must be in (0, 1/2], got {flip:g}")
        flip = check_shared_number(flip, x_t, "observed flip", x_t.dtype)
        check_flips(flip)
    if drift is not None:
        check_shared(drift, x_t, "drift", x_t.dtype)
    if known is not None:
        mask, values = check_pair(known, "known", "(mask, values)")
        check_shared(mask, x_t, "known mask", torch.bool)
        check_shared(values, x_t, "known values", x_t.dtype)
    return _Step(
        logit_out, rows, seed, example_ids, t, mask, values, y, flip, drift, bool(deterministic)
    )


def _reference(x_t: Tensor, inputs: _Step) -> Tensor:
    check_timesteps(inputs.t, first=1)  # kernels do so themselves; without noise it does not
    return reference.bernoulli_step(
        x_t,
        *inputs[:5],
        known=None if inputs.mask is None else (inputs.mask, inputs.values),  # type: ignore[arg-type]
        observed=None if inputs.y is None else (inputs.y, inputs.flip),  # type: ignore[arg-type]
        drift=inputs.drift,
        deterministic=inputs.deterministic,
    )


def check_flips(flip: Tensor) -> None:
    if flip.device.type == "cpu" and flip.numel() > 0 and not torch.compiler.is_compiling():
        low, high = flip.aminmax()
        if not (low > 0 and high <= 0.5):
            raise ValueError(
                f"observed flip must be in (0, 1/2], got {low.item():g} to {high.item():g}"
            )


_NOISE = "Tensor x_0, Tensor rows, SymInt seed, Tensor example_ids, Tensor t"
_STEP = (
    "Tensor logit_out, Tensor rows, SymInt seed, Tensor example_ids, Tensor t, Tensor? known_mask, "
    "Tensor? known_values, Tensor? y, Tensor? flip, Tensor? drift, bool deterministic"
)
_KL = "Tensor x_0, Tensor x_t, Tensor logit_out, Tensor rows"
LIBRARY.define(f"bernoulli_noise({_NOISE}) -> Tensor")
LIBRARY.define(f"bernoulli_step(Tensor x_t, {_STEP}) -> Tensor")
LIBRARY.define(f"bernoulli_step_(Tensor(a!) x_t, {_STEP}) -> ()")
LIBRARY.define(f"bernoulli_kl({_KL}) -> Tensor")
LIBRARY.define(f"_bernoulli_kl_with_grad({_KL}) -> (Tensor, Tensor)")


@on_its_device
def _noise(x_0: Tensor, rows: Tensor, seed: int, example_ids: Tensor, t: Tensor) -> Tensor:
    x_0, rows = collapsible(x_0), rows.contiguous()
    source = (seed, int(Stream.FORWARD), example_ids.contiguous(), t.contiguous())
    x_t = torch.empty_like(x_0)
    if x_0.numel() == 0:
        return x_t
    if dispatch.kernels("bernoulli_noise", x_0) == "triton":
        from dpm_fast.triton_kernels import bernoulli as triton_kernels

        check_timesteps(t)
        triton_kernels.noise(x_0, rows, source, x_t)
        return x_t
    module, execution = dispatch.native(x_0)
    module.bernoulli_noise(x_0, rows, *source, x_t, execution)
    return x_t


@on_its_device
def _step(x_t: Tensor, *args: object) -> Tensor:
    x_prev = torch.empty_like(collapsible(x_t))
    _write_step(x_t, x_prev, *args)  # type: ignore[arg-type]
    return x_prev


@on_its_device
def _step_in_place(x_t: Tensor, *args: object) -> None:
    written = collapsible(x_t)
    others = (apart(x, written) if isinstance(x, Tensor) else x for x in args)
    _write_step(written, written, *others)  # type: ignore[arg-type]
    if written is not x_t:
        x_t.copy_(written)


def _write_step(
    x_t: Tensor,
    x_prev: Tensor,
    logit_out: Tensor,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: Tensor,
    known_mask: Tensor | None,
    known_values: Tensor | None,
    y: Tensor | None,
    flip: Tensor | None,
    drift: Tensor | None,
    deterministic: bool,
) -> None:
    if x_t.numel() == 0:
        return
    rows = rows.contiguous()
    source = (seed, int(Stream.REVERSE), example_ids.contiguous(), t.contiguous())
    given = (x_t, logit_out, known_mask, known_values, y, flip, drift)
    inputs = [None if x is None else collapsible(x) for x in given]
    if dispatch.kernels("bernoulli_step", x_t) == "triton":
        from dpm_fast.triton_kernels import bernoulli as triton_kernels

        check_timesteps(t, first=1)
        triton_kernels.step(inputs, rows, source, deterministic, x_prev)
        return
    module, execution = dispatch.native(x_t)
    module.bernoulli_step(*inputs, rows, *source, deterministic, x_prev, execution)


@on_its_device
def _kl_with_grad(
    x_0: Tensor, x_t: Tensor, logit_out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(collapsible(logit_out))
    return _write_kl(x_0, x_t, logit_out, rows, grad), grad


@on_its_device
def _kl(x_0: Tensor, x_t: Tensor, logit_out: Tensor, rows: Tensor) -> Tensor:
    return _write_kl(x_0, x_t, logit_out, rows, None)


def _write_kl(
    x_0: Tensor, x_t: Tensor, logit_out: Tensor, rows: Tensor, grad: Tensor | None
) -> Tensor:
    """Returns the nats; the gradient goes into ``grad``."""
    nats = torch.empty(x_0.shape[0], dtype=torch.float64, device=x_0.device)
    if x_0.numel() == 0:
        return nats.zero_()
    inputs, rows = [collapsible(x) for x in (x_0, x_t, logit_out)], rows.contiguous()
    if dispatch.kernels("bernoulli_kl", x_0) == "triton":
        from dpm_fast.triton_kernels import bernoulli as triton_kernels

        triton_kernels.kl(inputs, rows, nats, grad)
        return nats
    module, execution = dispatch.native(x_0)
    pieces = room_for_pieces(module, x_0, 1)
    module.bernoulli_kl(*inputs, rows, nats, grad, pieces, execution)
    return nats


class _Kl(Gradient):
    inputs = slice(2, 3)  # logit_out
    with_gradients = _kl_with_grad

    @staticmethod
    def forward(ctx, run, *args):  # type: ignore[no-untyped-def]
        nats, grad = run(*args)
        save_gradients(ctx, args, (grad,), fresh=run is _kl_with_grad)
        return nats

    @staticmethod
    def backward(ctx, grad_nats):  # type: ignore[no-untyped-def]
        if is_differentiated_again():
            tensors, wanted = ctx.saved_tensors[:4], ctx.needs_input_grad[1:]
            return None, *differentiable_gradients(
                reference.bernoulli_kl, tensors, wanted, grad_nats
            )
        return None, None, None, *weighted_gradients(ctx, grad_nats), None


def _like_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(collapsible(x))


def _nats_fake(x_0: Tensor, *_: object) -> Tensor:
    return x_0.new_empty(x_0.shape[0], dtype=torch.float64)


def _nats_and_grad_fake(
    x_0: Tensor, x_t: Tensor, logit_out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    return _nats_fake(x_0), _like_first(logit_out)


_NOISE_OP = Op("bernoulli_noise", _noise, _like_first)
_STEP_OP = Op("bernoulli_step", _step, _like_first)
_STEP_IN_PLACE_OP = Op("bernoulli_step_", _step_in_place, lambda *_: None)
_KL_WITH_GRAD_OP = Op("_bernoulli_kl_with_grad", _kl_with_grad, _nats_and_grad_fake)
_KL_OP = Op("bernoulli_kl", _kl, _nats_fake, gradient=_Kl, with_gradients=_KL_WITH_GRAD_OP.op)
