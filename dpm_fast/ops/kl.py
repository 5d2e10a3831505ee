"""The op `kl`: one term of the likelihood bound per example, with its gradients in one pass."""

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dpm_fast import dispatch, reference
from dpm_fast.ops.common import (
    LIBRARY,
    Gradient,
    Op,
    check_examples,
    check_joined,
    check_like,
    check_rows,
    check_variances,
    collapsible,
    differentiable_gradients,
    is_differentiated_again,
    needs_gradient,
    on_its_device,
    room_for_pieces,
    save_gradients,
    weighted_gradients,
)
from dpm_fast.reference import Bins, ReverseRow

EDGES = ("decoder", "discretized", "discretized_tanh")  # numbered as in csrc/kl.h
NUM_COLUMNS = len(ReverseRow._fields)
_NO_BINS = Bins(0.0, 0.0, 0.0)


def kl(
    x_0: Tensor,
    x_t: Tensor,
    mu_out: Tensor,
    sigma2_out: Tensor | None,
    rows: Tensor,
    *,
    joined: bool = False,
    edge: str = "decoder",
    bins: Bins | None = None,
) -> Tensor:
    """One term of the bound per example.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t >= 2, and -log p(x_0 | x_1) at t = 1
    ([DPM] equation 14, [DDPM] equations 5 and 13). Per element, with Delta = mu_q - mu_p and
    delta = ln(sigma2_q / sigma2_p),

        t >= 2:  1/2 [exp(delta) - 1 - delta + Delta^2 / sigma2_p]
        t = 1:   1/2 [ln(2 pi sigma2_p) + Delta^2 / sigma2_p], or -ln of the probability of a bin

    where mu_p and sigma2_p follow from the network's outputs and a row of coefficients, see
    `dpm_fast.reference.ReverseRow`.

    Differentiable with respect to every tensor. Value and gradients are made in one pass; second
    derivatives are those of the reference, at its speed.
    Outputs may be views (channel halves of one tensor, channels-last): nothing is copied as long
    as the spatial dimensions collapse into one.

    Args:
        x_0, x_t: (N, C, *spatial) or (N, D), model scale; float32, bfloat16, float16 or float64.
        mu_out: the same shape and dtype; bfloat16 or float16 also with float32 x.
        sigma2_out: like mu_out, or None for a constant variance, where rows must have s = 0.
        rows: (N, 15) coefficients of each example's timestep, columns as in `ReverseRow`; float32,
            or float64 for float64 x. Its ``base`` must be positive.
        joined: mu_out is a network's whole output instead, (N, 2 C, *spatial) with mu_out before
            sigma2_out, which must be None: its gradient is then made in one tensor, where those of
            two halves would have to be joined.
        edge: the decoder at t = 1: a density ("decoder"), or the probability of the data's bin
            by exact CDFs ("discretized") or as [iDDPM] approximates it ("discretized_tanh").
        bins: of a discretized edge, a `dpm_fast.reference.Bins` in model scale.

    Returns:
        (N,) float64, nats per example: summed in float64 over groups of four elements, each of
        which is added up in float32 (in float64 for float64 x).

    Raises:
        TypeError: for a dtype that does not fit, or bins of another type.
        ValueError: for a shape, device, edge, bins or, on a CPU, a variance that does not fit. On
            other devices a row whose base is not positive gives NaN.
        NotImplementedError: where torch.func or forward mode wants the derivative of a kernel.

    Reference: `dpm_fast.reference.kl`.
    """
    check_examples(x_0, "x_0")
    check_like(x_t, x_0, "x_t", "x_0")
    check_like(mu_out, x_0, "mu_out", "x_0", narrow=True, channels=2 if joined else 1)
    if sigma2_out is not None:
        if joined:
            check_joined(sigma2_out)
        check_like(sigma2_out, mu_out, "sigma2_out", "mu_out")
    check_rows(rows, x_0, NUM_COLUMNS)
    if edge not in EDGES:
        raise ValueError(f"edge must be one of {', '.join(EDGES)}, got {edge!r}")
    if (edge == "decoder") != (bins is None):
        raise ValueError(
            f"bins must be given for a discretized edge alone, got {bins} for {edge!r}"
        )
    if bins is not None:
        _check_bins(bins)
    if dispatch.backend("kl", x_0) == "reference":
        check_variances(rows, mu_out if joined else sigma2_out, zero=False)
        return reference.kl(x_0, x_t, mu_out, sigma2_out, rows, joined=joined, edge=edge, bins=bins)
    if mu_out.dtype == torch.float16 and needs_gradient(x_0, x_t, mu_out, sigma2_out, rows):
        # Gradients are made before the scale of a loss is known, which float16 may need.
        x_0, x_t, mu_out = x_0.float(), x_t.float(), mu_out.float()
        sigma2_out = None if sigma2_out is None else sigma2_out.float()
    numbers = _NO_BINS if bins is None else map(float, bins)
    return _OP(x_0, x_t, mu_out, sigma2_out, rows, EDGES.index(edge), *numbers)


def _check_bins(bins: Bins) -> None:
    if not isinstance(bins, Bins):
        raise TypeError(f"bins must be a dpm_fast.reference.Bins, got {type(bins).__name__}")
    for name, value in zip(Bins._fields, bins, strict=True):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"bins.{name} must be a number, got {type(value).__name__}")
    # Not NaN either, of which no comparison holds.
    if not 0 < bins.half_width < math.inf:
        raise ValueError(f"bins.half_width must be positive and finite, got {bins.half_width:g}")
    if not -math.inf < bins.lowest < bins.highest < math.inf:
        raise ValueError(
            "bins.lowest must be below bins.highest, both finite, "
            f"got {bins.lowest:g} and {bins.highest:g}"
        )


