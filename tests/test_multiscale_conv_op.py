"""The op `multiscale_conv` and its stack: every backend against float64, contract, routes."""

import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dpm_fast
from backends import CPU_BACKENDS, TRITON, Backend, rounding_to_tf32
from dpm_fast import dispatch, noise, ops, reference
from dpm_fast.networks import ConvDenseNetwork
from tolerances import rounding

op = sys.modules["dpm_fast.ops.multiscale_conv"]  # the function hides its module
each_cpu_backend = pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
# Those with kernels of it.
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS + TRITON, ids=str)
each_kind = pytest.mark.parametrize("backend", CPU_BACKENDS[:1] + TRITON, ids=str)
needs_kernels = pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native extension")


class Stack(NamedTuple):
    """Sizes of a test: channels before the first layer and after each."""

    channels: tuple[int, ...] = (2, 6, 3)
    num_scales: int = 1
    kernel: int = 3
    size: tuple[int, int] = (8, 12)
    n: int = 3
    per_location: bool = False
    activation: str = "per_scale"

    def __str__(self) -> str:
        form = "location" if self.per_location else "channel"
        sizes = "-".join("x".join(map(str, size)) for size in (self.channels, self.size))
        return f"{sizes}-S{self.num_scales}-K{self.kernel}-N{self.n}-{form}-{self.activation}"


Layers = list[list[Tensor]]

STACKS = [
    Stack(),
    Stack((1, 20, 20), n=17, size=(12, 28)),
    Stack((20, 7, 20), 3, n=16, size=(4, 28), per_location=True),
    Stack((3, 11), 2, n=2, size=(6, 14), activation="after_sum"),
    Stack((4, 5, 4), 4, n=17, size=(8, 8), per_location=True, activation="after_sum"),
    Stack((3, 8, 2), 3, kernel=5, size=(8, 12), n=20),
    Stack((2, 9, 1), 2, kernel=5, size=(4, 6), per_location=True, activation="after_sum"),
    Stack((5, 2, 3), kernel=1, size=(5, 3)),
    Stack((1, 1), size=(1, 1), n=1),
    Stack((2, 2, 2), size=(3, 2), n=15),
    Stack((2, 3), size=(2, 5), n=1),
    Stack((6, 6), size=(68, 40), n=1),
]
# The interpreter takes milliseconds for each block of pixels and channels.
SMALL_STACKS = [
    Stack(n=2),
    Stack((20, 7, 20), 3, n=2, size=(4, 8), per_location=True),
    Stack((3, 11), 2, n=2, size=(6, 14), activation="after_sum"),
    Stack((2, 5, 4), 4, n=2, size=(8, 8), per_location=True, activation="after_sum"),
    Stack((2, 3), 2, kernel=5, size=(4, 6), n=2),
    Stack((2, 3), 2, n=1, size=(14, 20)),  # several blocks of pixels
    Stack((130, 3, 130), kernel=1, n=2, size=(1, 3)),  # of channels
    Stack((2, 3), kernel=7, size=(2, 5), n=2),
    Stack((1, 1), size=(1, 1), n=1),
]
each_stack = pytest.mark.parametrize(
    ("backend", "stack"),
    [*itertools.product(CPU_BACKENDS, STACKS), *itertools.product(TRITON, SMALL_STACKS)],
    ids=str,
)


