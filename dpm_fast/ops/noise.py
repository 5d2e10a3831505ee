"""The op `noise`: x_t from x_0 with noise made on the way; and plain random numbers.

The random numbers are those of `dpm_fast.noise`, whose functions of the same names are the
references of `normal`, `uniform` and `words`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_fast import dispatch, reference
from dpm_fast import noise as contract
from dpm_fast.noise import Stream
from dpm_fast.ops.common import (
    DTYPES,
    LIBRARY,
    Gradient,
    Op,
    check_examples,
    check_noise,
    check_rows,
    collapsible,
    differentiable_gradients,
    is_differentiated_again,
    on_its_device,
    room_for_pieces,
)

RANDOM = ("words", "uniform", "normal")  # numbered as in csrc/noise.h


def noise(
    x_0: Tensor,
    coefficients: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    stream: int = Stream.FORWARD,
) -> Tensor:
    """A sample of the forward process.

    x_t = coefficients[:, 0] x_0 + coefficients[:, 1] eps, which is [DDPM] equation 4 with the
    coefficients sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t); eps is the unit Gaussian noise of
    `dpm_fast.noise` at (seed, stream, example id, t, element).

    Differentiable with respect to x_0 and the coefficients. Nothing is stored for that: the
    backward pass makes the same noise again.

    Args:
        x_0: (N, C, *spatial) or (N, D); float32, bfloat16, float16 or float64. A view whose
            spatial dimensions collapse into one is not copied.
        coefficients: (N, 2) float32, or float64 for float64 x_0.
        seed: any integer in [-2**63, 2**64), taken modulo 2**64.
        example_ids: (N,) int64, global indices of the examples, any values.
        t: timestep in 0..2**24 - 1, one for all or (N,) int64.
        stream: purpose of the noise, see `dpm_fast.noise.Stream`.

    Returns:
        x_t of the shape and dtype of x_0, computed in float32 (float64 for float64 x_0, of the same
        normals, which are float32). Bits do not depend on the batch, the memory layout or the
        number of threads.

    Raises:
        TypeError, ValueError: for a dtype, shape, device, seed, stream or, on a CPU, a timestep
            that does not fit. On other devices a timestep out of range gives NaN.
        NotImplementedError: where torch.func or forward mode wants the derivative of a kernel.

    Reference: `dpm_fast.reference.noise`.
    """
    check_examples(x_0, "x_0")
    check_rows(coefficients, x_0, 2, "coefficients")
    seed, stream, example_ids, t = check_noise(seed, stream, example_ids, t, x_0)
    if dispatch.backend("noise", x_0) == "reference":
        return reference.noise(x_0, coefficients, seed, example_ids, t, stream=stream)
    return _OP(x_0, coefficients, seed, example_ids, t, stream)


def normal(
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: int | Tensor,
    event_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Gaussian numbers, (N, *event_shape) of ``dtype``: float32 values, converted.

    Arguments as for `noise`; float32, bfloat16, float16 or float64. Raises likewise, and a
    timestep out of range gives NaN likewise.

    Reference: `dpm_fast.noise.normal`, from which a value may differ by 1e-5.
    """
    return _fill("normal", seed, stream, example_ids, t, event_shape, dtype)


