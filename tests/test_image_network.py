"""The op `image_network`: its kernels against float64, contract, and the networks that call it."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dpm_fast
from backends import CPU_BACKENDS
from dpm_fast import dispatch, ops, reference
from dpm_fast.networks import ConvDenseNetwork
from test_multiscale_conv_op import Stack, arguments, normal, weights_of
from tolerances import rounding

op = sys.modules["dpm_fast.ops.multiscale_conv"]
needs_kernels = pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native extension")
each_cpu_backend = pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
SLOPE = 0.05


class Case(NamedTuple):
    """A stack and the sizes of its tail: channels beside it, after each pixel layer, and of z."""

    stack: Stack
    beside: int = 0
    pixel: tuple[int, ...] = (5,)
    outputs: int = 2

    def __str__(self) -> str:
        pixel = "-".join(map(str, self.pixel))
        return f"{self.stack}-beside{self.beside}-pixel{pixel}-O{self.outputs}"


CASES = [
    Case(Stack()),
    Case(Stack((1, 20, 20), 3, n=17, size=(8, 28)), beside=2, pixel=(20,)),
    Case(Stack((3, 7), 2, n=33), beside=3, pixel=(), outputs=6),
    Case(Stack((2, 4), n=2, activation="after_sum"), beside=1, pixel=(9, 3, 7), outputs=1),
    Case(Stack((2, 4, 5), n=5, per_location=True, activation="after_sum"), pixel=(), outputs=3),
    Case(Stack((1, 6), kernel=5, n=16, size=(5, 7)), beside=6, pixel=(1, 2)),
    Case(Stack((4, 3), n=1, size=(28, 4)), beside=2),  # its rows are cut into parts
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The arguments, flat, all of which may need a gradient."""
    x, weights, biases = arguments(case.stack, dtype)
    flat = [x, *itertools.chain(*weights), *itertools.chain(*biases)]
    widths = [case.stack.channels[-1] + case.beside, *case.pixel]
    for i, (c, f) in enumerate(itertools.pairwise(widths)):
        flat += [normal(100 + i, (f, c), dtype) * c**-0.5, normal(200 + i, (f,), dtype) * 0.3]
    wide = torch.promote_types(dtype, torch.float32)
    flat.append(normal(300, (case.stack.n, case.outputs, widths[-1]), wide) * widths[-1] ** -0.5)
    flat.append(normal(301, (case.stack.n, case.outputs), wide))
    if case.beside:  # its channels last, as a dense path leaves them
        image = normal(302, (case.stack.n, *case.stack.size, case.beside), dtype)
        flat.append(image.permute(0, 3, 1, 2))
    return flat


def call(function: Callable[..., Tensor], case: Case, flat: list[Tensor]) -> Tensor:
    stack, left = case.stack, iter(flat)
    x = next(left)
    weights, biases = (
        [[next(left) for _ in range(stack.num_scales)] for _ in stack.channels[1:]]
        for _ in range(2)
    )
    pixel = [(next(left), next(left)) for _ in case.pixel]
    return function(
        x, weights, biases, [w for w, _ in pixel], [b for _, b in pixel], next(left), next(left),
        beside=next(left, None), activation=stack.activation, negative_slope=SLOPE,
    )  # fmt: skip


def textbook(
    x, weights, biases, pixel_weights, pixel_biases, readout_weight, readout_bias, *,
    beside, activation, negative_slope,
):  # fmt: skip
    """The network layer by layer, as it is defined."""
    for layer in zip(weights, biases, strict=True):
        x = reference.multiscale_conv(
            x, *layer, activation=activation, negative_slope=negative_slope
        )
    y = x if beside is None else torch.cat([x, beside], dim=1)
    for weight, bias in zip(pixel_weights, pixel_biases, strict=True):
        y = torch.einsum("oc,nchw->nohw", weight, y) + bias[:, None, None]
        y = F.leaky_relu(y, negative_slope)
    return torch.einsum("noc,nchw->nohw", readout_weight, y) + readout_bias[:, :, None, None]


