"""The ops `step` and `step_`: one step of the reverse trajectory, its noise made on the fly."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpm_fast import dispatch, reference
from dpm_fast.noise import Stream, check_timesteps
from dpm_fast.ops.common import (
    LIBRARY,
    Op,
    apart,
    check_examples,
    check_joined,
    check_like,
    check_noise,
    check_pair,
    check_rows,
    check_shared,
    check_shared_number,
    check_variances,
    check_writable,
    collapsible,
    needs_gradient,
    on_its_device,
    write_in_place,
)
from dpm_fast.reference import ReverseRow

_NUM_COLUMNS = len(ReverseRow._fields)
_STREAM = int(Stream.REVERSE)
_BASE = ReverseRow._fields.index("base")


def step(
    x_t: Tensor,
    mu_out: Tensor,
    sigma2_out: Tensor | None,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    joined: bool = False,
    known: tuple[Tensor, Tensor] | None = None,
    observed: tuple[Tensor, Tensor | float] | None = None,
    drift: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """x_{t-1} given x_t: one reverse step of any parameterization, in one pass over memory.

    mu_p and sigma2_p follow from the network's outputs and a row of coefficients, see
    `dpm_fast.reference.ReverseRow`. Then, in this order ([DPM] section 2.5),

        observed:  sigma2 = 1 / (1 / sigma2_p + 1 / sigma2_y)
                   mu = sigma2 (mu_p / sigma2_p + y / sigma2_y)
        drift:     mu = mu + sigma2 drift
        noise:     x_{t-1} = mu + sqrt(sigma2) eps,  eps of the contract in `dpm_fast.noise`
        known:     elements of the mask take their values, bit for bit

    Views are taken as they are (channel halves of one tensor, channels-last): nothing is copied as
    long as the spatial dimensions collapse into one. The noise of an element does not depend on
    the layout. This op is for sampling and has no gradient; `dpm_fast.reference.step` has one.

    Args:
        x_t: (N, C, *spatial) or (N, D); float32, bfloat16, float16 or float64.
        mu_out: the same shape and dtype; bfloat16 or float16 also with float32 x_t.
        sigma2_out: like mu_out, or None for a constant variance, where rows must have s = 0.
        rows: (N, 15) coefficients of each example's timestep, columns as in `ReverseRow`; float32,
            or float64 for float64 x_t. A ``base`` of 0 is a step without noise.
        seed: of the noise, a 64-bit integer.
        example_ids: (N,) int64, global indices of the examples.
        t: timestep in 1..2**24 - 1, one for all or (N,) int64; which noise, nothing else.
        joined: mu_out is a network's whole output instead, (N, 2 C, *spatial) with mu_out before
            sigma2_out, which must be None.
        known: (mask, values), bool and the dtype of x_t.
        observed: (y, sigma2_y): y = x_{t-1} + N(0, sigma2_y); the dtype of x_t, and a positive
            number or a floating-point tensor, infinite where nothing was observed.
        drift: the shape and dtype of x_t, or shared; grad log r for a product with r(x).
        deterministic: leave the noise out.
        The shape of mask, values, y, sigma2_y and drift is that of x_t, or (1, *event).

    Returns:
        x_{t-1}, shape and dtype of x_t.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit, a seed outside of 64 bits and, on a
            CPU, a t out of range, a negative base or a sigma2_y that is not positive. On other
            devices these give NaN.
        RuntimeError: where a gradient is asked for.

    Reference: `dpm_fast.reference.step`.
    """
    inputs = _checked(
        x_t, mu_out, sigma2_out, rows, seed, example_ids, t, joined, known, observed, drift,
        deterministic,
    )  # fmt: skip
    if dispatch.backend("step", x_t) == "reference":
        return _reference(inputs)
    return _OP(*inputs)


def step_(
    x_t: Tensor,
    mu_out: Tensor,
    sigma2_out: Tensor | None,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    joined: bool = False,
    known: tuple[Tensor, Tensor] | None = None,
    observed: tuple[Tensor, Tensor | float] | None = None,
    drift: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`step` that writes x_{t-1} into x_t and returns it.

    Other arguments may share memory with x_t; they are copied then.

    Raises:
        ValueError: also where elements of x_t share memory among themselves, or where x_t
            requires a gradient.
    """
    inputs = _checked(
        x_t, mu_out, sigma2_out, rows, seed, example_ids, t, joined, known, observed, drift,
        deterministic,
    )  # fmt: skip
    check_writable(x_t, "x_t")
    if dispatch.backend("step", x_t) == "reference":
        return x_t.copy_(_reference(inputs))
    return write_in_place(_OP, _IN_PLACE_OP, *inputs)


class StepInputs(NamedTuple):
    """Arguments of the registered ops."""

    x_t: Tensor
    mu_out: Tensor
    sigma2_out: Tensor | None
    rows: Tensor
    seed: int  # signed
    example_ids: Tensor
    t: Tensor
    y: Tensor | None
    sigma2_y: Tensor | None
    drift: Tensor | None
    mask: Tensor | None
    values: Tensor | None
    deterministic: bool