_SCHEMA = (
    "(Tensor x_0, Tensor x_t, Tensor mu_out, Tensor? sigma2_out, Tensor rows, int edge, "
    "float half_width, float lowest, float highest"
)
LIBRARY.define(f"kl{_SCHEMA}) -> Tensor")
# `wanted`: bit i for the gradient of tensor i; those not wanted come back empty.
LIBRARY.define(
    f"_kl_with_grads{_SCHEMA}, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@on_its_device
def _kl(*args: Any) -> Tensor:
    nats = _nats(args[0])
    _launch(args, nats, _NO_GRADS)
    return nats


@on_its_device
def _with_grads(*args_and_wanted: Any) -> tuple[Tensor | None, ...]:
    """The nats and the gradients wanted."""
    *args, wanted = args_and_wanted
    nats, grads = _nats(args[0]), _grads(args, wanted)
    _launch(args, nats, grads)
    return nats, *grads


def _kl_with_grads(*args: Any) -> tuple[Tensor, ...]:
    return _as_op(args[0], _with_grads(*args))


def _as_op(x_0: Tensor, made: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(x_0.new_empty(0) if x is None else x for x in made)


def _nats(x_0: Tensor) -> Tensor:
    return torch.empty(x_0.shape[0], dtype=torch.float64, device=x_0.device)


def _grads(args: Sequence[Any], wanted: int) -> list[Tensor | None]:
    """Those wanted, like their tensors, that of the rows in float64."""
    grads = [
        torch.empty_like(collapsible(x)) if wanted >> i & 1 else None
        for i, x in enumerate(args[:4])
    ]
    rows = args[4]
    return [*grads, rows.new_empty(rows.shape, dtype=torch.float64) if wanted >> 4 & 1 else None]


_NO_GRADS = (None,) * 5


def _launch(
    args: Sequence[Any],  # of the op `kl`
    nats: Tensor,  # written, as are the gradients that are not None:
    grads: Sequence[Tensor | None],  # of x_0, x_t, mu_out, sigma2_out, rows
) -> None:
    x_0, x_t, mu_out, sigma2_out, rows, edge, *bins = args
    if x_0.numel() == 0:
        nats.zero_()
        if grads[4] is not None:
            grads[4].zero_()
        return
    joined = mu_out.shape != x_0.shape
    sigma2_out = None if sigma2_out is None else collapsible(sigma2_out)
    inputs = collapsible(x_0), collapsible(x_t), collapsible(mu_out), sigma2_out
    rows = rows.contiguous()
    if dispatch.kernels("kl", x_0) == "triton":
        from dpm_fast.triton_kernels.kl import kl as launch

        if joined:
            inputs, grads = _halves(inputs), _halves(grads)
        launch(inputs, rows, edge, bins, nats, grads)
        return
    module, execution = dispatch.native(x_0)
    pieces = room_for_pieces(module, x_0, 1 + NUM_COLUMNS)
    module.kl(*inputs, joined, rows, edge, *bins, nats, *grads, pieces, execution)


def _halves(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """x_0, x_t, mu_out, sigma2_out and all others, from those where mu_out is joined."""
    x_0, x_t, joined, _, *others = tensors
    return x_0, x_t, *((None, None) if joined is None else joined.chunk(2, dim=1)), *others


def _kl_fake(x_0: Tensor, *args: Any) -> Tensor:
    return _nats(x_0)


def _kl_with_grads_fake(*args: Any) -> tuple[Tensor, ...]:
    return _as_op(args[0], (_nats(args[0]), *_grads(args[:-1], args[-1])))


class _Kl(Gradient):
    inputs = slice(5)
    with_gradients = _with_grads

    @staticmethod
    def forward(ctx, run, *args):  # type: ignore[no-untyped-def]
        wanted = sum(needed << i for i, needed in enumerate(ctx.needs_input_grad[1:6]))
        nats, *grads = run(*args, wanted)
        kept = [g for i, g in enumerate(grads) if wanted >> i & 1]
        save_gradients(ctx, args[:5], kept, fresh=run is _with_grads)
        ctx.rest, ctx.rows_dtype = args[5:], args[4].dtype
        return nats

    @staticmethod
    def backward(ctx, grad_nats):  # type: ignore[no-untyped-def]
        if is_differentiated_again():
            tensors, wanted = ctx.saved_tensors[:5], ctx.needs_input_grad[1:6]
            by_reference = partial(_reference, ctx.rest)
            grads = differentiable_gradients(by_reference, tensors, wanted, grad_nats)
            return None, *grads, *(None,) * 4
        weighted = iter(weighted_gradients(ctx, grad_nats))
        grads = [next(weighted) if needed else None for needed in ctx.needs_input_grad]
        if grads[5] is not None:
            grads[5] = grads[5].to(ctx.rows_dtype)
        return tuple(grads)


def _reference(rest: Sequence[Any], x_0: Tensor, x_t: Tensor, mu_out: Tensor, *args: Any) -> Tensor:
    edge, *bins = rest
    return reference.kl(
        x_0, x_t, mu_out, *args,
        joined=mu_out.shape != x_0.shape,
        edge=EDGES[edge],
        bins=Bins(*bins) if edge else None,
    )  # fmt: skip


_WITH_GRADS_OP = Op("_kl_with_grads", _kl_with_grads, _kl_with_grads_fake)
_OP = Op("kl", _kl, _kl_fake, gradient=_Kl, with_gradients=_WITH_GRADS_OP.op)