def value_and_gradients(
    function: Callable[..., Tensor], case: Case, flat: list[Tensor]
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in flat]
    out = call(function, case, leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights_of(out))]


def check(case: Case, dtype: torch.dtype) -> None:
    flat = tensors(case, dtype)
    expected = value_and_gradients(textbook, case, [x.double() for x in flat])
    magnitudes = value_and_gradients(textbook, case, [x.double().abs() for x in flat])
    found = value_and_gradients(ops.image_network, case, flat)
    computed = torch.promote_types(dtype, torch.float32)
    widths = max(*case.stack.channels, *case.pixel, case.stack.channels[-1] + case.beside)
    num_terms = widths * case.stack.kernel**2 + case.stack.n * math.prod(case.stack.size)
    num_layers = len(case.stack.channels) * case.stack.num_scales + len(case.pixel) + 1
    tolerance = rounding(computed, num_terms, 16 * num_layers)
    for result, wanted, magnitude, x in zip(
        found, expected, magnitudes, [found[0], *flat], strict=True
    ):
        assert result.dtype == x.dtype
        assert result.shape == wanted.shape
        error = (result.double() - wanted).abs()
        allowed = tolerance * magnitude.max() + torch.finfo(x.dtype).eps * wanted.abs()
        if dtype == torch.float16:
            allowed = allowed + torch.finfo(dtype).smallest_normal * 2**-10  # subnormal steps
        assert bool((error <= allowed).all()), (error / allowed).max()


@each_case
@each_cpu_backend
def test_value_and_gradients(backend, case) -> None:
    with backend.use():
        check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3], CASES[6]], ids=str)
@each_cpu_backend
def test_storage_types(backend, case, dtype) -> None:
    with backend.use():
        check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
def test_in_torch(case, dtype) -> None:
    with dpm_fast.use_backend("reference"):
        check(case, dtype)


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(
    case=st.builds(
        Case,
        stack=st.builds(
            Stack,
            channels=st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple),
            num_scales=st.integers(1, 2),
            kernel=st.sampled_from([1, 3, 5]),
            per_location=st.booleans(),
            size=st.tuples(st.integers(1, 5), st.integers(1, 7)).map(
                lambda s: (2 * s[0], 2 * s[1])
            ),
            n=st.integers(1, 35),
            activation=st.sampled_from(["per_scale", "after_sum"]),
        ),
        beside=st.integers(0, 7),
        pixel=st.lists(st.integers(1, 24), max_size=3).map(tuple),
        outputs=st.integers(1, 7),
    )
)
def test_any_sizes(case) -> None:
    with CPU_BACKENDS[0].use():
        check(case, torch.float32)


@needs_kernels
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads() -> None:
    case = Case(Stack((1, 20, 5), 2, size=(8, 28), n=70), beside=2)
    x, *parameters = tensors(case)
    weight, bias, beside = parameters[-3:]
    threads = torch.get_num_threads()
    with CPU_BACKENDS[0].use():
        whole = value_and_gradients(ops.image_network, case, [x, *parameters])
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                again = value_and_gradients(ops.image_network, case, [x, *parameters])
                assert all(map(torch.equal, whole, again))
        finally:
            torch.set_num_threads(threads)
        pieces = []
        for part in (slice(0, 1), slice(1, 40), slice(40, 70)):
            some = [x[part], *parameters[:-3], weight[part], bias[part], beside[part]]
            found = value_and_gradients_of_ones(case, some)
            pieces.append([found[0], found[1], *found[-3:]])
        expected = value_and_gradients_of_ones(case, [x, *parameters])
        expected = [expected[0], expected[1], *expected[-3:]]
        for joined, wanted in zip(zip(*pieces, strict=True), expected, strict=True):
            if wanted is expected[0] or wanted is expected[1] or wanted is expected[4]:
                assert torch.equal(torch.cat(joined), wanted)
            else:  # sums over pixels, whose order depends on how images fill the lanes
                torch.testing.assert_close(torch.cat(joined), wanted, rtol=1e-4, atol=1e-4)