def normal(index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    ids = torch.zeros(1, dtype=torch.int64)
    return noise.normal(index, noise.Stream.DATA, ids, 0, tuple(shape), torch.float64)[0].to(dtype)


def arguments(stack: Stack, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Layers, Layers]:
    """x, weights and biases of the layers, the sums of which have a variance near 1."""
    height, width = stack.size
    weights: Layers = []
    biases: Layers = []
    for index, (c, f) in enumerate(itertools.pairwise(stack.channels)):
        gain = (c * stack.kernel**2) ** -0.5
        shape = f, c, stack.kernel, stack.kernel
        scales = range(stack.num_scales)
        seeds = [1 + 2 * (index * stack.num_scales + s) for s in scales]
        weights.append([gain * normal(seed, shape, dtype) for seed in seeds])
        sides = [(height >> s, width >> s) if stack.per_location else () for s in scales]
        biases.append(
            [0.3 * normal(k + 1, (f, *s), dtype) for k, s in zip(seeds, sides, strict=True)]
        )
    x = normal(0, (stack.n, stack.channels[0], height, width), dtype)
    return x, weights, biases


def on(backend: Backend, *args: Any) -> tuple[Any, ...]:
    """Tensors and layers on the device of a backend."""
    return torch.utils._pytree.tree_map(lambda x: x.to(backend.device), args)


def by_layers(x: Tensor, weights: Layers, biases: Layers, *, activation: str) -> Tensor:
    for layer in zip(weights, biases, strict=True):
        x = reference.multiscale_conv(x, *layer, activation=activation)
    return x


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16 and TRITON[0].interpreted:  # Triton's interpreter cuts bits off
        return (x.float().view(torch.int32) & -(2**16)).view(torch.float32).to(x.dtype)
    return x.to(dtype).to(x.dtype)


class _Rounded(torch.autograd.Function):
    """Values, gradients or both rounded to a dtype."""

    @staticmethod
    def forward(ctx, x, of_value, of_gradient):
        ctx.of_gradient = of_gradient
        return rounded(x, of_value)

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad, ctx.of_gradient), None, None


class _RoundedSoftplus(torch.autograd.Function):
    """Its derivative is found from what is left of its values."""

    @staticmethod
    def forward(ctx, x, dtype):
        out = rounded(F.softplus(x), dtype)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return -grad * torch.expm1(-out), None


