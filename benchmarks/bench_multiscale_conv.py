"""Layers and stacks of multiscale convolutions, of the widths of the published networks and wider.

"reference" is eager PyTorch on images that are channels first, "channels_last" the same in the
order that oneDNN convolves fastest, also put through `torch.compile`; "native" is the kernel
whatever the size, "auto" what the op takes. Flops are those of the definition: who needs fewer
multiplications can have a share of the roof above 1.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Case
from dpm_fast import dispatch, noise, ops, reference, use_backend


class Stack(NamedTuple):
    """`layers` layers of `width` channels in and out, on square images."""

    layers: int
    width: int
    num_scales: int
    n: int
    side: int = 28
    kernel: int = 3
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        form = f"{self.layers} layers S={self.num_scales} K={self.kernel} {dtype}"
        return f"{self.n}x{self.width}x{self.side}x{self.side} {form}"


STACKS = [
    *(
        Stack(layers, 20, num_scales, n)
        for layers in (1, 4)
        for num_scales, n in ((1, 512), (3, 64))
    ),
    Stack(4, 20, 1, 64),
    Stack(4, 20, 2, 64, side=32),
    Stack(4, 20, 1, 16),
    Stack(2, 20, 1, 64, kernel=5),
    *(Stack(4, width, num_scales, 64) for width in (64, 100) for num_scales in (1, 3)),
    Stack(4, 20, 1, 512, dtype=torch.bfloat16),
    Stack(4, 64, 1, 64, dtype=torch.bfloat16),
]


def parameters(stack: Stack, tensors: tuple[Tensor, ...]) -> tuple[list[list[Tensor]], ...]:
    """Weights and biases by layer."""
    rows = [
        list(tensors[i : i + stack.num_scales]) for i in range(0, len(tensors), stack.num_scales)
    ]
    return rows[: stack.layers], rows[stack.layers :]


def eager(stack: Stack, order: torch.memory_format, x: Tensor, *tensors: Tensor) -> Tensor:
    x = x.contiguous(memory_format=order)
    for layer in zip(*parameters(stack, tensors), strict=True):
        x = reference.multiscale_conv(x, *layer)
    return x


def with_backend(stack: Stack, name: str, x: Tensor, *tensors: Tensor) -> Tensor:
    with use_backend(name):
        return ops.multiscale_conv_stack(x, *parameters(stack, tensors))


def stays_in_shared_memory(stack: Stack) -> bool:
    """Whether CUDA C++ is here and takes the stack, forward, rather than leave it to torch."""
    if dispatch.why_absent("native", "cuda"):
        return False
    module, _ = dispatch.native(torch.empty(0, device="cuda"))
    shapes = [(stack.width, stack.width, stack.kernel)] * stack.layers
    needed, _ = module.multiscale_conv_bytes(
        stack.side, stack.side, stack.num_scales, shapes, stack.dtype == torch.float32
    )
    return needed <= module.most_shared_bytes()


def inputs(stack: Stack, device: torch.device) -> tuple[Tensor, ...]:
    """x and the parameters; channels last, as the layer before would leave x."""

    def normal(seed: int, *shape: int) -> Tensor:
        return noise.normal(seed, noise.Stream.DATA, torch.arange(1), 0, shape)[0]

    width, count = stack.width, stack.layers * stack.num_scales
    fan_in = width * stack.kernel**2
    kernel = (width, width, stack.kernel, stack.kernel)
    ids = torch.arange(stack.n)
    x = noise.normal(0, noise.Stream.DATA, ids, 0, (width, stack.side, stack.side))
    weights = [normal(1 + i, *kernel) / math.sqrt(fan_in) for i in range(count)]
    biases = [0.1 * normal(1 + count + i, width) for i in range(count)]
    x = x.contiguous(memory_format=torch.channels_last)
    return tuple(tensor.to(device, stack.dtype) for tensor in (x, *weights, *biases))


def tolerance(stack: Stack, mode: str) -> float:
    """torch rounds bfloat16 after every layer. And of millions of sums some are so near 0 that
    rounding changes their sign, and with it the slope of the leaky ReLU: the gradient of some 180
    pixels then differs by a tenth of its root mean square, or more where such errors meet."""
    in_bfloat16 = stack.dtype == torch.bfloat16
    if mode == "forward_backward":
        return 1.0 if in_bfloat16 else 0.5
    return 0.1 if in_bfloat16 else 1e-4


def cases(device: torch.device) -> Iterator[Case]:
    for stack in STACKS:
        providers = {
            "reference": partial(eager, stack, torch.contiguous_format),
            "channels_last": partial(eager, stack, torch.channels_last),
        }
        if device.type == "cpu" and dispatch.why_absent("native", "cpu") is None:
            providers |= {name: partial(with_backend, stack, name) for name in ("native", "auto")}
        pixels = sum((stack.side >> s) ** 2 for s in range(stack.num_scales))
        per_layer = 2 * stack.width**2 * stack.kernel**2 * pixels * stack.n
        num_inputs = 1 + 2 * stack.layers * stack.num_scales
        element_bytes = torch.finfo(stack.dtype).bits // 8
        image_bytes = stack.n * stack.width * stack.side**2 * element_bytes
        for mode, passes in (("forward", 1), ("forward_backward", 3)):
            on_cuda = device.type == "cuda" and mode == "forward" and stays_in_shared_memory(stack)
            native = {"native": partial(with_backend, stack, "native")} if on_cuda else {}
            yield Case(
                op="multiscale_conv",
                name=str(stack),
                mode=mode,
                inputs=partial(inputs, stack, device),
                providers=providers | native,
                expected=partial(eager, stack, torch.channels_last),
                bytes=2 * passes * image_bytes,
                flops=passes * stack.layers * per_layer,
                wrt=tuple(range(num_inputs)) if passes > 1 else (),
                compiled="channels_last",
                tolerances=dict.fromkeys(providers | native, tolerance(stack, mode)),
            )


def bench_multiscale_conv(call: object, benchmark: BenchmarkFixture) -> None:
    benchmark(call)
