"""x_t of the forward process, and plain normals: the op, and what a user of PyTorch writes."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.distributions import Normal

from benchmarks.harness import Case
from dpm_fast import dispatch, ops, use_backend
from dpm_fast.noise import Stream

# MNIST as in the results of the other ops, CIFAR-10, and points of a plane.
SHAPES = ((512, 1, 28, 28), (128, 3, 32, 32), (10_000, 2))
SEED = 0
FLOPS_PER_NORMAL = 25  # of Box-Muller; the integer operations of Philox come on top


def cases(device: torch.device) -> Iterator[Case]:
    for shape in SHAPES:
        yield _x_t(shape, "forward", device)
        yield _x_t(shape, "forward_backward", device)
        yield _normal(shape, device)


def bench_noise(call: object, benchmark: BenchmarkFixture) -> None:
    benchmark(call)


def _x_t(shape: tuple[int, ...], mode: str, device: torch.device) -> Case:
    ids = torch.arange(shape[0], device=device)

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x_0 = torch.rand(shape, generator=generator) * 2 - 1
        signal = torch.linspace(0.99, 0.1, shape[0])
        coefficients = torch.stack((signal, (1 - signal * signal).sqrt()), dim=1)
        t = torch.arange(shape[0]) % 1000 + 1
        return tuple(x.to(device) for x in (x_0, coefficients, t))

    def reference(x_0: Tensor, coefficients: Tensor, t: Tensor) -> Tensor:
        signal, spread = _columns(coefficients, x_0)
        return signal * x_0 + spread * torch.randn_like(x_0)

    def op(x_0: Tensor, coefficients: Tensor, t: Tensor) -> Tensor:
        return ops.noise(x_0, coefficients, SEED, ids, t)

    def expected(x_0: Tensor, coefficients: Tensor, t: Tensor) -> Normal:
        signal, spread = _columns(coefficients, x_0)
        return Normal(signal * x_0, spread.expand_as(x_0))

    num_elements = torch.Size(shape).numel()
    backward = mode == "forward_backward"
    return Case(
        op="noise",
        name="x".join(map(str, shape)),
        mode=mode,
        inputs=inputs,
        providers={"reference": reference, **_backends(op, device)},
        expected=expected,
        bytes=(4 if backward else 2) * 4 * num_elements,
        flops=(FLOPS_PER_NORMAL + 3 + backward) * num_elements,
        wrt=(0,) if backward else (),
    )


def _normal(shape: tuple[int, ...], device: torch.device) -> Case:
    ids = torch.arange(shape[0], device=device)

    def inputs() -> tuple[Tensor, ...]:
        # The first input names the device and dtype of a case.
        return torch.zeros(1, device=device), torch.arange(shape[0], device=device) % 1000 + 1

    def reference(_: Tensor, t: Tensor) -> Tensor:
        return torch.randn(shape, device=device)

    def op(_: Tensor, t: Tensor) -> Tensor:
        return ops.normal(SEED, Stream.REVERSE, ids, t, shape[1:])

    def expected(x: Tensor, t: Tensor) -> Normal:
        zeros = x.new_zeros(shape)
        return Normal(zeros, zeros + 1)

    num_elements = torch.Size(shape).numel()
    return Case(
        op="normal",
        name="x".join(map(str, shape)),
        mode="forward",
        inputs=inputs,
        providers={"reference": reference, **_backends(op, device)},
        expected=expected,
        bytes=4 * num_elements,
        flops=FLOPS_PER_NORMAL * num_elements,
    )


def _columns(coefficients: Tensor, x: Tensor) -> list[Tensor]:
    return [c.view(-1, *(1 for _ in x.shape[1:])) for c in coefficients.unbind(1)]


def _backends(op: Callable[..., Any], device: torch.device) -> Mapping[str, Callable[..., Any]]:
    """The op on each backend with kernels for the device."""
    names = {"native": "native" if device.type == "cpu" else "cuda", "triton": "triton"}
    return {
        provider: partial(_with_backend, backend, op)
        for backend, provider in names.items()
        if dispatch.why_absent(backend, device.type) is None
    }


def _with_backend(name: str, op: Callable[..., Any], *inputs: Tensor) -> Any:
    with use_backend(name):
        return op(*inputs)