def stored_as(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The reference with images, and gradients of sums, rounded as the products of a GPU need them.

    A sign that rounding changes would change a gradient by more than any bound on rounding.
    """

    def by_layers(x: Tensor, weights: Layers, biases: Layers, *, activation: str) -> Tensor:
        for kernels, offsets in zip(weights, biases, strict=True):
            images, maps = [x], []
            for _ in kernels[1:]:
                pooled = F.avg_pool2d(images[-1], 2)
                images.append(_Rounded.apply(pooled, dtype, torch.float64))
            for image, weight, bias in zip(images, kernels, offsets, strict=True):
                sums = F.conv2d(image, weight, padding=weight.shape[-1] // 2)
                sums = sums + (bias if bias.dim() > 1 else bias[:, None, None])
                sums = _Rounded.apply(sums, torch.float64, dtype)
                maps.append(F.leaky_relu(sums, 0.05) if activation == "per_scale" else sums)
            total = maps.pop()
            while maps:
                total = _Rounded.apply(total, torch.float64, dtype)
                total = F.interpolate(total, scale_factor=2, mode="nearest") + maps.pop()
            if activation == "after_sum":
                x = _RoundedSoftplus.apply(total, dtype)
            else:
                x = _Rounded.apply(total / len(kernels), dtype, torch.float64)
        return x

    return by_layers


def value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, weights: Layers, biases: Layers, activation: str
) -> list[Tensor]:
    """The output, and gradients of a sum of it with weights of one sign, so that none cancels."""
    copies = [
        [[p.detach().requires_grad_() for p in layer] for layer in w] for w in (weights, biases)
    ]
    x = x.detach().requires_grad_()
    out = function(x, *copies, activation=activation)
    leaves = [x, *(p for kind in copies for layer in kind for p in layer)]
    return [out.detach(), *torch.autograd.grad(out, leaves, weights_of(out))]


def weights_of(out: Tensor) -> Tensor:
    """Between 1/2 and 3/2, the same in every dtype."""
    weights = torch.linspace(32, 96, out.numel(), dtype=torch.float64).round() / 64
    return weights.view(out.shape).to(out.dtype)


def check(stack: Stack, backend: Backend, dtype: torch.dtype = torch.float32) -> None:
    x, weights, biases = arguments(stack, dtype)
    compare(x, weights, biases, stack, backend)


def compare(x: Tensor, weights: Layers, biases: Layers, stack: Stack, backend: Backend) -> None:
    dtype = x.dtype
    wide = [[[p.double() for p in layer] for layer in kind] for kind in (weights, biases)]
    narrow = backend.name == "triton" and dtype != torch.float32
    function = stored_as(dtype) if narrow else by_layers
    expected = value_and_gradients(function, x.double(), *wide, stack.activation)
    positive = [[[p.abs() for p in layer] for layer in kind] for kind in wide]
    magnitudes = value_and_gradients(by_layers, x.double().abs(), *positive, stack.activation)
    with backend.use():
        there = on(backend, x, weights, biases)
        found = value_and_gradients(ops.multiscale_conv_stack, *there, stack.activation)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    num_terms = max(stack.channels) * stack.kernel**2 + stack.n * math.prod(stack.size)
    # Errors of a layer enter those of the next. A four-point product has 1.5 times the error.
    tolerance = rounding(computed, num_terms, 16 * len(weights) * stack.num_scales)
    for result, wanted, magnitude in zip(found, expected, magnitudes, strict=True):
        assert result.dtype == dtype
        assert result.shape == wanted.shape
        error = (result.cpu().double() - wanted).abs()
        allowed = tolerance * magnitude.max() + torch.finfo(dtype).eps * wanted.abs()
        if narrow:  # one term of many may be next to a tie
            allowed = allowed + torch.finfo(dtype).eps / 16 * magnitude.max()
        if dtype == torch.float16:
            allowed = allowed + torch.finfo(dtype).smallest_normal * 2**-10  # subnormal steps
        assert bool((error <= allowed).all()), (error / allowed).max()


@each_stack
def test_value_and_gradients(backend, stack) -> None:
    check(stack, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stack", [STACKS[1], STACKS[2], STACKS[4], STACKS[5]], ids=str)
@each_cpu_backend
def test_storage_types(backend, stack, dtype) -> None:
    check(stack, backend, dtype)


def any_stack(
    layers: int, width: int, quarters: tuple[int, int], n: int
) -> st.SearchStrategy[Stack]:
    """Of so many layers, channels, quarters of a side and examples at most."""
    sides = st.tuples(*(st.integers(1, most) for most in quarters))
    return st.builds(
        Stack,
        channels=st.lists(st.integers(1, width), min_size=2, max_size=layers + 1).map(tuple),
        num_scales=st.integers(1, 3),
        kernel=st.sampled_from([1, 3, 3, 5, 7]),
        size=sides.map(lambda s: (4 * s[0], 4 * s[1])),
        n=st.integers(1, n),
        per_location=st.booleans(),
        activation=st.sampled_from(["per_scale", "after_sum"]),
    )


def smallest_sum(x: Tensor, weights: Layers, biases: Layers) -> float:
    """The least of which a leaky ReLU takes the sign."""
    smallest = math.inf
    for kernels, offsets in zip(weights, biases, strict=True):
        image = x
        for scale, (weight, bias) in enumerate(zip(kernels, offsets, strict=True)):
            image = F.avg_pool2d(image, 2) if scale else image
            sums = F.conv2d(image, weight, padding=weight.shape[-1] // 2)
            sums = sums + (bias if bias.dim() > 1 else bias[:, None, None])
            smallest = min(smallest, float(sums.abs().min()))
        x = reference.multiscale_conv(x, kernels, offsets)
    return smallest


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(stack=any_stack(3, 12, (5, 9), 40))
def test_any_sizes(stack) -> None:
    if stack.activation == "per_scale":  # a sign that rounding changes would change a gradient
        x, *layers = arguments(stack, torch.float32)
        wide = [[[p.double() for p in layer] for layer in kind] for kind in layers]
        assume(smallest_sum(x.double(), *wide) > 1e-6)
    check(stack, CPU_BACKENDS[0])


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@settings(max_examples=6, deadline=None)
@given(stack=any_stack(2, 6, (1, 2), 2))
def test_any_sizes_in_triton(stack) -> None:
    check(stack, TRITON[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stack", [SMALL_STACKS[1], SMALL_STACKS[3]], ids=str)
@pytest.mark.parametrize("backend", TRITON, ids=str)
def test_storage_types_of_products(backend, stack, dtype) -> None:
    check(stack, backend, dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel half": lambda x: torch.cat((x + 1, x), dim=1)[:, x.shape[1] :],
    "channel half of channels last": lambda x: torch.cat((x + 1, x), dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other example": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every other pixel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "one image for all": lambda x: x[:1].expand_as(x),
}


WIDE, NARROW = torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "layout", "channels", "dtype"),
    [
        *itertools.product(
            CPU_BACKENDS[:1], LAYOUTS, [1, 3, 20], [torch.float32, NARROW, WIDE]
        ),
        *itertools.product(TRITON, ["channels last", "one image for all"], [3], [torch.float32]),
    ],
    ids=str,
)  # fmt: skip
def test_layouts(backend, layout, channels, dtype) -> None:
    stack = Stack((channels, 4), size=(4, 9), n=2 if backend.interpreted else 18)
    x, weights, biases = on(backend, *arguments(stack, dtype))
    changed = LAYOUTS[layout](x)
    same = changed.contiguous()
    with backend.use():
        for strange, plain in zip(
            value_and_gradients(ops.multiscale_conv_stack, changed, weights, biases, "per_scale"),
            value_and_gradients(ops.multiscale_conv_stack, same, weights, biases, "per_scale"),
            strict=True,
        ):
            assert torch.equal(strange, plain)
        # Parameters and gradients in other orders.
        turned = [[w.transpose(2, 3).contiguous().transpose(2, 3) for w in weights[0]]]
        leaf = x.detach().requires_grad_()
        out = ops.multiscale_conv_stack(leaf, turned, biases)
        grad_out = normal(9, out.shape, dtype).to(x.device)
        for order in (torch.contiguous_format, torch.channels_last):
            (gradient,) = torch.autograd.grad(
                out, leaf, grad_out.contiguous(memory_format=order), retain_graph=True
            )
            (zero_stride,) = torch.autograd.grad(
                out, leaf, out.new_ones(()).expand_as(out), retain_graph=True
            )
            assert bool(gradient.isfinite().all()) and bool(zero_stride.isfinite().all())
            if order is torch.contiguous_format:
                first = gradient
        assert torch.equal(first, gradient)
    assert out.is_contiguous(memory_format=torch.channels_last)


@each_backend
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads(backend, monkeypatch) -> None:
    if (
        backend.interpreted
    ):  # rows of NumPy's products are rounded by their place, those of GPUs not
        product = lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype)  # noqa: E731
        monkeypatch.setattr(np, "matmul", product)
    few = Stack((2, 20), 2, size=(6, 10), n=4)  # blocks of Triton begin within images
    stack = few if backend.name == "triton" else Stack((2, 20, 5), 2, size=(8, 28), n=70)
    x, weights, biases = on(backend, *arguments(stack))
    threads = torch.get_num_threads()

    def run(x: Tensor) -> list[Tensor]:
        return value_and_gradients(ops.multiscale_conv_stack, x, weights, biases, "per_scale")

    def parts(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = ops.multiscale_conv_stack(leaf, weights, biases)
        return [out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))]

    with backend.use():
        whole = run(x)
        assert all(map(torch.equal, whole, run(x)))
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert all(map(torch.equal, whole, run(x)))
        finally:
            torch.set_num_threads(threads)
        ends = (0, 1, stack.n // 2, stack.n)
        pieces = [parts(x[i:j]) for i, j in itertools.pairwise(ends)]
        assert all(map(torch.equal, map(torch.cat, zip(*pieces, strict=True)), parts(x)))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_stack_is_its_layers(backend, dtype) -> None:
    if dtype == torch.float16 and backend.name != "triton":
        pytest.skip("native kernels keep float32 between layers")
    stack = Stack((3, 6, 5, 2), 3, size=(8, 4), n=2 if backend.name == "triton" else 50)
    x, weights, biases = on(backend, *arguments(stack, dtype))
    with backend.use():
        whole = ops.multiscale_conv_stack(x, weights, biases)
        for layer in zip(weights, biases, strict=True):
            x = ops.multiscale_conv(x, *layer)
    assert torch.equal(x, whole)


@each_backend
def test_without_examples(backend) -> None:
    stack = Stack(n=0)
    x, weights, biases = on(backend, *arguments(stack))
    with backend.use():
        found = value_and_gradients(ops.multiscale_conv_stack, x, weights, biases, "per_scale")
    assert found[0].shape == (0, 3, 8, 12)
    assert found[1].shape == x.shape
    assert not any(bool(gradient.any()) for gradient in found[2:])


@each_kind
@pytest.mark.parametrize("wanted", range(3))
def test_gradients_wanted_alone(backend, wanted) -> None:
    stack = Stack(num_scales=2, size=(4, 6), n=2)
    x, weights, biases = on(backend, *arguments(stack))
    with backend.use():
        every = value_and_gradients(ops.multiscale_conv_stack, x, weights, biases, "per_scale")
        leaf = (x, weights[1][1], biases[0][1])[wanted].requires_grad_()
        out = ops.multiscale_conv_stack(x, weights, biases)
        (alone,) = torch.autograd.grad(out, leaf, weights_of(out))
    assert torch.equal(alone, every[(1, 5, 7)[wanted]])


@each_cpu_backend
@pytest.mark.parametrize("activation", ["per_scale", "after_sum"])
@pytest.mark.parametrize(("scales", "kernel"), [(1, 3), (2, 3), (2, 5)])
def test_gradcheck(backend, scales, kernel, activation) -> None:
    stack = Stack((2, 3, 2), scales, kernel, (4, 6), 2, per_location=scales == 2)
    x, weights, biases = arguments(stack, torch.float64)
    leaves = [x, *itertools.chain(*weights), *itertools.chain(*biases)]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        rows = [list(parameters[i : i + scales]) for i in range(0, len(parameters), scales)]
        return ops.multiscale_conv_stack(x, rows[:2], rows[2:], activation=activation)

    leaves = [leaf.requires_grad_() for leaf in leaves]
    with backend.use():
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        if activation == "after_sum":  # a leaky ReLU is linear
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("backend", "after_sum"),
    [*itertools.product(CPU_BACKENDS[:1], [False, True]), *itertools.product(TRITON, [True])],
    ids=str,
)
def test_opcheck(backend, after_sum) -> None:
    x, weights, biases = on(backend, *arguments(Stack((2, 3), 2, size=(4, 4), n=1)))
    form = 2, after_sum, 0.05, op.WHOLE if backend.name == "triton" else 2
    with backend.use():
        for requires_grad in (False, True):
            flat = [list(itertools.chain(*kind)) for kind in (weights, biases)]
            leaf, *flat = [
                x.clone().requires_grad_(requires_grad),
                *([p.clone().requires_grad_(requires_grad) for p in kind] for kind in flat),
            ]
            torch.library.opcheck(torch.ops.dpm_fast.multiscale_conv, (leaf, *flat, [], *form))
        flat = [list(itertools.chain(*kind)) for kind in (weights, biases)]
        keeping = torch.ops.dpm_fast._multiscale_conv_keeping
        torch.library.opcheck(keeping, (x, *flat, [], *form))
        out, outs, signs = keeping(x, *flat, [], *form)
        if after_sum and backend.name == "triton":
            outs = [*outs, out]
        torch.library.opcheck(
            torch.ops.dpm_fast._multiscale_conv_gradient,
            (out, x, *flat, [], outs, signs, *form, [True, False, True, True, True]),
        )


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("reference", None), ("native", None), ("native", True), ("triton", None), ("triton", True),
        ("auto", None),
    ],
)  # fmt: skip
def test_compiles_whole(name, dynamic) -> None:
    if reason := dispatch.why_absent("native" if name == "auto" else name, "cpu"):
        pytest.skip(reason)
    torch.compiler.reset()
    stack = Stack((2, 5) if name == "triton" else (2, 6, 3), num_scales=2, size=(4, 6))
    _, weights, biases = arguments(stack)
    compiled = torch.compile(
        ops.multiscale_conv_stack, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    with dpm_fast.use_backend(name):
        for n in (2, 5) if name == "triton" else (2, 32, 5):
            x = arguments(stack._replace(n=n))[0]
            activation = "after_sum" if dynamic else "per_scale"
            expected = value_and_gradients(
                ops.multiscale_conv_stack, x, weights, biases, activation
            )
            found = value_and_gradients(compiled, x, weights, biases, activation)
            torch.testing.assert_close(found, expected)


@needs_kernels
def test_a_network_compiles_whole() -> None:
    torch.compiler.reset()
    network = ConvDenseNetwork((1, 8, 8), 10, conv_channels=5, num_scales=2, dense_width=8)
    torch.nn.init.normal_(network.readout.weight)
    x, t = normal(0, (32, 1, 8, 8), torch.float32), torch.arange(32) % 10 + 1
    with dpm_fast.use_backend("native"):
        expected = network(x, t)
        found = torch.compile(network, fullgraph=True, backend="aot_eager")(x, t)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
@each_kind
def test_transformed_by_torch_func_it_is_the_reference(backend) -> None:
    x, weights, biases = on(backend, *arguments(Stack((2, 3), num_scales=2)))
    function = lambda x: ops.multiscale_conv(x, weights[0], biases[0])  # noqa: E731
    with backend.use():
        expected = function(x)
        torch.testing.assert_close(torch.func.vmap(function)(x[None])[0], expected)
        value, tangent = torch.func.jvp(function, (x,), (x,))
    torch.testing.assert_close(value, expected)
    assert tangent.shape == expected.shape


@each_kind
def test_under_autocast_it_takes_and_gives_the_narrow_type(backend) -> None:
    x, weights, biases = on(backend, *arguments(Stack((3, 6), size=(4, 6), n=20)))
    narrow = [p.bfloat16() for p in (x, weights[0][0], biases[0][0])]
    with backend.use():
        expected = ops.multiscale_conv(narrow[0], narrow[1:2], narrow[2:])
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            found = ops.multiscale_conv(x, weights[0], biases[0])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@needs_kernels
def test_the_route_depends_on_what_is_faster(monkeypatch) -> None:
    def route(n: int, width: int = 20, kernel: int = 3, dtype: torch.dtype = torch.float32) -> str:
        x, shapes = torch.empty(n, width, 28, 28, dtype=dtype), [(width, width, kernel, kernel)]
        _, full = op._parts(x, shapes, 1, False, False)
        return dispatch.convolution_route(x, shapes, 1, full)

    facts = dispatch._CpuFacts("avx512", 8, True, 2)
    monkeypatch.setattr(dispatch, "_native_cpu_facts", lambda: facts)
    with dpm_fast.use_backend("auto"):
        assert {route(n) for n in (0, 1, 14, 33, 512)} == {"native"}
        assert [route(n, 64) for n in (1, 16, 512)] == ["reference", "native", "native"]
        assert [route(512, width) for width in (128, 256)] == ["native", "reference"]
        assert [route(512, width, kernel=5) for width in (20, 64)] == ["native", "reference"]
        wide, narrow = torch.float64, torch.bfloat16
        assert [route(64, 64, dtype=dtype) for dtype in (wide, narrow)] == ["native", "reference"]
        facts = facts._replace(threads=16)  # most of them without work
        assert [route(n) for n in (1, 64)] == ["reference", "native"]
        facts = facts._replace(threads=2, multiplies_bfloat16=False)
        assert route(512, 64, dtype=narrow) == "native"
        facts = facts._replace(instruction_set="baseline")
        assert route(512) == "reference"
    with dpm_fast.use_backend("native"):
        assert route(1, 300) == "native"
    with dpm_fast.use_backend("triton"):
        assert not TRITON or route(1) == "triton"


def parts_of(n: int, height: int, *, differentiable: bool = False, **options: bool) -> int:
    x = torch.empty(n, 1, height, 4)
    per_location = options.get("per_location", False)
    return op._parts(x, [(1, 1, 3, 3)], 2, per_location, differentiable)[0]


@needs_kernels
def test_few_images_are_cut_into_parts_of_whole_pools(monkeypatch) -> None:
    facts = dispatch._CpuFacts("avx512", 8, True, 2)
    monkeypatch.setattr(dispatch, "_native_cpu_facts", lambda: facts)
    with dpm_fast.use_backend("native"):
        assert [parts_of(n, 28) for n in (1, 2, 32, 64, 512)] == [14, 14, 1, 1, 1]
        assert parts_of(49, 24) > 1
        assert [parts_of(1, height) for height in (2, 4, 6, 26, 64)] == [1, 2, 3, 13, 16]
        assert parts_of(1, 28, per_location=True) == 1
        # Gradients do not depend on the number of threads.
        wanted = [parts_of(n, 28, differentiable=True) for n in range(70)]
        facts = facts._replace(threads=7)
        assert [parts_of(n, 28, differentiable=True) for n in range(70)] == wanted


@each_cpu_backend
@pytest.mark.parametrize("activation", ["per_scale", "after_sum"])
@pytest.mark.parametrize(("num_scales", "kernel"), [(1, 3), (1, 5), (3, 3), (2, 1)])
def test_images_in_parts_have_the_bits_of_whole_ones(
    backend, num_scales, kernel, activation, monkeypatch
) -> None:
    stack = Stack((2, 5, 3), num_scales, kernel, (24, 8), 5)
    x, weights, biases = arguments(stack)
    found = {}
    for parts in (1, 2, 3, 6, 12):
        if 24 // parts % 2 ** (num_scales - 1) or 24 // parts < kernel // 2:
            continue
        monkeypatch.setattr(op, "_parts", lambda *_, parts=parts: (parts, 1.0))
        with backend.use():
            found[parts] = value_and_gradients(
                ops.multiscale_conv_stack, x, weights, biases, activation
            )
    assert len(found) > 2
    for parts, results in found.items():
        for index, (result, whole) in enumerate(zip(results, found[1], strict=True)):
            if index < 2:
                assert torch.equal(result, whole), parts
            else:
                torch.testing.assert_close(result, whole, rtol=1e-4, atol=1e-4)


def test_more_scales_than_kernels_take() -> None:
    stack = Stack((1, 1), num_scales=9, size=(256, 256), n=1)
    x, weights, biases = arguments(stack)
    expected = reference.multiscale_conv(x, weights[0], biases[0])
    torch.testing.assert_close(ops.multiscale_conv(x, weights[0], biases[0]), expected)
    if CPU_BACKENDS:
        message = "the backend 'native' takes 8 scales, got 9"
        with (
            dpm_fast.use_backend("native"),
            pytest.raises(dispatch.BackendError, match=f"^{message}$"),
        ):
            ops.multiscale_conv(x, weights[0], biases[0])


@each_kind
@pytest.mark.parametrize("slope", [0.0, 1.0, -0.5, 2.0])
def test_a_leaky_relu_of_any_slope(backend, slope) -> None:
    x, weights, biases = on(backend, *arguments(Stack((2, 3), num_scales=2, size=(4, 6), n=2)))
    x.requires_grad_()
    expected = reference.multiscale_conv(x, weights[0], biases[0], negative_slope=slope)
    with backend.use():
        found = ops.multiscale_conv(x, weights[0], biases[0], negative_slope=slope)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out, x, weights_of(out))[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_triton_multiplies_as_torch_is_told_to() -> None:
    triton_kernels = pytest.importorskip("dpm_fast.triton_kernels.multiscale_conv")
    assert triton_kernels._precision() == "tf32x3"
    with rounding_to_tf32():
        assert triton_kernels._precision() == "tf32"


X = torch.zeros(2, 3, 8, 12)
W = torch.zeros(4, 3, 3, 3)
B = torch.zeros(4)
ERRORS: list[tuple[tuple[object, ...], dict[str, object], type[Exception], str]] = [
    ((X[0], [[W]], [[B]]), {}, ValueError, "x must have shape (N, C, H, W), got (3, 8, 12)"),
    ((1.0, [[W]], [[B]]), {}, TypeError, "x must be a tensor, got float"),
    ((X, [], []), {}, ValueError,
     "weights and biases must be of the same layers, one at least, got 0 and 0"),
    ((X, [[W]], []), {}, ValueError,
     "weights and biases must be of the same layers, one at least, got 1 and 0"),
    ((X, [[]], [[]]), {}, ValueError,
     "layer 0 must have one weight and one bias for each of one or more scales, got 0 and 0"),
    ((X, [[W, W]], [[B]]), {}, ValueError,
     "layer 0 must have one weight and one bias for each of 2 scales, got 2 and 1"),
    ((X, [[W, W], [W[:, :, :1, :1]]], [[B, B], [B]]), {}, ValueError,
     "layer 1 must have one weight and one bias for each of 2 scales, got 1 and 1"),
    ((X, [[W] * 4], [[B] * 4]), {}, ValueError,
     "sides of x must be divisible by 8 for 4 scales, got 8 x 12"),
    ((X, [[W[:, :2]]], [[B]]), {}, ValueError,
     "weights of layer 0 must have shape (F, 3, K, K), K odd, got (4, 2, 3, 3)"),
    ((X, [[W[..., :2]]], [[B]]), {}, ValueError,
     "weights of layer 0 must have shape (F, 3, K, K), K odd, got (4, 3, 3, 2)"),
    ((X, [[W], [W]], [[B], [B]]), {}, ValueError,
     "weights of layer 1 must have shape (F, 4, K, K), K odd, got (4, 3, 3, 3)"),
    ((X, [[W, W[:3]]], [[B, B]]), {}, ValueError,
     "weights[1] of layer 0 must have shape (4, 3, 3, 3), got (3, 3, 3, 3)"),
    ((X, [[W]], [[B[:3]]]), {}, ValueError,
     "biases[0] of layer 0 must have shape (4,), got (3,)"),
    ((X, [[W]], [[torch.zeros(4, 8, 8)]]), {}, ValueError,
     "biases[0] of layer 0 must have shape (4, 8, 12), got (4, 8, 8)"),
    ((X, [[W, W]], [[torch.zeros(4, 8, 12), B]]), {}, ValueError,
     "biases[1] of layer 0 must have shape (4, 4, 6), got (4,)"),
    ((X, [[W.double()]], [[B]]), {}, TypeError,
     "weights[0] of layer 0 must have dtype torch.float32 like x, got torch.float64"),
    ((X, [[W]], [[B.to("meta")]]), {}, ValueError,
     "biases[0] of layer 0 must be on cpu like x, got meta"),
    ((X, [[W]], [[B]]), {"activation": "relu"}, ValueError,
     "activation must be 'per_scale' or 'after_sum', got 'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS)
def test_messages(args, options, kind, message) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ops.multiscale_conv_stack(*args, **options)