def uniform(
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: int | Tensor,
    event_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in (0, 1], otherwise as `normal`; equal to `dpm_fast.noise.uniform`."""
    return _fill("uniform", seed, stream, example_ids, t, event_shape, dtype)


def words(
    seed: int, stream: int, example_ids: Tensor, t: int | Tensor, num_elements: int
) -> Tensor:
    """Raw words in [0, 2**32), (N, num_elements) int64; equal to `dpm_fast.noise.words`."""
    event_shape = (contract.check_num_elements(num_elements),)
    return _fill("words", seed, stream, example_ids, t, event_shape, torch.int64)


def _fill(
    random: str,
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: int | Tensor,
    event_shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    if random != "words" and dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"dtype must be {names}, got {dtype}")
    seed, stream, example_ids, t = contract.check(seed, stream, example_ids, t)
    num_elements = contract.check_event(event_shape)
    if dispatch.backend(random, example_ids) == "reference":
        if random == "words":
            return contract.words(seed, stream, example_ids, t, num_elements)
        return getattr(contract, random)(seed, stream, example_ids, t, event_shape, dtype)
    out = _RANDOM_OP(RANDOM.index(random), seed, stream, example_ids, t, num_elements, dtype)
    return out.view(example_ids.shape[0], *event_shape)


LIBRARY.define(
    "noise(Tensor x_0, Tensor coefficients, SymInt seed, Tensor example_ids, Tensor t, "
    "int stream) -> Tensor"
)
# Empty tensors stand for gradients that are not wanted; that of the coefficients is float64.
LIBRARY.define(
    "_noise_gradients(Tensor grad_x_t, Tensor? x_0, Tensor coefficients, SymInt seed, "
    "Tensor example_ids, Tensor t, int stream, bool per_x_0) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "random(int random, SymInt seed, int stream, Tensor example_ids, Tensor t, "
    "SymInt num_elements, ScalarType dtype) -> Tensor"
)


@on_its_device
def _noise(
    x_0: Tensor, coefficients: Tensor, seed: int, example_ids: Tensor, t: Tensor, stream: int
) -> Tensor:
    x_0 = collapsible(x_0)
    x_t = torch.empty_like(x_0)
    if x_0.numel() == 0:
        return x_t
    coefficients, example_ids, t = (x.contiguous() for x in (coefficients, example_ids, t))
    if dispatch.kernels("noise", x_0) == "triton":
        from dpm_fast.triton_kernels.noise import noise as launch

        contract.check_timesteps(t)
        launch(x_0, x_t, coefficients, (seed, stream, example_ids, t))
        return x_t
    module, execution = dispatch.native(x_0)
    module.noise(x_0, coefficients, seed, stream, example_ids, t, x_t, execution)
    return x_t


@on_its_device
def _noise_gradients(
    grad_x_t: Tensor,
    x_0: Tensor | None,
    coefficients: Tensor,
    seed: int,
    example_ids: Tensor,
    t: Tensor,
    stream: int,
    per_x_0: bool,
) -> tuple[Tensor, Tensor]:
    grad_x_t = collapsible(grad_x_t)
    x_0 = None if x_0 is None else collapsible(x_0)
    grad_x_0, grad_coefficients = _gradients(grad_x_t, x_0, coefficients, per_x_0)
    if grad_x_t.numel() == 0:
        return grad_x_0, grad_coefficients.zero_()
    coefficients, example_ids, t = (x.contiguous() for x in (coefficients, example_ids, t))
    if dispatch.kernels("noise", grad_x_t) == "triton":
        from dpm_fast.triton_kernels.noise import noise_gradients as launch

        source = (seed, stream, example_ids, t)
        launch(grad_x_t, x_0, coefficients, source, grad_x_0, grad_coefficients)
        return grad_x_0, grad_coefficients
    module, execution = dispatch.native(grad_x_t)
    pieces = None if x_0 is None else room_for_pieces(module, grad_x_t, 2)
    module.noise_gradient(
        grad_x_t, x_0, coefficients, seed, stream, example_ids, t,
        grad_x_0 if per_x_0 else None, grad_coefficients, pieces, execution,
    )  # fmt: skip
    return grad_x_0, grad_coefficients


def _gradients(
    grad_x_t: Tensor, x_0: Tensor | None, coefficients: Tensor, per_x_0: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(grad_x_t) if per_x_0 else grad_x_t.new_empty(0),
        coefficients.new_empty(0 if x_0 is None else coefficients.shape, dtype=torch.float64),
    )


@on_its_device
def _random(
    random: int,
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: Tensor,
    num_elements: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(len(example_ids), num_elements, dtype=dtype, device=example_ids.device)
    if out.numel() == 0:
        return out
    example_ids, t = example_ids.contiguous(), t.contiguous()
    if dispatch.kernels(RANDOM[random], example_ids) == "triton":
        from dpm_fast.triton_kernels.noise import fill as launch

        contract.check_timesteps(t)
        launch(random, (seed, stream, example_ids, t), out)
        return out
    module, execution = dispatch.native(example_ids)
    module.fill(random, seed, stream, example_ids, t, out, execution)
    return out


class _Noise(Gradient):
    inputs = slice(2)
    with_gradients = _noise  # all that backward needs besides are arguments

    @staticmethod
    def forward(ctx, run, x_0, coefficients, seed, example_ids, t, stream):  # type: ignore[no-untyped-def]
        needed = ctx.needs_input_grad[2]
        ctx.save_for_backward(x_0 if needed else None, coefficients, example_ids, t)
        ctx.counters = seed, stream
        return run(x_0, coefficients, seed, example_ids, t, stream)

    @staticmethod
    def backward(ctx, grad_x_t):  # type: ignore[no-untyped-def]
        x_0, coefficients, example_ids, t = ctx.saved_tensors
        per_x_0, per_coefficients = ctx.needs_input_grad[1:3]
        seed, stream = ctx.counters
        if is_differentiated_again():
            # Linear in both, and of x_0 itself nothing is needed where only its gradient is.
            given = torch.zeros_like(grad_x_t).requires_grad_() if x_0 is None else x_0

            def by_reference(x_0: Tensor, coefficients: Tensor) -> Tensor:
                return reference.noise(x_0, coefficients, seed, example_ids, t, stream=stream)

            grads = differentiable_gradients(
                by_reference, (given, coefficients), (per_x_0, per_coefficients), grad_x_t
            )
            return None, *grads, *(None,) * 4
        grad_x_0, grad_coefficients = _GRADIENTS_OP(
            grad_x_t, x_0, coefficients, seed, example_ids, t, stream, per_x_0
        )
        return (
            None,
            grad_x_0 if per_x_0 else None,
            grad_coefficients.to(coefficients.dtype) if per_coefficients else None,
            *(None,) * 4,
        )


def _noise_fake(x_0: Tensor, *args: object) -> Tensor:
    return torch.empty_like(collapsible(x_0))


def _noise_gradients_fake(
    grad_x_t: Tensor, x_0: Tensor | None, coefficients: Tensor, *args: object
) -> tuple[Tensor, Tensor]:
    return _gradients(collapsible(grad_x_t), x_0, coefficients, bool(args[-1]))


def _random_fake(
    random: int,
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: Tensor,
    num_elements: int,
    dtype: torch.dtype,
) -> Tensor:
    return example_ids.new_empty(example_ids.shape[0], num_elements, dtype=dtype)


_OP = Op("noise", _noise, _noise_fake, gradient=_Noise)
_GRADIENTS_OP = Op("_noise_gradients", _noise_gradients, _noise_gradients_fake)
_RANDOM_OP = Op("random", _random, _random_fake)
