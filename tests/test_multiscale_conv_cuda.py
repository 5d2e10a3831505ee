"""`multiscale_conv` in CUDA C++, images resident in shared memory: against float64, orders, limits.

In the host runner, or on a GPU where there is one.
"""

import itertools
import logging
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, Backend, needs_host_runner, rounding_to_tf32, running_in
from dpm_fast import dispatch, ops, reference
from host_runner import build
from test_multiscale_conv_op import LAYOUTS, Layers, Stack, arguments, by_layers
from tolerances import rounding

KERNELS = [
    backend for backend in BACKENDS if backend.name == "native" and not backend.instruction_set
]
each_kernel = pytest.mark.parametrize("backend", KERNELS, ids=str)

# In the order: what the smallest sizes are; a wide image that ends rows within fragments; features
# of more than one pass; scales, biases, kernels and activations of every kind; odd counts.
STACKS = [
    Stack(),
    Stack((1, 1), size=(1, 1), n=1),
    Stack((1, 20, 20), n=2, size=(8, 28)),
    Stack((3, 34), size=(5, 7), n=2),
    Stack((20, 7, 20), 3, n=2, size=(4, 28), per_location=True),
    Stack((3, 11), 2, n=2, size=(6, 14), activation="after_sum"),
    Stack((4, 5, 4), 4, n=2, size=(8, 8), per_location=True, activation="after_sum"),
    Stack((3, 8, 2), 3, kernel=5, size=(8, 12), n=2),
    Stack((5, 2, 3), kernel=1, size=(5, 3)),
    Stack((2, 2, 2), kernel=7, size=(3, 2), n=5),
]
TF32_EPS = 2.0**-10
MNIST = Stack((1, 20, 20, 20, 20), 3, size=(28, 28), n=1)


def run(
    backend: Backend, stack: Stack, x: Tensor, *parameters: Layers, slope: float = 0.05
) -> Tensor:
    device = backend.device
    placed = [[[p.to(device) for p in layer] for layer in kind] for kind in parameters]
    form = {"activation": stack.activation, "negative_slope": slope}
    with backend.use():
        return ops.multiscale_conv_stack(x.to(device), *placed, **form).cpu()


def check(
    stack: Stack, dtype: torch.dtype, backend: Backend, eps: float | None = None
) -> tuple[Tensor, float]:
    """The result, which must be that of float64 up to roundings to the dtype, or by `eps`; and the
    root of its mean squared error, relative."""
    eps = eps or torch.finfo(dtype).eps
    x, weights, biases = arguments(stack, dtype)
    out = run(backend, stack, x, weights, biases)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    wide = [[[p.double() for p in layer] for layer in kind] for kind in (weights, biases)]
    expected = by_layers(x.double(), *wide, activation=stack.activation)
    positive = [[[p.abs() for p in layer] for layer in kind] for kind in wide]
    magnitude = by_layers(x.double().abs(), *positive, activation=stack.activation)
    error = (out.double() - expected).abs()
    # On its way through a layer a value is rounded as a mean and as a map of each scale. No element
    # is farther off than all of these together; that most are far nearer is the second bound.
    roundings = 2 * len(weights) * stack.num_scales
    terms = max(stack.channels) * stack.kernel**2
    allowed = (eps / 2 * roundings + rounding(torch.float32, terms, 8 * roundings)) * magnitude
    if dtype == torch.float16:
        allowed = allowed + torch.finfo(dtype).smallest_normal * eps * roundings  # subnormal steps
    assert bool((error <= allowed).all()), (error / allowed).max()
    relative = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
    assert relative <= eps * (1 + math.sqrt(roundings))
    return out, relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