def value_and_gradients_of_ones(case: Case, flat: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in flat]
    out = call(ops.image_network, case, leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@needs_kernels
@each_case
def test_the_value_is_that_without_gradients(case) -> None:
    flat = tensors(case)
    with CPU_BACKENDS[0].use():
        expected = call(ops.image_network, case, flat)
        assert torch.equal(value_and_gradients(ops.image_network, case, flat)[0], expected)
    assert expected.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("wanted", range(10))
def test_gradients_wanted_alone(wanted) -> None:
    case = Case(Stack((2, 6, 3)), beside=2, pixel=(5,))
    flat = tensors(case)
    with CPU_BACKENDS[0].use():
        every = value_and_gradients(ops.image_network, case, flat)
        flat[wanted].requires_grad_()
        out = call(ops.image_network, case, flat)
        (alone,) = torch.autograd.grad(out, flat[wanted], weights_of(out))
    assert torch.equal(alone, every[1 + wanted])


@needs_kernels
def test_gradcheck() -> None:
    case = Case(Stack((1, 3), size=(4, 3), n=2, activation="after_sum"), beside=1, pixel=(3, 2))
    flat = [x.requires_grad_() for x in tensors(case, torch.float64)]

    def function(*flat: Tensor) -> Tensor:
        return call(ops.image_network, case, list(flat))

    with CPU_BACKENDS[0].use():
        assert torch.autograd.gradcheck(function, flat, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, flat, fast_mode=True)


@needs_kernels
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_opcheck(case) -> None:
    flat = tensors(case)
    length = 2 + 2 * len(case.pixel) + bool(case.beside)
    middle = (1 + len(flat) - length) // 2
    # The tail of the schema begins with the linear layer.
    layers, readout = flat[-length:], 2 * len(case.pixel)
    tail = [*layers[readout : readout + 2], *layers[:readout:2], *layers[1:readout:2]]
    tail += layers[readout + 2 :]
    parts = flat[0], flat[1:middle], flat[middle : len(flat) - length], tail
    form = case.stack.num_scales, case.stack.activation == "after_sum", SLOPE, 1
    with CPU_BACKENDS[0].use():
        for requires_grad in (False, True):
            leaves = [
                p.detach().requires_grad_(requires_grad)
                if isinstance(p, Tensor)
                else [q.detach().requires_grad_(requires_grad) for q in p]
                for p in parts
            ]
            torch.library.opcheck(torch.ops.dpm_fast.multiscale_conv, (*leaves, *form))
        keeping = torch.ops.dpm_fast._multiscale_conv_keeping
        torch.library.opcheck(keeping, (*parts, *form))
        out, outs, signs = keeping(*parts, *form)
        wanted = [i % 3 > 0 for i in range(len(flat))]
        torch.library.opcheck(
            torch.ops.dpm_fast._multiscale_conv_gradient,
            (out, *parts, outs, signs, *form, wanted),
        )


@pytest.mark.parametrize("name", ["reference", "native", "auto"])
def test_compiles_whole(name) -> None:
    if name == "native" and not CPU_BACKENDS:
        pytest.skip("needs the native extension")
    torch.compiler.reset()
    case = Case(Stack((1, 4), 2, n=5), beside=2)

    def function(*flat: Tensor) -> Tensor:
        return call(ops.image_network, case, list(flat))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    flat = [x.requires_grad_() for x in tensors(case)]
    with dpm_fast.use_backend(name):
        expected, found = (
            [f(*flat), *torch.autograd.grad(f(*flat).sum(), flat)] for f in (function, compiled)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_more_pixel_layers_than_kernels_take() -> None:
    case = Case(Stack((2, 3)), pixel=(4,) * 9)
    check(case, torch.float32)


@pytest.mark.parametrize("case", [Case(Stack(n=0), beside=2), Case(Stack(n=0), pixel=())])
def test_without_examples(case) -> None:
    found = value_and_gradients(ops.image_network, case, tensors(case))
    assert found[0].shape == (0, case.outputs, *case.stack.size)
    assert not any(bool(gradient.any()) for gradient in found[1:])


def wrong(**changes: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """A call one of whose arguments is changed."""

    def function(x, weights, biases, pixel_weights, pixel_biases, weight, bias, **options):
        given = {
            "pixel_weights": pixel_weights,
            "pixel_biases": pixel_biases,
            "readout_weight": weight,
            "readout_bias": bias,
            **options,
        }
        given |= {name: change(given[name]) for name, change in changes.items()}
        return ops.image_network(x, weights, biases, **given)

    case = Case(Stack((2, 3), size=(4, 6), n=3), beside=2, pixel=(5,))
    return lambda: call(function, case, tensors(case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            wrong(beside=lambda x: x[:, :, :2]),
            ValueError,
            r"beside must have shape \(3, 2, 4, 6\), got \(3, 2, 2, 6\)",
        ),
        (
            wrong(beside=lambda x: x.double()),
            TypeError,
            "beside must have dtype torch.float32 like x, got torch.float64",
        ),
        (
            wrong(beside=lambda x: None),
            ValueError,
            r"pixel_weights\[0\] must have shape \(5, 3\), got \(5, 5\)",
        ),
        (
            wrong(pixel_weights=lambda w: [w[0][:0]], pixel_biases=lambda b: [b[0][:0]]),
            ValueError,
            r"pixel_weights\[0\] must have shape \(1, 5\), got \(0, 5\)",
        ),
        (
            wrong(pixel_biases=lambda b: []),
            ValueError,
            "pixel_weights and pixel_biases must name as many layers, got 1 and 0",
        ),
        (
            wrong(pixel_biases=lambda b: [b[0][:2]]),
            ValueError,
            r"pixel_biases\[0\] must have shape \(5,\), got \(2,\)",
        ),
        (
            wrong(readout_weight=lambda w: w[:, :, 1:]),
            ValueError,
            r"readout_weight must have shape \(3, 2, 5\), got \(3, 2, 4\)",
        ),
        (
            wrong(readout_weight=lambda w: w[:1]),
            ValueError,
            r"readout_weight must have shape \(3, 2, 5\), got \(1, 2, 5\)",
        ),
        (
            wrong(readout_bias=lambda b: b.bfloat16()),
            TypeError,
            "readout_bias must have dtype torch.float32, got torch.bfloat16",
        ),
        (
            wrong(negative_slope=lambda s: -0.1),
            ValueError,
            "negative_slope must not be negative, got -0.1",
        ),
    ],
)
def test_errors(change, error, message) -> None:
    with pytest.raises(error, match=message):
        change()


@needs_kernels
@pytest.mark.parametrize("dense_layers", [0, 3])
@pytest.mark.parametrize("pixel_layers", [1, 2])
@pytest.mark.parametrize("readout", ["bumps", "per_timestep"])
def test_networks_take_the_kernels(dense_layers, pixel_layers, readout, monkeypatch) -> None:
    torch.manual_seed(0)
    network = ConvDenseNetwork(
        (2, 8, 6), 9, conv_channels=4, num_scales=2, dense_layers=dense_layers, dense_width=7,
        pixel_layers=pixel_layers, pixel_width=5, readout=readout,
    )  # fmt: skip
    torch.nn.init.normal_(network.readout.weight)
    x = normal(1, (20, 2, 8, 6), torch.float32)
    t = torch.arange(20) % 9 + 1
    launched = []
    launch = op._launch
    monkeypatch.setattr(op, "_launch", lambda *args: (launched.append(1), launch(*args))[1])

    def run(name: str, t: Tensor) -> list[Tensor]:
        with dpm_fast.use_backend(name):
            z = network(x, t)
            return [z, *torch.autograd.grad(z.square().sum(), list(network.parameters()))]

    for times in (t, t[3:4]):
        torch.testing.assert_close(
            run("native", times), run("reference", times), rtol=2e-4, atol=2e-4
        )
    assert len(launched) == 4  # forward and backward of both
    assert dispatch.backend("multiscale_conv", x) == "native"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reference", "native", "auto"])
def test_narrow_networks_on_every_route(name, dtype) -> None:
    if name == "native" and not CPU_BACKENDS:
        pytest.skip("needs the native extension")
    flat = [x.requires_grad_() for x in tensors(CASES[1], dtype)]
    expected = call(textbook, CASES[1], [x.detach().double() for x in flat])
    with dpm_fast.use_backend(name):
        out = call(ops.image_network, CASES[1], flat)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0.1, atol=0.1)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), flat[:1], create_graph=True)
        gradient.float().square().sum().backward()
    assert bool(flat[1].grad.isfinite().all())