def _checked(
    x_t: Tensor,
    mu_out: Tensor,
    sigma2_out: Tensor | None,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    joined: bool,
    known: tuple[Tensor, Tensor] | None,
    observed: tuple[Tensor, Tensor | float] | None,
    drift: Tensor | None,
    deterministic: bool,
) -> StepInputs:
    check_examples(x_t, "x_t")
    check_like(mu_out, x_t, "mu_out", "x_t", narrow=True, channels=2 if joined else 1)
    if joined:
        check_joined(sigma2_out)
        mu_out, sigma2_out = mu_out.chunk(2, dim=1)
    elif sigma2_out is not None:
        check_like(sigma2_out, mu_out, "sigma2_out", "mu_out")
    check_rows(rows, x_t, _NUM_COLUMNS)
    seed, _, example_ids, t = check_noise(seed, _STREAM, example_ids, t, x_t, first=1)
    y = sigma2_y = mask = values = None
    if observed is not None:
        y, sigma2_y = check_pair(observed, "observed", "(y, sigma2_y)")
        check_shared(y, x_t, "observed y", x_t.dtype)
        sigma2_y = checked_variance(sigma2_y, x_t, rows.dtype)
    if drift is not None:
        check_shared(drift, x_t, "drift", x_t.dtype)
    if known is not None:
        mask, values = check_pair(known, "known", "(mask, values)")
        check_shared(mask, x_t, "known mask", torch.bool)
        check_shared(values, x_t, "known values", x_t.dtype)
    if needs_gradient(x_t, mu_out, sigma2_out, rows, y, sigma2_y, drift, values):
        raise RuntimeError(
            "step has no gradient: call it under torch.no_grad(), or use dpm_fast.reference.step"
        )
    return StepInputs(
        x_t, mu_out, sigma2_out, rows, seed, example_ids, t, y, sigma2_y, drift, mask, values,
        bool(deterministic),
    )  # fmt: skip


def checked_variance(sigma2_y: Tensor | float, x_t: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(sigma2_y, int | float) and not sigma2_y > 0:
        raise ValueError(f"observed sigma2_y must be positive, got {sigma2_y:g}")
    sigma2_y = check_shared_number(sigma2_y, x_t, "observed sigma2_y", dtype)
    if x_t.device.type == "cpu" and not torch.compiler.is_compiling():
        positive = sigma2_y > 0
        if not bool(positive.all()):
            wrong = sigma2_y[~positive][0].item()
            raise ValueError(f"observed sigma2_y must be positive, got {wrong:g}")
    return sigma2_y


def _check_values(inputs: StepInputs) -> None:
    """What the native launcher of a CPU finds out by itself."""
    check_variances(inputs.rows, inputs.sigma2_out, zero=True)
    check_timesteps(inputs.t, first=1)


def _reference(inputs: StepInputs) -> Tensor:
    _check_values(inputs)
    return reference.step(
        *inputs[:7],
        known=None if inputs.mask is None else (inputs.mask, inputs.values),  # type: ignore[arg-type]
        observed=None if inputs.y is None else (inputs.y, inputs.sigma2_y),  # type: ignore[arg-type]
        drift=inputs.drift,
        deterministic=inputs.deterministic,
    )


_SCHEMA = (
    "Tensor mu_out, Tensor? sigma2_out, Tensor rows, SymInt seed, Tensor example_ids, Tensor t, "
    "Tensor? y, Tensor? sigma2_y, Tensor? drift, Tensor? mask, Tensor? values, bool deterministic"
)
LIBRARY.define(f"step(Tensor x_t, {_SCHEMA}) -> Tensor")
LIBRARY.define(f"step_(Tensor(a!) x_t, {_SCHEMA}) -> ()")


@on_its_device
def _step(*args: object) -> Tensor:
    inputs = StepInputs(*args)  # type: ignore[arg-type]
    x_t = collapsible(inputs.x_t)
    x_prev = torch.empty_like(x_t)
    _launch(x_prev, inputs if x_t is inputs.x_t else inputs._replace(x_t=x_t))
    return x_prev


@on_its_device
def _step_(*args: object) -> None:
    inputs = StepInputs(*args)  # type: ignore[arg-type]
    x_t = collapsible(inputs.x_t)
    _launch(
        x_t,
        StepInputs(x_t, *(apart(x, x_t) if isinstance(x, Tensor) else x for x in inputs[1:])),  # type: ignore[arg-type]
    )
    if x_t is not inputs.x_t:
        inputs.x_t.copy_(x_t)


def _launch(x_prev: Tensor, inputs: StepInputs) -> None:
    if x_prev.numel() == 0:
        return
    if dispatch.kernels("step", x_prev) == "triton":
        from dpm_fast.triton_kernels.step import step as launch

        _check_values(inputs)
        launch(x_prev, _arranged(inputs))
    else:
        _launch_native(x_prev, _arranged(inputs))


def _arranged(inputs: StepInputs) -> StepInputs:
    """In layouts that kernels read; x_t is so already."""

    def optional(x: Tensor | None) -> Tensor | None:
        return None if x is None else collapsible(x)

    x_t, mu_out, sigma2_out, rows, seed, ids, t, y, sigma2_y, drift, mask, values, last = inputs
    return StepInputs(
        x_t, collapsible(mu_out), optional(sigma2_out), rows.contiguous(), seed,
        ids.contiguous(), t.contiguous(), optional(y), optional(sigma2_y), optional(drift),
        optional(mask), optional(values), last,
    )  # fmt: skip


def _launch_native(x_prev: Tensor, inputs: StepInputs) -> None:
    module, execution = dispatch.native(x_prev)
    x_t, mu_out, sigma2_out, rows, seed, ids, t, *shared, deterministic = inputs
    module.step(
        x_t, mu_out, sigma2_out, rows, seed, _STREAM, ids, t, *shared, deterministic, x_prev,
        execution,
    )  # fmt: skip


def _step_fake(x_t: Tensor, *_: object) -> Tensor:
    return torch.empty_like(collapsible(x_t))


_OP = Op("step", _step, _step_fake)
_IN_PLACE_OP = Op("step_", _step_, lambda *_: None)