@each_kernel
def test_values(backend, stack, dtype) -> None:
    check(stack, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_the_network_of_2015(backend, dtype) -> None:
    """The image of its size, where three scales of float32 do not fit."""
    check(MNIST._replace(num_scales=3 if dtype == torch.bfloat16 else 1), dtype, backend)


@contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    build.set_attribute(build.load_native_cuda(), "multiprocessors", count)
    yield
    build.set_attribute(build.load_native_cuda(), "multiprocessors", 4)


@needs_host_runner
@pytest.mark.parametrize("order", build.ORDERS)
def test_no_order_of_blocks_or_threads_matters(order) -> None:
    with running_in(order) as backend, multiprocessors(1):
        for stack in (STACKS[5]._replace(n=9), STACKS[4]._replace(n=5)):
            check(stack, torch.bfloat16, backend)
            check(stack, torch.float32, backend)


@each_kernel
def test_bits_do_not_depend_on_the_batch_or_the_run(backend) -> None:
    stack = Stack((2, 20, 5), 2, size=(4, 12), n=23)  # more images than the runner has blocks
    x, weights, biases = arguments(stack, torch.float16)
    whole = run(backend, stack, x, weights, biases)
    assert torch.equal(run(backend, stack, x, weights, biases), whole)
    parts = [run(backend, stack, x[i:j], weights, biases) for i, j in ((0, 1), (1, 20), (20, 23))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_a_stack_is_its_layers(backend, dtype) -> None:
    """Whose outputs are rounded to the type of x, wherever they stay. The sums have one order here:
    it depends on the width of an image and on the units of channels of the widest layer."""
    stack = Stack((3, 6, 5, 2), 2, n=2)
    x, weights, biases = arguments(stack, dtype)
    whole = run(backend, stack, x, weights, biases)
    for layer in zip(weights, biases, strict=True):
        x = run(backend, stack, x, *([kind] for kind in layer))
    assert torch.equal(x, whole)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 4])
@each_kernel
def test_layouts(backend, channels, layout) -> None:
    stack = Stack((channels, 4), size=(4, 9), n=2)
    for dtype in (torch.float32, torch.bfloat16):
        x, weights, biases = arguments(stack, dtype)
        changed = LAYOUTS[layout](x.to(backend.device))
        turned = [[w.transpose(2, 3).contiguous().transpose(2, 3) for w in weights[0]]]
        expected = run(backend, stack, changed.contiguous(), weights, biases)
        assert torch.equal(run(backend, stack, changed, turned, biases), expected)


@each_kernel
def test_a_nan_stays_in_its_neighborhood(backend) -> None:
    """Zeros of the halo, of filled-up channels and sums, and other images do not meet it."""
    stack = Stack((3, 5, 2), size=(9, 11), n=3)
    x, weights, biases = arguments(stack)
    x[1, 2, 4, 5] = math.nan
    for dtype in (torch.float32, torch.bfloat16):
        converted = ([[p.to(dtype) for p in layer] for layer in kind] for kind in (weights, biases))
        out = run(backend, stack, x.to(dtype), *converted)
        near = torch.zeros(3, 9, 11, dtype=torch.bool)
        near[1, 2:7, 3:8] = True
        assert torch.equal(out.isnan(), near[:, None].expand_as(out))


@each_kernel
def test_a_leaky_relu_of_any_slope(backend) -> None:
    stack = Stack((2, 3), 2, n=1)
    x, weights, biases = arguments(stack)
    for slope in (0.0, 1.0, -0.5, 2.0):
        expected = reference.multiscale_conv(x, weights[0], biases[0], negative_slope=slope)
        found = run(backend, stack, x, weights, biases, slope=slope)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_kernel
def test_float32_is_exact_unless_torch_may_round_to_tf32(backend) -> None:
    stack = STACKS[7]
    exact, _ = check(stack, torch.float32, backend)
    with rounding_to_tf32():
        rounded, relative = check(stack, torch.float32, backend, eps=TF32_EPS)
    assert not torch.equal(exact, rounded)
    assert relative > TF32_EPS / 16
    assert torch.equal(check(stack, torch.float32, backend)[0], exact)


@each_kernel
def test_without_examples(backend) -> None:
    stack = Stack(n=0)
    assert run(backend, stack, *arguments(stack)).shape == (0, 3, 8, 12)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dpm_fast"]


@needs_host_runner
@pytest.mark.parametrize("limit", ["memory", "layers"])
def test_what_does_not_fit_is_left_to_torch(limit, caplog) -> None:
    stack = Stack() if limit == "memory" else Stack((1,) * 18, size=(2, 2))
    x, weights, biases = arguments(stack)
    module = build.load_native_cuda()
    dispatch.log_limit.cache_clear()
    try:
        if limit == "memory":
            build.set_attribute(module, "shared_bytes_per_block", 4096)
        with caplog.at_level(logging.INFO), running_in("forward") as backend:
            found = [run(backend, stack, x, weights, biases) for _ in range(2)]
    finally:
        build.set_attribute(module, "shared_bytes_per_block", 227 * 1024)
    expected = by_layers(x, weights, biases, activation=stack.activation)
    for out in found:
        torch.testing.assert_close(out, expected)
    (line,) = lines(caplog)
    assert line.endswith("runs in the reference")