@pytest.mark.parametrize("name", ["reference", "native", "auto"])
def test_without_outputs(name) -> None:
    if name == "native" and not CPU_BACKENDS:
        pytest.skip("needs the native extension")
    case = Case(Stack((2, 3), n=16), outputs=0)
    with dpm_fast.use_backend(name):
        found = value_and_gradients(ops.image_network, case, tensors(case))
    assert found[0].shape == (16, 0, *case.stack.size)
    assert not any(bool(gradient.any()) for gradient in found[1:])


@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_checkpoint_gives_the_same_gradients(name) -> None:
    if name == "native" and not CPU_BACKENDS:
        pytest.skip("needs the native extension")
    flat = [x.requires_grad_() for x in tensors(CASES[0])]

    def function(*flat: Tensor) -> Tensor:
        return call(ops.image_network, CASES[0], list(flat))

    with dpm_fast.use_backend(name):
        expected = torch.autograd.grad(function(*flat).sum(), flat)
        again = checkpoint(function, *flat, use_reentrant=False)
        found = torch.autograd.grad(again.sum(), flat)
    torch.testing.assert_close(found, expected)


@needs_kernels
def test_many_gradients_at_once() -> None:
    case = Case(Stack((1, 2), size=(2, 2), n=1, activation="after_sum"), pixel=())
    flat = tensors(case, torch.float64)

    def function(x: Tensor) -> Tensor:
        return call(ops.image_network, case, [x, *flat[1:]])

    with CPU_BACKENDS[0].use():
        one_by_one, at_once = (
            torch.autograd.functional.jacobian(function, flat[0], vectorize=vectorize)
            for vectorize in (False, True)
        )
    torch.testing.assert_close(one_by_one, at_once)


@needs_kernels
@pytest.mark.parametrize(
    ("place", "tensor"),
    [
        (1, torch.zeros(3, 3, 3, 3)),  # weights of more channels than x has
        (2, torch.zeros(3, 2, 1, 1)),  # of the second scale
        (2, torch.zeros(3, 2, 3, 3).transpose(2, 3).transpose(0, 1).reshape(2, 3, 3, 3)),
        (3, torch.zeros(1)),  # a bias
        (4, torch.zeros(3, dtype=torch.float16)),
        (5, torch.zeros(5, 4)),  # of a pixel
        (6, torch.zeros(4)),
        (7, torch.zeros(1, 2, 5)),  # the linear layers
        (8, torch.zeros(3, 3)),
    ],
)
def test_what_would_be_read_beyond_its_end_is_refused(place, tensor) -> None:
    case = Case(Stack((2, 3), 2, n=3))
    flat = tensors(case)
    flat[place] = tensor
    x, tail = flat[0], [flat[7], flat[8], flat[5], flat[6]]
    with CPU_BACKENDS[0].use(), pytest.raises(ValueError):
        torch.ops.dpm_fast.multiscale_conv(x, flat[1:3], flat[3:5], tail, 2, False, SLOPE, 1)