@needs_host_runner
def test_gradients_are_left_to_torch(caplog) -> None:
    stack = Stack(num_scales=2)
    x, weights, biases = arguments(stack)
    dispatch._log_lack.cache_clear()
    with caplog.at_level(logging.INFO), running_in("forward") as backend, backend.use():
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            ops.multiscale_conv_stack(leaf, weights, biases).sum().backward()
            assert leaf.grad is not None
        with torch.no_grad():  # no gradient is wanted, and it is the kernel
            ops.multiscale_conv_stack(leaf, weights, biases)
        flat = [list(itertools.chain(*kind)) for kind in (weights, biases)]
        with pytest.raises(dispatch.BackendError, match="no CUDA C"):
            torch.ops.dpm_fast.multiscale_conv(leaf, *flat, [], 2, False, 0.05, 1)
    assert lines(caplog) == [
        "the gradient of multiscale_conv has no native kernels on cuda and runs in the reference"
    ]


@needs_host_runner
@pytest.mark.parametrize(
    ("num_scales", "wide", "blocks"), [(1, False, 2), (3, False, 1), (1, True, 1), (3, True, 0)]
)
def test_how_many_images_of_the_2015_network_a_multiprocessor_holds(
    num_scales, wide, blocks
) -> None:
    """Of the 228 KB of sm_90 and sm_100 each block takes 1 KB for the system."""
    shapes = [(20, 1, 3), (20, 20, 3), (20, 20, 3), (20, 20, 3)]
    shared, packed = build.load_native_cuda().multiscale_conv_bytes(
        28, 28, num_scales, shapes, wide
    )
    assert packed < shared
    assert (228 * 1024) // (shared + 1024) == blocks


def conflicts(offsets: Sequence[int], stride: int, row: int, height: int, width: int) -> int:
    """Of all loads of pixels in a convolution, by 16 lanes of 8 bytes each: how many more turns of
    the banks than one each they take. Lanes that read the same bytes share them."""
    found = 0
    for first in range(0, height * width, 16):
        # Row r of a fragment is its pixel 4 (r mod 4) + r / 4.
        pixels = [min(first + 4 * (r % 4) + r // 4, height * width - 1) for r in range(16)]
        units = [pixel // width * row + pixel % width * stride for pixel in pixels]
        for step, rows in itertools.product(range(0, len(offsets), 4), range(0, 16, 4)):
            loaded = {
                unit + offset // 8
                for unit in units[rows : rows + 4]
                for offset in offsets[step : step + 4]
            }
            found += max(Counter(unit % 16 for unit in loaded).values()) - 1
    return found


@needs_host_runner
def test_loads_of_pixels_meet_in_no_bank_of_shared_memory() -> None:
    height, width = 8, 28
    x, weights, biases = arguments(Stack((1, 20, 20), n=1, size=(height, width)), torch.bfloat16)
    module, shapes = build.load_native_cuda(), [(20, 1, 3), (20, 20, 3)]
    _, num_bytes = module.multiscale_conv_bytes(height, width, 1, shapes, False)
    packed, out = torch.empty(num_bytes, dtype=torch.uint8), x.new_empty(1, 20, height, width)
    layers = tuple(
        (tuple(w), tuple(b), None, None, None, None) for w, b in zip(weights, biases, strict=True)
    )
    module.multiscale_conv(x, out, 1, layers, False, 0.05, packed, False, 0)
    stride, row = 5, 28 * 5 + 16
    begin = 0
    for units in (1, 5):  # of 4 channels
        num_steps = -(-9 * units // 4)
        offsets = packed[begin : begin + 16 * num_steps].view(torch.int32).tolist()
        taps = {y * row + x * stride for y in (-1, 0, 1) for x in (-1, 0, 1)}
        assert set(offsets) == {8 * (tap + unit) for tap in taps for unit in range(units)}
        assert conflicts(offsets, stride, row, height, width) == 0
        begin += 16 * num_steps + 24 * 4 + num_steps * 3 * 32 * 8
    assert begin == num_bytes
    assert conflicts(sorted(offsets), stride, row, height, width) > 0  # tap after tap


def assert_sanitized(file: str, selection: str) -> None:
    """No access outside of tensors, nor past what a launch asked for, in tests of a file."""
    environment = build.sanitizer_environment()
    if not all(Path(library).exists() for library in environment["LD_PRELOAD"].split(":")):
        pytest.skip("needs libasan")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        [*command, "-k", selection],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10_000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_host_runner
def test_the_kernels_under_sanitizers() -> None:
    assert_sanitized(__file__, "test_values or test_layouts")
